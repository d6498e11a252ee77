"""The tables of a rerank job: which pairs there are, which are scored, which ranks they get.

A scores collection is a pair of tables a partition: ``NAME.candidates`` holds what the first stage
found, ``NAME`` what the reranker says of it. Failures of queries and of pairs lie in the failures
table under the collection's name, with the query_id or the pair_id as unit_id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.tables.commit import Commit, commit_once, commit_transaction
from qvl_batch.tables.store import TableStore

SCORES_KIND, CANDIDATES_KIND = "scores", "candidates"

# What `ranks_to_set` needs of a scores table.
RANKED = ["pair_id", "query_id", "rerank_score", "rank_before", "rank_after"]

_BATCH_ROWS = 65_536


def candidates_collection(collection: str) -> str:
    """Return the collection of the candidates tables that belong to a scores collection."""
    return f"{collection}.candidates"


def scores_collection(candidates: str) -> str:
    """Return the scores collection that a collection of candidates belongs to."""
    return candidates.removesuffix(".candidates")


def read_where_in(
    ds: lance.LanceDataset | None, column: str, values: pa.Array, columns: Sequence[str]
) -> pa.Table | None:
    """Return the rows whose ``column`` is one of ``values``; None if there is no table.

    The table is read in batches and filtered here: the values, a user's ids of any length, never
    become a part of an expression.
    """
    if ds is None:
        return None
    read = list(dict.fromkeys([column, *columns]))
    found = [
        rows
        for batch in ds.to_batches(columns=read, batch_size=_BATCH_ROWS)
        if (rows := batch.filter(pc.is_in(batch[column], value_set=values))).num_rows
    ]
    schema = pa.schema([ds.schema.field(name) for name in read])
    return pa.Table.from_batches(found, found[0].schema if found else schema).select(list(columns))


def column_values(ds: lance.LanceDataset | None, column: str) -> pa.Array:
    """Return the distinct values of a string column; none if there is no table."""
    if ds is None:
        return pa.array([], pa.string())
    seen = [
        pc.unique(batch.column(0))
        for batch in ds.to_batches(columns=[column], batch_size=_BATCH_ROWS)
        if batch.num_rows
    ]
    return pc.unique(pa.concat_arrays(seen)) if seen else pa.array([], pa.string())


def ranks_to_set(scores: pa.Table, incomplete: pa.Array) -> pa.Table:
    """Return the ranks that a scores table should have and has not.

    Args:
        scores: ``pair_id, query_id, rerank_score, rank_before, rank_after``.
        incomplete: query_ids that have candidates with neither score nor failure.

    Returns:
        ``pair_id``, ``rank_after`` int32: from 1 within a query, by falling score, then by the rank
        before. Only rows whose rank is another now.
    """
    waiting = pc.is_in(scores["query_id"], value_set=incomplete)
    rows = scores.filter(pc.invert(waiting)).combine_chunks()
    keys = [
        ("query_id", "ascending"),
        ("rerank_score", "descending"),
        ("rank_before", "ascending"),
    ]
    rows = rows.take(pc.sort_indices(rows, sort_keys=keys))
    if not rows.num_rows:
        return pa.table({"pair_id": pa.array([], pa.string()), "rank_after": _int32([])})
    ids = rows["query_id"].combine_chunks()
    begins = np.flatnonzero(np.r_[True, pc.not_equal(ids[1:], ids[:-1]).to_numpy(False)])
    sizes = np.diff(np.r_[begins, len(ids)])
    ranks = _int32(np.arange(len(ids)) - np.repeat(begins, sizes) + 1)
    changed = pc.fill_null(pc.not_equal(rows["rank_after"], ranks), True)
    return pa.table({"pair_id": rows["pair_id"], "rank_after": ranks}).filter(changed)


def incomplete_queries(candidates: pa.Table, scored: pa.Array, failed: pa.Array) -> pa.Array:
    """Return the query_ids that have a candidate with neither score nor failure.

    Args:
        candidates: ``query_id, pair_id``.
        scored, failed: pair_ids.
    """
    ended = pc.or_(
        pc.is_in(candidates["pair_id"], value_set=scored),
        pc.is_in(candidates["pair_id"], value_set=failed),
    )
    return pc.unique(candidates.filter(pc.invert(ended))["query_id"])


def set_ranks(
    store: TableStore,
    table: str,
    planned: Callable[[lance.LanceDataset], pa.Table],
    *,
    marker: str,
    run_id: str,
    planned_version: int,
    commit: Commit = commit_transaction,
) -> int:
    """Bring a scores table's ranks up to date in one commit: readers see all of them or none.

    Args:
        planned: Returns `ranks_to_set` for an open version of the table.
        marker: As `commit.append` has it, like all that follow.

    Returns:
        How many rows got another rank.

    Raises:
        LeaseHeldError, StorageError, RunFailedError: As `commit.append`. If another run wrote rows
            meanwhile, that run sets the ranks.
    """
    changed = 0

    def build(latest: lance.LanceDataset) -> lance.LanceOperation.BaseOperation | None:
        nonlocal changed
        ranks = planned(latest)
        changed = ranks.num_rows
        if not changed:
            return None
        # All rows of a fragment change as a rule: the one column is written anew, no row moves.
        merge = latest.merge_insert("pair_id").when_matched_update_all()
        transaction, _ = merge.write_mode("rewrite_columns").execute_uncommitted(ranks)
        return transaction.operation

    commit_once(
        store,
        table,
        build,
        marker=marker,
        run_id=run_id,
        since=planned_version,
        exclusive=True,
        commit=commit,
    )
    return changed


def _int32(values: object) -> pa.Array:
    return pa.array(values, pa.int32())
