"""Tables whose vectors have the structure of embeddings: topics, sub-topics, falling variance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qvl_batch.tables import commit, fragments
from qvl_batch.tables.store import TableStore
from tests.tables import rows

DIM = 64


def vectors(num_rows: int, *, seed: int = 0, dim: int = DIM) -> npt.NDArray[np.float32]:
    """Return unit vectors around 40 topics, the same topics for every seed."""
    topics = np.random.default_rng(7).normal(size=(40, dim))
    rng = np.random.default_rng(seed)
    drawn = topics[rng.integers(0, len(topics), num_rows)] + 0.8 * rng.normal(size=(num_rows, dim))
    drawn *= (np.arange(dim) + 8.0) ** -0.35
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def table(
    schema: pa.Schema, values: npt.NDArray[np.float32], *, prefix: str = "u", run_id: str = "run-0"
) -> pa.Table:
    """Return one row a vector, with whatever encodings the schema has."""
    num_rows = len(values)
    units = [f"{prefix}{i:06}" for i in range(num_rows)]
    scale = np.abs(values).max(axis=1) / 127
    columns: dict[str, object] = {
        "row_id": [f"{unit}:0" for unit in units],
        "unit_id": units,
        "media_id": units,
        "kind": ["image"] * num_rows,
        "segment": np.zeros(num_rows, np.int32),
        "num_segments": np.ones(num_rows, np.int32),
        "num_tokens": np.ones(num_rows, np.int32),
        "truncated": np.zeros(num_rows, bool),
        "vector_scale": scale.astype(np.float32),
        "vector_int8": np.round(values / scale[:, None]).astype(np.int8),
        "vector_bits": np.packbits(values > 0, axis=1),
        "run_id": [run_id] * num_rows,
        "embedded_at": [rows.NOW] * num_rows,
    }
    if "vector" in schema.names:
        kind = schema.field("vector").type.value_type.to_pandas_dtype()
        columns["vector"] = values.astype(kind)
    arrays = []
    for field in schema:
        column = columns.get(field.name)
        if column is None:
            arrays.append(pa.nulls(num_rows, field.type))
        elif isinstance(column, np.ndarray) and column.ndim == 2:
            flat = pa.array(column.ravel())
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
        else:
            arrays.append(pa.array(column, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def make(
    store: TableStore,
    name: str,
    num_rows: Sequence[int],
    *,
    encodings: tuple[str, ...] = ("binary", "int8"),
    dim: int = DIM,
) -> None:
    """Create a table with one fragment for each of these numbers of rows."""
    store.check_writable()
    _, _, value = name.partition("__dt-")
    partition = (("dt", value),) if value else ()
    store.create(name, rows.schema(partition=partition, encodings=encodings, dim=dim))
    for number, count in enumerate(num_rows):
        add(store, name, count, seed=number, dim=dim)


def add(
    store: TableStore, name: str, num_rows: int, *, seed: int, run_id: str = "run-0", dim: int = DIM
) -> list[fragments.DataFileRecord]:
    """Append rows whose ids and vectors depend on the seed; return the files' records."""
    schema = store.open(name).schema
    new = table(schema, vectors(num_rows, seed=seed, dim=dim), prefix=f"{seed}-", run_id=run_id)
    written = fragments.write_fragments(store.root, store.storage, name, new)
    commit.append(store, name, written, marker=f"{name}:{seed}", run_id=run_id)
    return [file for fragment in written for file in fragment["files"]]
