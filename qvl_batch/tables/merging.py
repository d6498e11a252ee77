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
    """Candidates of one table with their scores."""

    near: Near
    score: npt.NDArray[np.float32]


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


def tied(
    pairs: Sequence[Pairs], in_shortlist: Sequence[bool], shortlist: int
) -> list[npt.NDArray[np.bool_]]:
    """Return for each table which candidates `merged_hits` needs the row_ids of.

    Those that tie with the last of the shortlist, if not all of them are in it, and those of equal
    scores: a few of hundreds. Row_ids of the others are never looked at.
    """
    every = _Joined.of(pairs, in_shortlist)
    marked = np.zeros(len(every.query), bool)
    listed = every.listed
    order = listed[np.lexsort((every.key[listed], every.query[listed]))]
    query, key = every.query[order], every.key[order]
    last = np.flatnonzero(_positions(query) == shortlist - 1)
    following = last[last + 1 < len(order)] + 1
    cut = following[
        (query[following] == query[following - 1]) & (key[following] == key[following - 1])
    ]
    limit = np.full(every.query.max(initial=-1) + 1, -1, np.float32)
    limit[query[cut]] = key[cut]
    marked[listed] = every.key[listed] == limit[every.query[listed]]
    order = np.lexsort((every.score, every.query))
    query, score = every.query[order], every.score[order]
    same = (query[1:] == query[:-1]) & (score[1:] == score[:-1])
    marked[order[1:][same]] = True
    marked[order[:-1][same]] = True
    return np.split(marked, np.cumsum([len(one.score) for one in pairs])[:-1])


def merged_hits(
    pairs: Sequence[Pairs],
    in_shortlist: Sequence[bool],
    row_ids: Sequence[pa.StringArray],
    needed: Sequence[npt.NDArray[np.bool_]],
    *,
    shortlist: int,
    top_k: int,
) -> Hits:
    """Return the ``top_k`` of each query by falling score, then table, then row_id.

    Args:
        pairs: One entry a table, in the order in which tables break ties.
        in_shortlist: Of which tables the candidates must first be among the ``shortlist`` nearest
            by key, then row_id, then table, of all such tables.
        row_ids: Of the candidates that `tied` names, which is ``needed``.
    """
    every = _Joined.of(pairs, in_shortlist)
    row_id = np.zeros(len(every.query), np.int64)
    row_id[np.concatenate(needed)] = _ranks(row_ids)
    listed = every.listed
    order = listed[
        np.lexsort((every.table[listed], row_id[listed], every.key[listed], every.query[listed]))
    ]
    kept = np.ones(len(every.query), bool)
    kept[order[_positions(every.query[order]) >= shortlist]] = False
    rows = np.flatnonzero(kept)
    keys = (row_id[rows], every.table[rows], -every.score[rows], every.query[rows])
    order = rows[np.lexsort(keys)]
    position = _positions(every.query[order])
    top = order[position < top_k]
    rank = (position[position < top_k] + 1).astype(np.int32)
    return Hits(every.query[top], rank, every.score[top], every.table[top], every.offset[top])


@dataclass(frozen=True)
class _Joined:
    """The candidates of all tables in one; ``listed`` are those that compete for the shortlist."""

    query: npt.NDArray[np.int32]
    key: npt.NDArray[np.float32]
    score: npt.NDArray[np.float32]
    table: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    listed: npt.NDArray[np.intp]

    @classmethod
    def of(cls, pairs: Sequence[Pairs], in_shortlist: Sequence[bool]) -> _Joined:
        sizes = [len(one.score) for one in pairs]
        return cls(
            np.concatenate([one.near.query for one in pairs]),
            np.concatenate([one.near.key.astype(np.float32) for one in pairs]),
            np.concatenate([one.score for one in pairs]),
            np.repeat(np.arange(len(pairs), dtype=np.int32), sizes),
            np.concatenate([one.near.offset for one in pairs]),
            np.flatnonzero(np.repeat(in_shortlist, sizes)),
        )


def _ranks(row_ids: Sequence[pa.StringArray]) -> npt.NDArray[np.int64]:
    """Return integers that compare as the row_ids do."""
    joined = pa.chunked_array(row_ids, pa.string()).combine_chunks()
    return pc.rank(joined, sort_keys="ascending", tiebreaker="min").to_numpy().astype(np.int64)


def _positions(query: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Return each entry's position within its run of equal queries."""
    starts = np.flatnonzero(np.r_[len(query) > 0, query[1:] != query[:-1]])
    runs = np.diff(np.r_[starts, len(query)])
    return np.arange(len(query)) - np.repeat(starts, runs)
