"""Compaction and garbage collection of tables: fewer files, no dead ones, the same rows.

Neither takes part in a run's exactly-once protocol: compaction writes files of its own and makes
them visible only if no run has written to the table meanwhile; garbage collection removes what no
kept version refers to and what is older than any run lasts.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import lance
from lance.file import LanceFileSession
from lance.optimize import Compaction, RewriteResult

from qvl_batch.errors import InvariantBrokenError, LeaseHeldError, RunFailedError, StorageError
from qvl_batch.tables import catalog
from qvl_batch.tables.commit import CONTENT_OPERATIONS, stamps_since
from qvl_batch.tables.fragments import DataFileRecord, data_path, sha256_of
from qvl_batch.tables.layout import VECTORS_KIND
from qvl_batch.tables.lease import TTL_S, Leases, holders, lease_place
from qvl_batch.tables.ledger import table_collection, table_kind
from qvl_batch.tables.rewrite import fence
from qvl_batch.tables.store import TableStore, storage_error

# One fragment a million rows: Lance's own target, and about 1.2 GB at 1,024 dimensions.
TARGET_ROWS = 1_048_576
LONGEST_RUN = timedelta(days=7)

# No version is that old: nothing but unreferenced files is asked for.
_NO_VERSION = timedelta(days=36_500)
_MANY_FILES = 10_000_000

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
    steal: bool = False,
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
        steal: Take the table from a run that was killed before its lease expires.
        commit: Makes the rewritten fragments visible; for tests.

    Raises:
        LeaseHeldError: If a run is writing to the table, or did while this worked. The table is as
            that left it.
        InvariantBrokenError: If a source file is not what the catalog says, or rows got lost.
        RunFailedError: If other maintenance was faster. The table is as that left it.
        StorageError: If there is no such table, or it can not be read or written.
    """
    _open(store, table)
    if table.startswith("_"):
        return _compact(store, table, target_rows, commit, None)
    run_id = f"compact-{uuid.uuid4().hex[:8]}"
    with Leases(lease_place(store.root, store.storage), run_id) as leases:
        for taken in leases.acquire([table], steal=steal):
            fence(store, taken, run_id=run_id)
        return _compact(store, table, target_rows, commit, leases)


def _compact(
    store: TableStore,
    table: str,
    target_rows: int,
    commit: CommitCompaction,
    leases: Leases | None,
) -> Compacted:
    dataset = _open(store, table)
    try:
        before = len(dataset.get_fragments())
        plan = Compaction.plan(dataset, {"target_rows_per_fragment": target_rows})
        known: list[DataFileRecord] = []
        if plan.num_tasks():
            known = _rewrite(store, table, dataset, plan.tasks, commit, leases)
        latest = _open(store, table)
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
    if leases is not None:
        leases.confirm(table)
        stamps = stamps_since(store, table, _open(store, table), dataset.version)
        others = [stamp for stamp in stamps if stamp.operation in CONTENT_OPERATIONS]
        if others:
            for path in added:
                files.delete_file(path)
            raise LeaseHeldError(table, others[-1].run_id or "unknown")
    try:
        commit(dataset, results)
    except (ValueError, OSError, RuntimeError) as error:
        # Its acknowledgement may have been lost: the table tells.
        if not added <= _paths(_open(store, table)):
            if "conflict" in str(error).lower():
                raise RunFailedError(
                    f"table {table}: other maintenance was faster; run this again"
                ) from error
            raise
    done = _open(store, table)
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


@dataclass(frozen=True, kw_only=True)
class DeadFile:
    """A file that no kept version of its table refers to."""

    path: str
    kind: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What garbage collection removed from one table, or would remove."""

    table: str
    versions: tuple[int, ...]
    files: tuple[DeadFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def gc(
    store: TableStore, table: str, older_than: timedelta = LONGEST_RUN, *, dry_run: bool = False
) -> Collected:
    """Remove old versions of a table, and files that no version refers to.

    A version goes if it is neither the latest nor tagged and its manifest is older than
    ``older_than``. Any other file goes if no kept version, branch or tag refers to it and it is
    older than that too: data of a run that died before its commit, an index or a compaction that
    was not finished. Ages are differences of two times that the store itself gave.

    Args:
        older_than: Must be longer than a run holds files that it has not committed, and than a
            reader stays with one version. While a run writes to the table it is 7 days at least.
        dry_run: Remove nothing, only say what would be.

    Raises:
        StorageError: If the table can not be read, or a file not be removed.
    """
    dataset = _open(store, table)
    try:
        place = lease_place(store.root, store.storage)
        if any(holder.table == table and holder.is_live(TTL_S) for holder in holders(place)):
            older_than = max(older_than, LONGEST_RUN)
        oldest = place.now() - older_than
        modified = _modified(store, table)
        dead = _unreferenced(dataset, _old_versions(dataset, modified, oldest), oldest, modified)
        if not dry_run:
            _remove(store.files(table), dead)
    except (ValueError, OSError, RuntimeError) as error:
        raise storage_error(store.uri(table), error) from error
    versions = [_version_of(file.path) for file in dead if file.kind == "manifest"]
    return Collected(
        table=table, versions=tuple(sorted(v for v in versions if v)), files=tuple(dead)
    )


def _old_versions(
    dataset: lance.LanceDataset, modified: Mapping[str, datetime], oldest: datetime
) -> list[int]:
    tagged = {tag["version"] for tag in dataset.tags.list().values()}
    found = {_version_of(path): at for path, at in modified.items()}
    return sorted(
        version
        for version, at in found.items()
        if version is not None
        and version != dataset.version
        and version not in tagged
        and at < oldest
    )


def _unreferenced(
    dataset: lance.LanceDataset,
    versions: Sequence[int],
    oldest: datetime,
    modified: Mapping[str, datetime],
) -> list[DeadFile]:
    """Return what could go with these versions, manifests first, then by path."""
    chosen: dict[str, Any] = {"versions": versions} if versions else {"older_than": _NO_VERSION}
    # delete_unverified lists what no version refers to whatever its age; the age is looked at here.
    candidates = dataset.explain_cleanup_old_versions(
        delete_unverified=True,
        error_if_tagged_old_versions=False,
        include_files=True,
        max_files=_MANY_FILES,
        **chosen,
    ).candidate_files
    dead = []
    for file in candidates:
        path = file.path.rsplit(f"{dataset.uri.rstrip('/').rsplit('/', 1)[-1]}/", 1)[-1]
        if path in modified and modified[path] < oldest:
            dead.append(DeadFile(path=path, kind=file.kind, size_bytes=file.size_bytes))
    return sorted(dead, key=lambda file: (file.kind != "manifest", file.path))


def _remove(files: LanceFileSession, dead: Sequence[DeadFile]) -> None:
    # Manifests first: a version must never refer to a file that is gone.
    manifests = [file for file in dead if file.kind == "manifest"]
    others = [file for file in dead if file.kind != "manifest"]
    with ThreadPoolExecutor(16) as pool:
        for group in (manifests, others):
            list(pool.map(lambda file: files.delete_file(file.path), group))


def _version_of(path: str) -> int | None:
    """Return the version of a manifest's path; None for any other file."""
    folder, _, name = path.rpartition("/")
    number, _, extension = name.partition(".")
    if folder != "_versions" or extension != "manifest" or not number.isdecimal():
        return None
    # Lance counts down from the largest number, so that the latest version is listed first.
    return 2**64 - 1 - int(number) if len(number) == 20 else int(number)


def _modified(store: TableStore, table: str) -> dict[str, datetime]:
    """Return when each file of a table was written, by its path within the table."""
    uri = store.uri(table)
    fs = store.storage.filesystem(uri)
    fs.invalidate_cache()
    top = fs._strip_protocol(uri).rstrip("/")
    found = {}
    for path, info in fs.find(top, detail=True).items():
        found[path.removeprefix(f"{top}/")] = _time_of(info)
    return found


def _time_of(info: Mapping[str, Any]) -> datetime:
    # Each file system of fsspec has a name of its own for it.
    for key in ("LastModified", "mtime", "last_modified", "updated"):
        at = info.get(key)
        if isinstance(at, datetime):
            return at
        if isinstance(at, int | float):
            return datetime.fromtimestamp(at).astimezone()
    raise StorageError(f"{info.get('name')} has no time.", "This store can not be cleaned.")


def _open(store: TableStore, table: str) -> lance.LanceDataset:
    dataset = store.open(table)
    if dataset is None:
        raise StorageError(f"There is no table {store.uri(table)}.", "Check the root and the name.")
    return dataset
