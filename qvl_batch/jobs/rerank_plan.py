"""What a rerank run has to do: queries without candidates, then pairs without a score.

Everything here runs on the driver. The tables are the ledger: what is planned is what they lack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch import schema
from qvl_batch.errors import ConfigError
from qvl_batch.jobs.plan import split_failed
from qvl_batch.jobs.rerank_blocks import group_by_medium
from qvl_batch.tables.layout import Partition, partition_json, table_name
from qvl_batch.tables.ledger import Failures
from qvl_batch.tables.scores import (
    candidates_collection,
    column_values,
    incomplete_queries,
    read_where_in,
)
from qvl_batch.tables.store import TableStore
from qvl_batch.units import pair_id, query_id


@dataclass(frozen=True, kw_only=True)
class Target:
    """The tables of a scores collection: `partitions` by the name of their scores table."""

    store: TableStore
    collection: str
    partitions: Mapping[str, Partition]

    def candidates(self, scores_table: str) -> str:
        return table_name(candidates_collection(self.collection), self.partitions[scores_table])

    def json(self, scores_table: str) -> str:
        return partition_json(self.partitions[scores_table])


@dataclass(frozen=True, kw_only=True)
class Retries:
    """Which failures are tried again."""

    retry_failed: bool
    max_attempts: int

    def split(self, failed: pa.Table) -> tuple[pa.Array, pa.Table]:
        return split_failed(failed, retry_failed=self.retry_failed, max_attempts=self.max_attempts)


@dataclass(frozen=True, kw_only=True)
class QueryPlan:
    """Queries to be given candidates, in order, and what is already known of the others.

    `todo` has `schema.QUERIES`, ``query_digest``, the partition columns, ``_table`` (of the
    candidates), ``_attempt``, ``_ordinal`` and, where candidates are given, ``_given``.
    """

    todo: pa.Table
    planned_versions: Mapping[str, int]
    num_queries: int
    num_found_before: int
    num_failed_before: int


@dataclass(frozen=True, kw_only=True)
class PairPlan:
    """Media to be scored with all their pairs, in block order.

    `media` has ``_ordinal``, uri, etag, byte range and kind, and ``_pairs``
    (a list of `schema.found_pair`).
    """

    media: pa.Table
    planned_versions: Mapping[str, int]
    num_pairs: int
    num_scored_before: int
    num_failed_before: int
    num_todo: int


def with_digests(queries: pa.Table, tables: pa.Array) -> pa.Table:
    """Add ``query_digest`` and ``_scores`` (the scores table) to queries."""
    asked = queries.select(["text", "image", "video", "instruction"]).to_pylist()
    digests = [query_id(*one.values()) for one in asked]
    return queries.append_column("query_digest", pa.array(digests, pa.string())).append_column(
        "_scores", tables
    )


def plan_queries(
    target: Target, queries: pa.Table, given: pa.Table | None, retries: Retries
) -> QueryPlan:
    """Subtract the queries that have candidates, or have failed for good.

    Raises:
        ConfigError: If a query's candidates are those of another text, image, video or
            instruction under the same id, or others than the given ones.
    """
    left, versions = [], {}
    num_found = num_failed = 0
    failures = Failures(target.store, target.collection)
    for scores_table in target.partitions:
        mine = queries.filter(pc.equal(queries["_scores"], scores_table))
        name = target.candidates(scores_table)
        dataset = target.store.open(name)
        ids = mine["query_id"].combine_chunks()
        found = read_where_in(dataset, "query_id", ids, ["query_id", "query_digest", "row_id"])
        failed = failures.of(target.json(scores_table), column_values(dataset, "query_id"))
        if dataset is not None and found is not None:
            versions[name] = dataset.version
            _refuse_changed(mine, found)
            if given is not None:
                _refuse_other_candidates(given, found, failed["unit_id"].combine_chunks())
            done = pc.is_in(mine["query_id"], value_set=found["query_id"].combine_chunks())
            num_found += pc.sum(done).as_py() or 0
            mine = mine.filter(pc.invert(done))
        skip, retry = retries.split(failed)
        skipped = pc.is_in(mine["query_id"], value_set=skip)
        num_failed += pc.sum(skipped).as_py() or 0
        mine = mine.filter(pc.invert(skipped))
        attempts = _attempts(mine["query_id"], retry)
        tables = pa.array([name] * mine.num_rows, pa.string())
        left.append(mine.append_column("_table", tables).append_column("_attempt", attempts))
    # Text queries first: their blocks are many and small.
    todo = _by_media(pa.concat_tables(left)) if left else queries
    todo = todo.append_column("_ordinal", pa.array(np.arange(todo.num_rows, dtype=np.int64)))
    if given is not None:
        todo = todo.append_column("_given", _given_lists(todo["query_id"], given))
    return QueryPlan(
        todo=todo.combine_chunks(),
        planned_versions=versions,
        num_queries=queries.num_rows,
        num_found_before=num_found,
        num_failed_before=num_failed,
    )


def _by_media(queries: pa.Table) -> pa.Table:
    media = pc.add(
        pc.is_valid(queries["image"]).cast(pa.int8()),
        pc.multiply(pc.is_valid(queries["video"]).cast(pa.int8()), pa.scalar(2, pa.int8())),
    )
    return queries.take(pc.sort_indices(pa.table({"media": media}), [("media", "ascending")]))


def _attempts(ids: pa.ChunkedArray, retry: pa.Table) -> pa.Array:
    place = pc.index_in(ids, value_set=retry["unit_id"].combine_chunks())
    return pc.fill_null(retry["attempt"].combine_chunks().take(place), 0).cast(pa.int32())


def _refuse_changed(queries: pa.Table, found: pa.Table) -> None:
    place = pc.index_in(found["query_id"], value_set=queries["query_id"].combine_chunks())
    asked = queries["query_digest"].take(place)
    changed = found.filter(pc.not_equal(asked, found["query_digest"]))
    if changed.num_rows:
        raise ConfigError(
            f"The query {_shown(changed['query_id'][0].as_py())} asks something else than when its "
            "candidates were found.",
            "Give it another query_id, or write to another output.collection.",
        )


def _refuse_other_candidates(given: pa.Table, found: pa.Table, failed: pa.Array) -> None:
    ours = given.filter(
        pc.is_in(given["query_id"], value_set=found["query_id"].combine_chunks())
    ).select(["query_id", "row_id"])
    failed_ids = set(failed.to_pylist())
    asked = {tuple(pair.values()) for pair in ours.to_pylist()}
    known = {tuple(pair.values()) for pair in found.select(["query_id", "row_id"]).to_pylist()}
    for query, row in sorted(asked ^ known):
        if (query, row) in asked and pair_id(query, row) in failed_ids:
            continue
        raise ConfigError(
            f"The query {_shown(query)} has other candidates than input.candidates lists "
            f"(the row {row}).",
            "Write to another output.collection.",
        )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}…")


def _given_lists(ids: pa.ChunkedArray, given: pa.Table) -> pa.Array:
    kind = pa.struct(
        [
            pa.field("row_id", pa.string()),
            pa.field("first_score", pa.float32()),
            pa.field("rank_before", pa.int32()),
        ]
    )
    by_query: dict[str, list[dict[str, object]]] = {}
    for row in given.select(["query_id", *(field.name for field in kind)]).to_pylist():
        by_query.setdefault(row.pop("query_id"), []).append(row)
    return pa.array([by_query.get(query, []) for query in ids.to_pylist()], pa.list_(kind))


def plan_pairs(
    target: Target, wave: pa.Table, query_columns: list[pa.Field], retries: Retries
) -> PairPlan:
    """Return the pairs of a wave's queries that have neither a score nor a final failure."""
    kind = schema.found_pair(query_columns)
    inside = {"_table", "_attempt"}
    columns = [field.name for field in kind if field.name not in inside]
    left, versions = [], {}
    num_pairs = num_scored = num_failed = 0
    failures = Failures(target.store, target.collection)
    for scores_table in pc.unique(wave["_scores"]).to_pylist():
        mine = wave.filter(pc.equal(wave["_scores"], scores_table))
        dataset = target.store.open(target.candidates(scores_table))
        ids = mine["query_id"].combine_chunks()
        pairs = read_where_in(dataset, "query_id", ids, columns)
        if pairs is None:
            continue
        num_pairs += pairs.num_rows
        scores = target.store.open(scores_table)
        if scores is not None:
            versions[scores_table] = scores.version
        scored = column_values(scores, "pair_id")
        done = pc.is_in(pairs["pair_id"], value_set=scored)
        num_scored += pc.sum(done).as_py() or 0
        pairs = pairs.filter(pc.invert(done))
        failed = failures.of(target.json(scores_table), scored)
        skip, retry = retries.split(failed)
        skipped = pc.is_in(pairs["pair_id"], value_set=skip)
        num_failed += pc.sum(skipped).as_py() or 0
        pairs = pairs.filter(pc.invert(skipped))
        tables = pa.array([scores_table] * pairs.num_rows, pa.string())
        attempts = _attempts(pairs["pair_id"], retry)
        left.append(pairs.append_column("_table", tables).append_column("_attempt", attempts))
    empty = pa.schema(list(kind)).empty_table()
    todo = pa.concat_tables([empty, *(part.cast(empty.schema) for part in left)])
    return PairPlan(
        media=group_by_medium(todo.combine_chunks(), wave["query_id"].combine_chunks()),
        planned_versions=versions,
        num_pairs=num_pairs,
        num_scored_before=num_scored,
        num_failed_before=num_failed,
        num_todo=todo.num_rows,
    )


def incomplete(target: Target, scores_table: str, scored: pa.Array) -> pa.Array:
    """Return the query_ids of a partition whose candidates are not all scored or failed."""
    dataset = target.store.open(target.candidates(scores_table))
    if dataset is None:
        return pa.array([], pa.string())
    candidates = dataset.to_table(columns=["query_id", "pair_id"])
    failures = Failures(target.store, target.collection)
    failed = failures.of(target.json(scores_table), scored)
    return incomplete_queries(candidates, scored, failed["unit_id"].combine_chunks())
