"""The first half of the rerank job: queries in, candidate pairs out. Plain callables on Arrow.

One row a query, in the order given: a replayed task must deliver the same blocks again.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch import schema
from qvl_batch.errors import (
    MissingRowError,
    NoCandidatesError,
    QvlError,
    StorageError,
    UnitError,
)
from qvl_batch.jobs.media_reader import ReadMedia, WantedMedium
from qvl_batch.jobs.parts import Part, iter_parts, parts_array
from qvl_batch.jobs.stages import NOT_STARTED, Written, failure_value
from qvl_batch.media.fetch import FetchRequest
from qvl_batch.storage import Storage
from qvl_batch.tables.filters import filter_of
from qvl_batch.tables.fragments import write_fragments
from qvl_batch.tables.scores import read_where_in
from qvl_batch.tables.search import search
from qvl_batch.tables.store import TableStore
from qvl_batch.units import EmbedInput, Engine, Vision, pair_id

_FOUND = [field.name for field in schema.FOUND_ROW]


def failures_array(values: Sequence[Mapping[str, Any] | None]) -> pa.Array:
    return pa.array(list(values), schema.FAILURE)


@dataclass(frozen=True, kw_only=True)
class DecodeQueries:
    """Reads the images and videos of queries: adds ``_parts`` and ``_failure``."""

    media: ReadMedia
    may_start: Callable[[int], bool] = lambda _: True

    def open(self) -> QueryDecoder:
        return QueryDecoder(self)


class QueryDecoder:
    """A `DecodeQueries` at work."""

    def __init__(self, stage: DecodeQueries) -> None:
        self._stage = stage
        self._reader = stage.media.open()

    def __call__(self, queries: pa.Table) -> pa.Table:
        outcomes: list[list[Part] | Mapping[str, Any]]
        if not self._stage.may_start(queries["_ordinal"][0].as_py()):
            outcomes = [NOT_STARTED] * queries.num_rows
        else:
            outcomes = self._read(queries)
        failures = [None if isinstance(one, list) else one for one in outcomes]
        parts = [one if isinstance(one, list) else [] for one in outcomes]
        return queries.append_column("_parts", parts_array(parts)).append_column(
            "_failure", failures_array(failures)
        )

    def _read(self, queries: pa.Table) -> list[list[Part] | Mapping[str, Any]]:
        wanted, owners = [], []
        for owner, query in enumerate(
            queries.select(["image", "video", "instruction"]).to_pylist()
        ):
            for kind in ("video", "image"):
                if query[kind] is not None:
                    wanted.append(
                        WantedMedium(
                            request=FetchRequest(uri=query[kind]),
                            kind=kind,
                            instruction=query["instruction"],
                        )
                    )
                    owners.append(owner)
        outcomes: list[list[Part] | Mapping[str, Any]] = [[] for _ in range(queries.num_rows)]
        for owner, read in zip(owners, self._reader.read_all(wanted), strict=True):
            so_far = outcomes[owner]
            if isinstance(read, UnitError):
                outcomes[owner] = failure_value(read)
            elif isinstance(so_far, list):
                so_far.extend(read)
        return outcomes


def without_media(queries: pa.Table) -> pa.Table:
    """Return queries of text alone as `DecodeQueries` would."""
    return queries.append_column("_parts", parts_array([[]] * queries.num_rows)).append_column(
        "_failure", failures_array([None] * queries.num_rows)
    )


def query_input(query: Mapping[str, Any], visions: Iterable[Vision]) -> EmbedInput:
    """Return the prompt's side that a query is."""
    held = list(visions)
    return EmbedInput(
        texts=(query["text"],) if query["text"] is not None else (),
        images=tuple(vision for vision in held if not vision.seconds),
        videos=tuple(vision for vision in held if vision.seconds),
        instruction=query["instruction"],
        uri=query["video"] or query["image"] or "",
    )


class EmbedQueries:
    """Turns queries into vectors: ``_vector`` (null where there is a failure) for ``_parts``."""

    def __init__(self, load: Callable[[], Engine]) -> None:
        self._broken: QvlError | None = None
        try:
            self._engine = load()
        except QvlError as error:
            self._broken = error

    def __call__(self, decoded: pa.Table) -> pa.Table:
        if self._broken is not None:
            raise self._broken
        failures = decoded["_failure"].to_pylist()
        asked = decoded.select(["text", "image", "video", "instruction"]).to_pylist()
        parts = list(iter_parts(decoded["_parts"]))
        places = [i for i, failure in enumerate(failures) if failure is None]
        inputs = [query_input(asked[i], (vision for _, vision in parts[i])) for i in places]
        vectors: list[Any] = [None] * decoded.num_rows
        if inputs:
            result = self._engine.embed(inputs)
            for number, place in enumerate(places):
                if number in result.failures:
                    failures[place] = failure_value(result.failures[number])
                else:
                    vectors[place] = result.columns["vector"][number]
        return (
            decoded.drop_columns(["_parts", "_failure"])
            .append_column("_vector", pa.array(vectors, pa.list_(pa.float32())))
            .append_column("_failure", failures_array(failures))
        )


@dataclass(frozen=True, kw_only=True)
class FirstStage:
    """What is searched and how; `versions` names the tables and pins what is seen of them."""

    root: str
    storage: Storage
    versions: Mapping[str, int]
    top_k: int
    shortlist: int
    rescore: bool
    where: tuple[str, ...]
    nprobes: Mapping[str, int]

    def tables(self) -> dict[str, Any]:
        store = TableStore(self.root, self.storage)
        opened = {}
        for name, version in self.versions.items():
            dataset = store.open(name)
            if dataset is None:
                raise StorageError(f"{store.uri(name)} is gone.", "It was there when this began.")
            opened[name] = dataset.checkout_version(version)
        return opened


class SearchTables:
    """Searches all tables for a block of queries at once: adds ``_pairs`` for ``_vector``."""

    def __init__(self, first: FirstStage) -> None:
        self._first = first
        self._tables = first.tables()

    def __call__(self, embedded: pa.Table) -> pa.Table:
        failures = embedded["_failure"].to_pylist()
        places = [i for i, failure in enumerate(failures) if failure is None]
        counts = np.zeros(len(failures), np.int64)
        found = pa.schema(list(FOUND_PAIR)).empty_table()
        if places:
            first = self._first
            found = search(
                self._tables,
                np.stack([np.array(embedded["_vector"][i].as_py(), np.float32) for i in places]),
                first.top_k,
                shortlist=first.shortlist,
                rescore=first.rescore,
                columns=[name for name in _FOUND if name != "table"],
                where=self._where(),
                nprobes=first.nprobes,
            )
            # Sorted by query already.
            counts[places] = np.bincount(found["query"].to_numpy(), minlength=len(places))
            found = found.rename_columns({"score": "first_score", "rank": "rank_before"})
        structs = pa.StructArray.from_arrays(
            [_one_array(found[one.name].cast(one.type)) for one in FOUND_PAIR],
            fields=list(FOUND_PAIR),
        )
        offsets = pa.array(np.r_[0, np.cumsum(counts)], pa.int32())
        pairs = pa.ListArray.from_arrays(offsets, structs)
        return with_pairs(embedded.drop_columns(["_vector", "_failure"]), pairs, failures)

    def _where(self) -> Any:
        if not self._first.where:
            return None
        dataset = next(iter(self._tables.values()))
        return filter_of(list(self._first.where), dataset.schema)


class LookUpRows:
    """Takes given candidates instead of a search: adds ``_pairs`` and ``_lost`` for ``_given``.

    ``_given`` is a list of (row_id, first_score, rank_before) a query; ``_lost`` are the row_ids
    that no table holds.
    """

    def __init__(self, first: FirstStage) -> None:
        self._tables = first.tables()

    def __call__(self, queries: pa.Table) -> pa.Table:
        given = queries["_given"].to_pylist()
        wanted = pa.array({one["row_id"] for query in given for one in query}, pa.string())
        columns = [name for name in _FOUND if name != "table"]
        known: dict[str, dict[str, Any]] = {}
        for name, dataset in sorted(self._tables.items()):
            rows = read_where_in(dataset, "row_id", wanted, columns)
            for row in rows.to_pylist() if rows is not None else ():
                known.setdefault(row["row_id"], row | {"table": name})
        pairs = [
            [known[one["row_id"]] | one for one in query if one["row_id"] in known]
            for query in given
        ]
        lost = [[one["row_id"] for one in query if one["row_id"] not in known] for query in given]
        lists = pa.array(pairs, pa.list_(FOUND_PAIR))
        found = with_pairs(queries.drop_columns(["_given"]), lists, [None] * len(given))
        return found.append_column("_lost", pa.array(lost, pa.list_(pa.string())))


FOUND_PAIR = pa.struct(
    [
        *(pa.field(field.name, field.type) for field in schema.FOUND_ROW),
        pa.field("first_score", pa.float32()),
        pa.field("rank_before", pa.int32()),
    ]
)


def with_pairs(
    queries: pa.Table, pairs: pa.ListArray, failures: Sequence[Mapping[str, Any] | None]
) -> pa.Table:
    """Add ``_pairs`` and ``_failure``; a query without either gets a failure of its own."""
    ended = [
        failure_value(NoCandidatesError("", "no row was found"))
        if failure is None and not size
        else failure
        for size, failure in zip(pc.list_value_length(pairs).to_pylist(), failures, strict=True)
    ]
    return queries.append_column("_pairs", pairs).append_column("_failure", failures_array(ended))


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


@dataclass(frozen=True, kw_only=True)
class WriteCandidates:
    """Queries with their pairs in, immutable fragments and failure rows out; commits nothing.

    Args:
        collection: Of the scores: failures are noted under it.
        schemas: Of the candidates tables, by name.
        partitions: JSON of their partitions.
    """

    root: str
    storage: Storage
    collection: str
    schemas: Mapping[str, pa.Schema]
    partitions: Mapping[str, str]
    run_id: str

    def __call__(self, blocks: Sequence[pa.Table], exclude: frozenset[int]) -> Written:
        queries = pa.concat_tables(blocks)
        ordinals = queries["_ordinal"].to_numpy()
        if exclude:
            keep = ~np.isin(ordinals, np.fromiter(exclude, np.int64))
            queries, ordinals = queries.filter(pa.array(keep)), ordinals[keep]
        stage = pc.struct_field(queries["_failure"], "stage")
        stopped = pc.fill_null(pc.equal(stage, NOT_STARTED["stage"]), False)
        not_started = queries.filter(stopped)["_ordinal"].to_numpy()
        queries = queries.filter(pc.invert(stopped))
        now = dt.datetime.now(dt.UTC)
        fragments, num_rows = {}, 0
        found = queries.filter(pc.is_null(queries["_failure"]))
        for name in found["_table"].unique().to_pylist():
            mine = found.filter(pc.equal(found["_table"], name))
            rows = self._rows(mine, self.schemas[name], now)
            fragments[name] = write_fragments(self.root, self.storage, name, rows)
            num_rows += rows.num_rows
        asked = queries.drop_columns(["_pairs"]).to_pylist()
        failures = [row for query in asked for row in self._failures(query, now)]
        return Written(
            ordinals=ordinals,
            not_started=not_started,
            fragments=fragments,
            failures=pa.Table.from_pylist(failures, schema.FAILURES),
            num_units=found.num_rows,
            num_rows=num_rows,
            num_tokens=0,
            work={
                "queries_failed": queries.num_rows - found.num_rows,
                "rows_missing": sum(len(query.get("_lost") or ()) for query in asked),
            },
        )

    def _rows(self, queries: pa.Table, target: pa.Schema, now: dt.datetime) -> pa.Table:
        lists = _one_array(queries["_pairs"])
        parents, found = pc.list_parent_indices(lists), pc.list_flatten(lists)
        asked = queries["query_id"].take(parents)
        ids = zip(asked.to_pylist(), found.field("row_id").to_pylist(), strict=True)
        made: dict[str, Any] = {
            "pair_id": pa.array([pair_id(*pair) for pair in ids], pa.string()),
            "run_id": pa.repeat(pa.scalar(self.run_id), len(found)),
            "made_at": pa.repeat(pa.scalar(now, schema.UTC_TIME), len(found)),
        }
        columns = []
        for one in target:
            if one.name in made:
                columns.append(made[one.name])
            elif FOUND_PAIR.get_field_index(one.name) >= 0:
                # A row's text, not its query's.
                columns.append(found.field(one.name))
            else:
                columns.append(queries[one.name].take(parents))
        return pa.Table.from_arrays(columns, schema=target)

    def _failures(self, query: Mapping[str, Any], now: dt.datetime) -> list[dict[str, Any]]:
        noted = {
            "collection": self.collection,
            "partition": self.partitions[query["_table"]],
            "run_id": self.run_id,
            "failed_at": now,
            "attempt": query["_attempt"] + 1,
            "media_id": query["query_digest"],
        }
        rows = [
            noted
            | failure_value(MissingRowError("", f"no table holds the row {row_id}"))
            | {"unit_id": pair_id(query["query_id"], row_id)}
            for row_id in query.get("_lost") or ()
        ]
        if query["_failure"] is not None:
            uri = query["video"] or query["image"]
            rows.append(noted | query["_failure"] | {"unit_id": query["query_id"], "uri": uri})
        return rows
