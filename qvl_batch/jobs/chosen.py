"""Which tables of a root a maintenance command works on, and how its outcome is told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qvl_batch.errors import ConfigError, LeaseHeldError, QvlError, StorageError
from qvl_batch.tables.open import OpenTables, collection_of
from qvl_batch.tables.store import TableStore


def vector_tables(
    store: TableStore, collection: str | None = None, where: Sequence[str] = ()
) -> list[str]:
    """Return the names of the partition tables of vectors, sorted.

    Args:
        collection: Only this one's; None: those of all collections.
        where: Filters over the partition's keys, whose values are texts, such as
            ``dt>=2026-01-01``. All of them must hold.

    Raises:
        ConfigError: If a filter is wrong, or no table passes.
        StorageError: If the root holds no such tables, or they can not be read.
    """
    tables = OpenTables(store)
    there = tables.collections()
    if not there:
        raise StorageError(f"{store.root} holds no tables.", "Give the output.root of a run.")
    if collection is not None and collection not in there:
        raise StorageError(
            f"{store.root} holds no collection {collection!r}.", f"There are: {', '.join(there)}."
        )
    chosen = [collection] if collection is not None else there
    names = [name for one in chosen for name in tables.of(one, list(where) or None)]
    if not names:
        raise ConfigError(f"No table passes {' and '.join(where)}.", "Widen the filter.")
    return sorted(names)


def all_tables(store: TableStore, collection: str | None = None) -> list[str]:
    """Return the names of all tables, those of our own (``_qvl_…``) and scores among them.

    Args:
        collection: Only the tables of this one.

    Raises:
        StorageError: If the root holds none, or can not be listed.
    """
    names = store.names()
    if collection is not None:
        names = [name for name in names if collection_of(name) == collection]
    if not names:
        what = "tables" if collection is None else f"collection {collection!r}"
        raise StorageError(f"{store.root} holds no {what}.", "Give the output.root of a run.")
    return names


def exit_code_of(errors: Iterable[QvlError]) -> int:
    """Return what a command ends with whose other tables went well.

    0 without errors; 3 if all that is wrong is that a run holds a table; 1 otherwise.
    """
    errors = list(errors)
    if not errors:
        return 0
    return 3 if all(isinstance(error, LeaseHeldError) for error in errors) else 1
