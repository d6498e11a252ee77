"""`_qvl_aliases`: names that readers ask for, each standing for a collection.

A new recipe goes to a new collection; readers who ask for an alias move there with one commit.
"""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime

import pyarrow as pa

from qvl_batch.errors import ConfigError, QvlError, RunFailedError
from qvl_batch.schema import ALIASES
from qvl_batch.tables.layout import VECTORS_KIND, check_collection_name
from qvl_batch.tables.ledger import table_kind
from qvl_batch.tables.open import collection_of
from qvl_batch.tables.store import TableStore, storage_error

ALIASES_TABLE = "_qvl_aliases"
_ATTEMPTS = 10
_LONGEST_PAUSE_S = 2.0


def read(store: TableStore) -> dict[str, str]:
    """Return the collection that each alias stands for, sorted by alias; {} if there is none.

    Raises:
        StorageError: If that can not be told.
    """
    dataset = store.open(ALIASES_TABLE)
    if dataset is None:
        return {}
    try:
        rows = dataset.to_table(columns=["alias", "collection"]).sort_by("alias")
    except (ValueError, OSError, RuntimeError) as error:
        raise storage_error(store.uri(ALIASES_TABLE), error) from error
    return dict(zip(rows["alias"].to_pylist(), rows["collection"].to_pylist(), strict=True))


def resolve(store: TableStore, name: str) -> str:
    """Return the collection that an alias stands for; any other name is returned as it is.

    Raises:
        ConfigError: If the name is an alias and, by now, a collection too: which of the two is
            meant is not for us to guess.
        StorageError: If that can not be told.
    """
    collection = read(store).get(name)
    if collection is None:
        return name
    if name in _prefixes(store):
        raise ConfigError(
            f"{store.root}: {name!r} is an alias of {collection} and a collection as well.",
            "Ask for the collection by an alias of its own, or switch to another alias.",
        )
    return collection


def refuse_alias(store: TableStore, collection: str) -> None:
    """Refuse to write a collection that an alias hides.

    Raises:
        ConfigError: If the name is an alias.
        StorageError: If that can not be told.
    """
    hidden = read(store).get(collection)
    if hidden is not None:
        raise ConfigError(
            f"output.collection is {collection!r}, which is an alias of {hidden} in {store.root}.",
            f"Write to {hidden}, or to a collection of another name.",
        )


def switch(store: TableStore, alias: str, collection: str) -> None:
    """Let an alias stand for a collection from now on, in one commit; make the alias if need be.

    Readers see what it stood for or what it stands for, never nothing. Of two at once the later
    commit stays, and there is one row an alias.

    Raises:
        ConfigError: If the alias can not be a name, is a collection's, or the collection holds no
            table of vectors.
        StorageError: If the table of aliases can not be written.
    """
    try:
        check_collection_name(alias)
    except ConfigError as error:
        raise ConfigError(f"The alias is {alias!r}.", error.remedy) from None
    known = _prefixes(store)
    if alias in known:
        raise ConfigError(
            f"{store.root} has a collection {alias!r}: an alias would hide it.",
            "Choose another name for the alias.",
        )
    first = known.get(collection)
    dataset = store.open(first) if first is not None else None
    if dataset is None or table_kind(dataset) != VECTORS_KIND:
        raise ConfigError(
            f"{store.root} has no collection {collection!r} of vectors.",
            f"There are: {', '.join(sorted(known)) or 'none'}.",
        )
    _merge(store, alias, collection)


def _prefixes(store: TableStore) -> dict[str, str]:
    """Return the first table of each collection, scores among them, from one listing."""
    found: dict[str, str] = {}
    for name in store.names():
        found.setdefault(collection_of(name), name)
    found.pop("", None)
    return found


def _merge(store: TableStore, alias: str, collection: str) -> None:
    row = {"alias": alias, "collection": collection, "updated_at": datetime.now(UTC)}
    rows = pa.Table.from_pylist([row], schema=ALIASES)
    if store.open(ALIASES_TABLE) is None:
        store.create(ALIASES_TABLE, ALIASES)
    cause: Exception = RunFailedError("never tried")
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE_S, 0.1 * 2**attempt)))
        dataset = store.open(ALIASES_TABLE)
        if dataset is None:
            raise RunFailedError(f"{store.uri(ALIASES_TABLE)} is gone")
        try:
            (
                dataset.merge_insert("alias")
                .when_matched_update_all()
                .when_not_matched_insert_all()
                .execute(rows)
            )
            return
        except (ValueError, OSError, RuntimeError) as error:
            # Doing it again is harmless, whether or not it was done.
            cause = error
    if isinstance(cause, QvlError):
        raise cause
    raise storage_error(store.uri(ALIASES_TABLE), cause) from cause
