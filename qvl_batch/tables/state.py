"""What each table of a root holds now, beside what the catalog says of it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import lance

from qvl_batch.tables import catalog
from qvl_batch.tables.layout import VECTORS_KIND, partition_json
from qvl_batch.tables.ledger import (
    done_units,
    failed_units,
    table_collection,
    table_kind,
    table_partition,
    table_recipe,
)
from qvl_batch.tables.store import TableStore, storage_error

_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class TableState:
    """One partition's table.

    ``catalogued_version`` is None for a table that is not in the catalog. ``num_unindexed_rows`` is
    None without a published index. ``recipe_id`` is '' for a table that states no recipe.
    """

    table: str
    collection: str
    partition: str
    version: int
    catalogued_version: int | None
    num_rows: int
    num_units: int
    num_failures: int
    num_unindexed_rows: int | None
    recipe_id: str


def table_states(store: TableStore) -> tuple[list[TableState], list[str]]:
    """Return the state of every table of vectors, sorted, and the catalogued ones that are gone.

    Rows are counted now. Units and failures are the catalog's where it knows the table's latest
    version, else they are counted, which reads a column of the table.

    Raises:
        StorageError: If a table can not be read.
    """
    catalogued = {row["table"]: row for row in catalog.read(store).to_pylist()}
    names = [name for name in store.names() if not name.startswith("_")]

    def look(name: str) -> TableState | None:
        try:
            return _state(store, name, catalogued.get(name))
        except (ValueError, OSError, RuntimeError) as error:
            raise storage_error(store.uri(name), error) from error

    with ThreadPoolExecutor(_THREADS) as pool:
        states = [state for state in pool.map(look, names) if state is not None]
    return states, sorted(set(catalogued) - set(names))


def _state(store: TableStore, name: str, row: Mapping[str, Any] | None) -> TableState | None:
    dataset = store.open(name)
    if dataset is None or table_kind(dataset) != VECTORS_KIND:
        return None
    collection, partition = table_collection(dataset), partition_json(table_partition(dataset))
    if not collection:
        # Somebody else's table in the same directory.
        return None
    recipe = table_recipe(dataset)
    if row is not None and row["version"] == dataset.version:
        num_units, num_failures = row["num_units"], row["num_failures"]
    else:
        num_units = len(done_units(dataset))
        num_failures = failed_units(store, collection, partition).num_rows
    return TableState(
        table=name,
        collection=collection,
        partition=partition,
        version=dataset.version,
        catalogued_version=None if row is None else row["version"],
        num_rows=dataset.count_rows(),
        num_units=num_units,
        num_failures=num_failures,
        num_unindexed_rows=_unindexed_rows(dataset, row),
        recipe_id=recipe.recipe_id if recipe else "",
    )


def _unindexed_rows(dataset: lance.LanceDataset, row: Mapping[str, Any] | None) -> int | None:
    """Return how many rows the published index does not cover; None if none is published."""
    published = None if row is None else row["index"]
    if not published or not published["name"]:
        return None
    if published["name"] not in {index.name for index in dataset.describe_indices()}:
        return dataset.count_rows()
    return dataset.stats.index_stats(published["name"])["num_unindexed_rows"]
