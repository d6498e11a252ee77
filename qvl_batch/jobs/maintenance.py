"""The commands `compact` and `gc`: one table after the other, each on its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from qvl_batch.errors import ConfigError, QvlError, StorageError
from qvl_batch.jobs.chosen import all_tables, exit_code_of, vector_tables
from qvl_batch.jobs.leasing import new_run_id, take_leases
from qvl_batch.storage import Storage
from qvl_batch.tables import staging
from qvl_batch.tables.garbage import LONGEST_RUN, Collected, gc, held_tables
from qvl_batch.tables.maintenance import Compacted, compact
from qvl_batch.tables.store import TableStore

# A run commits every minute: what it holds uncommitted is younger by far.
SHORTEST_AGE = timedelta(hours=1)
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
_LISTED_FILES = 20


@dataclass(frozen=True, kw_only=True)
class MaintenanceReport:
    """What became of each table; ``errors`` names those that were left as they were."""

    tables: tuple[Compacted | Collected, ...]
    errors: Mapping[str, QvlError]

    @property
    def exit_code(self) -> int:
        return exit_code_of(self.errors.values())

    def to_json(self) -> str:
        values = {
            "ok": not self.errors,
            "tables": [dataclasses.asdict(done) for done in self.tables],
            "errors": {name: str(error) for name, error in self.errors.items()},
        }
        return json.dumps(values, indent=2)

    def __str__(self) -> str:
        failed = f"; {len(self.errors)} left as they were" if self.errors else ""
        collected = [done for done in self.tables if isinstance(done, Collected)]
        if collected:
            size = sum(done.size_bytes for done in collected) / 1e6
            versions = sum(len(done.versions) for done in collected)
            files = sum(len(done.files) for done in collected)
            return f"{versions:,} versions, {files:,} files, {size:,.1f} MB{failed}"
        changed = sum(
            isinstance(done, Compacted) and done.fragments_before != done.fragments_after
            for done in self.tables
        )
        return f"{changed} of {len(self.tables)} table(s) compacted{failed}"


def run_compact(
    root: str,
    storage: Storage,
    *,
    collection: str | None = None,
    where: Sequence[str] = (),
    steal: bool = False,
    echo: Callable[[str], None] = print,
) -> MaintenanceReport:
    """Compact these tables; without a collection or a filter also those of failures and catalog.

    Args:
        where: Filters over partition values; see `chosen.vector_tables`.
        steal: Take tables from runs that were killed before their leases expire.

    Raises:
        InputError: If the root, the collection or a filter is wrong.
    """
    store = TableStore(root, storage)
    names = vector_tables(store, collection, where) if where else all_tables(store, collection)

    def line(done: Compacted) -> str:
        if done.fragments_before == done.fragments_after:
            return f"{done.table}: {done.num_rows:,} rows, nothing to do"
        return (
            f"{done.table}: {done.num_rows:,} rows, {done.fragments_before:,} fragments are now "
            f"{done.fragments_after:,}"
        )

    return _each(names, lambda name: compact(store, name, steal=steal), line, echo)


def run_gc(
    root: str,
    storage: Storage,
    *,
    older_than: timedelta = LONGEST_RUN,
    dry_run: bool = False,
    echo: Callable[[str], None] = print,
) -> MaintenanceReport:
    """Remove old versions and dead files of all tables, or list them.

    Raises:
        ConfigError: If `older_than` is below one hour.
        StorageError: If the root holds no tables, or can not be listed.
    """
    if older_than < SHORTEST_AGE:
        raise ConfigError(
            f"older-than is {older_than}: a run holds files that long before it commits them.",
            "Give 1h or more; 7d is longer than any run.",
        )
    store = TableStore(root, storage)

    def line(done: Collected) -> str:
        verb = "would remove" if dry_run else "removed"
        head = (
            f"{done.table}: {verb} {len(done.versions):,} versions, {len(done.files):,} files, "
            f"{done.size_bytes / 1e6:,.1f} MB"
        )
        if not dry_run:
            return head
        listed = [f"  {file.path}" for file in done.files[:_LISTED_FILES]]
        if len(done.files) > _LISTED_FILES:
            listed.append(f"  … and {len(done.files) - _LISTED_FILES:,} more (--json lists all)")
        return "\n".join([head, *listed])

    names, held = all_tables(store), held_tables(store)
    return _each(
        names, lambda name: gc(store, name, older_than, dry_run=dry_run, held=held), line, echo
    )


def give_up(
    root: str,
    storage: Storage,
    table: str,
    *,
    steal: bool = False,
    echo: Callable[[str], None] = print,
) -> None:
    """Close an open replace of a table: what it had written is for `gc`, the table stays as it is.

    Raises:
        StorageError: If no replace of the table is open.
        LeaseHeldError: If a run is at it.
    """
    store = TableStore(root, storage)
    with contextlib.ExitStack() as held:
        run_id = new_run_id()
        take_leases(store, [table], run_id, held, steal=steal)
        found = staging.open_replaces(store)
        if table not in found:
            there = f"Open are those of {', '.join(sorted(found))}." if found else "None is open."
            raise StorageError(f"No replace of table {table!r} is open.", there)
        staging.close(store, table, found[table].session, run_id=run_id)
        units = len(found[table].units)
    echo(f"{table}: the replace of session {found[table].session} is given up, {units:,} units")


def parse_age(text: str) -> timedelta:
    """Return the time that ``30m``, ``12h`` or ``7d`` stands for.

    Raises:
        ConfigError: If it is none of these.
    """
    found = re.fullmatch(r"([0-9]{1,6})([mhd])", text.strip())
    if found is None:
        raise ConfigError(f"{text!r} is no time.", "Write 90m, 12h or 7d.")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def _each(
    names: Sequence[str],
    work: Callable[[str], Compacted | Collected],
    line: Callable[..., str],
    echo: Callable[[str], None],
) -> MaintenanceReport:
    tables, errors = [], {}
    for name in names:
        try:
            done = work(name)
        except QvlError as error:
            errors[name] = error
            echo(f"{name}: {error}")
        else:
            tables.append(done)
            echo(line(done))
    return MaintenanceReport(tables=tuple(tables), errors=errors)
