"""What is left to do: the manifest minus what the tables hold, in blocks of units.

Everything here runs on the driver. Deciding is pure (Arrow in, Arrow out); only `read_manifest`
and `plan_units` touch storage.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qvl_batch import budget, schema
from qvl_batch.errors import ManifestError
from qvl_batch.media.objects import explained, first_page
from qvl_batch.recipe import Recipe
from qvl_batch.storage import Storage, scheme_of
from qvl_batch.tables.layout import Partition, partition_json, table_name
from qvl_batch.tables.ledger import done_units, failed_units
from qvl_batch.tables.store import TableStore
from qvl_batch.units import KINDS, media_id, unit_id

# What one output block holds at the most, by kind, however small its units are: a block is also
# the grain of progress and of what a kill loses.
MAX_UNITS_PER_BLOCK = {"text": 256, "image": 64, "document": 16, "video": 16, "mixed": 16}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest as read: `rows` has every column of `schema.MANIFEST`, then its own."""

    path: str
    rows: pa.Table
    partition_by: tuple[str, ...]
    extra_fields: tuple[pa.Field, ...]


@dataclass(frozen=True, kw_only=True)
class Units:
    """Distinct units (`schema.PLANNED` without ordinal and attempt) and their partitions."""

    rows: pa.Table
    partitions: Mapping[str, Partition]
    num_duplicates: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run has to do, and what it may skip.

    `todo` is in block order; its `_ordinal` counts from 0. `planned_versions` holds the version of
    each partition table that existed when it was read.
    """

    todo: pa.Table
    partitions: Mapping[str, Partition]
    planned_versions: Mapping[str, int]
    extra_fields: tuple[pa.Field, ...]
    num_manifest_rows: int
    num_duplicates: int
    num_units: int
    num_done: int
    num_failed_before: int
    num_held_back: int


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


def identify(manifest: Manifest, collection: str) -> Units:
    """Give every row its ids and its table, and collapse equal rows.

    Raises:
        ManifestError: If two rows are the same unit of a partition but differ in a column, or if
            two partitions would share a table.
    """
    rows = manifest.rows
    columns = [
        rows[name].to_pylist() for name in ("uri", "text", "byte_offset", "byte_length", "etag")
    ]
    media, units = [], []
    for uri, text, offset, length, etag in zip(*columns, strict=True):
        identity = media_id(uri or None, text=text, byte_offset=offset, byte_length=length)
        media.append(identity)
        units.append(unit_id(identity, etag))
    tables, partitions = tables_of(manifest.path, manifest.rows, manifest.partition_by, collection)
    rows = (
        rows.append_column("unit_id", pa.array(units, pa.string()))
        .append_column("media_id", pa.array(media, pa.string()))
        .append_column("_table", tables)
    )
    distinct = _collapse(manifest.path, rows)
    return Units(
        rows=distinct, partitions=partitions, num_duplicates=rows.num_rows - distinct.num_rows
    )


def tables_of(
    path: str, rows: pa.Table, keys: Sequence[str], collection: str
) -> tuple[pa.Array, dict[str, Partition]]:
    """Return the table of every row by the values of its partition columns, and all tables.

    Raises:
        ManifestError: If a value can not name a partition, or two partitions would share a table.
    """
    if not keys:
        name = table_name(collection, ())
        return pa.array([name] * rows.num_rows, pa.string()), {name: ()}
    partitions: dict[str, Partition] = {}
    names: dict[tuple[object, ...], str] = {}
    of_row = []
    for values in zip(*(rows[key].to_pylist() for key in keys), strict=True):
        if values not in names:
            partition = tuple(
                (key, partition_value(path, key, value))
                for key, value in zip(keys, values, strict=True)
            )
            name = table_name(collection, partition)
            if partitions.setdefault(name, partition) != partition:
                raise ManifestError(
                    f"The partitions {partition_json(partitions[name])} and "
                    f"{partition_json(partition)} would share the table {name}.",
                    "Rename one of the values.",
                )
            names[values] = name
        of_row.append(names[values])
    return pa.array(of_row, pa.string()), partitions


def _collapse(path: str, rows: pa.Table) -> pa.Table:
    numbered = rows.select(["_table", "unit_id"]).append_column(
        "row", pa.array(np.arange(rows.num_rows))
    )
    groups = numbered.group_by(["_table", "unit_id"]).aggregate([("row", "min"), ("row", "count")])
    if groups.num_rows == rows.num_rows:
        return rows
    repeated = groups.filter(pc.greater(groups["row_count"], 1)).select(
        ["_table", "unit_id", "row_min"]
    )
    copies = numbered.join(repeated, ["_table", "unit_id"], join_type="inner").sort_by("row")
    compared = [name for name in rows.column_names if name not in ("size_bytes", "mtime")]
    ours = rows.select(compared).take(copies["row"]).to_pylist()
    firsts = rows.select(compared).take(copies["row_min"]).to_pylist()
    for mine, first in zip(ours, firsts, strict=True):
        if mine != first:
            column = next(name for name in compared if mine[name] != first[name])
            raise ManifestError(
                f"{path} lists {mine['uri'] or mine['text']!r} twice in one partition, with "
                f"{column} {first[column]!r} and {mine[column]!r}.",
                "Keep one of the rows: a unit has one set of values.",
            )
    return rows.take(groups["row_min"].sort())


def units_per_block(recipe: Recipe, block_bytes: int, fixed: int | None) -> dict[str, int]:
    """Return how many units of each kind one block holds.

    ``fixed`` wins; else as many as stay under ``block_bytes`` if each decodes to its upper bound.
    """
    if fixed is not None:
        return dict.fromkeys(KINDS, fixed)
    return {
        kind: max(1, min(most, block_bytes // budget.largest_part_bytes(recipe, kind)))
        for kind, most in MAX_UNITS_PER_BLOCK.items()
    }


def cut_blocks(todo: pa.Table, per_block: Mapping[str, int]) -> list[pa.Table]:
    """Cut ordered units into blocks by unit count alone.

    A unit weighs 1 / per_block[kind]; a block is full at weight 1. So a block's bounds depend on
    the kinds and the order of the units, never on time, memory or results.
    """
    if todo.num_rows == 0:
        return []
    weights = np.array([1.0 / per_block[kind] for kind in todo["kind"].to_pylist()])
    blocks, start, filled = [], 0, 0.0
    for i, weight in enumerate(weights):
        # A thousandth of slack: 64 x 1/64 must fill one block whatever the rounding.
        if i > start and filled + weight > 1.001:
            blocks.append(todo.slice(start, i - start))
            start, filled = i, 0.0
        filled += weight
    blocks.append(todo.slice(start))
    return blocks


def split_failed(
    failed: pa.Table, *, retry_failed: bool, max_attempts: int
) -> tuple[pa.Array, pa.Table]:
    """Split a partition's failed units into those to skip and those to try again.

    Returns:
        The unit_ids to skip, and a table ``unit_id, attempt`` of those to retry.
    """
    tried_out = pc.greater_equal(failed["attempt"], max_attempts)
    final = pc.or_(pc.invert(failed["retryable"]), tried_out)
    if retry_failed:
        final = pc.and_(final, False)
    skip = failed.filter(final)["unit_id"].combine_chunks()
    return skip, failed.filter(pc.invert(final)).select(["unit_id", "attempt"])


def plan_units(
    units: Units,
    store: TableStore,
    collection: str,
    *,
    extra_fields: tuple[pa.Field, ...],
    num_manifest_rows: int,
    retry_failed: bool,
    max_attempts: int,
    limit: int | None,
    on_table: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Subtract what the tables hold, order the rest and number it.

    The order is partition, kind, size: few partitions are open at once, and a batch holds units of
    like cost.
    """
    left: list[pa.Table] = []
    versions: dict[str, int] = {}
    num_done = num_failed = 0
    for name, partition in sorted(units.partitions.items()):
        on_table(name)
        mine = units.rows.filter(pc.equal(units.rows["_table"], name))
        dataset = store.open(name)
        if dataset is not None:
            versions[name] = dataset.version
            done = pc.is_in(mine["unit_id"], value_set=done_units(dataset))
            num_done += pc.sum(done).as_py() or 0
            mine = mine.filter(pc.invert(done))
        failed = failed_units(store, collection, partition_json(partition))
        skip, retry = split_failed(failed, retry_failed=retry_failed, max_attempts=max_attempts)
        skipped = pc.is_in(mine["unit_id"], value_set=skip)
        num_failed += pc.sum(skipped).as_py() or 0
        mine = mine.filter(pc.invert(skipped))
        place = pc.index_in(mine["unit_id"], value_set=retry["unit_id"].combine_chunks())
        attempts = pc.fill_null(retry["attempt"].combine_chunks().take(place), 0)
        left.append(mine.append_column("_attempt", attempts.cast(pa.int32())))
    todo = pa.concat_tables(left).sort_by(
        [("_table", "ascending"), ("kind", "ascending"), ("size_bytes", "ascending")]
    )
    taken = todo.slice(0, limit) if limit is not None else todo
    ordinals = pa.array(np.arange(taken.num_rows, dtype=np.int64))
    numbered = taken.append_column("_ordinal", ordinals)
    names = [*schema.PLANNED.names, *(field.name for field in extra_fields)]
    target = pa.schema([*schema.PLANNED, *extra_fields])
    return Plan(
        todo=numbered.select(names).cast(target).combine_chunks(),
        partitions=units.partitions,
        planned_versions=versions,
        extra_fields=extra_fields,
        num_manifest_rows=num_manifest_rows,
        num_duplicates=units.num_duplicates,
        num_units=units.rows.num_rows,
        num_done=num_done,
        num_failed_before=num_failed,
        num_held_back=todo.num_rows - taken.num_rows,
    )
