"""The commit loop with writes and tables that keep what they are given in memory."""

import datetime as dt

import numpy as np
import pyarrow as pa
import pytest

from qvl_batch import schema
from qvl_batch.errors import TooManyFailuresError
from qvl_batch.jobs.commit_loop import CommitLoop
from qvl_batch.jobs.stages import Written


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


class Writes:
    """A block is (ordinals, failed ordinals); a write ends when the test lets it."""

    def __init__(self, *, at_once=True):
        self.at_once, self.started = at_once, []

    def start(self, blocks, exclude):
        self.started.append((blocks, exclude))
        return len(self.started) - 1

    def finished(self, handles, timeout_s):
        return {h: self.result(h) for h in handles} if self.at_once else {}

    def result(self, handle):
        blocks, exclude = self.started[handle]
        ordinals = [o for block, _ in blocks for o in block if o not in exclude]
        failed = [o for _, lost in blocks for o in lost if o not in exclude]
        done = [o for o in ordinals if o not in failed]
        fragment = {"fragment": str(done), "num_rows": len(done), "files": [{"path": str(done)}]}
        return Written(
            ordinals=np.array(ordinals, np.int64),
            not_started=np.array([], np.int64),
            fragments={"t": [fragment]} if done else {},
            failures=failures(len(failed)),
            num_units=len(done),
            num_rows=len(done),
            num_tokens=10 * len(done),
        )


def failures(count):
    row = {
        "collection": "c",
        "partition": "{}",
        "unit_id": "u",
        "media_id": "m",
        "stage": "decode",
        "error_type": "CorruptMediaError",
        "message": "",
        "retryable": False,
        "attempt": 1,
        "run_id": "r",
        "failed_at": dt.datetime.now(dt.UTC),
    }
    return pa.Table.from_pylist([row] * count, schema.FAILURES)


class Tables:
    def __init__(self):
        self.commits, self.failures, self.markers = [], 0, []

    def append(self, table, fragments, marker, ordinals):
        self.commits.append([fragment["fragment"] for fragment in fragments])
        self.markers.append(marker)

    def append_failures(self, rows, marker):
        self.failures += rows.num_rows
        self.markers.append(marker)


def make_loop(num_units, *, writes=None, clock=None, **options):
    tables = Tables()
    settings = {
        "interval_s": 60,
        "fragment_bytes": 100,
        "max_writes": 2,
        "max_failure_rate": 0.5,
        "failure_rate_after_units": 1000,
    } | options
    loop = CommitLoop(
        num_units=num_units,
        writes=writes or Writes(),
        tables=tables,
        run_id="run",
        clock=clock or Clock(),
        **settings,
    )
    return loop, tables


def test_nothing_is_committed_before_the_interval_and_everything_after_it():
    clock = Clock()
    loop, tables = make_loop(4, clock=clock)
    loop.add(([0, 1], []), 10)
    loop.poll()
    assert tables.commits == []
    clock.now_s = 61
    loop.poll()
    loop.poll()
    assert tables.commits == [["[0, 1]"]]
    assert loop.counts.embedded == 2
    assert loop.missing().tolist() == [2, 3]


def test_a_full_group_is_written_early_but_committed_on_time():
    writes = Writes()
    loop, tables = make_loop(4, writes=writes)
    loop.add(([0, 1], []), 60)
    loop.add(([2, 3], []), 60)
    assert len(writes.started) == 1
    loop.poll()
    assert tables.commits == []
    loop.finish()
    assert tables.commits == [["[0, 1, 2, 3]"]]
    assert loop.missing().size == 0


def test_a_block_that_comes_twice_is_committed_once():
    loop, tables = make_loop(3)
    loop.add(([0, 1], []), 100)
    loop.poll()
    loop.add(([0, 1], []), 100)
    loop.poll()
    loop.finish()
    assert tables.commits == [["[0, 1]"]]
    assert loop.counts.embedded == 2


def test_a_group_of_old_and_new_units_is_written_again_without_the_old():
    writes = Writes()
    loop, tables = make_loop(4, writes=writes)
    loop.add(([0, 1], []), 100)
    loop.poll()
    loop.add(([0, 1], []), 50)
    loop.add(([2, 3], [3]), 50)
    loop.poll()
    loop.finish()
    assert writes.started[-1][1] == frozenset({0, 1})
    assert tables.commits == [["[0, 1]", "[2]"]]
    assert tables.failures == 1
    assert loop.missing().size == 0


def test_markers_are_distinct():
    loop, tables = make_loop(3)
    for ordinal in range(3):
        loop.add(([ordinal], [ordinal] if ordinal == 2 else []), 100)
        loop.poll()
        loop.finish()
    assert len(set(tables.markers)) == len(tables.markers) == 3


def test_too_many_failures_end_the_run_after_a_commit():
    loop, tables = make_loop(10, failure_rate_after_units=4)
    loop.add(([0, 1, 2, 3], [1, 2, 3]), 100)
    with pytest.raises(TooManyFailuresError, match="3 of 4 units failed"):
        loop.poll()
    assert tables.commits == [["[0]"]]
    assert tables.failures == 3


def test_few_units_do_not_trip_the_failure_limit():
    loop, tables = make_loop(3, failure_rate_after_units=4)
    loop.add(([0, 1, 2], [0, 1, 2]), 100)
    loop.poll()
    loop.finish()
    assert tables.failures == 3


def test_writes_at_a_time_are_bounded():
    writes = Writes(at_once=False)
    loop, _ = make_loop(10, writes=writes, max_writes=2)
    for ordinal in range(5):
        loop.add(([ordinal], []), 100)
    assert len(writes.started) == 2
    assert loop.is_full
