"""Which units a manifest holds: ids, partitions, equal rows collapsed.

Millions of rows are the normal case, so nothing here holds a Python object a row: ids are made a
slice at a time, tables are codes, and a row's further columns are taken for the units that are
left to do only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qvl_batch.errors import ManifestError
from qvl_batch.jobs.manifest import Manifest, partition_value
from qvl_batch.tables.layout import Partition, partition_json, table_name
from qvl_batch.units import media_id, unit_id

_IDENTITY = ("uri", "text", "byte_offset", "byte_length", "etag")
_ROWS_A_SLICE = 100_000


@dataclass(frozen=True, kw_only=True)
class Units:
    """The distinct units of a manifest.

    Args:
        manifest: Its rows, as read.
        rows: Which of them are units, in their order: the first of equal rows. int64 (units,).
        ids: Their unit_ids.
        codes: Per unit, its table as a position in ``tables``. int32 (units,).
        tables: Names of the partitions' tables.
        partitions: Of every table.
        num_duplicates: Equal rows left out.
    """

    manifest: Manifest
    rows: npt.NDArray[np.int64]
    ids: pa.StringArray
    codes: npt.NDArray[np.int32]
    tables: tuple[str, ...]
    partitions: Mapping[str, Partition]
    num_duplicates: int

    def __len__(self) -> int:
        return len(self.rows)

    def of_table(self, name: str) -> npt.NDArray[np.int64]:
        """Return the positions of a table's units, ascending."""
        if name not in self.tables:
            return np.empty(0, np.int64)
        code = self.tables.index(name)
        start, end = np.searchsorted(self._sorted_codes, [code, code + 1])
        return self._by_table[start:end]

    def ids_of(self, name: str) -> pa.StringArray:
        """Return the unit_ids of a table's units."""
        return self.ids.take(pa.array(self.of_table(name)))

    def take(self, positions: npt.NDArray[np.int64]) -> pa.Table:
        """Return units as the manifest has them, with ``unit_id``, ``media_id`` and ``_table``."""
        rows = self.manifest.rows.take(pa.array(self.rows[positions]))
        tables = pa.DictionaryArray.from_arrays(
            pa.array(self.codes[positions]), pa.array(self.tables, pa.string())
        )
        return (
            rows.append_column("unit_id", self.ids.take(pa.array(positions)))
            .append_column("media_id", pa.array(_media_ids(rows), pa.string()))
            .append_column("_table", tables.cast(pa.string()))
        )

    def media_ids(self, positions: npt.NDArray[np.int64]) -> pa.Array:
        """Return the media_ids of units."""
        rows = self.manifest.rows.select(_IDENTITY[:4])
        taken = self.rows[positions]
        slices = [
            pa.array(_media_ids(rows.take(pa.array(taken[start : start + _ROWS_A_SLICE]))))
            for start in range(0, len(taken), _ROWS_A_SLICE)
        ]
        return pa.chunked_array(slices, pa.string()).combine_chunks()

    @cached_property
    def _by_table(self) -> npt.NDArray[np.int64]:
        return np.argsort(self.codes, kind="stable")

    @cached_property
    def _sorted_codes(self) -> npt.NDArray[np.int32]:
        return self.codes[self._by_table]


def identify(manifest: Manifest, collection: str) -> Units:
    """Give every row its id and its table, and collapse equal rows.

    Raises:
        ManifestError: If two rows are the same unit of a partition but differ in a column, or if
            two partitions would share a table.
    """
    ids = pa.chunked_array(list(_unit_ids(manifest.rows)), pa.string()).combine_chunks()
    codes, tables, partitions = tables_of(
        manifest.path, manifest.rows, manifest.partition_by, collection
    )
    rows = _distinct(manifest, ids, codes)
    num_duplicates = len(ids) - len(rows)
    if num_duplicates:
        ids, codes = ids.take(pa.array(rows)), codes[rows]
    return Units(
        manifest=manifest,
        rows=rows,
        ids=ids,
        codes=codes,
        tables=tables,
        partitions=partitions,
        num_duplicates=num_duplicates,
    )


def _unit_ids(rows: pa.Table) -> Iterator[pa.Array]:
    for start in range(0, rows.num_rows, _ROWS_A_SLICE):
        part = rows.slice(start, _ROWS_A_SLICE)
        etags = part["etag"].to_pylist()
        ids = [unit_id(*pair) for pair in zip(_media_ids(part), etags, strict=True)]
        yield pa.array(ids, pa.string())


def _media_ids(rows: pa.Table) -> list[str]:
    columns = [rows[name].to_pylist() for name in _IDENTITY[:4]]
    return [
        media_id(uri or None, text=text, byte_offset=offset, byte_length=length)
        for uri, text, offset, length in zip(*columns, strict=True)
    ]


def tables_of(
    path: str, rows: pa.Table, keys: Sequence[str], collection: str
) -> tuple[npt.NDArray[np.int32], tuple[str, ...], dict[str, Partition]]:
    """Return each row's table as a position in the names, the names, and their partitions.

    Args:
        path: Of the list that the rows come from, for messages.
        keys: Columns that select a table.

    Raises:
        ManifestError: If a value can not name a partition, or two partitions would share a table.
    """
    num_rows = rows.num_rows
    if not keys:
        name = table_name(collection, ())
        return np.zeros(num_rows, np.int32), (name,), {name: ()}
    combined, combinations = np.zeros(num_rows, np.int64), [()]
    for key in keys:
        column = rows[key].combine_chunks().dictionary_encode(null_encoding="encode")
        values = column.dictionary.to_pylist()
        # Dense again after every key, so that many of them do not overflow.
        distinct, combined = np.unique(
            combined * len(values) + column.indices.to_numpy(), return_inverse=True
        )
        combinations = [
            (*combinations[code // len(values)], values[code % len(values)])
            for code in distinct.tolist()
        ]
    partitions: dict[str, Partition] = {}
    names = []
    for found in combinations:
        partition = tuple(
            (key, partition_value(path, key, value)) for key, value in zip(keys, found, strict=True)
        )
        name = table_name(collection, partition)
        if partitions.setdefault(name, partition) != partition:
            raise ManifestError(
                f"The partitions {partition_json(partitions[name])} and "
                f"{partition_json(partition)} would share the table {name}.",
                "Rename one of the values.",
            )
        names.append(name)
    # Values of two types may name one partition (1 and "1"): one table each, the codes follow.
    tables = tuple(dict.fromkeys(names))
    of_value = np.array([tables.index(name) for name in names], np.int32)
    return of_value[combined], tables, partitions


def _distinct(
    manifest: Manifest, ids: pa.StringArray, codes: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """Return the rows that are units: of equal rows the first."""
    # The first 64 bits of an id tell almost everything: sorted, repeats are neighbours.
    keys = _first_bits(ids) ^ (codes.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if not again.size:
        return np.arange(len(ids), dtype=np.int64)
    suspects = np.unique(np.concatenate([order[again], order[again + 1]]))
    first: dict[tuple[int, str], int] = {}
    repeated = []
    names = ids.take(pa.array(suspects)).to_pylist()
    for row, name in zip(suspects.tolist(), names, strict=True):
        earlier = first.setdefault((int(codes[row]), name), row)
        if earlier != row:
            _refuse_difference(manifest, earlier, row)
            repeated.append(row)
    return np.delete(np.arange(len(ids), dtype=np.int64), repeated)


def _first_bits(ids: pa.StringArray) -> npt.NDArray[np.uint64]:
    """Return the first 16 hex digits of every id as a number, uint64 (ids,)."""
    digits = np.frombuffer(ids.buffers()[2], np.uint8, len(ids) * 32).reshape(-1, 32)[:, :16]
    values = np.zeros(len(ids), np.uint64)
    for place in range(16):
        digit = digits[:, place]
        # '0' is 48, 'a' is 97.
        values = (values << np.uint64(4)) | (digit - np.where(digit < 97, 48, 87)).astype(np.uint64)
    return values


def _refuse_difference(manifest: Manifest, first: int, second: int) -> None:
    compared = [n for n in manifest.rows.column_names if n not in ("size_bytes", "mtime")]
    one, other = (
        manifest.rows.slice(row, 1).select(compared).to_pylist()[0] for row in (first, second)
    )
    if one != other:
        column = next(name for name in compared if one[name] != other[name])
        raise ManifestError(
            f"{manifest.path} lists {other['uri'] or other['text']!r} twice in one partition, with "
            f"{column} {one[column]!r} and {other[column]!r}.",
            "Keep one of the rows: a unit has one set of values.",
        )
