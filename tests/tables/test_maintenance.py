from __future__ import annotations

import hashlib
import os
import time
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from qvl_batch.errors import InvariantBrokenError, LeaseHeldError, RunFailedError, StorageError
from qvl_batch.storage import is_local
from qvl_batch.tables import catalog, commit, fragments, index, maintenance
from qvl_batch.tables.check import check_table
from qvl_batch.tables.garbage import gc
from qvl_batch.tables.index import IndexRules
from qvl_batch.tables.lease import Leases, lease_place
from qvl_batch.tables.ledger import done_units
from qvl_batch.tables.recall import sample_queries
from qvl_batch.tables.search import search
from tests.tables import clusters, rows

NAME = "media__dt-1"
RULES = IndexRules(min_rows=1000, num_queries=200)
NO_FAILURES = pa.array([], pa.string())
NOW = timedelta(0)


def sound(store, num_rows, table=NAME) -> None:
    dataset = store.open(table)
    assert dataset.count_rows() == num_rows
    assert check_table(dataset, None, NO_FAILURES) == []


def paths(store, table=NAME) -> set[str]:
    fs = store.storage.filesystem(store.root)
    top = fs._strip_protocol(store.uri(table))
    fs.invalidate_cache()
    return {path.removeprefix(f"{top}/") for path in fs.find(top)}


def let_time_pass(store) -> None:
    # Object stores give the time of a file in whole seconds.
    time.sleep(0.02 if is_local(store.root) else 1.1)


def test_fewer_files_with_the_same_rows_in_the_same_order(any_store) -> None:
    clusters.make(any_store, NAME, [300, 200, 100])
    before = any_store.open(NAME).to_table()
    done = maintenance.compact(any_store, NAME)
    assert (done.fragments_before, done.fragments_after, done.num_rows) == (3, 1, 600)
    assert any_store.open(NAME).to_table().equals(before)
    sound(any_store, 600)
    version = any_store.open(NAME).version
    again = maintenance.compact(any_store, NAME)
    assert (again.fragments_before, again.fragments_after) == (1, 1)
    assert any_store.open(NAME).version == version


def test_new_files_are_in_the_catalog_as_known(store) -> None:
    clusters.make(store, NAME, [])
    known = [file for seed in range(3) for file in clusters.add(store, NAME, 100, seed=seed)]
    catalog.refresh(store, [NAME], {NAME: known}, run_id="run-0")
    maintenance.compact(store, NAME)
    row = catalog.row_of(store, NAME, ["files", "version", "run_id", "num_units"])
    (file,) = row["files"]
    content = Path(store.root, f"{NAME}.lance", file["path"]).read_bytes()
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert not file["recomputed"]
    assert row["version"] == store.open(NAME).version
    assert (row["run_id"], row["num_units"]) == ("run-0", 300)


def test_files_made_of_unknown_ones_are_marked(store) -> None:
    clusters.make(store, NAME, [100, 100])
    maintenance.compact(store, NAME)
    (file,) = catalog.row_of(store, NAME, ["files"])["files"]
    assert file["recomputed"]


def test_a_damaged_file_is_not_laundered(store) -> None:
    clusters.make(store, NAME, [])
    known = [file for seed in range(2) for file in clusters.add(store, NAME, 100, seed=seed)]
    catalog.refresh(store, [NAME], {NAME: known}, run_id="run-0")
    path = Path(store.root, f"{NAME}.lance", known[1]["path"])
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    version = store.open(NAME).version
    with pytest.raises(InvariantBrokenError, match=known[1]["path"]):
        maintenance.compact(store, NAME)
    assert store.open(NAME).version == version


def test_an_index_stays_valid_and_published(any_store) -> None:
    clusters.make(any_store, NAME, [2000, 2000])
    index.publish(any_store, index.refresh_index(any_store, NAME, RULES))
    clusters.add(any_store, NAME, 100, seed=9)
    state = catalog.row_of(any_store, NAME, ["index"])["index"]
    dataset = any_store.open(NAME)
    queries, _ = sample_queries(dataset, 20)
    before = search({NAME: dataset}, queries, 10, nprobes={NAME: 2})
    maintenance.compact(any_store, NAME)
    dataset = any_store.open(NAME)
    # Lance does not mix rows that an index covers with rows that it does not.
    assert len(dataset.get_fragments()) == 2
    assert search({NAME: dataset}, queries, 10, nprobes={NAME: 2}).equals(before)
    assert index.coverage(dataset, "vector_bits_idx").segments == (4000,)
    assert catalog.row_of(any_store, NAME, ["index"])["index"] == state
    sound(any_store, 4100)
    assert index.refresh_index(any_store, NAME, RULES).action == index.EXTEND


def test_a_run_goes_on_after_a_compaction_of_its_indexed_table(any_store) -> None:
    # It looks for its marker in every version since its plan, those of maintenance among them.
    clusters.make(any_store, NAME, [2000, 2000])
    planned = any_store.open(NAME).version
    index.refresh_index(any_store, NAME, RULES)
    maintenance.compact(any_store, NAME)
    schema = any_store.open(NAME).schema
    new = clusters.table(schema, clusters.vectors(10, seed=5), prefix="n", run_id="run-1")
    written = fragments.write_fragments(any_store.root, any_store.storage, NAME, new)
    for _ in range(2):
        # A store that has read no version yet, as after a restart.
        fresh = type(any_store)(any_store.root, any_store.storage)
        version = commit.append(
            fresh, NAME, written, marker="m", run_id="run-1", planned_version=planned
        )
    assert version == any_store.open(NAME).version
    assert len(done_units(any_store.open(NAME))) == 4010
    sound(any_store, 4010)


def test_a_table_that_is_being_written_is_left_alone(any_store) -> None:
    clusters.make(any_store, NAME, [100, 100])
    version = any_store.open(NAME).version
    place = lease_place(any_store.root, any_store.storage)
    with Leases(place, "run-0") as leases:
        leases.acquire([NAME])
        with pytest.raises(LeaseHeldError, match="run-0"):
            maintenance.compact(any_store, NAME)
    assert any_store.open(NAME).version == version
    assert maintenance.compact(any_store, NAME).fragments_after == 1
    with Leases(place, "run-1") as leases:
        assert leases.acquire([NAME]) == [], "the compaction gave the lease back"


def test_rows_that_come_while_it_works_win(any_store) -> None:
    # From a driver that holds no lease, or lost it.
    clusters.make(any_store, NAME, [100, 100])
    before = paths(any_store)
    other = type(any_store)(any_store.root, any_store.storage)
    dataset = any_store.open(NAME)
    tasks = maintenance.Compaction.plan(dataset, {}).tasks
    clusters.add(other, NAME, 50, seed=9, run_id="run-1")
    with Leases(lease_place(any_store.root, any_store.storage), "compact-0") as leases:
        leases.acquire([NAME])
        with pytest.raises(LeaseHeldError, match="run-1"):
            maintenance._rewrite(
                any_store, NAME, dataset, tasks, maintenance.Compaction.commit, leases
            )
    sound(any_store, 250)
    # Nothing is left behind.
    added = paths(any_store) - before
    assert len([path for path in added if path.startswith("data/")]) == 1


def test_a_commit_in_the_last_moment_harms_nothing(any_store) -> None:
    clusters.make(any_store, NAME, [100, 100])
    other = type(any_store)(any_store.root, any_store.storage)

    def after_an_append(dataset, results):
        clusters.add(other, NAME, 50, seed=9, run_id="run-1")
        return maintenance.Compaction.commit(dataset, results)

    done = maintenance.compact(any_store, NAME, commit=after_an_append)
    assert (done.num_rows, done.fragments_after) == (250, 2)
    sound(any_store, 250)


def test_a_lost_acknowledgement_is_no_error(any_store) -> None:
    clusters.make(any_store, NAME, [100, 100])

    def unheard(dataset, results):
        maintenance.Compaction.commit(dataset, results)
        raise OSError("connection reset")

    assert maintenance.compact(any_store, NAME, commit=unheard).fragments_after == 1
    sound(any_store, 200)


def test_of_two_compactions_one_says_that_the_other_was_faster(store) -> None:
    clusters.make(store, NAME, [100, 100])

    def beaten(dataset, results):
        # One that does not know of leases.
        other = store.open(NAME)
        other.optimize.compact_files(target_rows_per_fragment=1000)
        return maintenance.Compaction.commit(dataset, results)

    with pytest.raises(RunFailedError, match="faster"):
        maintenance.compact(store, NAME, commit=beaten)
    sound(store, 200)


@pytest.mark.parametrize("action", ["die-in-compaction", "die-after-compaction"])
def test_a_kill_in_the_middle_and_again(store, start_worker, action) -> None:
    clusters.make(store, NAME, [2000, 2000])
    index.publish(store, index.refresh_index(store, NAME, RULES))
    worker = start_worker(action, store, NAME)
    assert worker.wait(timeout=60) == -9
    sound(store, 4000)
    # Its process is gone from this machine, so its lease is taken over at once.
    assert maintenance.compact(store, NAME).fragments_after == 1
    sound(store, 4000)
    assert index.refresh_index(store, NAME, RULES).action == index.NOTHING
    row = catalog.row_of(store, NAME, ["version", "index", "files"])
    assert (row["version"], len(row["files"])) == (store.open(NAME).version, 1)
    assert row["index"] is not None


@pytest.mark.parametrize("action", ["die-in-index", "die-before-publishing"])
def test_a_kill_while_an_index_is_built_and_again(store, start_worker, action) -> None:
    clusters.make(store, NAME, [8000, 8000])
    worker = start_worker(action, store, NAME)
    assert worker.wait(timeout=60) == -9
    sound(store, 16_000)
    done = index.refresh_index(store, NAME, RULES)
    index.publish(store, done)
    assert done.published
    sound(store, 16_000)
    # What the killed build left goes, and what is in use stays.
    gc(store, NAME, NOW)
    assert index.refresh_index(store, NAME, RULES).action == index.NOTHING
    uuids = {path.split("/")[1] for path in paths(store) if path.startswith("_indices/")}
    assert len(uuids) == 1
    dataset = store.open(NAME)
    queries, _ = sample_queries(dataset, 20)
    assert search({NAME: dataset}, queries, 10, nprobes={NAME: 2}).num_rows == 200


def test_failures_and_catalog_are_compacted_too(store) -> None:
    store.check_writable()
    for i in range(4):
        commit.append_failures(store, rows.failures([f"u{i}"]), f"m{i}", "run-0")
    assert maintenance.compact(store, "_qvl_failures").fragments_after == 1
    clusters.make(store, NAME, [10])
    for i in range(4):
        catalog.refresh(store, [NAME], {}, run_id=f"run-{i}")
    before = catalog.read(store)
    maintenance.compact(store, "_qvl_catalog")
    assert catalog.read(store).equals(before)


def orphan(store) -> str:
    new = clusters.table(store.open(NAME).schema, clusters.vectors(5), prefix="o")
    (written,) = fragments.write_fragments(store.root, store.storage, NAME, new)
    return written["files"][0]["path"]


def test_old_versions_and_orphans_go_and_live_files_stay(any_store) -> None:
    clusters.make(any_store, NAME, [2000, 2000])
    index.publish(any_store, index.refresh_index(any_store, NAME, RULES))
    old = {file for file in paths(any_store) if file.startswith("data/")}
    maintenance.compact(any_store, NAME)
    lost = orphan(any_store)
    let_time_pass(any_store)
    before = paths(any_store)
    planned = gc(any_store, NAME, NOW, dry_run=True)
    assert paths(any_store) == before
    gone = {file.path for file in planned.files}
    assert old | {lost} <= gone
    assert planned.versions == tuple(range(1, any_store.open(NAME).version))
    done = gc(any_store, NAME, NOW)
    assert done == planned
    assert paths(any_store) == before - gone
    assert done.size_bytes > 0
    sound(any_store, 4000)
    assert [v["version"] for v in any_store.open(NAME).versions()] == [any_store.open(NAME).version]
    dataset = any_store.open(NAME)
    queries, _ = sample_queries(dataset, 20)
    assert search({NAME: dataset}, queries, 10, nprobes={NAME: 2}).num_rows == 200
    assert gc(any_store, NAME, NOW).files == ()


def test_what_is_young_stays(store) -> None:
    clusters.make(store, NAME, [100, 100])
    lost = orphan(store)
    assert gc(store, NAME).files == ()
    # A file of a run that died eight days ago, and a version that is as old.
    long_ago = time.time() - 8 * 86400
    os.utime(Path(store.root, f"{NAME}.lance", lost), (long_ago, long_ago))
    (first,) = Path(store.root, f"{NAME}.lance", "_versions").glob(f"{2**64 - 2}.manifest")
    os.utime(first, (long_ago, long_ago))
    done = gc(store, NAME)
    assert done.versions == (1,)
    assert [file.path for file in done.files if file.kind == "data"] == [lost]
    sound(store, 200)


def test_a_run_that_is_about_to_commit_keeps_its_files(any_store) -> None:
    clusters.make(any_store, NAME, [100])
    planned = any_store.open(NAME).version
    with Leases(lease_place(any_store.root, any_store.storage), "run-0") as leases:
        leases.acquire([NAME])
        new = clusters.table(any_store.open(NAME).schema, clusters.vectors(50), prefix="n")
        written = fragments.write_fragments(any_store.root, any_store.storage, NAME, new)
        let_time_pass(any_store)
        gc(any_store, NAME, NOW)
        commit.append(any_store, NAME, written, marker="m", run_id="run-0", planned_version=planned)
    sound(any_store, 150)


def test_tagged_versions_stay(store) -> None:
    clusters.make(store, NAME, [100, 100])
    store.open(NAME).tags.create("before", 2)
    maintenance.compact(store, NAME)
    let_time_pass(store)
    done = gc(store, NAME, NOW)
    assert 2 not in done.versions
    assert store.open(NAME).checkout_version("before").to_table().num_rows == 100
    sound(store, 200)


def test_a_run_finds_its_commit_although_older_versions_are_gone(store) -> None:
    clusters.make(store, NAME, [100])
    planned = store.open(NAME).version
    new = clusters.table(store.open(NAME).schema, clusters.vectors(50), prefix="n", run_id="r")
    written = fragments.write_fragments(store.root, store.storage, NAME, new)
    first = commit.append(store, NAME, written, marker="m", run_id="r", planned_version=planned)
    let_time_pass(store)
    gc(store, NAME, NOW)
    fresh = type(store)(store.root)
    again = commit.append(fresh, NAME, written, marker="m", run_id="r", planned_version=planned)
    assert again == first
    sound(store, 150)


def test_no_such_table(store) -> None:
    store.check_writable()
    for act in (maintenance.compact, gc, index.refresh_index):
        with pytest.raises(StorageError, match="no table"):
            act(store, "absent")
