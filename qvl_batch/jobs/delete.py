"""The delete job: all rows of some media leave every table under a root, and then their bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import lance
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.errors import ConfigError, StorageError
from qvl_batch.jobs.leasing import new_run_id, refuse_open_replaces, take_leases
from qvl_batch.jobs.rerank_plan import Target, incomplete
from qvl_batch.storage import Storage
from qvl_batch.tables import staging
from qvl_batch.tables.garbage import gc, present_versions
from qvl_batch.tables.layout import FAILURES_TABLE
from qvl_batch.tables.lease import Leases, lease_place, live_runs
from qvl_batch.tables.ledger import table_collection, table_kind, table_partition
from qvl_batch.tables.maintenance import compact, has_deleted_rows
from qvl_batch.tables.rewrite import remove_rows
from qvl_batch.tables.scores import RANKED, SCORES_KIND, column_values, ranks_to_set, set_ranks
from qvl_batch.tables.store import TableStore, storage_error

# Object stores give times in whole seconds, so what was written just now is younger than "now".
_JUST_NOW = timedelta(seconds=-2)
_BATCH_ROWS = 65_536
_MARKER = "/delete/"


@dataclass(frozen=True, kw_only=True)
class DeleteReport:
    """What went: rows by table, uris that nothing was known of, tables of which bytes are left."""

    root: str
    removed: Mapping[str, int]
    unknown: tuple[str, ...]
    cleaned: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        rows, lines = sum(self.removed.values()), []
        lines.append(f"{rows:,} rows removed from {len(self.removed)} table(s)")
        if self.unknown:
            lines.append(f"unknown, no row has it: {', '.join(self.unknown)}")
        if self.left:
            lines.append(
                f"old versions of {', '.join(self.left)} still hold bytes of what was deleted; "
                f"remove them with `qvl-batch gc {self.root} --older-than 1h` an hour from now, "
                "or by doing this again with --now while no run is at work (a tagged version stays "
                "until its tag is removed)"
            )
        if rows:
            lines.append("take these media out of the manifest too, or the next run embeds them")
        return "\n".join(lines)


def run_delete(
    root: str,
    storage: Storage,
    uris: Sequence[str],
    *,
    now: bool = False,
    steal: bool = False,
    echo: Callable[[str], None] = print,
) -> DeleteReport:
    """Remove every row of these media: vectors, candidates, scores, failures.

    A medium that is a query's is not looked for. Afterwards no data file of a table's latest
    version holds them: fragments that lost rows are written anew. May be done again, and goes on
    where a kill had ended it.

    Args:
        root: The output.root of the runs.
        uris: As the manifest had them.
        now: Remove old versions of the tables too, whatever their age.
        steal: Take tables over from runs that still seem to be alive.
        echo: Takes lines for a person.

    Raises:
        InputError: If there are no uris, no tables, or a replace is open.
        LeaseHeldError: If a run writes one of the tables. No row was removed then.
    """
    wanted = sorted({uri for uri in uris if uri})
    if not wanted:
        raise ConfigError("No uri is given.", "Give --uri or --uris.")
    store = TableStore(root, storage)
    names = [name for name in store.names() if not name.startswith("_")]
    if not names:
        raise StorageError(f"{store.root} holds no tables.", "Give the output.root of a run.")
    # Of any table: the rows that an open replace has written are in no table yet.
    refuse_open_replaces(store, sorted(staging.open_replaces(store)))
    holding = {name: _rows_of(store, name, wanted) for name in [*names, FAILURES_TABLE]}
    known = pa.array([], pa.string())
    for found in holding.values():
        known = pc.unique(pa.concat_arrays([known, pc.unique(found)]))
    touched = [name for name, found in holding.items() if len(found)]
    touched += [n for n in holding if n not in touched and _is_unfinished(store, n, also_old=now)]
    removed: dict[str, int] = {}
    cleaned: list[str] = []
    with contextlib.ExitStack() as held:
        run_id = new_run_id()
        own = [name for name in touched if name != FAILURES_TABLE]
        leases, _ = take_leases(store, own, run_id, held, steal=steal)
        for name in touched:
            count = _remove(store, name, wanted, run_id, leases)
            if count:
                removed[name] = count
                echo(f"{name}: {count:,} rows removed")
        for name in touched:
            leases.check()
            # Only now: a query is ranked when all its candidates have ended.
            _set_ranks(store, name, run_id)
            compact(store, name, deleted_share=0.0, leases=leases)
        others = live_runs(lease_place(store.root, store.storage)) - {run_id}
        for name in touched if now else ():
            leases.check()
            # Runs append to the failures without a lease of theirs.
            if name == FAILURES_TABLE and others:
                echo(f"{name}: a run is at work, its old versions stay")
                continue
            gc(store, name, _JUST_NOW, held=())
            cleaned.append(name)
    report = DeleteReport(
        root=store.root,
        removed=removed,
        unknown=tuple(sorted(set(wanted) - set(known.to_pylist()))),
        cleaned=tuple(cleaned),
        left=tuple(name for name in touched if len(present_versions(store, name)) > 1),
    )
    echo(str(report))
    return report


def _remove(store: TableStore, name: str, uris: Sequence[str], run_id: str, leases: Leases) -> int:
    """Remove the rows of a table; return how many went."""
    leases.check()
    dataset = store.open_existing(name)
    before = dataset.count_rows()
    remove_rows(
        store,
        name,
        "uri",
        uris,
        marker=f"{run_id}{_MARKER}{name}",
        run_id=run_id,
        planned_version=dataset.version,
        # Other runs append their failures meanwhile.
        exclusive=name != FAILURES_TABLE,
    )
    return max(0, before - store.open_existing(name).count_rows())


def _set_ranks(store: TableStore, name: str, run_id: str) -> None:
    """Let the ranks of those that stay follow each other again."""
    scores = store.open_existing(name)
    if table_kind(scores) != SCORES_KIND:
        return
    partition = table_partition(scores)
    target = Target(store=store, collection=table_collection(scores), partitions={name: partition})

    def ranks(latest: lance.LanceDataset) -> pa.Table:
        waiting = incomplete(target, name, column_values(latest, "pair_id"))
        return ranks_to_set(latest.to_table(columns=RANKED), waiting)

    set_ranks(
        store,
        name,
        ranks,
        marker=f"{run_id}/ranks",
        run_id=run_id,
        planned_version=scores.version,
    )


def _rows_of(store: TableStore, name: str, uris: Sequence[str]) -> pa.Array:
    """Return the uris of those rows of a table that are asked for; none if it has no uris."""
    dataset = store.open(name)
    if dataset is None or "uri" not in dataset.schema.names:
        return pa.array([], pa.string())
    values = pa.array(uris, pa.string())
    try:
        found = [
            batch.column(0).filter(pc.is_in(batch.column(0), value_set=values))
            for batch in dataset.to_batches(columns=["uri"], batch_size=_BATCH_ROWS)
        ]
    except (ValueError, OSError, RuntimeError) as error:
        raise storage_error(store.uri(name), error) from error
    return pa.concat_arrays(found) if found else pa.array([], pa.string())


def _is_unfinished(store: TableStore, name: str, also_old: bool) -> bool:
    """Return whether an earlier deletion has left bytes: in data files, or in old versions."""
    dataset = store.open(name)
    if dataset is None or "uri" not in dataset.schema.names:
        return False
    if has_deleted_rows(dataset):
        return True
    if not also_old:
        return False
    history = store.histories[name]
    history.read(dataset, present_versions(store, name)[0] - 1)
    return any(_MARKER in marker for marker in history.markers())
