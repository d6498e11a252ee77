"""Exact two-tier search for many queries over many tables: Hamming shortlist, then dot products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.errors import ConfigError
from qvl_batch.tables import nearest
from qvl_batch.tables.merging import Pairs, limited, merged_hits, tied
from qvl_batch.tables.nearest import Near
from qvl_batch.tables.store import storage_error
from qvl_batch.tables.table_rows import TableRows

# The least that keeps 0.99 of the recall@10 of scoring every int8 row: 0.9913 of it at 1,000,000 x
# 1,024 generated vectors, where 200 keep 0.9882, 100 0.9819 and the bits alone about 0.6; at
# 100,000 rows 100 suffice (tests/bench/bench_search.py).
SHORTLIST = 400
COLUMNS = ("row_id", "uri", "kind", "page", "start_s", "end_s", "text")

# A scan keeps about 4 x shortlist x 10 bytes a query and table.
_MAX_QUERIES = 1024
_MAX_KEPT = 1_000_000
# Vectors read at once for rescoring, per table.
_TAKE_BYTES = 64 << 20
# A first search of 64 tables of 1 MB on S3 takes fewer than half the requests if their vectors come
# with the scan; the shortlist's rows lie too far apart to share one.
_SMALL_BYTES = 4 << 20
_HELD_BYTES = 256 << 20
_THREADS = 16

T = TypeVar("T")


def search(
    tables: Mapping[str, lance.LanceDataset],
    queries: npt.ArrayLike,
    top_k: int = 10,
    *,
    shortlist: int = SHORTLIST,
    rescore: bool = True,
    columns: Sequence[str] = (),
    where: pc.Expression | None = None,
    nprobes: Mapping[str, int] | None = None,
) -> pa.Table:
    """Return the rows nearest to each query, over all tables, best first.

    Of the tables that hold bits and vectors, the ``shortlist`` nearest rows by Hamming distance
    over all of them (ties by row_id, then table) are scored by their vectors. All rows of
    the other tables are scored. A score is the dot product in float32 with ``vector`` or
    ``vector_int8 * vector_scale``; without those, or without ``rescore``, it is
    ``1 - 2 * hamming / dim``. For unit vectors both are cosines, true or estimated.

    A query's rows do not depend on the other queries of the call, and one scan of a table serves
    all of them (1,024 at a time). A dataset handle must not be in use by another thread.

    Args:
        tables: Open tables by name.
        queries: Float vectors of unit norm, ``(dim,)`` or ``(q, dim)``.
        columns: Further columns of the tables to return.
        where: A filter (see `filters`), applied before the search. Literals need the exact type
            of their column.
        nprobes: Tables whose index is used, and how many of its lists are read: the index of
            ``vector_bits``, or of ``vector`` where there are no bits. Other tables are scanned.

    Returns:
        ``query`` int32 (its position), ``rank`` int32 from 1, ``score`` float32, ``table``,
        `COLUMNS`, then ``columns``; at most ``top_k`` rows a query, sorted by query, falling
        score, table and row_id.

    Raises:
        ConfigError: If the queries are not finite vectors of every table's dimension, a column is
            not there, or the filter is refused.
        StorageError: If a table can not be read.
    """
    vectors = _checked(queries)
    if top_k < 1 or shortlist < top_k:
        raise ConfigError(
            f"top_k is {top_k} with a shortlist of {shortlist}.",
            "Give a top_k of 1 or more and a shortlist no smaller.",
        )
    if where is not None and not isinstance(where, pc.Expression):
        raise ConfigError(
            f"where is a {type(where).__name__}.",
            "Give a pyarrow.compute expression, or make one with parse_filter or filter_of.",
        )
    wanted = list(dict.fromkeys([*COLUMNS, *columns]))
    opened = [
        _Table.of(name, dataset, vectors.shape[1], rescore, (nprobes or {}).get(name))
        for name, dataset in sorted(tables.items())
    ]
    for table in opened:
        table.check_columns(wanted)
    opened = _with_small_ones_held(opened)
    asked = _Asked(top_k, shortlist, wanted, where)
    at_once = min(_MAX_QUERIES, max(1, _MAX_KEPT // shortlist))
    parts = []
    try:
        with ThreadPoolExecutor(max(1, min(_THREADS, len(opened)))) as pool:
            for start in range(0, len(vectors), at_once):
                found = _search(opened, vectors[start : start + at_once], asked, pool)
                number = pc.add(found["query"], pa.scalar(start, pa.int32()))
                parts.append(found.set_column(0, "query", number))
    except (ValueError, OSError, RuntimeError) as error:
        # Arrow binds the filter to the schema, Lance wants it to be true or false.
        of_filter = isinstance(error, pa.ArrowException) or "Invalid user input" in str(error)
        if where is not None and of_filter:
            reason = str(error).splitlines()[0][:300]
            raise ConfigError(
                f"The filter {where} is refused: {reason}",
                "Use the tables' columns, and literals of their exact types, such as "
                "pyarrow.scalar(3, pyarrow.int32()).",
            ) from error
        raise storage_error(", ".join(sorted(tables)), error) from error
    if not parts:
        return _result_schema(opened, wanted).empty_table()
    return pa.concat_tables(parts, promote_options="permissive").combine_chunks()


def _with_small_ones_held(tables: Sequence[_Table]) -> list[_Table]:
    """Return the tables, the small ones to be read whole as long as there is room."""
    room, chosen = _HELD_BYTES, []
    for table in tables:
        if table.in_shortlist and table.nprobes is None and table.scored_bytes <= _SMALL_BYTES:
            room -= table.scored_bytes
            table = table.held() if room >= 0 else table
        chosen.append(table)
    return chosen


@dataclass(frozen=True)
class _Asked:
    top_k: int
    shortlist: int
    columns: list[str]
    where: pc.Expression | None


@dataclass(frozen=True)
class _Table:
    """An open table and how it is searched."""

    name: str
    dataset: lance.LanceDataset
    dim: int
    by_bits: bool
    rescored: bool
    nprobes: int | None
    rows: TableRows

    @property
    def in_shortlist(self) -> bool:
        """Whether its candidates compete by Hamming distance with those of other tables."""
        return self.by_bits and self.rescored

    @classmethod
    def of(
        cls, name: str, dataset: lance.LanceDataset, dim: int, rescore: bool, nprobes: int | None
    ) -> _Table:
        schema = dataset.schema
        sizes = {
            field.type.list_size * (8 if field.name == "vector_bits" else 1)
            for field in schema
            if field.name in ("vector", "vector_int8", "vector_bits")
        }
        if not sizes:
            raise ConfigError(f"Table {name} has no vectors.", "Search a collection's tables.")
        if sizes != {dim}:
            raise ConfigError(
                f"A query has {dim} dimensions, table {name} has {min(sizes)}.",
                "Embed the query with the table's recipe.",
            )
        has_bits = "vector_bits" in schema.names
        has_vectors = "vector" in schema.names or "vector_int8" in schema.names
        rescored = has_bits and has_vectors and rescore
        if not has_bits and "vector" in schema.names and nprobes is not None:
            # What an index of float vectors says is not exact: rescored, and never compared.
            rescored = True
        return cls(name, dataset, dim, has_bits, rescored, nprobes, TableRows(dataset))

    @property
    def scored_bytes(self) -> int:
        """Return the size of all its vectors, about."""
        return (
            self.dataset.count_rows()
            * self.dim
            * (4 if "vector" in self.dataset.schema.names else 1)
        )

    def held(self) -> _Table:
        """Return the table with all of its vectors read by the scan."""
        columns = ["row_id", "vector_bits", *nearest.vector_columns(self.dataset)]
        return replace(self, rows=TableRows(self.dataset, columns))

    def check_columns(self, wanted: Sequence[str]) -> None:
        names = self.dataset.schema.names
        missing = [column for column in wanted if column not in names]
        if missing:
            raise ConfigError(
                f"Table {self.name} has no column {', '.join(missing)}.",
                f"It has: {', '.join(names)}.",
            )

    def near(self, queries: npt.NDArray[np.float32], asked: _Asked) -> Near:
        """Return the first stage's candidates; final scores (sign turned) if not rescored."""
        k = asked.shortlist if self.rescored else asked.top_k
        if not self.by_bits:
            if not self.rescored:
                return nearest.nearest_vectors(self.rows, queries, k, asked.where)
            return nearest.nearest_vectors_indexed(
                self.dataset, queries, k, asked.where, self.nprobes
            )
        bits = np.packbits(queries > 0, axis=1)
        if self.nprobes is None:
            near = nearest.nearest_bits(self.rows, bits, k, asked.where)
        else:
            near = nearest.nearest_bits_indexed(self.dataset, bits, k, asked.where, self.nprobes)
        if self.rescored:
            return near
        scores = (2 * near.key.astype(np.float64) / self.dim - 1).astype(np.float32)
        return Near(near.query, scores, near.offset)

    def scored(self, near: Near, queries: npt.NDArray[np.float32]) -> Pairs:
        """Return the candidates' scores, by the vectors of their rows if they are to be read."""
        if not self.rescored:
            return Pairs(near, -near.key)
        offsets, row = np.unique(near.offset, return_inverse=True)
        scores = np.empty(len(row), np.float32)
        columns = nearest.vector_columns(self.dataset)
        at_once = max(1, _TAKE_BYTES // (4 * self.dim))
        for start, rows in self.rows.taken(offsets, columns, at_once):
            pairs = np.flatnonzero((row >= start) & (row < start + rows.num_rows))
            vectors = nearest.Vectors.of(rows)
            for query, of_query in _runs(near.query[pairs]):
                chosen = pairs[of_query]
                scores[chosen] = vectors.take(row[chosen] - start).scores(queries[query])
        return Pairs(near, scores)

    def row_ids(self, offsets: npt.NDArray[np.int64]) -> pa.StringArray:
        """Return the ids of these rows, in this order."""
        if not len(offsets):
            return pa.array([], pa.string())
        distinct, row = np.unique(offsets, return_inverse=True)
        ids = self.rows.take(distinct, ["row_id"])["row_id"].combine_chunks()
        return ids.take(pa.array(row))

    def shown(self, offsets: npt.NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Return these rows' columns, in this order."""
        distinct, row = np.unique(offsets, return_inverse=True)
        rows = self.rows.take(distinct, columns).take(pa.array(row))
        return rows.replace_schema_metadata(None)


def _search(
    tables: Sequence[_Table],
    queries: npt.NDArray[np.float32],
    asked: _Asked,
    pool: ThreadPoolExecutor,
) -> pa.Table:
    near = _each(pool, lambda table: table.near(queries, asked), tables)
    near = _cut(tables, near, len(queries), asked)
    hit = [(table, rows) for table, rows in zip(tables, near, strict=True) if len(rows.query)]
    if not hit:
        return _result_schema(tables, asked.columns).empty_table()
    pairs = _each(pool, lambda one: one[0].scored(one[1], queries), hit)
    in_shortlist = [table.in_shortlist for table, _ in hit]
    # A row's id costs as much to read as its vector, and few rows need one before they are hits.
    needed = tied(pairs, in_shortlist, asked.shortlist)
    offsets = [one.near.offset[rows] for one, rows in zip(pairs, needed, strict=True)]
    row_ids = _each(pool, lambda i: hit[i][0].row_ids(offsets[i]), range(len(hit)))
    merged = merged_hits(
        pairs, in_shortlist, row_ids, needed, shortlist=asked.shortlist, top_k=asked.top_k
    )
    by_table = [
        (hit[number][0], np.flatnonzero(merged.table == number))
        for number in np.unique(merged.table)
    ]
    read = _each(pool, lambda one: one[0].shown(merged.offset[one[1]], asked.columns), by_table)
    rows = pa.concat_tables(read, promote_options="permissive")
    place = np.empty(len(merged.query), np.int64)
    place[np.concatenate([positions for _, positions in by_table])] = np.arange(len(place))
    names = pa.array([table.name for table, _ in hit], pa.string())
    head = {
        "query": pa.array(merged.query, pa.int32()),
        "rank": pa.array(merged.rank, pa.int32()),
        "score": pa.array(merged.score, pa.float32()),
        "table": names.take(pa.array(merged.table)),
    }
    rows = rows.take(pa.array(place))
    for number, (name, column) in enumerate(head.items()):
        rows = rows.add_column(number, name, column)
    return rows


def _cut(
    tables: Sequence[_Table], near: Sequence[Near], num_queries: int, asked: _Asked
) -> list[Near]:
    """Keep what can still be among a query's best over all tables, every tie included."""
    kept = list(near)
    in_shortlist = [i for i, table in enumerate(tables) if table.in_shortlist]
    scored = [i for i, table in enumerate(tables) if not table.rescored]
    for group, k in ((in_shortlist, asked.shortlist), (scored, asked.top_k)):
        for i, one in zip(group, limited([near[i] for i in group], num_queries, k), strict=True):
            kept[i] = one
    return kept


def _runs(query: npt.NDArray[np.int32]) -> list[tuple[int, slice]]:
    starts = np.flatnonzero(np.r_[True, query[1:] != query[:-1]]) if len(query) else []
    ends = [*starts[1:], len(query)]
    return [(int(query[a]), slice(int(a), int(b))) for a, b in zip(starts, ends, strict=True)]


def _each(pool: ThreadPoolExecutor, call: Callable[..., T], items: Sequence[object]) -> list[T]:
    # A lone table needs no thread: a shorter trace where something fails.
    return [call(items[0])] if len(items) == 1 else list(pool.map(call, items))


def _checked(queries: npt.ArrayLike) -> npt.NDArray[np.float32]:
    vectors = np.ascontiguousarray(np.atleast_2d(np.asarray(queries, np.float32)))
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ConfigError(
            f"The queries have shape {np.shape(queries)}.",
            "Give finite float vectors, (dim,) or (queries, dim).",
        )
    return vectors


def _result_schema(tables: Sequence[_Table], wanted: Sequence[str]) -> pa.Schema:
    fields = [
        pa.field("query", pa.int32()),
        pa.field("rank", pa.int32()),
        pa.field("score", pa.float32()),
        pa.field("table", pa.string()),
    ]
    if tables:
        return pa.schema([*fields, *(tables[0].dataset.schema.field(name) for name in wanted)])
    return pa.schema([*fields, *(pa.field(name, pa.null()) for name in wanted)])
