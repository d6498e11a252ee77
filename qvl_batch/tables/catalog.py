"""`_qvl_catalog`: one row a partition table, rebuilt from the tables on demand."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import lance
import pyarrow as pa

from qvl_batch import crash
from qvl_batch.errors import QvlError, RunFailedError
from qvl_batch.schema import CATALOG
from qvl_batch.tables.fragments import data_path, sha256_of
from qvl_batch.tables.layout import CATALOG_TABLE, partition_json
from qvl_batch.tables.ledger import (
    done_units,
    failed_units,
    sql_text,
    table_collection,
    table_partition,
    table_recipe,
)
from qvl_batch.tables.store import TableStore, storage_error

_ATTEMPTS = 10
_LONGEST_PAUSE_S = 2.0


def read(store: TableStore) -> pa.Table:
    """Return the catalog, sorted by table; no rows if there is none yet."""
    dataset = store.open(CATALOG_TABLE)
    if dataset is None:
        return CATALOG.empty_table()
    return dataset.to_table().sort_by("table")


def row_of(store: TableStore, name: str, columns: Sequence[str]) -> dict[str, Any] | None:
    """Return these columns of a table's row; None if it is not in the catalog."""
    return _catalogued(store, [name], columns).get(name)


def refresh(
    store: TableStore,
    table_names: Iterable[str],
    known_files: Mapping[str, list[dict[str, Any]]],
    *,
    run_id: str | None,
    indexes: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> None:
    """Write the present state of these tables to the catalog, in one commit.

    Other tables' rows stay. A published index stays published as long as the table has an index
    of that name.

    Args:
        table_names: Partition tables. One that is not there is left out.
        known_files: For each table the records (`schema.DATA_FILE`) of files this run wrote, whose
            sha256 is known. Hashes in the catalog are kept; any other file is read and hashed, and
            marked ``recomputed``: its content when written was not seen.
        run_id: Of the run that refreshes; None keeps the one that is there.
        indexes: What is to be published of some of these tables (`schema.INDEX_STATE`); None takes
            a published index back.

    Raises:
        StorageError: If a table can not be read, or the catalog not be written.
    """
    names = sorted(set(table_names))
    catalogued = _catalogued(store, names, ["run_id", "files"])
    rows, index_names = [], {}
    for name in names:
        dataset = store.open(name)
        if dataset is not None:
            before = catalogued.get(name, {})
            known = {file["path"]: file for file in before.get("files", ())}
            known |= {file["path"]: file for file in known_files.get(name, ())}
            stated_run = run_id if run_id is not None else before.get("run_id", "")
            rows.append(_row(store, name, dataset, known, stated_run))
            index_names[name] = {index.name for index in dataset.describe_indices()}
    if not rows:
        return
    if store.open(CATALOG_TABLE) is None:
        store.create(CATALOG_TABLE, CATALOG)
    _merge(store, rows, index_names, indexes or {})


def present_row(store: TableStore, name: str, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the row of a table as it is now.

    Args:
        before: Its row so far: hashes, run and published index are kept as long as they hold.

    Raises:
        StorageError: If the table can not be read.
    """
    before = before or {}
    dataset = store.open_existing(name)
    known = {file["path"]: file for file in before.get("files", ())}
    row = _row(store, name, dataset, known, before.get("run_id", ""))
    index = before.get("index")
    if index is not None and index["name"] in {i.name for i in dataset.describe_indices()}:
        row["index"] = index
    return row


def unindexed_rows(row: Mapping[str, Any]) -> int | None:
    """Return how many rows a table's published index does not cover; None if it has none.

    Args:
        row: Of the catalog. Rows that an index does not cover are searched one by one: the result
            is right, and costs more the more they are. `qvl-batch index` covers them.
    """
    index = row["index"]
    return None if index is None else max(0, row["num_rows"] - index["num_rows"])


def _merge(
    store: TableStore,
    rows: list[dict[str, Any]],
    index_names: Mapping[str, set[str]],
    indexes: Mapping[str, Mapping[str, Any] | None],
) -> None:
    cause: Exception = RunFailedError("never tried")
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE_S, 0.1 * 2**attempt)))
        catalog = store.open(CATALOG_TABLE)
        if catalog is None:
            raise RunFailedError(f"{store.uri(CATALOG_TABLE)} is gone")
        try:
            crash.reached("catalog-update")
            published = _catalogued_in(catalog, list(index_names), ["index"])
            for row in rows:
                name = row["table"]
                index = indexes.get(name, published.get(name, {}).get("index"))
                kept = index is not None and index["name"] in index_names[name]
                row["index"] = dict(index) if kept else None
            # The version keeps a slow driver from putting an older state over a newer one. No
            # retry by Lance: whoever changed these rows since they were read may have published
            # an index, which is to be read first.
            (
                catalog.merge_insert("table")
                .when_matched_update_all(condition="source.version >= target.version")
                .when_not_matched_insert_all()
                .conflict_retries(0)
                .execute(pa.Table.from_pylist(rows, schema=CATALOG))
            )
            return
        except (ValueError, OSError, RuntimeError) as error:
            # Doing it again is harmless, whether or not it was done.
            cause = error
    if isinstance(cause, QvlError):
        raise cause
    raise storage_error(store.uri(CATALOG_TABLE), cause) from cause


def _row(
    store: TableStore,
    name: str,
    dataset: lance.LanceDataset,
    known: Mapping[str, Mapping[str, Any]],
    run_id: str,
) -> dict[str, Any]:
    recipe = table_recipe(dataset)
    collection, partition = table_collection(dataset), partition_json(table_partition(dataset))
    failures = failed_units(store, collection, partition).num_rows if collection else 0
    return {
        "table": name,
        "collection": collection,
        "partition": partition,
        "version": dataset.version,
        "num_units": len(done_units(dataset)),
        "num_rows": dataset.count_rows(),
        "num_failures": failures,
        "recipe_id": recipe.recipe_id if recipe else "",
        "recipe": recipe.to_json() if recipe else "",
        "run_id": run_id,
        "index_state": index_state(dataset),
        "index": None,
        "files": _files(store, name, dataset, known),
        "updated_at": datetime.now(UTC),
    }


def index_state(dataset: lance.LanceDataset) -> str:
    """Return ``none``, or the indexes as ``column:type`` joined by commas."""
    found = [
        f"{'+'.join(index.field_names)}:{index.index_type}" for index in dataset.describe_indices()
    ]
    return ",".join(sorted(found)) or "none"


def _files(
    store: TableStore,
    name: str,
    dataset: lance.LanceDataset,
    known: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    session = store.files(name)
    files = []
    for fragment in dataset.get_fragments():
        for file in fragment.metadata.files:
            path, size_bytes = data_path(file), file.file_size_bytes
            record = known.get(path)
            if record is None or record["size_bytes"] != size_bytes or not record["sha256"]:
                try:
                    digest = sha256_of(session, path, size_bytes)
                except OSError as error:
                    raise storage_error(f"{store.uri(name)}/{path}", error) from error
                record = {"path": path, "size_bytes": size_bytes, "sha256": digest}
                record["recomputed"] = True
            files.append({"recomputed": False} | dict(record))
    return files


def _catalogued(
    store: TableStore, names: list[str], columns: Sequence[str]
) -> dict[str, dict[str, Any]]:
    dataset = store.open(CATALOG_TABLE)
    return {} if dataset is None or not names else _catalogued_in(dataset, names, columns)


def _catalogued_in(
    dataset: lance.LanceDataset, names: list[str], columns: Sequence[str]
) -> dict[str, dict[str, Any]]:
    listed = ", ".join(sql_text(name) for name in names)
    rows = dataset.to_table(columns=["table", *columns], filter=f"table IN ({listed})")
    return {row["table"]: row for row in rows.to_pylist()}
