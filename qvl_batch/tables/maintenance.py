"""Compaction of tables: fewer files, the same rows, the same indexes.

It takes no part in a run's exactly-once protocol: it writes files of its own and makes them visible
only if no run has written to the table meanwhile.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lance
from lance.file import LanceFileSession
from lance.optimize import Compaction, RewriteResult

from qvl_batch import crash
from qvl_batch.errors import InvariantBrokenError, LeaseHeldError, RunFailedError
from qvl_batch.tables import catalog
from qvl_batch.tables.commit import other_writers
from qvl_batch.tables.fragments import DataFileRecord, data_path, sha256_of
from qvl_batch.tables.layout import VECTORS_KIND
from qvl_batch.tables.lease import Leases, lease_place
from qvl_batch.tables.ledger import table_collection, table_kind
from qvl_batch.tables.rewrite import fence
from qvl_batch.tables.store import TableStore, storage_error

# One fragment a million rows: Lance's own target, and about 1.2 GB at 1,024 dimensions.
TARGET_ROWS = 1_048_576
# Lance's own: fewer deleted rows are not worth writing the others anew.
DELETED_SHARE = 0.1

CommitCompaction = Callable[[lance.LanceDataset, list[RewriteResult]], object]


@dataclass(frozen=True, kw_only=True)
class Compacted:
    """What became of one table; equal numbers mean that there was nothing to do."""

    table: str
    num_rows: int
    fragments_before: int
    fragments_after: int


def compact(
    store: TableStore,
    table: str,
    *,
    target_rows: int = TARGET_ROWS,
    deleted_share: float = DELETED_SHARE,
    steal: bool = False,
    leases: Leases | None = None,
    commit: CommitCompaction = Compaction.commit,
) -> Compacted:
    """Write a table's small fragments anew as large ones, in the same order of rows.

    Source files are compared with the catalog's hashes first, since Lance has no checksums and a
    flipped byte would get a new, right hash. The new files are hashed before they are visible and
    go to the catalog as known, or as ``recomputed`` if a source was not known itself. Indexes stay
    valid: Lance carries them over to the new row addresses in the same commit.

    The table's lease is held meanwhile. Tables that all runs share (``_qvl_…``) have none: Lance
    lets their appends and a compaction pass each other.

    Args:
        target_rows: Rows of a fragment that is large enough.
        deleted_share: A fragment that has lost a larger share of its rows is written anew without
            them; 0: any that has lost a row.
        steal: Take the table from a run that was killed before its lease expires.
        leases: Of the caller, who holds the table already.
        commit: Makes the rewritten fragments visible; for tests.

    Raises:
        LeaseHeldError: If a run is writing to the table, or did while this worked. The table is as
            that left it.
        InvariantBrokenError: If a source file is not what the catalog says, or rows got lost.
        RunFailedError: If other maintenance was faster. The table is as that left it.
        StorageError: If there is no such table, or it can not be read or written.
    """
    store.open_existing(table)
    options = {
        "target_rows_per_fragment": target_rows,
        "materialize_deletions_threshold": deleted_share,
    }
    if table.startswith("_") or leases is not None:
        return _compact(store, table, options, commit, leases)
    run_id = f"compact-{uuid.uuid4().hex[:8]}"
    with Leases(lease_place(store.root, store.storage), run_id) as leases:
        for taken in leases.acquire([table], steal=steal):
            fence(store, taken, run_id=run_id)
        return _compact(store, table, options, commit, leases)


def _compact(
    store: TableStore,
    table: str,
    options: Mapping[str, Any],
    commit: CommitCompaction,
    leases: Leases | None,
) -> Compacted:
    dataset = store.open_existing(table)
    try:
        before = len(dataset.get_fragments())
        plan = Compaction.plan(dataset, dict(options))
        known: list[DataFileRecord] = []
        if plan.num_tasks():
            known = _rewrite(store, table, dataset, plan.tasks, commit, leases)
        latest = store.open_existing(table)
        is_catalogued = table_collection(latest) and table_kind(latest) == VECTORS_KIND
        if is_catalogued and _catalogued_version(store, table) != latest.version:
            catalog.refresh(store, [table], {table: known}, run_id=None)
    except (ValueError, OSError, RuntimeError) as error:
        raise storage_error(store.uri(table), error) from error
    return Compacted(
        table=table,
        num_rows=latest.count_rows(),
        fragments_before=before,
        fragments_after=len(latest.get_fragments()),
    )


def has_deleted_rows(dataset: lance.LanceDataset) -> bool:
    """Return whether data files still hold rows that were taken away."""
    return any(fragment.num_deletions for fragment in dataset.get_fragments())


def _catalogued_version(store: TableStore, table: str) -> int | None:
    row = catalog.row_of(store, table, ["version"])
    return row["version"] if row else None


def _rewrite(
    store: TableStore,
    table: str,
    dataset: lance.LanceDataset,
    tasks: Sequence[Any],
    commit: CommitCompaction,
    leases: Leases | None,
) -> list[DataFileRecord]:
    """Rewrite and commit; return the records of the new files."""
    files = store.files(table)
    row = catalog.row_of(store, table, ["files"])
    catalogued = {file["path"]: file for file in row["files"]} if row else {}
    results, known = [], []
    for task in tasks:
        sources = [data_path(file) for fragment in task.fragments for file in fragment.files]
        sizes = {
            data_path(file): file.file_size_bytes
            for fragment in task.fragments
            for file in fragment.files
        }
        _compare_hashes(files, table, sizes, catalogued)
        unseen = any(path not in catalogued or catalogued[path]["recomputed"] for path in sources)
        crash.reached("compaction")
        result = task.execute(dataset)
        results.append(result)
        for fragment in result.new_fragments:
            for file in fragment.files:
                path, size_bytes = data_path(file), file.file_size_bytes
                digest = sha256_of(files, path, size_bytes)
                known.append(
                    DataFileRecord(
                        path=path, size_bytes=size_bytes, sha256=digest, recomputed=unseen
                    )
                )
    added = {record["path"] for record in known}
    if leases is not None and not table.startswith("_"):
        leases.confirm(table)
        # Its own fence is older than the version that was read.
        others = other_writers(store, table, "", dataset.version)
        if others:
            for path in added:
                files.delete_file(path)
            raise LeaseHeldError(table, others[-1] or "unknown")
    crash.reached("compaction")
    try:
        commit(dataset, results)
        crash.reached("compaction")
    except (ValueError, OSError, RuntimeError) as error:
        # Its acknowledgement may have been lost: the table tells.
        if not added <= _paths(store.open_existing(table)):
            if "conflict" in str(error).lower():
                raise RunFailedError(
                    f"table {table}: other maintenance was faster; run this again"
                ) from error
            raise
    done = store.open_existing(table)
    if not added <= _paths(done):
        raise InvariantBrokenError(f"table {table}: a compaction was accepted and is gone")
    if done.checkout_version(dataset.version).count_rows() > done.count_rows():
        raise InvariantBrokenError(
            f"table {table}: {dataset.count_rows()} rows before compaction, {done.count_rows()} "
            f"after; version {dataset.version} has them all"
        )
    return known


def _compare_hashes(
    files: LanceFileSession,
    table: str,
    sizes: Mapping[str, int],
    catalogued: Mapping[str, Mapping[str, Any]],
) -> None:
    for path, size_bytes in sizes.items():
        record = catalogued.get(path)
        if record is not None and sha256_of(files, path, size_bytes) != record["sha256"]:
            raise InvariantBrokenError(
                f"table {table}: {path} is not what was written (sha256 differs from the catalog)"
            )


def _paths(dataset: lance.LanceDataset) -> set[str]:
    return {
        data_path(file) for fragment in dataset.get_fragments() for file in fragment.metadata.files
    }
