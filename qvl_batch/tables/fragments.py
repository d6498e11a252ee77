"""From embedded units to immutable data files, in any process; nothing here is visible yet."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import TypedDict

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lance.file import LanceFileSession
from lance.fragment import write_fragments as lance_write_fragments

from qvl_batch import crash
from qvl_batch import schema as schemas
from qvl_batch.errors import InvariantBrokenError
from qvl_batch.storage import Storage
from qvl_batch.tables.store import TableStore, schema_difference, storage_error

_HASH_CHUNK_BYTES = 8 << 20
# The end of every Lance data file: found at size - 4, it proves that the file is all there.
_MAGIC = b"LANC"


class DataFileRecord(TypedDict):
    """One data file, as in `schema.DATA_FILE`; `path` is relative to the table."""

    path: str
    size_bytes: int
    sha256: str
    recomputed: bool


class WrittenFragment(TypedDict):
    """One fragment that is written and not committed: plain values, ready for JSON."""

    fragment: str
    num_rows: int
    files: list[DataFileRecord]


def write_fragments(
    store_root: str, storage: Storage | None, table: str, rows: pa.Table
) -> list[WrittenFragment]:
    """Write rows of an existing table's schema as immutable files, without committing them.

    Returns:
        One record a fragment; none for no rows. Lance keeps no checksums, so each file is read
        back and its sha256 taken.

    Raises:
        InvariantBrokenError: If the rows are not of the table's schema, or there is no table.
        StorageError: If the files can not be written or read back.
    """
    return write_to(TableStore(store_root, storage), table, rows)


def write_to(store: TableStore, table: str, rows: pa.Table) -> list[WrittenFragment]:
    """Do as `write_fragments` with a store that is already there."""
    dataset = store.open(table)
    if dataset is None:
        raise InvariantBrokenError(f"{store.uri(table)} does not exist; create it before writing")
    check_rows(rows, dataset.schema, table)
    if rows.num_rows == 0:
        return []
    try:
        fragments = lance_write_fragments(
            rows, dataset, mode="append", storage_options=store.options, session=store.session
        )
        crash.reached("after-fragment-write")
        files = store.files(table)
        return [
            WrittenFragment(
                fragment=json.dumps(fragment.to_json()),
                num_rows=fragment.num_rows,
                files=[_record(files, file) for file in fragment.files],
            )
            for fragment in fragments
        ]
    except (ValueError, OSError, RuntimeError) as error:
        raise storage_error(store.uri(table), error) from error


def sha256_of(files: LanceFileSession, path: str, size_bytes: int) -> str:
    """Return the sha256 hex of a table's file, read in chunks of 8 MiB."""
    digest = hashlib.sha256()
    for offset in range(0, size_bytes, _HASH_CHUNK_BYTES):
        length = min(_HASH_CHUNK_BYTES, size_bytes - offset)
        digest.update(files.read_range(path, offset, length))
    return digest.hexdigest()


def file_problem(files: LanceFileSession, path: str, size_bytes: int) -> str | None:
    """Return what is wrong with a data file of a table, or None; costs one small read.

    Raises:
        OSError: If that can not be told.
    """
    try:
        if files.read_range(path, size_bytes - len(_MAGIC), len(_MAGIC)) == _MAGIC:
            return None
    except OSError as error:
        if not files.contains(path):
            return "is missing"
        # A local file that is too short, and an object store's answer to such a range.
        if not re.search("fill whole buffer|416|InvalidRange|out of range", str(error)):
            raise
    return f"has not its {size_bytes} bytes"


def data_path(file: lance.fragment.DataFile) -> str:
    """Return a data file's path relative to its table."""
    return f"data/{file.path}"


def _record(files: LanceFileSession, file: lance.fragment.DataFile) -> DataFileRecord:
    path = data_path(file)
    try:
        digest = sha256_of(files, path, file.file_size_bytes)
    except OSError as error:
        # Lance 14.0.2 ends a file on a full local disk early and says nothing (measured).
        if "fill whole buffer" in str(error):
            raise OSError(f"No space left: {path} was cut as it was written") from error
        raise
    return DataFileRecord(
        path=path, size_bytes=file.file_size_bytes, sha256=digest, recomputed=False
    )


def check_rows(rows: pa.Table, schema: pa.Schema, table: str) -> None:
    """Refuse rows of another schema, or with a null where the schema has none.

    Raises:
        InvariantBrokenError: With the first column at fault.
    """
    difference = schema_difference(schema, rows.schema)
    if difference:
        raise InvariantBrokenError(f"rows for table {table}: {difference}")
    for field in schema:
        if not field.nullable and rows[field.name].null_count:
            raise InvariantBrokenError(f"rows for table {table}: null in column {field.name}")


def explode(
    embedded: pa.Table, schema: pa.Schema, run_id: str, embedded_at: pa.Scalar | object
) -> pa.Table:
    """Turn embedded units into table rows: one row a vector, failed units left out.

    Args:
        embedded: One row a unit, as `qvl_batch.schema.embedded` has it.
        schema: The table's schema, as `qvl_batch.schema.table_rows` has it.
        run_id: Of the run that embeds.
        embedded_at: Time of embedding, an aware datetime or a timestamp scalar.

    Returns:
        Rows in unit order, then segment order as given; every column not made here is carried from
        the unit.

    Raises:
        InvariantBrokenError: If a unit has neither rows nor a failure, or a vector is missing or
            of another length than the schema's.
    """
    units = embedded.filter(pc.is_null(embedded["_failure"]))
    lists = _one_chunk(units["_rows"])
    counts = pc.fill_null(pc.list_value_length(lists), 0)
    if units.num_rows and pc.min(counts).as_py() == 0:
        lost = units["unit_id"][pc.index(counts, 0).as_py()].as_py()
        raise InvariantBrokenError(f"unit {lost} has neither rows nor a failure")
    parents = pc.list_parent_indices(lists)
    rows = pc.list_flatten(lists)
    num_rows = len(rows)
    ids = units["unit_id"].take(parents)

    columns = []
    for field in schema:
        if field.name == "row_id":
            segments = pc.struct_field(rows, "segment").cast(pa.string())
            column = pc.binary_join_element_wise(ids, segments, ":")
        elif field.name == "run_id":
            column = pa.repeat(pa.scalar(run_id, pa.string()), num_rows)
        elif field.name == "embedded_at":
            column = pa.repeat(pa.scalar(embedded_at, schemas.UTC_TIME), num_rows)
        elif pa.types.is_fixed_size_list(field.type) and field.name.startswith("vector"):
            column = _vectors(pc.struct_field(rows, field.name), field)
        elif schemas.ROW.get_field_index(field.name) >= 0:
            column = pc.struct_field(rows, field.name)
        else:
            column = units[field.name].take(parents)
        columns.append(column)
    exploded = pa.Table.from_arrays(columns, schema=schema)
    check_rows(exploded, schema, "exploded")
    return exploded


def failure_rows(
    embedded: pa.Table,
    *,
    collection: str,
    partition_json: str,
    run_id: str,
    failed_at: pa.Scalar | object,
) -> pa.Table:
    """Return a row of `qvl_batch.schema.FAILURES` for each failed unit, in unit order."""
    units = embedded.filter(pc.is_valid(embedded["_failure"]))
    failures = _one_chunk(units["_failure"])
    constants = {
        "collection": collection,
        "partition": partition_json,
        "run_id": run_id,
        "failed_at": failed_at,
    }
    columns = []
    for field in schemas.FAILURES:
        if field.name in constants:
            value = pa.scalar(constants[field.name], field.type)
            column = pa.repeat(value, units.num_rows)
        elif field.name == "attempt":
            column = pc.add(units["_attempt"], pa.scalar(1, pa.int32()))
        elif schemas.FAILURE.get_field_index(field.name) >= 0:
            column = pc.struct_field(failures, field.name)
        else:
            column = units[field.name]
        columns.append(column)
    rows = pa.Table.from_arrays(columns, schema=schemas.FAILURES)
    check_rows(rows, schemas.FAILURES, "failures")
    return rows


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _vectors(packed: pa.Array, field: pa.Field) -> pa.Array:
    """Turn one binary a row into a fixed-size list, without touching single rows."""
    item, dim = field.type.value_type, field.type.list_size
    length_bytes = dim * item.bit_width // 8
    if packed.null_count:
        raise InvariantBrokenError(f"{packed.null_count} rows have no {field.name}")
    lengths = pc.unique(pc.binary_length(packed)).to_pylist()
    if lengths not in ([], [length_bytes]):
        raise InvariantBrokenError(
            f"{field.name} must have {length_bytes} bytes a row ({dim} x {item}), got {lengths}"
        )
    if not len(packed):
        return pa.array([], field.type)
    _, offsets, data = packed.buffers()
    first = np.frombuffer(offsets, np.int32)[packed.offset]
    flat = np.frombuffer(data, np.uint8, len(packed) * length_bytes, int(first))
    # A copy, since a slice of the block may not be aligned for the item type.
    values = pa.Array.from_buffers(item, len(packed) * dim, [None, pa.py_buffer(flat.copy())])
    return pa.FixedSizeListArray.from_arrays(values, type=field.type)


def iter_fragments(written: list[WrittenFragment]) -> Iterator[lance.FragmentMetadata]:
    """Return Lance's own metadata of written fragments."""
    for record in written:
        yield lance.FragmentMetadata.from_json(record["fragment"])
