"""One row of a collection's tables by its id, with the vector that is stored for it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.tables.store import storage_error

_VECTOR_COLUMNS = ("vector", "vector_int8", "vector_scale", "vector_bits")
_THREADS = 8


def find_row(tables: Mapping[str, lance.LanceDataset], row_id: str) -> dict[str, Any] | None:
    """Return a row as plain values, or None if no table holds it.

    Args:
        tables: Open tables by name; no index on ``row_id`` is expected, so each that is given is
            scanned for it (that one column).
        row_id: Its key; any characters.

    Returns:
        ``table``, the table's columns but for the encoded ones, and ``vector``: float32 ``(dim,)``
        of norm 1, from the most exact encoding that is stored.

    Raises:
        StorageError: If a table can not be read.
    """
    wanted = pc.field("row_id") == pa.scalar(row_id, pa.string())

    def look(name: str) -> pa.Table:
        try:
            return tables[name].to_table(filter=wanted, limit=1)
        except (ValueError, OSError, RuntimeError) as error:
            raise storage_error(name, error) from error

    names = sorted(tables)
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, found in zip(names, pool.map(look, names), strict=True):
            if found.num_rows:
                plain = found.drop_columns(
                    [column for column in found.column_names if column in _VECTOR_COLUMNS]
                )
                return {"table": name, **plain.to_pylist()[0], "vector": stored_vector(found)}
    return None


def stored_vector(row: pa.Table) -> npt.NDArray[np.float32]:
    """Return the vector of a table of one row, float32 ``(dim,)`` of norm 1.

    Bits alone give a vector whose signs are those bits: all of its values have one size.
    """
    if "vector" in row.column_names:
        vector = _values(row, "vector").astype(np.float32)
    elif "vector_int8" in row.column_names:
        # The scale is one number for the row: the norm takes it out.
        vector = _values(row, "vector_int8").astype(np.float32)
    else:
        vector = np.unpackbits(_values(row, "vector_bits")).astype(np.float32) * 2 - 1
    return vector / np.linalg.norm(vector)


def _values(row: pa.Table, column: str) -> npt.NDArray[Any]:
    return row[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
