"""A part of the crash matrix: each place once, and (`full`) each place in each mode."""

from __future__ import annotations

import multiprocessing

import pytest

from qvl_batch import crash
from tests.faults import forked, scenario
from tests.faults.first_states import FirstStates
from tests.faults.matrix import ON_RAY_ONLY, Case, Passages, run_case

PLACES = [place for place in crash.PLACES if place not in ON_RAY_ONLY]
SEED = 2026


@pytest.fixture(scope="module")
def first(s3):
    from qvl_batch.storage import Storage

    with FirstStates(Storage(endpoint_url=s3.endpoint_url, region="us-east-1")) as states:
        yield states


@pytest.fixture(scope="module")
def passages(first):
    return Passages(first)


def check(place: str, mode: str, store: str, passages, first, folder) -> None:
    result = run_case(Case(place, mode, store, SEED), passages, folder, first)
    assert result.is_right, result
    assert result.killed or result.reruns == 0


@pytest.mark.parametrize("place", PLACES)
def test_a_kill_at_each_place_loses_and_doubles_nothing(place, passages, first, tmp_path) -> None:
    position = PLACES.index(place)
    modes = [mode for mode in scenario.MODES if place in passages.places(mode)]
    assert modes, "no mode passes this place"
    store = ("local", "s3")[position % 2]
    check(place, modes[position % len(modes)], store, passages, first, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("mode", scenario.MODES)
@pytest.mark.parametrize("place", PLACES)
def test_a_kill_at_each_place_in_each_mode(place, mode, passages, first, tmp_path) -> None:
    if place not in passages.places(mode):
        pytest.skip(f"{mode} does not pass it")
    position = PLACES.index(place) + scenario.MODES.index(mode)
    check(place, mode, ("s3", "local")[position % 2], passages, first, tmp_path)


def test_what_is_forked_after_lance_began_to_work_is_refused() -> None:
    # This process is such a one.
    child = multiprocessing.get_context("spawn").Process(target=forked.check_parent)
    child.start()
    child.join()
    assert child.exitcode == 1
