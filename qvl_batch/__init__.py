"""Turn a bucket of media into searchable, quantised Qwen3-VL vectors, on a Ray cluster.

Importing this package loads neither torch, ray, lance nor a decoder: `Embedder`, `Reranker` and
`connect` are imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl_batch.api.connect import connect
    from qvl_batch.api.embedder import Embedder
    from qvl_batch.api.reranker import Reranker

__version__ = "0.1.0"

__all__ = ["Embedder", "Reranker", "__version__", "connect"]


def __getattr__(name: str) -> Any:
    if name == "Embedder":
        from qvl_batch.api.embedder import Embedder

        return Embedder
    if name == "Reranker":
        from qvl_batch.api.reranker import Reranker

        return Reranker
    if name == "connect":
        from qvl_batch.api.connect import connect

        return connect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
