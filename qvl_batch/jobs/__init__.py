"""The Ray jobs: embed, rerank, index; and what proves and keeps their tables."""
