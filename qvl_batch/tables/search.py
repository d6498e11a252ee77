"""Exact two-tier search over any number of tables: Hamming shortlist, then dot products."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.errors import ConfigError
from qvl_batch.tables.store import storage_error

# Hamming alone keeps 57 % of the top 10; a shortlist of 50 to 100 restored all of it (measured).
SHORTLIST = 200
COLUMNS = ("row_id", "uri", "kind", "page", "start_s", "end_s", "text")
_SCAN_ROWS = 8192


def search(
    tables: Mapping[str, lance.LanceDataset],
    query: npt.NDArray[np.float32],
    top_k: int = 10,
    *,
    shortlist: int = SHORTLIST,
    columns: Sequence[str] = (),
    where: str | None = None,
) -> pa.Table:
    """Return the rows nearest to a query, over all tables, best first.

    With ``vector_bits`` the ``shortlist`` nearest rows by Hamming distance, merged over all
    tables, are rescored; a table without is scanned whole. Scores are dot products in float32
    with ``vector`` or ``vector_int8 * vector_scale``; a table of bits alone is scored by
    ``1 - 2 * hamming / dim``. For unit vectors all of them are cosines.

    Args:
        tables: Open tables by name.
        query: float32 ``(dim,)``, unit norm.
        columns: Further columns of the tables to return.
        where: An SQL filter, applied before the search.

    Returns:
        ``score`` float32, ``table``, `COLUMNS`, then ``columns``; at most ``top_k`` rows, sorted
        by falling score, then table, then row_id.

    Raises:
        ConfigError: If the query is not a finite vector of every table's dimension, or a column
            is not there.
        StorageError: If a table can not be read, or the filter is refused.
    """
    query = np.asarray(query, np.float32)
    if query.ndim != 1 or not np.isfinite(query).all():
        raise ConfigError(f"The query has shape {query.shape}.", "Give one finite float vector.")
    if top_k < 1 or shortlist < top_k:
        raise ConfigError(
            f"top_k is {top_k} with a shortlist of {shortlist}.",
            "Give a top_k of 1 or more and a shortlist no smaller.",
        )
    wanted = [*COLUMNS, *(name for name in columns if name not in COLUMNS)]
    for name, dataset in tables.items():
        _check(name, dataset, len(query), wanted)
    coarse = {n: ds for n, ds in tables.items() if "vector_bits" in ds.schema.names}
    found = []
    try:
        near = [_nearest_bits(n, ds, query, shortlist, where) for n, ds in sorted(coarse.items())]
        for name, row_ids in _merge(near, shortlist):
            listed = ", ".join(map(str, row_ids))
            # Row addresses: Lance reads these rows alone.
            found += _scored(name, coarse[name], query, wanted, f"_rowid IN ({listed})", top_k)
        for name, dataset in tables.items():
            if name not in coarse:
                found += _scored(name, dataset, query, wanted, where, top_k)
    except (ValueError, OSError, RuntimeError) as error:
        if where is not None and re.search("Schema|SQL|parse|Invalid user input", str(error)):
            reason = str(error).splitlines()[0][:300]
            raise ConfigError(f"The filter {where!r} is refused: {reason}", "Mend it.") from error
        raise storage_error(", ".join(sorted(tables)), error) from error
    if not found:
        return _result_schema(tables, wanted).empty_table()
    return _best(pa.concat_tables(found, promote_options="permissive"), top_k)


def _check(name: str, dataset: lance.LanceDataset, dim: int, wanted: Sequence[str]) -> None:
    schema = dataset.schema
    sizes = {
        field.type.list_size * (8 if field.name == "vector_bits" else 1)
        for field in schema
        if re.fullmatch("vector|vector_int8|vector_bits", field.name)
    }
    if not sizes:
        raise ConfigError(f"Table {name} has no vectors.", "Search a collection's tables.")
    if sizes != {dim}:
        raise ConfigError(
            f"The query has {dim} dimensions, table {name} has {min(sizes)}.",
            "Embed the query with the table's recipe.",
        )
    missing = [column for column in wanted if column not in schema.names]
    if missing:
        raise ConfigError(
            f"Table {name} has no column {', '.join(missing)}.",
            f"It has: {', '.join(schema.names)}.",
        )


def _nearest_bits(
    name: str,
    dataset: lance.LanceDataset,
    query: npt.NDArray[np.float32],
    shortlist: int,
    where: str | None,
) -> pa.Table:
    """Return ``table, _rowid, _distance`` of a table's nearest rows."""
    rows = dataset.to_table(
        columns=["row_id", "_distance"],
        with_row_id=True,
        filter=where,
        prefilter=True,
        nearest={
            "column": "vector_bits",
            "q": np.packbits(query > 0),
            # Lance picks any of the rows that tie at the end of its list; with as many again the
            # global cut falls, by row_id, among rows that are all here.
            "k": 2 * shortlist,
            "metric": "hamming",
            "use_index": False,
        },
    )
    return rows.append_column("table", pa.repeat(pa.scalar(name), rows.num_rows))


def _merge(near: list[pa.Table], shortlist: int) -> Iterator[tuple[str, list[int]]]:
    """Return, per table, the row addresses of the global shortlist: Hamming is exact."""
    if not near:
        return
    merged = pa.concat_tables(near)
    keys = [("_distance", "ascending"), ("table", "ascending"), ("row_id", "ascending")]
    merged = merged.take(pc.sort_indices(merged, sort_keys=keys)[:shortlist])
    for name in pc.unique(merged["table"]).to_pylist():
        rows = merged.filter(pc.equal(merged["table"], name))
        yield name, rows["_rowid"].to_pylist()


def _scored(
    name: str,
    dataset: lance.LanceDataset,
    query: npt.NDArray[np.float32],
    wanted: Sequence[str],
    where: str | None,
    top_k: int,
) -> list[pa.Table]:
    """Return the best rows of a table that pass the filter, with their scores."""
    names = dataset.schema.names
    if "vector" in names:
        vectors = ["vector"]
    elif "vector_int8" in names:
        vectors = ["vector_int8", "vector_scale"]
    else:
        vectors = ["vector_bits"]
    best: pa.Table | None = None
    for batch in dataset.to_batches(
        columns=[*wanted, *vectors], filter=where, batch_size=_SCAN_ROWS
    ):
        if not batch.num_rows:
            continue
        rows = pa.Table.from_batches([batch]).select(list(wanted))
        rows = rows.add_column(0, "table", pa.repeat(pa.scalar(name), rows.num_rows))
        rows = rows.add_column(0, "score", pa.array(_scores(batch, query), pa.float32()))
        best = _best(rows if best is None else pa.concat_tables([best, rows]), top_k)
    return [] if best is None else [best.replace_schema_metadata(None)]


def _scores(batch: pa.RecordBatch, query: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the dot product of each row with the query, float32 ``(rows,)``."""
    if "vector" in batch.schema.names:
        return _dot(_matrix(batch["vector"]), query)
    if "vector_int8" in batch.schema.names:
        return _dot(_matrix(batch["vector_int8"]), query) * batch["vector_scale"].to_numpy()
    differing = np.bitwise_xor(_matrix(batch["vector_bits"]), np.packbits(query > 0))
    hamming = np.bitwise_count(differing).sum(axis=1, dtype=np.int64)
    return (1 - 2 * hamming / len(query)).astype(np.float32)


def _dot(
    vectors: npt.NDArray[np.generic], query: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    # Not BLAS: its rounding depends on a row's place in the block, so equal rows would not tie.
    return np.einsum("ij,j->i", vectors.astype(np.float32), query)


def _matrix(vectors: pa.FixedSizeListArray) -> npt.NDArray[np.generic]:
    return vectors.flatten().to_numpy().reshape(len(vectors), vectors.type.list_size)


def _best(rows: pa.Table, top_k: int) -> pa.Table:
    keys = [("score", "descending"), ("table", "ascending"), ("row_id", "ascending")]
    return rows.take(pc.sort_indices(rows, sort_keys=keys)[:top_k])


def _result_schema(tables: Mapping[str, lance.LanceDataset], wanted: Sequence[str]) -> pa.Schema:
    fields = [pa.field("score", pa.float32()), pa.field("table", pa.string())]
    for dataset in tables.values():
        return pa.schema([*fields, *(dataset.schema.field(name) for name in wanted)])
    return pa.schema([*fields, *(pa.field(name, pa.null()) for name in wanted)])
