"""A unit that kills its worker is found out, and its neighbours are done."""

from __future__ import annotations

import collections

import pyarrow as pa
import pytest

from qvl_batch.jobs.deaths import run_carefully


class Died(BaseException):
    """Stands for the end of the process."""


class Counting:
    """`Attempts` that outlive a worker, as the control actor does."""

    def __init__(self) -> None:
        self.open = collections.Counter()

    def begin(self, stage, ordinal, alone):
        self.open[stage, ordinal, alone] += 1
        return self.open[stage, ordinal, alone] - 1

    def end(self, stage, ordinal, alone):
        self.open.pop((stage, ordinal, alone), None)


def block_of(*ordinals: int) -> pa.Table:
    return pa.table({"_ordinal": pa.array(ordinals, pa.int64())})


def outcomes(table: pa.Table) -> list[str]:
    return table["outcome"].to_pylist()


@pytest.mark.parametrize("max_deaths", [2, 3])
@pytest.mark.parametrize("deadly", [{7}, {5, 8}, {5, 6, 7, 8}, set()])
def test_only_the_deadly_fail_and_the_block_keeps_its_order(deadly, max_deaths):
    attempts, deaths = Counting(), 0

    def run(units):
        if deadly & set(units["_ordinal"].to_pylist()):
            raise Died
        return units.append_column("outcome", pa.array(["done"] * units.num_rows))

    def failed(unit, failure):
        assert failure["error_type"] == "WorkerKilledError"
        assert not failure["retryable"]
        return unit.append_column("outcome", pa.array(["failed"]))

    while True:
        try:
            done = run_carefully(block_of(5, 6, 7, 8), "embed", run, failed, attempts, max_deaths)
        except Died:
            deaths += 1
            continue
        break
    assert done["_ordinal"].to_pylist() == [5, 6, 7, 8]
    assert outcomes(done) == ["failed" if o in deadly else "done" for o in (5, 6, 7, 8)]
    # The block once, then each deadly unit alone.
    assert deaths == (1 + len(deadly) * (max_deaths - 1) if deadly else 0)


def test_a_block_that_comes_again_after_it_ended_is_done_whole():
    attempts, sizes = Counting(), []

    def run(units):
        sizes.append(units.num_rows)
        return units

    for _ in range(2):
        run_carefully(block_of(1, 2, 3), "decode", run, None, attempts, 3)
    assert sizes == [3, 3]
