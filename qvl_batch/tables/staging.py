"""What a replace run has finished and nobody sees yet, so that a kill costs no finished work.

Every partition table that is being replaced has a table ``_qvl_staging__{table}``. While the
replace is open it holds, per commit interval, the fragments written for the partition's new
content with the unit_ids in them, and the units that failed. Its state is in its schema's metadata
and changes with one commit: opened, closed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import lance
import pyarrow as pa
import pyarrow.compute as pc
from lance.schema import LanceSchema

from qvl_batch import crash
from qvl_batch.tables.commit import append, commit_once
from qvl_batch.tables.fragments import WrittenFragment, write_to
from qvl_batch.tables.store import TableStore

PREFIX = "_qvl_staging__"
_SESSION = b"qvl.session"
_DIGEST = b"qvl.digest"
_BASE = b"qvl.base_version"

_SCHEMA = pa.schema(
    [
        pa.field("unit_ids", pa.list_(pa.string()), nullable=False),
        pa.field("failed_ids", pa.list_(pa.string()), nullable=False),
        pa.field("fragments", pa.large_string(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Staged:
    """An open replace of one table.

    Args:
        session: Names the replace: the same for every run that goes on with it.
        digest: Of what the partition is to hold; see `digest_of`.
        base_version: The table's when the replace began.
        units: unit_ids whose rows are written.
        failed: unit_ids that failed in this replace.
        fragments: All of them, as `fragments.write_fragments` gave them.
        version: Of the staging table that says so.
    """

    session: str
    digest: str
    base_version: int
    units: pa.Array
    failed: pa.Array
    fragments: tuple[WrittenFragment, ...]
    version: int = 0


def nothing(digest: str) -> Staged:
    """Return a replace that is not open yet: its session is ''."""
    empty = pa.array([], pa.string())
    return Staged(
        session="", digest=digest, base_version=0, units=empty, failed=empty, fragments=()
    )


def digest_of(recipe_id: str, unit_ids: pa.Array) -> str:
    """Return what a partition is to hold in short: a replace goes on only if it is the same."""
    digest = hashlib.blake2b(recipe_id.encode(), digest_size=16)
    for unit in unit_ids.sort().to_pylist():
        digest.update(unit.encode())
    return digest.hexdigest()


def read(store: TableStore, table: str) -> Staged | None:
    """Return the open replace of a table; None if there is none.

    Raises:
        StorageError: If that can not be read.
    """
    dataset = store.open(PREFIX + table)
    metadata = (dataset.schema.metadata or {}) if dataset is not None else {}
    if dataset is None or not metadata.get(_SESSION):
        return None
    rows = dataset.to_table()
    fragments = [
        fragment for text in rows["fragments"].to_pylist() for fragment in json.loads(text)
    ]
    return Staged(
        session=metadata[_SESSION].decode(),
        digest=metadata[_DIGEST].decode(),
        base_version=int(metadata[_BASE]),
        units=pc.list_flatten(rows["unit_ids"].combine_chunks()),
        failed=pc.list_flatten(rows["failed_ids"].combine_chunks()),
        fragments=tuple(fragments),
        version=dataset.version,
    )


def begin(
    store: TableStore,
    table: str,
    *,
    session: str,
    digest: str,
    base_version: int,
    run_id: str,
    still_held: Callable[[], None] = lambda: None,
) -> Staged:
    """Open a replace of a table, in place of an earlier one if there is any.

    Args:
        still_held: Raises if the run has lost its lease. Asked once it is known which version is
            gone on from: what another run commits after that is found.

    Raises:
        LeaseHeldError: If another run began, or went on with, a replace of the table meanwhile.
    """
    present = store.create(PREFIX + table, _SCHEMA.with_metadata({_SESSION: b""}))
    still_held()
    crash.reached("replace-begin")
    # Also fences a run that has fallen asleep as it was about to open its own.
    commit_once(
        store,
        PREFIX + table,
        lambda latest: lance.LanceOperation.Restore(latest.version),
        marker=f"{session}/fence/{table}",
        run_id=run_id,
        since=present.version,
        exclusive=True,
    )
    state = {_SESSION: session, _DIGEST: digest, _BASE: str(base_version)}
    marker = f"{session}/begin/{table}"
    _set_state(store, table, state, marker=marker, run_id=run_id, since=present.version)
    staged = read(store, table)
    assert staged is not None
    return staged


def record(
    store: TableStore,
    table: str,
    fragments: Sequence[WrittenFragment],
    units: Iterable[str],
    failed: Iterable[str],
    *,
    marker: str,
    run_id: str,
    since: int,
) -> None:
    """Note finished work, exactly once, whatever gets lost on the way.

    Args:
        since: The version that this run has read or begun; see `Staged`.

    Raises:
        LeaseHeldError: If another run has changed it after that version.
    """
    crash.reached("replace-record")
    row = {
        "unit_ids": [list(units)],
        "failed_ids": [list(failed)],
        "fragments": [json.dumps(list(fragments))],
    }
    dataset = store.open(PREFIX + table)
    assert dataset is not None, f"no replace of {table} is open"
    written = write_to(store, PREFIX + table, pa.table(row, schema=dataset.schema))
    append(store, PREFIX + table, written, marker=marker, run_id=run_id, planned_version=since)


def close(
    store: TableStore, table: str, session: str, *, run_id: str, since: int | None = None
) -> None:
    """End a replace: it was published, or is given up. May be done again.

    Args:
        since: As `record` has it; None: whatever other runs did.
    """
    current = read(store, table)
    if current is not None and current.session == session:
        crash.reached("replace-close")
        marker = f"{session}/close/{table}"
        _set_state(store, table, {_SESSION: ""}, marker=marker, run_id=run_id, since=since)


def open_replaces(store: TableStore) -> dict[str, Staged]:
    """Return every open replace under a root by its table."""
    names = [name.removeprefix(PREFIX) for name in store.names() if name.startswith(PREFIX)]
    found = {name: read(store, name) for name in names}
    return {name: staged for name, staged in found.items() if staged is not None}


def _set_state(
    store: TableStore,
    table: str,
    state: dict[bytes, str],
    *,
    marker: str,
    run_id: str,
    since: int | None,
) -> None:
    schema = _SCHEMA.with_metadata(state)

    def build(_: lance.LanceDataset) -> lance.LanceOperation.Overwrite:
        return lance.LanceOperation.Overwrite(LanceSchema.from_pyarrow(schema), [])

    commit_once(
        store,
        PREFIX + table,
        build,
        marker=marker,
        run_id=run_id,
        since=since or 0,
        exclusive=since is not None,
    )
