"""Taking the leases of tables for a run, and what stands in the way of changing a table."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Sequence

from qvl_batch.errors import StorageError
from qvl_batch.storage import is_local
from qvl_batch.tables import staging
from qvl_batch.tables.conditional import ensure_exclusive
from qvl_batch.tables.lease import TTL_S, Leases, lease_place
from qvl_batch.tables.rewrite import fence
from qvl_batch.tables.store import TableStore


def new_run_id() -> str:
    """Return an id that sorts by time and is no other run's."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}"


def take_leases(
    store: TableStore,
    tables: Sequence[str],
    run_id: str,
    held: contextlib.ExitStack,
    *,
    ttl_s: float = TTL_S,
    steal: bool = False,
) -> tuple[Leases, list[str]]:
    """Take the leases of tables; return them, and which tables are to be fenced once they exist.

    A table that was taken over from a run that did not release it is fenced here, before anything
    is read of it.

    Args:
        run_id: Of this run alone.
        held: Gets the leases: closing it releases them.
        ttl_s: See `Leases`.
        steal: Take them from whoever holds them.

    Raises:
        LeaseHeldError: If another live run holds one of them.
        StorageError: If the store lets two writers create the same object.
    """
    place = lease_place(store.root, store.storage)
    if not is_local(store.root):
        ensure_exclusive(place)
    leases = held.enter_context(Leases(place, run_id, ttl_s=ttl_s))
    absent = []
    for name in leases.acquire(tables, steal=steal):
        dataset = store.open(name)
        if dataset is None:
            absent.append(name)
        else:
            fence(store, name, run_id=run_id, since=dataset.version)
        # What a replace has finished is published as it stands there.
        dataset = store.open(staging.PREFIX + name)
        if dataset is not None:
            fence(store, staging.PREFIX + name, run_id=run_id, since=dataset.version)
    return leases, absent


def refuse_open_replaces(store: TableStore, tables: Sequence[str]) -> None:
    """Refuse to change tables that a replace is about to replace.

    Raises:
        StorageError: Naming the table.
    """
    present = set(store.names())
    for name in tables:
        if staging.PREFIX + name in present and staging.read(store, name) is not None:
            raise StorageError(
                f"A replace of table {name} was begun and not finished.",
                "Run it again (output.mode: replace) until it is done, or give it up with "
                f"`qvl-batch gc {store.root} --give-up {name}`.",
            )
