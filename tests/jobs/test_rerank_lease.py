"""A rerank run holds its tables of candidates and of scores."""

from __future__ import annotations

import contextlib

import pytest

from qvl_batch.errors import LeaseHeldError, LeaseLostError
from qvl_batch.jobs.rerank import run_rerank
from qvl_batch.jobs.rerank_job import prepare
from qvl_batch.storage import Storage
from qvl_batch.tables.lease import Leases, lease_place
from tests.jobs.rerank_jobs import RerankRun, write_lines


@pytest.fixture
def run(embedded, tmp_path) -> RerankRun:
    (tmp_path / "scores").mkdir()
    queries = [{"query_id": "q0", "text": "two red circles"}]
    path = write_lines(tmp_path / "queries.jsonl", queries)
    return RerankRun(queries=path, root=embedded.root, out=str(tmp_path / "scores"))


@pytest.mark.parametrize("table", ["scores", "scores.candidates"])
def test_a_second_run_is_refused_before_anything_starts(run, table):
    with Leases(lease_place(run.store.root, Storage()), "at-work") as other:
        other.acquire([table])
        with pytest.raises(LeaseHeldError, match="at-work") as refused:
            run_rerank(run.config(), echo=lambda _: None)
        assert refused.value.exit_code == 3
        with contextlib.ExitStack() as held:
            thief = prepare(run.config(), held, steal=True)
            # What dies before the table exists may create it and commit: fenced once it is there.
            assert thief.to_fence == [table]
            thief.leases.confirm(table)


def test_a_run_that_lost_its_lease_commits_nothing(run):
    with contextlib.ExitStack() as held:
        slept = prepare(run.config(), held)
        commits = slept.commits({})
        with Leases(lease_place(run.store.root, Storage()), "heir") as heir:
            heir.acquire(["scores.candidates"], steal=True)
            with pytest.raises(LeaseLostError, match="heir"):
                slept.leases.confirm("scores.candidates")
            with pytest.raises(LeaseLostError):
                commits.append("scores.candidates", [], "m", None)
    assert run.store.names() == []
