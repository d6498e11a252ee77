"""The demo: a small trained checkpoint, a corpus that it understands, and questions to it."""
