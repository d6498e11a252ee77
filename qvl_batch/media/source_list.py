"""Read a list of media: JSON lines, CSV or Parquet, local or in a bucket, batch by batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from qvl_batch.errors import ManifestError
from qvl_batch.media.objects import explained
from qvl_batch.media.records import absolute_from, csv_records, json_records, opened, refused
from qvl_batch.schema import MANIFEST, RESERVED
from qvl_batch.storage import Storage
from qvl_batch.units import KINDS

LIST_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")
_STRINGS = frozenset(("uri", "kind", "etag", "text", "instruction"))
_LEAST = {"size_bytes": 0, "byte_offset": 0, "byte_length": 1, "max_frames": 1}


@dataclass(frozen=True)
class ListBatch:
    """Some rows of a list.

    ``rows`` hold the manifest's own columns, checked, absent where null; ``places`` say where each
    row stands (``line 7``); ``further`` has the list's other columns, one row each.
    """

    rows: list[dict[str, Any]]
    places: list[str]
    further: pa.Table


def is_list(source: str) -> bool:
    return source.lower().endswith(LIST_SUFFIXES)


def read_list(source: str, *, storage: Storage, batch_rows: int) -> Iterator[ListBatch]:
    """Yield the rows of a list, at most ``batch_rows`` at a time.

    Further columns of a JSON list have the type of their values, those of a CSV are strings, those
    of a Parquet file keep their type. Relative uris are relative to the list's folder.

    Raises:
        ManifestError: If a line, a value, a column name or a type is wrong: with its place.
        StorageError: If the list can not be read.
    """
    suffix = source.lower().rpartition(".")[2]
    read = {"csv": _read_csv, "parquet": _read_parquet}.get(suffix, _read_json_lines)
    with explained(source, storage), opened(source, storage) as file:
        yield from read(source, file, batch_rows)


def _read_json_lines(source: str, file: IO[bytes], batch_rows: int) -> Iterator[ListBatch]:
    for places, records in _batched(json_records(source, file), batch_rows):
        yield _from_records(source, records, places)


def _read_csv(source: str, file: IO[bytes], batch_rows: int) -> Iterator[ListBatch]:
    for places, records in _batched(csv_records(source, file), batch_rows):
        yield _from_csv(source, records, places)


def _batched(
    placed: Iterator[tuple[str, dict[str, Any]]], batch_rows: int
) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    while batch := list(itertools.islice(placed, batch_rows)):
        yield [place for place, _ in batch], [record for _, record in batch]


def _from_records(source: str, records: list[dict[str, Any]], places: list[str]) -> ListBatch:
    names = dict.fromkeys(name for record in records for name in record)
    further = [name for name in names if name not in MANIFEST.names]
    _check_names(source, further)
    columns = {}
    for name in further:
        values = [record.get(name) for record in records]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            kinds = {}
            for value, place in zip(values, places, strict=True):
                if value is not None:
                    kinds.setdefault(type(value).__name__, place)
            seen = ", ".join(f"{kind} ({place})" for kind, place in kinds.items())
            raise ManifestError(
                f"{source}: the column {name!r} mixes types: {seen or error}.",
                "Give every row the same type.",
            ) from None
    table = pa.table(columns) if columns else no_columns(len(records))
    return ListBatch(_checked(source, records, places, False), places, table)


def _from_csv(source: str, records: list[dict[str, str]], places: list[str]) -> ListBatch:
    names = [name for name in records[0] if name not in MANIFEST.names]
    _check_names(source, names)
    rows = [{name: value for name, value in row.items() if value != ""} for row in records]
    further = {name: pa.array([row.get(name) for row in rows], pa.string()) for name in names}
    table = pa.table(further) if further else no_columns(len(rows))
    return ListBatch(_checked(source, rows, places, True), places, table)


def _read_parquet(source: str, file: IO[bytes], batch_rows: int) -> Iterator[ListBatch]:
    try:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        further = [name for name in names if name not in MANIFEST.names]
        _check_names(source, further)
        if len(set(names)) < len(names):
            raise ManifestError(f"{source} names a column twice.", "Name each once.")
        done = 0
        for batch in parquet.iter_batches(batch_size=batch_rows):
            table = pa.Table.from_batches([batch])
            own = [name for name in names if name in MANIFEST.names]
            if "mtime" in own and pa.types.is_timestamp(table["mtime"].type):
                # Nanoseconds have no Python value without pandas.
                zone = table["mtime"].type.tz
                cut = table["mtime"].cast(pa.timestamp("us", tz=zone), safe=False)
                table = table.set_column(names.index("mtime"), "mtime", cut)
            records = table.select(own).to_pylist()
            places = [f"row {done + at + 1}" for at in range(len(records))]
            done += len(records)
            rest = table.select(further) if further else no_columns(len(records))
            yield ListBatch(_checked(source, records, places, False), places, rest)
    except pa.ArrowException as error:
        detail = " ".join(str(error).split())[:200]
        raise ManifestError(
            f"{source} can not be read as Parquet: {detail}", "Write it again."
        ) from None


def no_columns(num_rows: int) -> pa.Table:
    """Return a table that has rows and no columns."""
    return pa.table({"_": pa.nulls(num_rows)}).select([])


def _check_names(source: str, further: list[str]) -> None:
    for name in further:
        if not name:
            raise ManifestError(f"{source} has a column without a name.", "Name it or drop it.")
        if name in RESERVED or name.startswith("_"):
            raise ManifestError(
                f"{source} has a column {name!r}, a name that the tables use themselves.",
                "Rename it.",
            )


def _checked(
    source: str, records: list[dict[str, Any]], places: list[str], textual: bool
) -> list[dict[str, Any]]:
    """Return the manifest columns of each row, checked and completed; nulls are dropped."""
    absolute = absolute_from(source)
    return [
        _checked_row(source, place, record, textual, absolute)
        for record, place in zip(records, places, strict=True)
    ]


def _checked_row(
    source: str, place: str, record: dict[str, Any], textual: bool, absolute: Callable[[str], str]
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in MANIFEST.names:
        value = record.get(name)
        if value is None or value == "":
            continue
        try:
            row[name] = _value(name, value, textual)
        except (ValueError, OverflowError) as error:
            problem = f"has {name}={value!r:.80}, which is not {error}"
            raise refused(source, place, problem, "Correct the value or leave it out.") from None
    uri, text = row.get("uri"), row.get("text")
    if uri is None and text is None:
        raise refused(source, place, "has neither uri nor text", "Give one of them.")
    if uri is None:
        if row.setdefault("kind", "text") != "text":
            raise refused(source, place, f"has kind {row['kind']!r} and no uri", "Give its uri.")
        if "byte_offset" in row or "byte_length" in row:
            raise refused(source, place, "has a byte range and no uri", "Give its uri.")
        row.setdefault("size_bytes", len(text.encode()))
        return row
    try:
        row["uri"] = absolute(uri)
    except ValueError as error:
        raise refused(source, place, f"has uri={uri!r:.200}, {error}", "Correct it.") from None
    return row


def _value(name: str, value: object, textual: bool) -> object:
    """Return a manifest value in its type; the message of a ValueError says what is allowed."""
    if name in _STRINGS:
        if not isinstance(value, str):
            raise ValueError("a string")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("valid Unicode") from None
        if name == "kind" and value not in KINDS:
            raise ValueError(f"one of {', '.join(KINDS)}")
        return value.strip('"') if name == "etag" else value
    if name == "mtime":
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value)
            except ValueError:
                raise ValueError("an ISO 8601 time such as 2026-01-02T03:04:05Z") from None
        if not isinstance(value, datetime):
            raise ValueError("an ISO 8601 time or a timestamp")
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    if name == "fps":
        try:
            fps = float(value) if textual or isinstance(value, int | float) else math.nan
        except ValueError:
            fps = math.nan
        if isinstance(value, bool) or not (math.isfinite(fps) and fps > 0):
            raise ValueError("a positive number")
        return fps
    least = _LEAST[name]
    most = 2**31 - 1 if name == "max_frames" else 2**63 - 1
    if textual and isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"a whole number from {least} to {most}")
    return value
