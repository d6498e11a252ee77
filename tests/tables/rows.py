"""Small embedded units and tables, made from their ids alone."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from qvl_batch import schema as schemas
from qvl_batch.recipe import Recipe
from qvl_batch.tables import commit, fragments, layout
from qvl_batch.tables.store import TableStore

DIM = 16
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PLANNED = schemas.PLANNED.append(pa.field("dt", pa.string()))
DECODE_FAILURE = {
    "stage": "decode",
    "error_type": "CorruptMediaError",
    "message": "not a picture",
    "retryable": False,
}


def recipe(encodings: tuple[str, ...] = ("binary", "int8"), dim: int = DIM) -> Recipe:
    return Recipe(model_digest="0" * 32, dim=dim, encodings=encodings)


def schema(
    collection: str = "media",
    partition: layout.Partition = (),
    encodings: tuple[str, ...] = ("binary", "int8"),
    dim: int = DIM,
) -> pa.Schema:
    stated = {
        layout.COLLECTION_METADATA: collection,
        layout.PARTITION_METADATA: layout.partition_json(partition),
    }
    return schemas.table_rows(recipe(encodings, dim), [pa.field("dt", pa.string())], stated)


def vector(key: str, dim: int = DIM) -> np.ndarray:
    """Return a unit vector, float32 (dim,), that depends on the key alone."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    values = np.random.default_rng(seed).normal(size=dim)
    return (values / np.linalg.norm(values)).astype(np.float32)


def encoded(key: str, encodings: tuple[str, ...], dim: int = DIM) -> dict[str, object]:
    values = vector(key, dim)
    columns: dict[str, object] = {}
    if "float32" in encodings or "float16" in encodings:
        kind = np.float32 if "float32" in encodings else np.float16
        columns["vector"] = values.astype(kind).tobytes()
    if "int8" in encodings:
        scale = np.float32(np.abs(values).max() / 127)
        columns["vector_int8"] = np.round(values / scale).astype(np.int8).tobytes()
        columns["vector_scale"] = float(scale)
    if "binary" in encodings:
        columns["vector_bits"] = np.packbits(values > 0).tobytes()
    return columns


def embedded(
    ids: list[str],
    *,
    num_segments: int = 1,
    failed: dict[str, dict[str, object]] | None = None,
    encodings: tuple[str, ...] = ("binary", "int8"),
    dim: int = DIM,
    attempt: int = 0,
) -> pa.Table:
    """Return the edge behind EmbedMedia for these unit_ids."""
    units = []
    for ordinal, unit in enumerate(ids):
        failure = (failed or {}).get(unit)
        rows = [
            {
                "segment": segment,
                "num_segments": num_segments,
                "page": segment,
                "num_tokens": 7,
                "truncated": False,
                **encoded(f"{unit}:{segment}", encodings, dim),
            }
            for segment in range(num_segments)
        ]
        units.append(
            {
                "unit_id": unit,
                "media_id": f"media-{unit}",
                "uri": f"s3://bucket/{unit}.png",
                "etag": f"etag-{unit}",
                "kind": "image",
                "text": f"about {unit}",
                "dt": "2026-01-02",
                "_ordinal": ordinal,
                "_table": "media",
                "_attempt": attempt,
                "_rows": None if failure else rows,
                "_failure": failure,
            }
        )
    return pa.Table.from_pylist(units, schema=schemas.embedded(PLANNED))


def table_rows(ids: list[str], table_schema: pa.Schema, **made: object) -> pa.Table:
    return fragments.explode(embedded(ids, **made), table_schema, "run-0", NOW)


def failures(ids: list[str], *, run_id: str = "run-0", attempt: int = 0) -> pa.Table:
    units = embedded(ids, failed=dict.fromkeys(ids, DECODE_FAILURE), attempt=attempt)
    return fragments.failure_rows(
        units, collection="media", partition_json="{}", run_id=run_id, failed_at=NOW
    )


def add(store: TableStore, table: str, rows: pa.Table, marker: str, **options: object) -> int:
    """Write and commit rows as run-0."""
    written = fragments.write_fragments(store.root, store.storage, table, rows)
    return commit.append(store, table, written, **{"marker": marker, "run_id": "run-0"} | options)
