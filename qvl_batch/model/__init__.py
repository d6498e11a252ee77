"""Frames and text to vectors, pairs to scores, vectors to encodings."""
