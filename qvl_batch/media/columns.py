"""A list of any form as Arrow columns, checked column by column, with a place for each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from qvl_batch.errors import ManifestError
from qvl_batch.media.objects import explained, first_page
from qvl_batch.media.records import absolute_from, csv_records, json_records, opened, refused
from qvl_batch.storage import Storage, join, scheme_of

FORMS = "JSON lines (.jsonl, .ndjson, .json), CSV (.csv), Parquet (a file or a folder) or .lance"

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
# Reads a Lance table's columns, as far as it has them: (path, storage, columns) -> table. An
# argument, since only one room opens Lance tables and it is not this one.
ReadLance = Callable[[str, Storage, Sequence[str]], pa.Table]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns of a list; ``places`` say where each row stands, None: ``row 1``, ``row 2``, …

    ``absolute`` makes an address of the list absolute and raises ValueError for one of no use.
    ``textual`` lists (CSV) write numbers as text.
    """

    path: str
    table: pa.Table
    places: Sequence[str] | None
    absolute: Callable[[str], str]
    textual: bool = False

    def place(self, row: int) -> str:
        return self.places[row] if self.places is not None else f"row {row + 1}"

    def refuse(self, mask: pa.Array, problem: str, remedy: str, *, of: str | None = None) -> None:
        """Raise for the first row where ``mask`` holds, if there is one.

        Args:
            problem: What is wrong with the row; of a column: what follows ``has column=value``.

        Raises:
            ManifestError: Naming the list, the place, the value and the problem.
        """
        row = pc.index(pc.fill_null(mask, False), pa.scalar(True)).as_py()
        if row >= 0:
            if of is not None:
                problem = f"has {of}={self.table[of][row].as_py()!r:.80}{problem}"
            raise refused(self.path, self.place(row), problem, remedy)

    def texts(self, name: str, *, numbers: bool = False) -> pa.Array:
        """Return a column as strings, "" as null; nulls where it is not there.

        Args:
            numbers: Take whole numbers too, in decimal.

        Raises:
            ManifestError: If it is of another type.
        """
        column = self._column(name)
        if column is None or pa.types.is_null(column.type):
            return pa.nulls(self.table.num_rows, pa.string())
        if not (is_text(column.type) or (numbers and pa.types.is_integer(column.type))):
            allowed = "text or whole numbers" if numbers else "text"
            self.refuse(pc.is_valid(column), f" ({column.type})", f"Give {allowed}.", of=name)
        column = column.cast(pa.string())
        return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)

    def addresses(self, name: str) -> pa.Array:
        """Return a column of addresses, each made absolute.

        Raises:
            ManifestError: If it is no text, or an address is of no use.
        """
        found: list[str | None] = []
        for row, uri in enumerate(self.texts(name).to_pylist()):
            try:
                found.append(None if uri is None else self.absolute(uri))
            except ValueError as error:
                problem = f"has {name}={uri!r:.200}, {error}"
                raise refused(self.path, self.place(row), problem, "Correct it.") from None
        return pa.array(found, pa.string())

    def numbers(self, name: str) -> pa.Array | None:
        """Return a column as float64 with a finite number in each row; None where it is not there.

        Raises:
            ManifestError: If a row has none.
        """
        column = self._column(name)
        if column is None:
            return None
        given = column
        if self.textual and is_text(column.type):
            column = pa.array([_number(text) for text in column.to_pylist()], pa.float64())
        known = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        values = column.cast(pa.float64(), safe=False) if known else pa.nulls(len(given))
        finite = pc.is_finite(values) if known else pa.array([False] * len(given))
        bad = pc.invert(pc.fill_null(finite, False))
        self.refuse(bad, "", "Give a finite number.", of=name)
        return values

    def duplicates(self, keys: dict[str, pa.Array], values: dict[str, pa.Array]) -> pa.Array | None:
        """Return the rows to keep, the first of each key; None where all keys differ.

        Raises:
            ManifestError: If two rows of a key differ in a value: naming both.
        """
        table = pa.table({**keys, "_row": pa.array(np.arange(self.table.num_rows))})
        groups = table.group_by([*keys], use_threads=False).aggregate(
            [("_row", "min"), ("_row", "count")]
        )
        if groups.num_rows == table.num_rows:
            return None
        repeated = groups.filter(pc.greater(groups["_row_count"], 1)).select([*keys, "_row_min"])
        copies = table.join(repeated, [*keys], join_type="inner")
        firsts, rows = (copies[name].combine_chunks() for name in ("_row_min", "_row"))
        for name, column in values.items():
            mine, first = column.take(rows), column.take(firsts)
            # Null and null are the same; null and a value are not.
            differ = pc.or_kleene(
                pc.fill_null(pc.not_equal(mine, first), False),
                pc.not_equal(pc.is_null(mine), pc.is_null(first)),
            )
            if pc.any(differ).as_py():
                at = int(pc.min(rows.filter(differ)).as_py())
                before = firsts[pc.index(rows, pa.scalar(at)).as_py()].as_py()
                named = ", ".join(
                    f"{key} {column[at].as_py()!r:.80}" for key, column in keys.items()
                )
                raise ManifestError(
                    f"{self.path} gives {named} twice, with {name} "
                    f"{column[before].as_py()!r:.80} ({self.place(before)}) and "
                    f"{column[at].as_py()!r:.80} ({self.place(at)}).",
                    "Keep one of the rows.",
                )
        return groups["_row_min"].combine_chunks().sort()

    def _column(self, name: str) -> pa.Array | None:
        if name not in self.table.column_names:
            return None
        column = self.table[name].combine_chunks()
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        return column


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def read_columns(
    path: str,
    storage: Storage,
    wanted: Sequence[str],
    *,
    what: str,
    read_lance: ReadLance | None = None,
) -> Columns:
    """Read the wanted columns of a list, as far as it has them.

    Relative addresses begin at the folder that holds the list; those of a folder of Parquet files
    begin there.

    Args:
        path: Local or in an object store; its ending tells the form: `FORMS`.
        what: What it lists, for messages: ``queries``.
        read_lance: What reads a ``.lance`` path.

    Raises:
        ManifestError: If it is not there, has no rows, or is not what its ending says.
        StorageError: If the place can not be reached.
    """
    if scheme_of(path) == "s3":
        # Tells a wrong bucket, endpoint or key within seconds; reading would try for minutes.
        first_page(path, storage)
    fs = storage.filesystem(path)
    low = path.rstrip("/").lower()
    folder, places, textual = None, None, low.endswith(".csv")
    with explained(path, storage):
        if not fs.exists(path):
            raise ManifestError(f"There is no list of {what} at {path}.", f"Give one: {FORMS}.")
        if textual or low.endswith(_JSON_SUFFIXES):
            read = csv_records if textual else json_records
            with opened(path, storage) as file:
                placed = list(read(path, file))
            places = [place for place, _ in placed]
            table = _from_records(path, [record for _, record in placed], places, wanted, textual)
        elif low.endswith(".lance") and read_lance is not None:
            table = read_lance(path, storage, wanted)
        else:
            folder = path.rstrip("/") if fs.isdir(path) else None
            table = _from_parquet(path, fs, wanted)
    if table.num_rows == 0:
        raise ManifestError(f"{path} has no rows.", f"It shall list {what}.")
    absolute = absolute_from(join(folder, "any") if folder else path)
    return Columns(path=path, table=table, places=places, absolute=absolute, textual=textual)


def _from_parquet(path: str, fs: Any, wanted: Sequence[str]) -> pa.Table:
    try:
        found = ds.dataset(
            fs._strip_protocol(path), filesystem=fs, format="parquet", partitioning=None
        )
        names = found.schema.names
        for name in wanted:
            if names.count(name) > 1:
                raise ManifestError(f"{path} has two columns {name!r}.", "Rename one.")
        return found.to_table(columns=[name for name in wanted if name in names])
    except pa.ArrowException as error:
        detail = " ".join(str(error).split())[:200]
        raise ManifestError(f"{path} is no Parquet: {detail}", f"Give {FORMS}.") from None


def _from_records(
    path: str,
    records: list[dict[str, Any]],
    places: list[str],
    wanted: Sequence[str],
    textual: bool,
) -> pa.Table:
    columns: dict[str, pa.Array] = {"_": pa.nulls(len(records))}
    for name in wanted:
        if not any(name in record for record in records):
            continue
        values = [record.get(name) for record in records]
        if textual:
            values = [value or None for value in values]
        try:
            columns[name] = pa.array(values)
        except UnicodeEncodeError:
            row = next(n for n, v in enumerate(values) if isinstance(v, str) and _is_broken(v))
            problem = f"has {name}={values[row]!r:.80}, which is no valid Unicode"
            raise refused(path, places[row], problem, "Correct it.") from None
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            kinds: dict[str, str] = {}
            for value, place in zip(values, places, strict=True):
                if value is not None:
                    kinds.setdefault(type(value).__name__, f"{place}: {value!r:.40}")
            seen = "; ".join(f"{kind} ({place})" for kind, place in kinds.items())
            raise ManifestError(
                f"{path}: the column {name!r} mixes types: {seen or error}.",
                "Give every row the same type.",
            ) from None
    return pa.table(columns)


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
