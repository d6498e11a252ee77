"""What a rerank run has to do: queries without candidates, then pairs without a score.

Everything here runs on the driver. The tables are the ledger: what is planned is what they lack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch import budget, schema
from qvl_batch.errors import ConfigError
from qvl_batch.jobs.plan import split_failed
from qvl_batch.recipe import Recipe, RerankRecipe
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

QUERIES_A_BLOCK = 256
BLOCK_BYTES = 128 * 2**20
# A medium that meets very many queries fills a block alone: blocks are the grain of commits.
PAIRS_A_BLOCK = 4096
# Decoded query media that a wave may hold in the object store.
WAVE_BYTES = 2 * 2**30

_MEDIUM = ("uri", "etag", "byte_offset", "byte_length", "kind")
# Of each kind of a query's media.
_QUERY_MEDIA = ("image", "video")


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


def query_bytes(query: Mapping[str, object], recipe: Recipe | RerankRecipe) -> int:
    """Return an upper bound of the bytes that a query's media decode to."""
    return sum(
        budget.largest_part_bytes(recipe, kind) for kind in _QUERY_MEDIA if query[kind] is not None
    )


def cut_queries(todo: pa.Table, recipe: Recipe | RerankRecipe) -> list[pa.Table]:
    """Cut queries into blocks by their number and by what their media may decode to."""
    weights = [
        max(1 / QUERIES_A_BLOCK, query_bytes(query, recipe) / BLOCK_BYTES)
        for query in todo.select(list(_QUERY_MEDIA)).to_pylist()
    ]
    return [todo.slice(first, last - first) for first, last in _cuts(weights)]


def cut_waves(queries: pa.Table, recipe: RerankRecipe, queries_per_wave: int) -> list[pa.Table]:
    """Cut queries into those whose pairs are scored together."""
    weights = [
        max(1 / queries_per_wave, query_bytes(query, recipe) / WAVE_BYTES)
        for query in queries.select(list(_QUERY_MEDIA)).to_pylist()
    ]
    return [queries.slice(first, last - first) for first, last in _cuts(weights)]


def _cuts(weights: list[float]) -> Iterator[tuple[int, int]]:
    """Yield [first, last) of blocks: full at weight 1, one item at least."""
    start, filled = 0, 0.0
    for i, weight in enumerate(weights):
        # A thousandth of slack: 64 x 1/64 must fill one block whatever the rounding.
        if i > start and filled + weight > 1.001:
            yield start, i
            start, filled = i, 0.0
        filled += weight
    if weights:
        yield start, len(weights)


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


def group_by_medium(pairs: pa.Table, queries: pa.Array) -> pa.Table:
    """Return one row a medium with all its pairs; a text, which needs no fetch, stands for itself.

    Media come in the order of the first query that meets them, so that a block holds many pairs of
    few queries: those share what stands before the document.

    Args:
        pairs: Of `schema.found_pair`'s fields.
        queries: query_ids in their order.
    """
    kind = pa.struct(list(pairs.schema))
    is_text = pc.equal(pairs["kind"], "text")
    numbers = [pairs[name].cast(pa.string()) for name in ("byte_offset", "byte_length")]
    place = pc.binary_join_element_wise(
        pairs["uri"],
        *numbers,
        pairs["etag"],
        pairs["kind"],
        "\x00",
        null_handling="replace",
        null_replacement="",
    )
    medium = pc.if_else(is_text, pairs["unit_id"], place).combine_chunks().dictionary_encode()
    codes = medium.indices.to_numpy()
    position = pc.index_in(pairs["query_id"], value_set=queries).to_numpy()
    first = np.full(len(medium.dictionary), np.iinfo(np.int64).max)
    np.minimum.at(first, codes, position)
    rank = pairs["rank_before"].to_numpy()
    order = np.lexsort((rank, position, codes, first[codes]))
    ordered = pairs.take(pa.array(order)).combine_chunks()
    codes = codes[order]
    begins = (
        np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]]) if len(codes) else np.array([], int)
    )
    offsets = pa.array(np.r_[begins, len(codes)], pa.int32())
    structs = pa.StructArray.from_arrays(
        [_one_array(ordered[field.name]) for field in kind], fields=list(kind)
    )
    heads = ordered.take(pa.array(begins, pa.int64())).select(list(_MEDIUM))
    return heads.append_column("_pairs", pa.ListArray.from_arrays(offsets, structs)).add_column(
        0, "_ordinal", pa.array(np.arange(len(begins), dtype=np.int64))
    )


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def cut_media(media: pa.Table, recipe: RerankRecipe, media_per_block: int) -> list[pa.Table]:
    """Cut media into blocks by what the plan says of them alone: their number, bytes and pairs."""
    lists = media["_pairs"].combine_chunks()
    segments = pc.list_flatten(lists).field("segment").to_pylist()
    sizes, weights, start = pc.list_value_length(lists).to_pylist(), [], 0
    for kind, size in zip(media["kind"].to_pylist(), sizes, strict=True):
        num_parts = len(set(segments[start : start + size]))
        start += size
        part = "image" if kind == "document" else kind
        num_bytes = num_parts * budget.largest_part_bytes(recipe, part)
        weights.append(max(1 / media_per_block, num_bytes / BLOCK_BYTES, size / PAIRS_A_BLOCK))
    return [media.slice(first, last - first) for first, last in _cuts(weights)]


def incomplete(target: Target, scores_table: str, scored: pa.Array) -> pa.Array:
    """Return the query_ids of a partition whose candidates are not all scored or failed."""
    dataset = target.store.open(target.candidates(scores_table))
    if dataset is None:
        return pa.array([], pa.string())
    candidates = dataset.to_table(columns=["query_id", "pair_id"])
    failures = Failures(target.store, target.collection)
    failed = failures.of(target.json(scores_table), scored)
    return incomplete_queries(candidates, scored, failed["unit_id"].combine_chunks())
