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
    KIND_METADATA,
    PARTITION_METADATA,
    VECTORS_KIND,
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


def units_of_media(ds: lance.LanceDataset) -> pa.Table:
    """Return ``unit_id, media_id`` of every unit that has any row, each once."""
    seen = [
        pa.Table.from_batches([batch]).group_by(["unit_id", "media_id"]).aggregate([])
        for batch in ds.to_batches(columns=["unit_id", "media_id"], batch_size=65_536)
        if batch.num_rows
    ]
    if not seen:
        return pa.table({name: pa.array([], pa.string()) for name in ("unit_id", "media_id")})
    return pa.concat_tables(seen).group_by(["unit_id", "media_id"]).aggregate([])


class Failures:
    """The failures of a collection, read once for all its partitions.

    Raises:
        StorageError: If the table can not be read.
    """

    def __init__(self, store: TableStore, collection: str) -> None:
        self._empty = pa.schema([FAILURES.field(name) for name in _VIEW_COLUMNS]).empty_table()
        self._rows: dict[str, pa.Table] = {}
        dataset = store.open(FAILURES_TABLE)
        if dataset is None:
            return
        rows = dataset.to_table(
            columns=["partition", *_VIEW_COLUMNS], filter=pc.field("collection") == collection
        )
        for partition in pc.unique(rows["partition"]).to_pylist():
            mine = rows.filter(pc.equal(rows["partition"], partition))
            self._rows[partition] = mine.select(_VIEW_COLUMNS)

    def of(self, partition_json: str, done: pa.Array | None) -> pa.Table:
        """Return the failures that count in a partition: the latest of each unit without rows.

        Columns ``unit_id, stage, error_type, message, retryable, attempt, uri, failed_at``, sorted
        by unit_id; no rows if nothing ever failed.

        Args:
            partition_json: As `layout.partition_json` gives it.
            done: unit_ids that have rows; None if there is no table.
        """
        rows = self._rows.get(partition_json, self._empty)
        return latest_failures(rows, done).cast(self._empty.schema)


def failed_units(store: TableStore, collection: str, partition_json: str) -> pa.Table:
    """Return `Failures.of` one partition.

    Raises:
        StorageError: If a table can not be read.
    """
    ds = store.open(table_name(collection, partition_from_json(partition_json)))
    done = None if ds is None else done_units(ds)
    return Failures(store, collection).of(partition_json, done)


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


def table_kind(ds: lance.LanceDataset) -> str:
    """Return what a table's rows are: ``vectors``, ``scores`` or ``candidates``."""
    return (ds.schema.metadata or {}).get(KIND_METADATA.encode(), VECTORS_KIND.encode()).decode()
