"""What the tables say of the work: the tables are the ledger, and rows win over failures."""

from __future__ import annotations

import lance
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.recipe import Recipe
from qvl_batch.schema import FAILURES
from qvl_batch.tables.layout import (
    COLLECTION_METADATA,
    FAILURES_TABLE,
    PARTITION_METADATA,
    Partition,
    partition_from_json,
    table_name,
)
from qvl_batch.tables.store import RECIPE_METADATA, TableStore, refuse_other_recipe

_VIEW_COLUMNS = (
    "unit_id",
    "stage",
    "error_type",
    "message",
    "retryable",
    "attempt",
    "uri",
    "failed_at",
)


def sql_text(value: str) -> str:
    """Return a string as an SQL literal; the one place where a filter is quoted."""
    return "'" + value.replace("'", "''") + "'"


def done_units(ds: lance.LanceDataset) -> pa.Array:
    """Return the distinct unit_ids that have any row, whatever its segment, as a string array.

    A unit of which some rows were removed by hand counts as done here; `check_table` tells.
    """
    seen = [
        pc.unique(batch.column(0))
        for batch in ds.to_batches(columns=["unit_id"], batch_size=65_536)
        if batch.num_rows
    ]
    if not seen:
        return pa.array([], pa.string())
    return pc.unique(pa.concat_arrays(seen))


def failed_units(store: TableStore, collection: str, partition_json: str) -> pa.Table:
    """Return the failures that count: the latest attempt of each unit that has no rows.

    Columns ``unit_id, stage, error_type, message, retryable, attempt, uri, failed_at``, sorted by
    unit_id; no rows if nothing ever failed.

    Raises:
        StorageError: If a table can not be read.
    """
    rows = failure_rows(store, collection, partition_json)
    if not rows.num_rows:
        return rows
    ds = store.open(table_name(collection, partition_from_json(partition_json)))
    return latest_failures(rows, None if ds is None else done_units(ds))


def failure_rows(store: TableStore, collection: str, partition_json: str) -> pa.Table:
    """Return all failures ever noted of a partition, in the columns of `failed_units`."""
    failures = store.open(FAILURES_TABLE)
    schema = pa.schema([FAILURES.field(name) for name in _VIEW_COLUMNS])
    if failures is None:
        return schema.empty_table()
    rows = failures.to_table(
        columns=list(_VIEW_COLUMNS),
        filter=f"collection = {sql_text(collection)} AND partition = {sql_text(partition_json)}",
    )
    return rows.cast(schema)


def latest_failures(rows: pa.Table, done: pa.Array | None) -> pa.Table:
    """Return the latest failure of each unit that is not done, sorted by unit_id.

    Args:
        rows: At least ``unit_id, attempt, failed_at``; may hold a unit often.
        done: unit_ids that have rows.
    """
    if done is not None and len(done):
        rows = rows.filter(pc.invert(pc.is_in(rows["unit_id"], value_set=done)))
    keys = [("unit_id", "ascending"), ("attempt", "descending"), ("failed_at", "descending")]
    rows = rows.take(pc.sort_indices(rows, sort_keys=keys))
    if rows.num_rows < 2:
        return rows
    ids = rows["unit_id"].combine_chunks()
    first = pa.concat_arrays([pa.array([True]), pc.not_equal(ids[1:], ids[:-1])])
    return rows.filter(first)


def table_recipe(ds: lance.LanceDataset) -> Recipe | None:
    """Return the recipe stated in a table's schema, or None if it states none."""
    stated = (ds.schema.metadata or {}).get(RECIPE_METADATA)
    return None if stated is None else Recipe.from_json(stated.decode())


def check_recipe(ds: lance.LanceDataset, recipe: Recipe) -> None:
    """Refuse to write to, or to query, a table with another recipe than its own.

    Raises:
        RecipeMismatchError: With every field that differs, and what to do.
    """
    ours = pa.schema([], metadata={RECIPE_METADATA: recipe.to_json().encode()})
    refuse_other_recipe(ds.uri, ours, ds.schema)


def table_partition(ds: lance.LanceDataset) -> Partition:
    """Return the partition stated in a table's schema; () if it states none."""
    stated = (ds.schema.metadata or {}).get(PARTITION_METADATA.encode())
    return () if stated is None else partition_from_json(stated.decode())


def table_collection(ds: lance.LanceDataset) -> str:
    """Return the collection stated in a table's schema; '' if it states none."""
    return (ds.schema.metadata or {}).get(COLLECTION_METADATA.encode(), b"").decode()
