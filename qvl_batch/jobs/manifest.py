"""A manifest as a job reads it: every column checked and in our types."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qvl_batch import schema
from qvl_batch.errors import ManifestError
from qvl_batch.media.objects import explained, first_page
from qvl_batch.storage import Storage, scheme_of
from qvl_batch.units import KINDS


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest as read: `rows` has every column of `schema.MANIFEST`, then its own."""

    path: str
    rows: pa.Table
    partition_by: tuple[str, ...]
    extra_fields: tuple[pa.Field, ...]


def _to_type(column: pa.ChunkedArray, field: pa.Field, path: str) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_null(column.type):
        return pa.chunked_array([pa.nulls(len(column), field.type)])
    number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    same_family = (
        (pa.types.is_string(field.type) and _is_text(column.type))
        or (pa.types.is_integer(field.type) and number)
        or (pa.types.is_floating(field.type) and number)
        or (pa.types.is_timestamp(field.type) and pa.types.is_timestamp(column.type))
    )
    try:
        if not same_family:
            raise pa.ArrowInvalid("other family")
        if pa.types.is_timestamp(field.type) and column.type.tz is None:
            column = pc.assume_timezone(column, "UTC")
        # Finer times than microseconds are cut: mtime is metadata, the etag tells versions apart.
        return column.cast(field.type, safe=not pa.types.is_timestamp(field.type))
    except pa.ArrowInvalid:
        raise ManifestError(
            f"{path}: column {field.name!r} has the type {column.type}, it must be {field.type}.",
            "Write it anew with that type; `qvl-batch manifest` does.",
        ) from None


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()


def read_manifest(path: str, storage: Storage, partition_by: Sequence[str] | None) -> Manifest:
    """Read and check a Parquet manifest.

    Args:
        path: Local path or object-store address of a Parquet file, or of a folder of them.
        storage: How to reach it.
        partition_by: Columns that select a table; None takes what the manifest's metadata states,
            else no partition at all.

    Raises:
        ManifestError: If it is missing, empty, no Parquet, or a column or value is not allowed.
        StorageError: If the place can not be reached.
    """
    if scheme_of(path) == "s3":
        # Tells a wrong bucket, endpoint or key within seconds; reading would try for minutes.
        first_page(path, storage)
    fs = storage.filesystem(path)
    with explained(path, storage):
        if not fs.exists(path):
            raise ManifestError(
                f"There is no manifest at {path}.",
                "`qvl-batch manifest SOURCE OUT.parquet` makes one.",
            )
        try:
            table = pq.read_table(fs._strip_protocol(path), filesystem=fs, partitioning=None)
        except pa.ArrowInvalid as error:
            raise ManifestError(
                f"{path} is not a Parquet file ({str(error).splitlines()[0]}).",
                "`qvl-batch manifest SOURCE OUT.parquet` makes one, also from JSONL and CSV lists.",
            ) from None
    return check_manifest(path, table, partition_by)


def check_manifest(path: str, table: pa.Table, partition_by: Sequence[str] | None) -> Manifest:
    """Check the columns and values of a manifest table and bring them into our types."""
    if "uri" not in table.column_names and "text" not in table.column_names:
        raise ManifestError(
            f"{path} has neither a column 'uri' nor 'text'.",
            f"Its columns are: {', '.join(table.column_names) or 'none'}.",
        )
    if len(set(table.column_names)) != len(table.column_names):
        raise ManifestError(f"{path} has two columns of one name.", "Rename one.")
    if table.num_rows == 0:
        raise ManifestError(f"{path} has no rows.", "List at least one medium.")
    stated = (table.schema.metadata or {}).get(b"qvl.partition_by")
    keys = tuple(partition_by if partition_by is not None else json.loads(stated or b"[]"))
    own = [name for name in table.column_names if name not in schema.MANIFEST.names]
    reserved = [name for name in own if name in schema.RESERVED or name.startswith("_")]
    if reserved:
        raise ManifestError(
            f"{path}: the column name {reserved[0]!r} is reserved for the tables.", "Rename it."
        )
    for key in keys:
        if key not in table.column_names or key == "text":
            raise ManifestError(
                f"{path} has no column {key!r} to partition by.",
                f"Set output.partition_by to some of: {', '.join(own) or 'none, there are none'}.",
            )
    columns = {
        field.name: _to_type(table[field.name], field, path)
        if field.name in table.column_names
        else pa.chunked_array([pa.nulls(table.num_rows, field.type)])
        for field in schema.MANIFEST
    }
    columns["kind"] = _checked_kinds(path, columns)
    _check_values(path, columns)
    for name in own:
        column = table[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        columns[name] = pa.nulls(len(column), pa.string()) if column.type == pa.null() else column
    rows = pa.table(columns)
    extra = tuple(rows.schema.field(name) for name in own)
    return Manifest(path=path, rows=rows, partition_by=keys, extra_fields=extra)


def _row_of(mask: pa.ChunkedArray) -> int | None:
    hit = pc.index(pc.fill_null(mask, False), pa.scalar(True)).as_py()
    return hit if hit >= 0 else None


def _blank(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.equal(column, ""), True)


def _checked_kinds(path: str, columns: Mapping[str, pa.ChunkedArray]) -> pa.ChunkedArray:
    # A list of texts needs no kind: where there is no address the text is the medium.
    kinds = pc.if_else(
        pc.and_(_blank(columns["uri"]), pc.is_null(columns["kind"])), "text", columns["kind"]
    )
    row = _row_of(pc.invert(pc.is_in(kinds, value_set=pa.array(KINDS))))
    if row is not None:
        raise ManifestError(
            f"{path}: row {row} ({columns['uri'][row]}) has the kind {kinds[row].as_py()!r}.",
            f"Allowed: {', '.join(KINDS)}.",
        )
    return kinds


def _check_values(path: str, columns: Mapping[str, pa.ChunkedArray]) -> None:
    no_uri, no_text = _blank(columns["uri"]), pc.is_null(columns["text"])
    is_text = pc.equal(columns["kind"], "text")
    checks = [
        (pc.and_(no_uri, no_text), "has neither uri nor text", "Give one of them."),
        (
            pc.and_(no_uri, pc.invert(is_text)),
            "has no uri, and its kind is not text",
            "Give the address of the medium.",
        ),
        (
            pc.and_(pc.equal(columns["kind"], "mixed"), no_text),
            "has the kind mixed and no text",
            "A mixed unit is one picture or video together with its text.",
        ),
        (pc.less_equal(columns["fps"], 0), "has an fps that is not above 0", "Mend it."),
        (pc.less(columns["max_frames"], 2), "has max_frames below 2", "Mend it."),
        (
            pc.or_(pc.less(columns["byte_offset"], 0), pc.less(columns["byte_length"], 1)),
            "has an impossible byte range",
            "byte_offset is 0 or more, byte_length 1 or more.",
        ),
    ]
    for mask, problem, remedy in checks:
        row = _row_of(mask)
        if row is not None:
            name = columns["uri"][row].as_py() or columns["text"][row].as_py()
            raise ManifestError(f"{path}: row {row} ({name!r}) {problem}.", remedy)


def partition_value(path: str, key: str, value: object) -> str | None:
    """Return a partition value as the text that names it; dates are ISO 8601."""
    if value is None:
        return None
    if isinstance(value, dt.datetime | dt.date):
        return value.isoformat()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int):
        return str(value)
    raise ManifestError(
        f"{path}: the partition column {key!r} holds {value!r} ({type(value).__name__}).",
        "Use text, whole numbers or dates.",
    )
