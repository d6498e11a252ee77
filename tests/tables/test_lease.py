"""Leases: one live holder a table, on disk and on S3."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from qvl_batch.errors import LeaseHeldError, LeaseLostError
from qvl_batch.storage import Storage
from qvl_batch.tables.conditional import Place, check_exclusive, ensure_exclusive
from qvl_batch.tables.lease import Leases, holders, live_runs

TABLES = ["media__dt-1", "media__dt-2"]


@pytest.fixture(params=["local", "s3", pytest.param("ceph", marks=pytest.mark.s3real)])
def place(request, tmp_path) -> Place:
    if request.param == "local":
        return Place(str(tmp_path / "_qvl_leases"), Storage())
    bucket = request.getfixturevalue("bucket" if request.param == "s3" else "real_bucket")
    return Place(bucket.uri("root/_qvl_leases"), bucket.storage)


def test_one_holder_and_who_it_is(place) -> None:
    with Leases(place, "run-a") as first:
        assert first.acquire(TABLES) == []
        with pytest.raises(LeaseHeldError) as refused, Leases(place, "run-b") as second:
            second.acquire(TABLES[1:])
        assert refused.value.exit_code == 3
        assert "run-a" in str(refused.value)
        assert "process" in str(refused.value)
        first.confirm(TABLES[0])
        # Another partition of the same root is free.
        with Leases(place, "run-c") as third:
            assert third.acquire(["media__dt-3"]) == []
    assert live_runs(place) == set()
    with Leases(place, "run-d") as after:
        # Released: nobody is left who could still commit.
        assert after.acquire(TABLES) == []
        assert live_runs(place) == {"run-d"}


def test_of_many_at_once_one_wins_all(place) -> None:
    def race(number: int) -> str:
        leases = Leases(place, f"run-{number}")
        try:
            leases.acquire(TABLES)
        except LeaseHeldError:
            return ""
        return leases.run_id

    with ThreadPoolExecutor(8) as pool:
        won = [run for run in pool.map(race, range(8)) if run]
    assert len(won) == 1
    assert {holder.run_id for holder in holders(place)} == set(won)


HOLD = """
import sys, time
from qvl_batch.storage import Storage
from qvl_batch.storage import Storage
from qvl_batch.tables.conditional import Place
from qvl_batch.tables.lease import Leases
Leases(Place(sys.argv[1], Storage()), "dead", ttl_s=2).acquire(sys.argv[2:])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holding(tmp_path):
    """Another process that holds the tables."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "_qvl_leases"), *TABLES]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_dead_are_taken_over_at_once_on_their_machine(holding, tmp_path) -> None:
    place = Place(str(tmp_path / "_qvl_leases"), Storage())
    with pytest.raises(LeaseHeldError, match=f"process {holding.pid}"), Leases(place, "b") as early:
        early.acquire(TABLES)
    holding.kill()
    holding.wait()
    with Leases(place, "heir") as heir:
        # To be fenced: who died may have left a commit on its way.
        assert heir.acquire(TABLES) == TABLES


def test_who_is_silent_is_taken_over_after_its_lifetime(holding, tmp_path) -> None:
    place = Place(str(tmp_path / "_qvl_leases"), Storage())
    with Leases(place, "thief", ttl_s=2) as thief:
        assert thief.acquire(TABLES[:1], steal=True) == TABLES[:1]
    holding.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    with Leases(place, "heir", ttl_s=1) as heir:
        # The thief has released the first; the second is still the silent run's.
        assert heir.acquire(TABLES) == TABLES[1:]


def test_a_run_that_was_taken_for_dead_may_not_go_on(place) -> None:
    slept = Leases(place, "slept", ttl_s=60)
    slept.acquire(TABLES)
    slept.check()
    with Leases(place, "heir") as heir:
        assert heir.acquire(TABLES, steal=True) == TABLES
        with pytest.raises(LeaseLostError, match="heir"):
            slept.confirm(TABLES[0])
        with pytest.raises(LeaseLostError):
            slept.check()
    slept.release()
    assert {holder.run_id for holder in holders(place)} == {"heir"}


def test_without_renewal_in_time_a_run_stops_by_itself(tmp_path) -> None:
    place = Place(str(tmp_path / "l"), Storage())
    lease = Leases(place, "run", ttl_s=1.5)
    lease.acquire(TABLES)
    time.sleep(2.5)
    lease.check()  # renewed meanwhile
    lease._stop.set()
    time.sleep(1.7)
    with pytest.raises(LeaseLostError, match="renewed"):
        lease.check()


def test_the_stores_of_the_tests_are_exclusive(place) -> None:
    check_exclusive(place)
    assert place.names("race") == []


def test_a_store_that_passed_is_believed_at_its_own_address_only(place) -> None:
    ensure_exclusive(place)
    assert place.names("exclusive") == ["exclusive"]
    passed_at = place.mtime("exclusive")
    time.sleep(1.1)
    ensure_exclusive(place)
    assert place.mtime("exclusive") == passed_at
    place.write("exclusive", place.read("exclusive") | {"root": "s3://another/root"})
    ensure_exclusive(place)
    assert place.read("exclusive")["root"] == place.root
