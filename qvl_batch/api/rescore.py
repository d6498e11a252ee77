"""Hits of a search in the order of a reranker that looks at the media themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.api.inputs import Item
from qvl_batch.api.query import row_item
from qvl_batch.recipe import Recipe

if TYPE_CHECKING:
    from qvl_batch.api.reranker import Reranker

# Number of hits that could not be rescored, in the metadata of the result's schema.
RERANK_ERRORS = b"qvl.num_rerank_errors"


def rescore(hits: pa.Table, query: Item, reranker: Reranker, recipe: Recipe, top: int) -> pa.Table:
    """Return the hits with the first ``top`` of them scored by the reranker and sorted by that.

    Each medium is read again where it was when it was embedded; one that is gone, or is another
    by now, is not scored. Behind the scored hits stand those that could not be, then those beyond
    ``top``, both in the order they had.

    Args:
        hits: Of one query, best first: ``rank``, ``score`` and `query.MEDIUM_COLUMNS`.
        query: What was asked for.
        reranker: Not used by anybody else meanwhile.
        recipe: Of the collection that the hits are from.
        top: How many hits to score.

    Returns:
        ``rank`` anew, ``score`` (of the search), ``rerank_score`` float32, ``rank_before`` int32
        and ``rerank_error`` string, then the other columns of the hits. The number of errors is in
        the schema's metadata under `RERANK_ERRORS`.

    Raises:
        UnitError: If the query's own medium can not be used.
    """
    chosen = hits.slice(0, top).to_pylist()
    items = [row_item(row, recipe) for row in chosen]
    scores, failures = reranker.score(query, items, errors="return")
    left_over = [None] * (hits.num_rows - len(chosen))
    found = [None if i in failures else float(scores[i]) for i in range(len(chosen))]
    reasons = [
        f"{type(failures[i]).__name__}: {failures[i].reason}" if i in failures else None
        for i in range(len(chosen))
    ]
    rescored = (
        hits.rename_columns(["rank_before" if n == "rank" else n for n in hits.column_names])
        .append_column("rerank_score", pa.array([*found, *left_over], pa.float32()))
        .append_column("rerank_error", pa.array([*reasons, *left_over], pa.string()))
    )
    keys = [("rerank_score", "descending"), ("rank_before", "ascending")]
    # Those without a score stand last.
    rescored = rescored.take(pc.sort_indices(rescored, sort_keys=keys))
    rank = pa.array(range(1, hits.num_rows + 1), pa.int32())
    first = ["rank", "score", "rerank_score", "rank_before", "rerank_error"]
    rescored = rescored.append_column("rank", rank)
    rescored = rescored.select([*first, *(n for n in rescored.column_names if n not in first)])
    return rescored.replace_schema_metadata({RERANK_ERRORS: str(len(failures)).encode()})
