"""Every file of every table under a root, read and compared; and the catalog written anew."""

from __future__ import annotations

from collections.abc import Callable

from qvl_batch.jobs.chosen import all_tables
from qvl_batch.storage import Storage
from qvl_batch.tables.integrity import Integrity, Rebuilt, check_files, rebuild_catalog
from qvl_batch.tables.store import TableStore


def look_at_files(store: TableStore) -> tuple[Integrity, ...]:
    """Return `check_files` of all tables, our own among them.

    Raises:
        StorageError: If a table can not be read.
    """
    return tuple(check_files(store, name) for name in all_tables(store))


def run_rebuild_catalog(
    root: str, storage: Storage, *, echo: Callable[[str], None] = print
) -> Rebuilt:
    """Write a root's catalog anew from its tables; see `rebuild_catalog`.

    Raises:
        InputError: If there are no tables, or one can not be read.
    """
    store = TableStore(root, storage)
    all_tables(store)
    rebuilt = rebuild_catalog(store)
    echo(str(rebuilt))
    return rebuilt
