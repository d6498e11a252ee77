"""What the versions of a table say, each read once, whatever cleaning has removed."""

from __future__ import annotations

from datetime import timedelta

import pytest

from qvl_batch.jobs.modes import Appending, Target
from qvl_batch.tables import commit
from qvl_batch.tables.garbage import gc
from qvl_batch.tables.history import History
from qvl_batch.tables.layout import FAILURES_TABLE
from qvl_batch.tables.store import TableStore
from tests.tables import rows

AT_ONCE = timedelta(seconds=-2)


@pytest.fixture
def media(any_store) -> TableStore:
    """Version 1 is empty; versions 2 to 7 are commits of two runs in turn."""
    any_store.check_writable()
    any_store.create("media", rows.schema())
    for number in range(2, 8):
        table = rows.table_rows([f"u{number}"], rows.schema())
        rows.add(any_store, "media", table, f"m{number}", run_id=f"run-{number % 2}")
    return any_store


def test_markers_and_writers_since_a_version(media) -> None:
    history = History()
    dataset = media.open("media")
    history.read(dataset, 4)
    assert history.markers() == ["m5", "m6", "m7"]
    assert history.find("m6", 4) == [6]
    assert history.find("m6", 6) == []
    assert history.find("m3", 0) == []
    assert history.other_writers("run-0", 4) == ["run-1"]
    assert history.other_writers("run-1", 6) == []
    # Asked for more than before, nothing is read twice.
    history.read(dataset, 0)
    assert history.find("m3", 0) == [3]
    assert history.find("m6", 0) == [6]
    assert sorted(history.markers()) == [f"m{number}" for number in range(2, 8)]


def test_versions_that_cleaning_has_removed_are_no_error(media) -> None:
    gc(media, "media", AT_ONCE)
    history = History()
    history.read(media.open("media"), 0)
    assert history.markers() == ["m7"]
    rows.add(media, "media", rows.table_rows(["z"], rows.schema()), "z", run_id="run-0")
    history.read(media.open("media"), 0)
    assert history.find("z", 0) == [8]


def test_a_handle_that_fails_half_way_leaves_nothing_to_be_counted_twice(media) -> None:
    class Failing:
        """A table whose store fails at one version."""

        def __init__(self, dataset) -> None:
            self._dataset, self.version = dataset, dataset.version

        def read_transaction(self, version):
            if version == 5:
                raise OSError("connection reset")
            return self._dataset.read_transaction(version)

    history, dataset = History(), media.open("media")
    with pytest.raises(OSError, match="reset"):
        history.read(Failing(dataset), 1)
    history.read(dataset, 1)
    assert [history.find(f"m{number}", 1) for number in range(2, 8)] == [[n] for n in range(2, 8)]


def test_a_run_reads_no_failures_of_earlier_runs(media) -> None:
    for number in range(4):
        commit.append_failures(media, rows.failures([f"f{number}"]), f"old/{number}", "old")
    store = TableStore(media.root, media.storage)
    mine = Appending(Target(store=store, run_id="mine", planned_versions={}))
    for number in range(2):
        mine.append_failures(rows.failures([f"x{number}"]), f"mine/{number}")
        mine.append_failures(rows.failures([f"x{number}"]), f"mine/{number}")
    assert store.histories[FAILURES_TABLE].markers() == ["mine/0", "mine/1"]
    assert store.open(FAILURES_TABLE).count_rows() == 6
