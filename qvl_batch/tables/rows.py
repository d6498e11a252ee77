"""Rows of tables as they are: one by its id with its vector, and all scores of a rerank job."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.tables.ledger import table_kind
from qvl_batch.tables.open import collection_of
from qvl_batch.tables.scores import SCORES_KIND
from qvl_batch.tables.store import TableStore, storage_error

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


def read_scores(store: TableStore, name: str, collection: str) -> pa.Table | None:
    """Return the scores that a rerank job gave to rows of a collection, of all partitions.

    Args:
        store: Where the tables of the scores lie.
        name: Of the scores, as the job's ``output.collection`` has it.
        collection: Whose rows: what the job said of other collections' is left out.

    Returns:
        The columns of `schema.scores`; None if there is no table of scores of that name.

    Raises:
        StorageError: If a table can not be read.
    """
    names = [table for table in store.names() if collection_of(table) == name]
    opened = [dataset for table in names if (dataset := store.open(table)) is not None]
    parts = []
    for dataset in opened:
        if table_kind(dataset) != SCORES_KIND:
            continue
        try:
            rows = dataset.to_table()
        except (ValueError, OSError, RuntimeError) as error:
            raise storage_error(dataset.uri, error) from error
        searched = pa.array([collection_of(table) for table in rows["table"].to_pylist()])
        parts.append(rows.filter(pc.equal(searched.cast(pa.string()), collection)))
    if not parts:
        return None
    found = pa.concat_tables(parts, promote_options="default").replace_schema_metadata(None)
    return found.sort_by([("query_id", "ascending"), ("rank_before", "ascending")])


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
