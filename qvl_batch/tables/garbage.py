"""Garbage collection of tables: old versions, and files that no version refers to.

What is removed is what no kept version refers to and what is older than any run lasts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import lance
from lance.file import LanceFileSession

from qvl_batch.errors import StorageError
from qvl_batch.tables import staging
from qvl_batch.tables.lease import TTL_S, holders, lease_place
from qvl_batch.tables.store import TableStore, storage_error

LONGEST_RUN = timedelta(days=7)

# No version is that old: nothing but unreferenced files is asked for.
_NO_VERSION = timedelta(days=36_500)
_MANY_FILES = 10_000_000


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


def held_tables(store: TableStore) -> frozenset[str]:
    """Return the tables that live runs hold.

    Raises:
        StorageError: If the leases can not be read.
    """
    try:
        found = holders(lease_place(store.root, store.storage))
    except OSError as error:
        raise storage_error(store.root, error) from error
    return frozenset(holder.table for holder in found if holder.is_live(TTL_S))


def gc(
    store: TableStore,
    table: str,
    older_than: timedelta = LONGEST_RUN,
    *,
    dry_run: bool = False,
    held: Collection[str] | None = None,
) -> Collected:
    """Remove old versions of a table, and files that no version refers to.

    A version goes if it is neither the latest nor tagged and its manifest is older than
    ``older_than``. Any other file goes if no kept version, branch or tag refers to it and it is
    older than that too: data of a run that died before its commit, an index or a compaction that
    was not finished. What an open replace has written stays, however old it is. Ages are
    differences of two times that the store itself gave.

    Args:
        older_than: Must be longer than a run holds files that it has not committed, and than a
            reader stays with one version. While a run writes to the table it is 7 days at least.
        dry_run: Remove nothing, only say what would be.
        held: The result of `held_tables`, where many tables are cleaned; None: it is asked for.

    Raises:
        StorageError: If the table can not be read, or a file not be removed.
    """
    dataset = store.open_existing(table)
    try:
        if table in (held_tables(store) if held is None else held):
            older_than = max(older_than, LONGEST_RUN)
        oldest = lease_place(store.root, store.storage).now() - older_than
        modified = _modified(store, table)
        # Of an open replace: no version refers to them until it is published.
        for path in _staged_files(store, table):
            modified.pop(path, None)
        dead = _unreferenced(dataset, _old_versions(dataset, modified, oldest), oldest, modified)
        if not dry_run:
            _remove(store.files(table), dead)
    except (ValueError, OSError, RuntimeError) as error:
        raise storage_error(store.uri(table), error) from error
    versions = [_version_of(file.path) for file in dead if file.kind == "manifest"]
    return Collected(
        table=table, versions=tuple(sorted(v for v in versions if v)), files=tuple(dead)
    )


def orphans(store: TableStore, table: str, older_than: timedelta) -> list[DeadFile]:
    """Return the files that no version and no open replace refers to and that are that old.

    `gc` removes those that Lance could have written. Anything else in the folder of data is told
    too.

    Raises:
        StorageError: If the table can not be read.
    """
    dataset = store.open_existing(table)
    try:
        oldest = lease_place(store.root, store.storage).now() - older_than
        modified = _modified(store, table)
        for path in _staged_files(store, table):
            modified.pop(path, None)
        found = _unreferenced(dataset, [], oldest, modified)
        sizes = file_sizes(store, table)
        strange = [
            DeadFile(path=path, kind="foreign", size_bytes=sizes.get(path, 0))
            for path, at in sorted(modified.items())
            if path.startswith("data/") and not path.endswith(".lance") and at < oldest
        ]
    except (ValueError, OSError, RuntimeError) as error:
        raise storage_error(store.uri(table), error) from error
    return [*found, *strange]


def _staged_files(store: TableStore, table: str) -> list[str]:
    staged = None if table.startswith("_") else staging.read(store, table)
    fragments = staged.fragments if staged is not None else ()
    return [file["path"] for fragment in fragments for file in fragment["files"]]


def present_versions(store: TableStore, table: str) -> list[int]:
    """Return the versions of a table that cleaning has left, ascending.

    Raises:
        StorageError: If the table can not be listed.
    """
    try:
        found = map(_version_of, _modified(store, table))
        return sorted(version for version in found if version is not None)
    except (ValueError, OSError, RuntimeError) as error:
        raise storage_error(store.uri(table), error) from error


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


def file_sizes(store: TableStore, table: str) -> dict[str, int]:
    """Return the bytes of every file of a table, by its path within it."""
    return {path: info["size"] for path, info in _listed(store, table).items()}


def _modified(store: TableStore, table: str) -> dict[str, datetime]:
    """Return when each file of a table was written, by its path within the table."""
    return {path: _time_of(info) for path, info in _listed(store, table).items()}


def _listed(store: TableStore, table: str) -> dict[str, dict[str, Any]]:
    uri = store.uri(table)
    fs = store.storage.filesystem(uri)
    fs.invalidate_cache()
    top = fs._strip_protocol(uri).rstrip("/")
    found = fs.find(top, detail=True)
    return {path.removeprefix(f"{top}/"): info for path, info in found.items()}


def _time_of(info: Mapping[str, Any]) -> datetime:
    # Each file system of fsspec has a name of its own for it.
    for key in ("LastModified", "mtime", "last_modified", "updated"):
        at = info.get(key)
        if isinstance(at, datetime):
            return at
        if isinstance(at, int | float):
            return datetime.fromtimestamp(at).astimezone()
    raise StorageError(f"{info.get('name')} has no time.", "This store can not be cleaned.")
