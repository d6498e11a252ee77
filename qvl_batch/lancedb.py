"""Import this to let plain LanceDB embed text queries and rerank with Qwen3-VL.

    import lancedb
    import qvl_batch.lancedb

    table = lancedb.connect("vectors").open_table("media__dt-2026-01-01")
    table.search("a red circle").limit(10).to_pandas()

Tables of the embed job name their embedding function, ``qwen3-vl``. LanceDB knows it only after
this import: without it a text query ends with ``KeyError: 'qwen3-vl'``; searches by a vector, and
everything else, work all the same. ``import qvl_batch`` alone does not register it, since it loads
neither LanceDB nor anything else that is heavy.
"""

from __future__ import annotations

from qvl_batch.api.lancedb_plugins import (
    Int8Rescorer,
    QwenEmbedding,
    QwenReranker,
    use_model,
)

__all__ = ["Int8Rescorer", "QwenEmbedding", "QwenReranker", "use_model"]
