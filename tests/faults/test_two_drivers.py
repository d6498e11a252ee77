"""Two drivers on the same partitions: one works, and who was taken for dead can not commit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from qvl_batch import crash
from tests.faults import forked, scenario
from tests.faults.first_states import FirstStates
from tests.faults.matrix import Setting

TTL_S = 5.0


@pytest.fixture(scope="module")
def first(s3):
    from qvl_batch.storage import Storage

    with FirstStates(Storage(endpoint_url=s3.endpoint_url, region="us-east-1")) as states:
        yield states


@pytest.fixture(params=["local", "s3"])
def setting(request, first, tmp_path) -> Setting:
    return Setting.of("append", False, 0, request.param, tmp_path, first)


def start(setting: Setting, name: str, pace_s: float = 0.0, **environment: str) -> forked.Started:
    log = setting.folder / f"{name}.txt"
    return forked.start("embed", str(setting.config), pace_s, log=log, **environment)


def wait_for(condition, timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to that in time"
        time.sleep(0.02)


def num_rows(setting: Setting) -> int:
    from qvl_batch.tables.store import TableStore

    store = TableStore(setting.root, setting.storage)
    tables = [store.open_existing(scenario.table_of(day)) for day in scenario.DAYS]
    return sum(table.count_rows() for table in tables)


def test_of_two_started_together_one_works(setting) -> None:
    both = [start(setting, name, 0.3) for name in ("one", "other")]
    codes = [run.wait() for run in both]
    assert sorted(codes) == [0, 3], [run.output() for run in both]
    worked, refused = both[codes.index(0)], both[codes.index(3)]
    assert f"process {worked.pid} on" in refused.output()
    assert "since" in refused.output()
    assert setting.outcome().is_right


def test_a_killed_driver_is_taken_over(setting) -> None:
    before = num_rows(setting)
    killed = start(setting, "killed", 0.5)
    wait_for(lambda: num_rows(setting) > before)
    assert start(setting, "early").wait() == 3
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -9
    heir = start(setting, "heir")
    assert heir.wait() == 0, heir.output()
    assert setting.outcome().is_right


def long(*values):
    return pytest.param(*values, marks=pytest.mark.full)


SLEEPS = [
    ("append", "before-commit", 2),
    long("append", "between-partitions", 1),
    ("upsert", "before-commit", 2),
    long("late-upsert", "delete", 2),
    long("replace", "create-table", 5),
    long("replace", "replace-begin", 2),
    # Of three tables, each with a fence and a beginning, then what is recorded of the first.
    long("replace", "before-commit", 4),
    ("replace", "before-commit", 8),
    long("replace", "replace-publish", 2),
    long("replace", "replace-close", 2),
]


@pytest.mark.parametrize(("mode", "place", "nth"), SLEEPS)
def test_who_slept_past_its_lease_can_not_commit(first, tmp_path, mode, place, nth) -> None:
    setting = Setting.of(mode, False, 1, "local", tmp_path, first)
    token = tmp_path / "token"
    token.touch()
    sleeper = start(setting, "sleeper", **{crash.ENVIRONMENT: f"stop:{place}:{nth}:{token}"})
    wait_for(lambda: is_stopped(sleeper.pid))
    time.sleep(TTL_S + 0.5)
    heir = start(setting, "heir")
    assert heir.wait() == 0, heir.output()
    rows = num_rows(setting)
    os.kill(sleeper.pid, signal.SIGCONT)
    assert sleeper.wait() == 3, sleeper.output()
    assert "error: " in sleeper.output()
    assert num_rows(setting) == rows
    found = setting.outcome()
    assert found.is_right, found


@pytest.mark.parametrize(("place", "nth"), [("create-table", 5), ("before-commit", 8)])
def test_who_wakes_while_its_heir_replaces_does_no_harm(first, tmp_path, place, nth) -> None:
    setting = Setting.of("replace", False, 1, "local", tmp_path, first)
    token = tmp_path / "token"
    token.touch()
    sleeper = start(setting, "sleeper", **{crash.ENVIRONMENT: f"stop:{place}:{nth}:{token}"})
    wait_for(lambda: is_stopped(sleeper.pid))
    time.sleep(TTL_S + 0.5)
    # The heir rests before it publishes: the sleeper wakes in the middle of its work.
    heir = start(setting, "heir", 0.7)
    wait_for(lambda: num_staged(setting) > 1)
    os.kill(sleeper.pid, signal.SIGCONT)
    assert sleeper.wait() == 3, sleeper.output()
    assert heir.wait() == 0, heir.output()
    found = setting.outcome()
    assert found.is_right, found


def num_staged(setting: Setting) -> int:
    """Return how many parts of the new content are recorded."""
    from qvl_batch.tables import staging
    from qvl_batch.tables.store import TableStore

    found = staging.open_replaces(TableStore(setting.root, setting.storage))
    return sum(len(staged.fragments) for staged in found.values())


def is_stopped(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return state == "T"
