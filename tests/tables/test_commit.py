from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import lance
import pytest

from qvl_batch.errors import InvariantBrokenError, LeaseHeldError, RunFailedError, StorageError
from qvl_batch.tables import commit, fragments, ledger
from qvl_batch.tables.layout import FAILURES_TABLE
from qvl_batch.tables.store import TableStore
from tests.tables import rows

SCHEMA = rows.schema()


@pytest.fixture
def media(any_store) -> TableStore:
    any_store.check_writable()
    any_store.create("media", SCHEMA)
    return any_store


def write(store: TableStore, ids: list[str]) -> list[fragments.WrittenFragment]:
    table = rows.table_rows(ids, SCHEMA)
    return fragments.write_fragments(store.root, store.storage, "media", table)


def ids(store: TableStore) -> list[str]:
    return sorted(store.open("media").to_table(columns=["row_id"])["row_id"].to_pylist())


def test_append_once_and_again_with_the_same_marker(media) -> None:
    written = write(media, ["a", "b"])
    version = commit.append(media, "media", written, marker="m1", run_id="r", planned_version=1)
    for store in (media, TableStore(media.root, media.storage)):
        for planned in (1, None):
            again = commit.append(
                store, "media", written, marker="m1", run_id="r", planned_version=planned
            )
            assert again == version == 2
    assert ids(media) == ["a:0", "b:0"]
    properties = media.open("media").read_transaction(version).transaction_properties
    assert properties == {"qvl.marker": "m1", "qvl.run_id": "r"}


def test_lance_itself_would_double_them(media) -> None:
    # The reason for the marker: if this ever fails, the protocol may become simpler.
    written = write(media, ["a"])
    operation = lance.LanceOperation.Append(list(fragments.iter_fragments(written)))
    for _ in range(2):
        commit.commit_transaction(media, "media", lance.Transaction(1, operation))
    assert ids(media) == ["a:0", "a:0"]


def test_a_lost_acknowledgement_is_no_second_commit(media) -> None:
    calls = []

    def lose_the_answer(store: TableStore, table: str, transaction: lance.Transaction) -> int:
        commit.commit_transaction(store, table, transaction)
        calls.append(table)
        raise OSError("connection reset")

    written = write(media, ["a"])
    version = commit.append(
        media, "media", written, marker="m", run_id="r", planned_version=1, commit=lose_the_answer
    )
    assert (version, calls, ids(media)) == (2, ["media"], ["a:0"])


def test_an_attempt_that_did_nothing_is_done_again(media) -> None:
    calls = []

    def fail_twice(store: TableStore, table: str, transaction: lance.Transaction) -> int:
        calls.append(table)
        if len(calls) < 3:
            raise OSError("503 slow down")
        return commit.commit_transaction(store, table, transaction)

    written = write(media, ["a"])
    commit.append(
        media, "media", written, marker="m", run_id="r", planned_version=1, commit=fail_twice
    )
    assert (len(calls), ids(media)) == (3, ["a:0"])


def test_retries_end(store) -> None:
    store.create("media", SCHEMA)
    calls = []

    def full(store: TableStore, table: str, transaction: lance.Transaction) -> int:
        calls.append(table)
        raise OSError("No space left on device (os error 28)")

    with pytest.raises(StorageError, match="no space left"):
        commit.append(
            store, "media", write(store, ["a"]), marker="m", run_id="r", commit=full, attempts=3
        )
    assert len(calls) == 3
    assert ids(store) == []


def test_own_commits_and_maintenance_since_the_plan_are_no_conflict(media) -> None:
    first, second = write(media, ["a", "b"]), write(media, ["c"])
    commit.append(media, "media", first, marker="m1", run_id="r", planned_version=1)
    media.open("media").delete("unit_id = 'a'")
    media.open("media").create_scalar_index("row_id", "BTREE")
    version = commit.append(media, "media", second, marker="m2", run_id="r", planned_version=1)
    assert version == 5
    assert ids(media) == ["b:0", "c:0"]


def test_another_run_on_the_table_is_refused_before_the_commit(media) -> None:
    commit.append(media, "media", write(media, ["a"]), marker="x", run_id="other")
    with pytest.raises(LeaseHeldError) as error:
        commit.append(
            media, "media", write(media, ["b"]), marker="m", run_id="r", planned_version=1
        )
    assert (error.value.table, error.value.run_id) == ("media", "other")
    assert ids(media) == ["a:0"]
    # A run that planned after it goes on.
    commit.append(media, "media", write(media, ["b"]), marker="m", run_id="r", planned_version=2)
    assert ids(media) == ["a:0", "b:0"]


def test_another_run_at_the_very_same_moment_is_told(media) -> None:
    other = write(media, ["a"])

    def overtaken(store: TableStore, table: str, transaction: lance.Transaction) -> int:
        commit.append(store, "media", other, marker="x", run_id="other")
        return commit.commit_transaction(store, table, transaction)

    written = write(media, ["b"])
    with pytest.raises(LeaseHeldError, match="other"):
        commit.append(
            media, "media", written, marker="m", run_id="r", planned_version=1, commit=overtaken
        )


def test_a_restore_by_another_run_fences_this_one(media) -> None:
    commit.append(media, "media", write(media, ["a"]), marker="m1", run_id="r", planned_version=1)
    media.open("media").restore()
    with pytest.raises(LeaseHeldError):
        commit.append(
            media, "media", write(media, ["b"]), marker="m2", run_id="r", planned_version=1
        )


def test_a_marker_that_stands_twice_is_told(media) -> None:
    written = write(media, ["a"])
    for _ in range(2):
        operation = lance.LanceOperation.Append(list(fragments.iter_fragments(written)))
        properties = {"qvl.marker": "m", "qvl.run_id": "r"}
        transaction = lance.Transaction(1, operation, transaction_properties=properties)
        commit.commit_transaction(media, "media", transaction)
    with pytest.raises(InvariantBrokenError, match=r"versions \[2, 3\]"):
        commit.append(media, "media", written, marker="m", run_id="r", planned_version=1)


def test_a_missing_file_is_not_committed(store) -> None:
    store.create("media", SCHEMA)
    for damage in ("gone", "cut"):
        written = write(store, ["a"])
        file = Path(store.root, "media.lance", written[0]["files"][0]["path"])
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-8])
        with pytest.raises(InvariantBrokenError, match=file.name):
            commit.append(store, "media", written, marker=damage, run_id="r", planned_version=1)
    assert store.open("media").version == 1


def test_nothing_to_commit_is_no_version(media) -> None:
    assert commit.append(media, "media", [], marker="m", run_id="r", planned_version=1) == 1


def test_a_removed_table_is_told(store) -> None:
    with pytest.raises(RunFailedError, match="is gone"):
        commit.append(store, "media", [], marker="m", run_id="r")


def test_failures_of_several_runs_stand_together(media) -> None:
    for run in ("r1", "r2"):
        found = rows.failures([f"{run}-a"], run_id=run)
        first = commit.append_failures(media, found, f"{run}:1", run)
        assert commit.append_failures(media, found, f"{run}:1", run) == first
    table = media.open(FAILURES_TABLE).to_table()
    assert sorted(table["unit_id"].to_pylist()) == ["r1-a", "r2-a"]


def test_eight_processes_lose_and_double_no_failure(store, start_worker) -> None:
    names = [f"run{i}" for i in range(8)]
    workers = [start_worker("failures", store, name) for name in names]
    assert [worker.wait(timeout=120) for worker in workers] == [0] * 8
    found = Counter(store.open(FAILURES_TABLE).to_table()["unit_id"].to_pylist())
    assert found == {f"{name}-{i}-{x}": 1 for name in names for i in range(4) for x in "ab"}


def test_a_kill_before_the_commit_leaves_nothing_and_the_next_run_does_it(
    store, start_worker
) -> None:
    store.create("media", SCHEMA)
    worker = start_worker("die-before-commit", store)
    assert worker.stdout.readline() == "written\n"
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert ids(store) == []
    assert len(store.files("media").list("data")) == 1
    commit.append(
        store, "media", write(store, ["a", "b"]), marker="m", run_id="r2", planned_version=1
    )
    assert ids(store) == ["a:0", "b:0"]


def test_a_kill_right_after_the_commit_is_seen_by_the_next_run(store, start_worker) -> None:
    store.create("media", SCHEMA)
    assert start_worker("die-after-commit", store).wait(timeout=60) == -signal.SIGKILL
    assert sorted(ledger.done_units(store.open("media")).to_pylist()) == ["a", "b"]
