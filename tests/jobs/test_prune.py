"""Units that left the manifest leave the tables, a commit a table, and never by mistake."""

from __future__ import annotations

import pytest

from qvl_batch.errors import ConfigError, LeaseHeldError, ManifestError, StorageError
from qvl_batch.jobs.prune import run_prune
from qvl_batch.jobs.verify import verify
from qvl_batch.tables import catalog, staging
from qvl_batch.tables.lease import Leases, lease_place
from tests.jobs.upkeep_roots import DAYS, many, table_of


def test_unlisted_units_go_in_one_commit_a_table_and_once(plain_root):
    first, second = DAYS
    plain_root.embed({first: many("a"), second: many("b")})
    later = plain_root.manifest({first: many("a")[1:], second: many("b")})
    before = {day: plain_root.store.open(table_of(day)).version for day in DAYS}
    said = []
    report = run_prune(plain_root.config(later), echo=said.append)
    assert report.removed == {table_of(first): 1}
    assert f"{table_of(first)}: 1 of 20 units removed" in said
    assert plain_root.names(first) == many("a")[1:]
    assert plain_root.names(second) == many("b")
    versions = {day: plain_root.store.open(table_of(day)).version for day in DAYS}
    assert versions == {first: before[first] + 1, second: before[second]}
    row = catalog.row_of(plain_root.store, table_of(first), ["version", "num_units", "num_rows"])
    assert row == {
        "table": table_of(first),
        "version": versions[first],
        "num_units": 19,
        "num_rows": 19,
    }
    storage = plain_root.store.storage
    assert verify(plain_root.store.root, storage, manifest=str(later)).problems == ()
    # Done again, as a scheduler may: nothing to do, no new version.
    assert run_prune(plain_root.config(later)).removed == {}
    assert plain_root.store.open(table_of(first)).version == versions[first]


def test_more_than_a_tenth_is_asked_about_and_nothing_is_touched(plain_root):
    first, second = DAYS
    plain_root.embed({first: many("a"), second: many("b")})
    # A tenth of the first day is allowed; the second day loses more.
    later = plain_root.manifest({first: many("a")[2:], second: many("b")[3:]})
    with pytest.raises(ConfigError, match=r"5 units .*dt-2026-01-02: 3 of 20.*--yes") as refused:
        run_prune(plain_root.config(later))
    assert refused.value.exit_code == 2
    assert table_of(first) not in str(refused.value)
    assert plain_root.names(first) == many("a")
    report = run_prune(plain_root.config(later), yes=True)
    assert report.removed == {table_of(first): 2, table_of(second): 3}
    assert plain_root.names(second) == many("b")[3:]


def test_a_partition_that_the_manifest_does_not_name_stays(plain_root):
    first, second = DAYS
    plain_root.embed({first: many("a"), second: many("b")})
    later = plain_root.manifest({second: many("b")[1:]})
    assert run_prune(plain_root.config(later)).removed == {table_of(second): 1}
    assert plain_root.names(first) == many("a")


def test_an_empty_manifest_an_open_replace_and_a_live_run_are_refused(plain_root):
    first, _ = DAYS
    plain_root.embed({first: many("a")})
    store, later = plain_root.store, plain_root.manifest({first: many("a")[1:]})
    with pytest.raises(ManifestError):
        run_prune(plain_root.config(plain_root.manifest({})))
    with Leases(lease_place(store.root, store.storage), "at-work") as other:
        other.acquire([table_of(first)])
        with pytest.raises(LeaseHeldError, match="at-work"):
            run_prune(plain_root.config(later))
    staging.begin(
        store, table_of(first), session="s", digest="d", base_version=1, run_id="replacing"
    )
    with pytest.raises(StorageError, match=f"gc {store.root} --give-up {table_of(first)}"):
        run_prune(plain_root.config(later))
    assert plain_root.names(first) == many("a")
