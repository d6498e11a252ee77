"""Make written fragments visible, once, whatever gets lost on the way.

Lance accepts the same Append twice and a stale one too (measured), so its own retry is off and
every commit carries a marker in its transaction properties. Before each attempt, and after any
error, the versions since the run's first are searched for it.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import lance
import pyarrow as pa
from lance.commit import CommitConflictError

from qvl_batch import crash
from qvl_batch.errors import (
    InvariantBrokenError,
    LeaseHeldError,
    QvlError,
    RunFailedError,
    StorageError,
)
from qvl_batch.schema import FAILURES
from qvl_batch.tables.fragments import (
    DataFileRecord,
    WrittenFragment,
    file_problem,
    iter_fragments,
    write_to,
)
from qvl_batch.tables.history import MARKER, RUN_ID
from qvl_batch.tables.layout import FAILURES_TABLE
from qvl_batch.tables.store import TableStore, storage_error

ATTEMPTS = 20
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
# What Lance raises when the store, or another commit, stands in the way.
_STORE_ERRORS = (OSError, ValueError, RuntimeError)

Commit = Callable[[TableStore, str, lance.Transaction], int]
# What to commit, made from the version that it goes on; None: there is nothing to do.
Build = Callable[[lance.LanceDataset], lance.LanceOperation.BaseOperation | None]


def commit_transaction(store: TableStore, table: str, transaction: lance.Transaction) -> int:
    """Commit with Lance's own retry off; return the new version."""
    dataset = lance.LanceDataset.commit(
        store.uri(table), transaction, storage_options=store.options, max_retries=0
    )
    return dataset.version


def append(
    store: TableStore,
    table: str,
    fragments: Sequence[WrittenFragment],
    *,
    marker: str,
    run_id: str,
    planned_version: int | None = None,
    since: int = 0,
    commit: Commit = commit_transaction,
    attempts: int = ATTEMPTS,
) -> int:
    """Append written fragments to a partition's table in one commit, exactly once.

    Args:
        fragments: As `write_fragments` returned them; with none, nothing is committed.
        marker: Unique for this set of fragments. Called again with the same marker, in this or
            another process, this returns the version that already holds it.
        run_id: Of the run that commits.
        planned_version: The version from which this run planned what is left to do. Versions
            after it are searched for the marker and for other writers. None: those after ``since``
            are searched for the marker, and other writers are allowed.
        commit: Does one attempt; for tests of lost acknowledgements.
        attempts: How often it is tried: 20 take up to half a minute.

    Returns:
        The version that holds the fragments.

    Raises:
        LeaseHeldError: If another run changed the rows since ``planned_version``. Nothing is
            committed then, unless that run's commit came in at the very same moment.
        InvariantBrokenError: If a file to be committed is missing or short, or the marker stands
            twice.
        StorageError: If the store fails for longer than the retries last.
        RunFailedError: If all attempts lost against other commits.
    """
    if not fragments:
        return _open(store, table).version

    @functools.cache
    def checked_once() -> None:
        check_files(store, table, fragments)

    def build(_: lance.LanceDataset) -> lance.LanceOperation.Append:
        checked_once()
        return lance.LanceOperation.Append(list(iter_fragments(fragments)))

    return commit_once(
        store,
        table,
        build,
        marker=marker,
        run_id=run_id,
        since=since if planned_version is None else planned_version,
        exclusive=planned_version is not None,
        commit=commit,
        attempts=attempts,
    )


def append_failures(
    store: TableStore,
    rows: pa.Table,
    marker: str,
    run_id: str,
    *,
    planned_version: int | None = None,
    commit: Commit = commit_transaction,
) -> int:
    """Append rows of `qvl_batch.schema.FAILURES` exactly once; other runs may append as well.

    Creates the table if there is none. ``planned_version`` only limits the search for the marker
    (a version of `_qvl_failures` from before the run began).
    """
    dataset = store.open(FAILURES_TABLE)
    if dataset is None:
        dataset = store.create(FAILURES_TABLE, FAILURES)
    if rows.num_rows == 0:
        return dataset.version
    since = planned_version or 0
    found = _find(store, FAILURES_TABLE, dataset, marker, since)
    if found is not None:
        return found
    fragments = write_to(store, FAILURES_TABLE, rows)
    return append(
        store, FAILURES_TABLE, fragments, marker=marker, run_id=run_id, commit=commit, since=since
    )


def commit_once(
    store: TableStore,
    table: str,
    build: Build,
    *,
    marker: str,
    run_id: str,
    since: int,
    exclusive: bool,
    commit: Commit = commit_transaction,
    attempts: int = ATTEMPTS,
) -> int:
    """Commit one operation exactly once, whatever gets lost on the way.

    Args:
        build: Makes the operation from the version that it is based on; called at each attempt.
        marker: Unique for what is committed; a version after ``since`` that holds it ends the work.
        run_id: Of the run that commits.
        since: Versions after it are looked at.
        exclusive: Whether a change of the rows by another run since then is refused.

    Returns:
        The version that holds the operation; the present one if there was nothing to do.

    Raises:
        LeaseHeldError, InvariantBrokenError, StorageError, RunFailedError: As `append`.
    """

    def standing(latest: lance.LanceDataset) -> int | None:
        found = _find(store, table, latest, marker, since)
        if exclusive:
            for other in store.histories[table].other_writers(run_id, since):
                raise LeaseHeldError(table, other or "unknown")
        return found

    cause: Exception = RunFailedError("never tried")
    for attempt in range(attempts):
        if attempt:
            time.sleep(_pause_s(attempt))
        try:
            latest = _open(store, table)
            found = standing(latest)
            if found is not None:
                return found
            operation = build(latest)
            if operation is None:
                return latest.version
            transaction = lance.Transaction(
                latest.version,
                operation,
                transaction_properties={MARKER: marker, RUN_ID: run_id},
            )
            crash.reached("before-commit")
            commit(store, table, transaction)
            crash.reached("after-commit")
            found = standing(_open(store, table))
        except (LeaseHeldError, RunFailedError):
            raise
        except (*_STORE_ERRORS, CommitConflictError, StorageError) as error:
            # Whatever failed, the commit may stand: only the next look at the versions can tell.
            cause = error
            continue
        if found is None:
            raise InvariantBrokenError(f"table {table}: commit {marker} was accepted and is gone")
        return found
    if isinstance(cause, QvlError):
        raise cause
    if isinstance(cause, CommitConflictError):
        raise RunFailedError(
            f"table {table}: {attempts} attempts to commit lost against other writers"
        ) from cause
    raise storage_error(store.uri(table), cause) from cause


def find_commit(store: TableStore, table: str, marker: str, since: int) -> int | None:
    """Return the version after ``since`` that was committed with a marker; None if there is none.

    Raises:
        InvariantBrokenError: If the marker stands twice, or there is no table.
    """
    return _find(store, table, _open(store, table), marker, since)


def other_writers(store: TableStore, table: str, run_id: str, since: int) -> list[str | None]:
    """Return the runs but this one that changed a table's rows after a version."""
    history = store.histories[table]
    history.read(_open(store, table), since)
    return history.other_writers(run_id, since)


def check_files(store: TableStore, table: str, fragments: Iterable[WrittenFragment]) -> None:
    """Refuse fragments of which a file is missing or cut: Lance would commit them.

    Raises:
        InvariantBrokenError: With the first file at fault.
    """
    files = store.files(table)
    records = [file for fragment in fragments for file in fragment["files"]]

    def problem(file: DataFileRecord) -> str | None:
        return file_problem(files, file["path"], file["size_bytes"])

    with ThreadPoolExecutor(8) as pool:
        for file, found in zip(records, pool.map(problem, records), strict=True):
            if found:
                raise InvariantBrokenError(f"{store.uri(table)}/{file['path']} {found}")


def _open(store: TableStore, table: str) -> lance.LanceDataset:
    dataset = store.open(table)
    if dataset is None:
        raise InvariantBrokenError(f"{store.uri(table)} is gone; it was there when the run began")
    return dataset


def _find(
    store: TableStore, table: str, latest: lance.LanceDataset, marker: str, since: int
) -> int | None:
    history = store.histories[table]
    history.read(latest, since)
    versions = history.find(marker, since)
    if len(versions) > 1:
        raise InvariantBrokenError(f"table {table}: commit {marker} stands in versions {versions}")
    return versions[0] if versions else None


def _pause_s(attempt: int) -> float:
    longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt)
    return random.uniform(longest / 4, longest)
