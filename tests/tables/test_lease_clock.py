"""Clocks that are wrong, or jump: what a lease says of a run, and that nobody is doubled."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from qvl_batch.errors import LeaseHeldError, LeaseLostError
from qvl_batch.storage import Storage
from qvl_batch.tables import commit, fragments, rewrite
from qvl_batch.tables.conditional import Place
from qvl_batch.tables.lease import Leases, holders, lease_place
from tests.tables import rows

TABLES = ["media"]


class JumpedPlace(Place):
    """A store whose clock has jumped since the others wrote their heartbeats."""

    def __init__(self, root: str, storage: Storage, jump: timedelta) -> None:
        super().__init__(root, storage)
        self._jump = jump

    def now(self) -> datetime:
        return super().now() + self._jump


@pytest.fixture
def root(tmp_path) -> str:
    return str(tmp_path / "_qvl_leases")


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_run_whose_own_clock_is_wrong_is_as_old_as_the_store_says(root, hours) -> None:
    wrong = JumpedPlace(root, Storage(), timedelta(hours=hours))
    right = Place(root, Storage())
    with Leases(wrong, "wrong-clock") as first:
        first.acquire(TABLES)
        # Its own time is monotonic.
        first.check()
        first.confirm("media")
        (holder,) = holders(right)
        assert abs(holder.age_s) < 5
        with pytest.raises(LeaseHeldError, match="wrong-clock"), Leases(right, "b") as second:
            second.acquire(TABLES)


def test_after_a_jump_back_nobody_is_taken_over_unasked(root) -> None:
    with Leases(Place(root, Storage()), "at-work") as first:
        first.acquire(TABLES)
        jumped = JumpedPlace(root, Storage(), timedelta(hours=-2))
        with pytest.raises(LeaseHeldError, match="at-work"), Leases(jumped, "b") as second:
            second.acquire(TABLES)
        first.confirm("media")
        with Leases(jumped, "thief") as thief:
            assert thief.acquire(TABLES, steal=True) == TABLES


def test_after_a_jump_forward_a_live_run_is_fenced_and_finds_out(store) -> None:
    schema = rows.schema()
    store.create("media", schema)
    place = lease_place(store.root, store.storage)
    with Leases(place, "at-work") as first:
        first.acquire(TABLES)
        written = fragments.write_to(store, "media", rows.table_rows(["a"], schema))
        jumped = JumpedPlace(place.root, store.storage, timedelta(hours=2))
        with Leases(jumped, "heir") as heir:
            assert heir.acquire(TABLES) == TABLES
            version = rewrite.fence(store, "media", run_id="heir")
            with pytest.raises(LeaseLostError, match="heir"):
                first.confirm("media")
            with pytest.raises(LeaseHeldError, match="heir"):
                commit.append(
                    store, "media", written, marker="m", run_id="at-work", planned_version=1
                )
            commit.append(
                store, "media", written, marker="m", run_id="heir", planned_version=version
            )
    assert store.open("media").count_rows() == 1
