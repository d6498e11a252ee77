"""Candidates of many tables made one list a query: pure functions on arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.tables.nearest import Near


@dataclass(frozen=True)
class Pairs:
    """Candidates of one table with their scores and row_ids."""

    near: Near
    score: npt.NDArray[np.float32]
    row_id: pa.StringArray


@dataclass(frozen=True)
class Hits:
    """What is found: arrays sorted by query and rank; ``table`` is a position among the tables."""

    query: npt.NDArray[np.int32]
    rank: npt.NDArray[np.int32]
    score: npt.NDArray[np.float32]
    table: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]


def limited(near: Sequence[Near], num_queries: int, k: int) -> list[Near]:
    """Return of each table the candidates among the k nearest of all tables, ties of the k-th too.

    Args:
        near: One entry a table; their keys must be comparable.
    """
    if len(near) < 2:
        return list(near)
    query = np.concatenate([one.query for one in near])
    # Exact: distances are below 2^24.
    key = np.concatenate([one.key.astype(np.float32) for one in near])
    if not len(query):
        return list(near)
    order = np.lexsort((key, query))
    starts = np.searchsorted(query[order], np.arange(num_queries + 1))
    last = np.minimum(starts[:-1] + k, starts[1:]) - 1
    # A query without candidates has no last one; nothing is compared with its limit.
    limit = key[order][np.maximum(last, 0)]
    kept = []
    for one in near:
        inside = one.key.astype(np.float32) <= limit[one.query]
        kept.append(Near(one.query[inside], one.key[inside], one.offset[inside]))
    return kept


def merged_hits(
    pairs: Sequence[Pairs], in_shortlist: Sequence[bool], *, shortlist: int, top_k: int
) -> Hits:
    """Return the ``top_k`` of each query by falling score, then table, then row_id.

    Args:
        pairs: One entry a table, in the order in which tables break ties.
        in_shortlist: Of which tables the candidates must first be among the ``shortlist`` nearest
            by key, then row_id, then table, of all such tables.
    """
    query = np.concatenate([one.near.query for one in pairs])
    sizes = [len(one.score) for one in pairs]
    table = np.repeat(np.arange(len(pairs), dtype=np.int32), sizes)
    offset = np.concatenate([one.near.offset for one in pairs])
    score = np.concatenate([one.score for one in pairs])
    row_id = _ranks([one.row_id for one in pairs])
    listed = np.flatnonzero(np.repeat(in_shortlist, sizes))
    kept = np.arange(len(query))
    if len(listed):
        chosen = zip(pairs, in_shortlist, strict=True)
        distance = np.concatenate([one.near.key for one, is_listed in chosen if is_listed])
        order = np.lexsort((table[listed], row_id[listed], distance, query[listed]))
        inside = listed[order][_positions(query[listed][order]) < shortlist]
        others = np.flatnonzero(~np.repeat(in_shortlist, sizes))
        kept = np.concatenate([inside, others])
    order = kept[np.lexsort((row_id[kept], table[kept], -score[kept], query[kept]))]
    position = _positions(query[order])
    top = order[position < top_k]
    rank = (position[position < top_k] + 1).astype(np.int32)
    return Hits(query[top], rank, score[top], table[top], offset[top])


def _ranks(row_ids: Sequence[pa.StringArray]) -> npt.NDArray[np.int64]:
    """Return integers that compare as the row_ids do."""
    joined = pa.chunked_array(row_ids).combine_chunks()
    return pc.rank(joined, sort_keys="ascending", tiebreaker="min").to_numpy().astype(np.int64)


def _positions(query: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Return each entry's position within its run of equal queries."""
    starts = np.flatnonzero(np.r_[len(query) > 0, query[1:] != query[:-1]])
    runs = np.diff(np.r_[starts, len(query)])
    return np.arange(len(query)) - np.repeat(starts, runs)
