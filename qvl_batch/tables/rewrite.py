"""Commits that take rows away: replaced by newer ones, removed, or a whole partition at once.

Each is one commit with a marker, made by the protocol of `tables.commit`: a reader sees the state
before it or the state after it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import lance
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch import crash
from qvl_batch.tables.commit import Commit, check_files, commit_once, commit_transaction
from qvl_batch.tables.fragments import WrittenFragment, iter_fragments
from qvl_batch.tables.ledger import sql_text
from qvl_batch.tables.store import TableStore


def replace_units(
    store: TableStore,
    table: str,
    fragments: Sequence[WrittenFragment],
    old_units: Iterable[str],
    *,
    marker: str,
    run_id: str,
    planned_version: int,
    commit: Commit = commit_transaction,
) -> int:
    """Add written fragments and take the rows of older units away, in one commit.

    Args:
        fragments: The new rows; with none, rows are only taken away.
        old_units: unit_ids of which no row shall be left; those that are not there are no error.
        marker: As `commit.append` has it, like all that follow.

    Raises:
        LeaseHeldError, InvariantBrokenError, StorageError, RunFailedError: As `commit.append`.
    """
    units = sorted(set(old_units))

    @functools.cache
    def checked_once() -> None:
        check_files(store, table, fragments)

    def build(latest: lance.LanceDataset) -> lance.LanceOperation.BaseOperation | None:
        checked_once()
        gone, changed = _without(latest, "unit_id", units)
        added = list(iter_fragments(list(fragments)))
        if not gone and not changed:
            return lance.LanceOperation.Append(added) if added else None
        if not added:
            return _delete(gone, changed, "unit_id", units)
        return lance.LanceOperation.Update(
            removed_fragment_ids=gone,
            updated_fragments=changed,
            new_fragments=added,
            fields_modified=[],
        )

    return commit_once(
        store,
        table,
        build,
        marker=marker,
        run_id=run_id,
        since=planned_version,
        exclusive=True,
        commit=commit,
    )


def remove_rows(
    store: TableStore,
    table: str,
    column: str,
    values: Iterable[str],
    *,
    marker: str,
    run_id: str,
    planned_version: int,
    exclusive: bool = True,
) -> int:
    """Take away all rows that have one of these values in a string column, in one commit.

    What is taken away is not named in the table's own files: they outlive the rows.

    Args:
        exclusive: Whether a change of the rows by another run since `planned_version` is refused.

    Raises:
        LeaseHeldError, InvariantBrokenError, StorageError, RunFailedError: As `commit.append`.
    """
    listed = sorted(set(values))

    def build(latest: lance.LanceDataset) -> lance.LanceOperation.BaseOperation | None:
        gone, changed = _without(latest, column, listed)
        return _delete(gone, changed, column, listed) if gone or changed else None

    return commit_once(
        store,
        table,
        build,
        marker=marker,
        run_id=run_id,
        since=planned_version,
        exclusive=exclusive,
    )


def publish(
    store: TableStore,
    table: str,
    fragments: Sequence[WrittenFragment],
    *,
    marker: str,
    run_id: str,
    planned_version: int,
    schema: pa.Schema | None = None,
    commit: Commit = commit_transaction,
) -> int:
    """Make fragments the whole content of a table, in one commit; indexes go with the old rows.

    Args:
        fragments: Written for this table and not committed yet.
        schema: The table's schema from now on; None keeps it.

    Raises:
        LeaseHeldError, InvariantBrokenError, StorageError, RunFailedError: As `commit.append`.
    """

    @functools.cache
    def checked_once() -> None:
        check_files(store, table, fragments)

    def build(latest: lance.LanceDataset) -> lance.LanceOperation.BaseOperation:
        checked_once()
        crash.reached("replace-publish")
        target = latest.lance_schema
        if schema is not None:
            target = lance.schema.LanceSchema.from_pyarrow(schema)
        return lance.LanceOperation.Overwrite(target, list(iter_fragments(list(fragments))))

    return commit_once(
        store,
        table,
        build,
        marker=marker,
        run_id=run_id,
        since=planned_version,
        exclusive=True,
        commit=commit,
    )


def fence(store: TableStore, table: str, *, run_id: str, since: int = 0) -> int:
    """Make Lance refuse whatever a former holder of the table had prepared; return the version.

    A ``Restore`` of the present version: rows and indexes stay, and every Append, Update, Delete
    and Overwrite that was based on an earlier version is refused from now on (measured).

    Args:
        since: A version from before this run; only what follows is searched for an earlier fence.
    """
    return commit_once(
        store,
        table,
        lambda latest: lance.LanceOperation.Restore(latest.version),
        marker=f"{run_id}/fence/{table}",
        run_id=run_id,
        since=since,
        exclusive=False,
    )


def _delete(
    gone: list[int],
    changed: list[lance.FragmentMetadata],
    column: str,
    values: Sequence[str],
) -> lance.LanceOperation.Delete:
    crash.reached("delete")
    return lance.LanceOperation.Delete(changed, gone, f"{column} IN ({len(values)} values)")


def _without(
    latest: lance.LanceDataset, column: str, values: Sequence[str]
) -> tuple[list[int], list[lance.FragmentMetadata]]:
    """Return the fragments that these values leave empty, and those they leave with fewer rows."""
    if not values:
        return [], []
    wanted = pa.array(values, pa.string())
    gone, changed = [], []
    for fragment in latest.get_fragments():
        held = pc.unique(fragment.to_table(columns=[column])[column])
        here = held.filter(pc.is_in(held, value_set=wanted)).to_pylist()
        if not here:
            continue
        if len(here) == len(held):
            gone.append(fragment.fragment_id)
            continue
        # One predicate: a second `delete` on the same handle would forget the first.
        listed = ", ".join(sql_text(value) for value in here)
        left = fragment.delete(f"{column} IN ({listed})")
        if left is None:
            gone.append(fragment.fragment_id)
        else:
            changed.append(left)
    return gone, changed
