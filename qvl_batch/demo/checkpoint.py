"""The checkpoint shipped with the package, and the recipe it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_CHECKPOINTS = Path(__file__).parent / "checkpoint"

# Keys of `recipe` that differ from the defaults. The checkpoint was trained on pictures of
# 64 x 64 px and on eight frames of that size: every square picture, page and frame is brought
# there, and a clip of eight frames at 2 frames a second keeps all of them.
DEMO_RECIPE: dict[str, Any] = {
    "dim": 128,
    "encodings": ["binary", "int8"],
    "max_tokens": 4096,
    "image": {"min_px": 4096, "max_px": 4096},
    "video": {"fps": 2.0, "min_px": 4096, "max_px": 4096},
    "document": {"min_px": 4096, "max_px": 4096},
}


def embedding_dir() -> Path:
    """Return the folder of the shipped embedding checkpoint."""
    return _CHECKPOINTS / "embedding"


def reranker_dir() -> Path:
    """Return the folder of the shipped reranker checkpoint."""
    return _CHECKPOINTS / "reranker"
