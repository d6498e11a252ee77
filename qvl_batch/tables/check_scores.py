"""Proof of a partition of scores: every candidate once, scored or failed, and ranked rightly."""

from __future__ import annotations

from collections.abc import Iterator

import lance
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.tables.check import DOUBLED, LOST, Problem, whole_fragments
from qvl_batch.tables.scores import incomplete_queries, ranks_to_set
from qvl_batch.tables.store import name_of, storage_error
from qvl_batch.units import pair_id

WRONG_PAIR_ID = "wrong pair_id"
UNKNOWN_PAIR = "unknown pair"
WRONG_RANK = "wrong rank"

_CANDIDATE = ["pair_id", "query_id", "row_id", "rank_before"]
_SCORED = [*_CANDIDATE, "rerank_score", "rank_after"]


def check_scores(
    candidates: lance.LanceDataset, scores: lance.LanceDataset | None, failed: pa.Array
) -> list[Problem]:
    """Return everything that is wrong with a partition; nothing if all invariants hold.

    Files first, as in `check.check_table`. Then pairs that stand twice, or whose id is not that of
    their query and row; candidates that share a first rank; scores without a candidate; candidates
    with neither score nor failure; and ranks that do not follow from the scores.

    Args:
        candidates: The table of what the first stage found.
        scores: The table of scores; None while there is none.
        failed: pair_ids of the failures that count.

    Raises:
        StorageError: If a table can not be read.
    """
    problems: list[Problem] = []
    pairs, table = _read(candidates, _CANDIDATE, problems), name_of(candidates)
    problems += _check_pairs(pairs, table)
    problems += _check_first_ranks(pairs, table)
    scored = pa.array([], pa.string())
    if scores is not None:
        rows, name = _read(scores, _SCORED, problems), name_of(scores)
        problems += _check_pairs(rows, name)
        scored = pc.unique(rows["pair_id"])
        known = pc.is_in(rows["pair_id"], value_set=pc.unique(pairs["pair_id"]))
        for pair in rows.filter(pc.invert(known))["pair_id"].to_pylist():
            problems.append(Problem(UNKNOWN_PAIR, name, pair, None, f"{table} has no such pair"))
        waiting = incomplete_queries(pairs.select(["query_id", "pair_id"]), scored, failed)
        for row in ranks_to_set(rows, waiting).to_pylist():
            detail = f"rank_after should be {row['rank_after']}: rerank again"
            problems.append(Problem(WRONG_RANK, name, row["pair_id"], None, detail))
    for pair in _lost(pairs, scored, failed):
        problems.append(Problem(LOST, table, pair, None, "neither scored nor failed"))
    return problems


def _read(dataset: lance.LanceDataset, columns: list[str], problems: list[Problem]) -> pa.Table:
    """Return the rows of the fragments that have all of their files; note those that have not."""
    try:
        found, whole = whole_fragments(dataset, name_of(dataset))
        problems += found
        schema = pa.schema([dataset.schema.field(name) for name in columns])
        if not whole:
            return schema.empty_table()
        return dataset.scanner(columns=columns, fragments=whole).to_table()
    except (ValueError, OSError, RuntimeError) as error:
        raise storage_error(dataset.uri, error) from error


def _check_pairs(pairs: pa.Table, table: str) -> Iterator[Problem]:
    counts = pairs.group_by("pair_id").aggregate([([], "count_all")])
    for row in counts.filter(pc.greater(counts["count_all"], 1)).to_pylist():
        yield Problem(DOUBLED, table, row["pair_id"], None, f"{row['count_all']} rows of one pair")
    for pair in pairs.select(["pair_id", "query_id", "row_id"]).to_pylist():
        if pair["pair_id"] != pair_id(pair["query_id"], pair["row_id"]):
            detail = f"not that of query {pair['query_id']!r:.80} and row {pair['row_id']}"
            yield Problem(WRONG_PAIR_ID, table, pair["pair_id"], None, detail)


def _check_first_ranks(pairs: pa.Table, table: str) -> Iterator[Problem]:
    counts = pairs.group_by(["query_id", "rank_before"]).aggregate([([], "count_all")])
    for row in counts.filter(pc.greater(counts["count_all"], 1)).to_pylist():
        detail = f"query {row['query_id']!r:.80} has two candidates of rank {row['rank_before']}"
        yield Problem(WRONG_RANK, table, None, None, detail)


def _lost(pairs: pa.Table, scored: pa.Array, failed: pa.Array) -> list[str]:
    ended = pc.or_(
        pc.is_in(pairs["pair_id"], value_set=scored), pc.is_in(pairs["pair_id"], value_set=failed)
    )
    return pc.unique(pairs.filter(pc.invert(ended))["pair_id"]).to_pylist()
