"""The prune job: units that a manifest does not list any more leave its partitions' tables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyarrow as pa

from qvl_batch.config import EmbedConfig
from qvl_batch.errors import ConfigError
from qvl_batch.jobs.identify import identify
from qvl_batch.jobs.leasing import new_run_id, refuse_open_replaces, take_leases
from qvl_batch.jobs.manifest import read_manifest
from qvl_batch.jobs.stale import find_unlisted
from qvl_batch.tables import catalog
from qvl_batch.tables.aliases import refuse_alias
from qvl_batch.tables.layout import check_collection_name
from qvl_batch.tables.rewrite import replace_units
from qvl_batch.tables.store import TableStore

# A manifest that lists so much less is as likely to be a mistake.
ASKED_ABOVE_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """How many units left each table; a table that lost none is not named."""

    removed: Mapping[str, int]
    num_tables: int

    @property
    def num_units(self) -> int:
        return sum(self.removed.values())

    def __str__(self) -> str:
        if not self.removed:
            return f"Nothing to prune: {self.num_tables} table(s) hold no unlisted units."
        return (
            f"{self.num_units:,} units removed from {len(self.removed)} of {self.num_tables} "
            "table(s); their bytes leave with `qvl-batch compact` and `qvl-batch gc`"
        )


def run_prune(
    config: EmbedConfig,
    *,
    yes: bool = False,
    steal: bool = False,
    echo: Callable[[str], None] = print,
) -> PruneReport:
    """Remove from a manifest's partitions the units that it does not list, a commit a table.

    Partitions of which the manifest lists nothing are left alone. May be done again: the second
    time there is nothing to do.

    Args:
        config: Of the embed job; its manifest, output and storage count.
        yes: Go on where more than 10 % of the units of a partition would go.
        steal: Take partitions over from a run that still seems to be alive.
        echo: Takes lines for a person.

    Raises:
        ConfigError: If more than 10 % of a partition's units would go, with the numbers.
        InputError: If the manifest or the storage can not be used, or a replace is open.
        LeaseHeldError: If another run writes the same partition.
    """
    storage, collection = config.storage.to_storage(), config.output.collection
    check_collection_name(collection)
    manifest = read_manifest(config.input.manifest, storage, config.output.partition_by)
    units = identify(manifest, collection)
    store = TableStore(config.output.root, storage)
    store.check_writable()
    refuse_alias(store, collection)
    present = [name for name in units.tables if store.open(name) is not None]
    removed: dict[str, int] = {}
    with contextlib.ExitStack() as held:
        run_id = new_run_id()
        leases, _ = take_leases(
            store, present, run_id, held, ttl_s=config.commit.lease_ttl_s, steal=steal
        )
        refuse_open_replaces(store, present)
        planned = {name: store.open_existing(name).version for name in present}
        unlisted = find_unlisted(units, store)
        if not yes:
            _refuse_many(unlisted)
        for name, (ids, num_units) in sorted(unlisted.items()):
            leases.check()
            replace_units(
                store,
                name,
                [],
                ids.to_pylist(),
                marker=f"{run_id}/prune/{name}",
                run_id=run_id,
                planned_version=planned[name],
            )
            removed[name] = len(ids)
            echo(f"{name}: {len(ids):,} of {num_units:,} units removed")
        # Also where nothing went: a run that was killed before this left the catalog behind.
        stale = [name for name in present if name in removed or _is_behind(store, name)]
        catalog.refresh(store, stale, {}, run_id=run_id)
    report = PruneReport(removed=removed, num_tables=len(present))
    echo(str(report))
    return report


def _is_behind(store: TableStore, name: str) -> bool:
    row = catalog.row_of(store, name, ["version"])
    return row is None or row["version"] != store.open_existing(name).version


def _refuse_many(unlisted: Mapping[str, tuple[pa.Array, int]]) -> None:
    """Refuse to remove more than a tenth of a partition unasked; then no partition is touched."""
    many = [
        f"{name}: {len(ids):,} of {num_units:,}"
        for name, (ids, num_units) in sorted(unlisted.items())
        if len(ids) > ASKED_ABOVE_SHARE * num_units
    ]
    if many:
        total = sum(len(ids) for ids, _ in unlisted.values())
        shown = "; ".join(many[:10]) + (f" and {len(many) - 10} more" if len(many) > 10 else "")
        raise ConfigError(
            f"{total:,} units are not in the manifest, more than 10 % of {len(many)} partition(s) "
            f"({shown}). Nothing was removed.",
            "Compare the manifest, then give --yes.",
        )
