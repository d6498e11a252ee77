"""A unit that kills the embedding actor, or a reranking one, fails; the others are unharmed."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from qvl_batch.config import ModelSection
from qvl_batch.demo.checkpoint import embedding_dir
from qvl_batch.jobs.checkpoint import QwenCheckpoint, QwenReranker
from qvl_batch.jobs.embed import run_embed
from qvl_batch.jobs.rerank import run_rerank
from qvl_batch.jobs.verify import verify
from qvl_batch.storage import Storage
from qvl_batch.tables.store import TableStore
from tests.jobs.conftest import Job
from tests.jobs.rerank_jobs import RerankRun, write_lines

DEADLY = "kill the worker"


class DeadlyEngine:
    """The true engine, dying as native code does when a certain text comes."""

    def __init__(self, engine) -> None:
        self._engine = engine

    def embed(self, inputs):
        if any(DEADLY in text for unit in inputs for text in unit.texts):
            os.kill(os.getpid(), signal.SIGKILL)
        return self._engine.embed(inputs)


@dataclass(frozen=True)
class DeadlyCheckpoint(QwenCheckpoint):
    def load_engine(self, recipe):
        return DeadlyEngine(super().load_engine(recipe))


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_unit_that_kills_the_embedding_actor_fails_alone(local_ray, tmp_path):
    texts = [f"a red circle number {n}" for n in range(40)]
    texts[17] = DEADLY
    manifest = str(tmp_path / "manifest.parquet")
    pq.write_table(pa.table({"text": texts}), manifest)
    job = Job(manifest=manifest, root=str(tmp_path / "vectors"))
    model = DeadlyCheckpoint(ModelSection(path=str(embedding_dir())), Storage())
    report = run_embed(job.config("pools.units_per_block=16"), model=model)
    assert (report.embedded, report.failed) == (39, 1)
    assert report.failures_by_reason == {"WorkerKilledError": 1}
    checked = verify(job.root, Storage(), manifest=manifest)
    assert not checked.problems
    assert (checked.num_done, checked.num_failed) == (39, 1)
    # It failed for good: a second run does not try it again.
    assert run_embed(job.config(), model=model).skipped_failed == 1


class DeadlyRerankEngine:
    """The true engine, dying as native code does when a certain document comes."""

    def __init__(self, engine, deadly: str) -> None:
        self._engine, self._deadly = engine, deadly
        self.counts = engine.counts

    def judge_pairs(self, pairs):
        if any(pair.document.uri == self._deadly for pair in pairs):
            os.kill(os.getpid(), signal.SIGKILL)
        return self._engine.judge_pairs(pairs)


@dataclass(frozen=True)
class DeadlyReranker(QwenReranker):
    deadly: str = ""

    def load_engine(self, recipe):
        return DeadlyRerankEngine(super().load_engine(recipe), self.deadly)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_medium_that_kills_the_rerank_actor_fails_alone(local_ray, embedded, tmp_path):
    store = TableStore(embedded.root)
    pictures = pa.concat_tables(
        store.open(name).to_table(columns=["row_id", "uri"], filter="kind = 'image'")
        for name in store.names()
        if not name.startswith("_")
    ).slice(0, 12)
    deadly = pictures["uri"][5].as_py()
    given = [{"query_id": "q0", "row_id": row} for row in pictures["row_id"].to_pylist()]
    (tmp_path / "scores").mkdir()
    run = RerankRun(
        queries=write_lines(tmp_path / "q.jsonl", [{"query_id": "q0", "text": "two red circles"}]),
        root=embedded.root,
        out=str(tmp_path / "scores"),
    )
    config = run.config(f"input.candidates={write_lines(tmp_path / 'given.jsonl', given)}")
    report = run_rerank(config, model=DeadlyReranker(config.model, Storage(), deadly=deadly))
    assert report.exit_code == 0
    scores, failures = run.rows("scores"), run.rows("_qvl_failures")
    assert scores.num_rows == 11
    assert deadly not in scores["uri"].to_pylist()
    assert sorted(pc.unique(scores["rank_after"]).to_pylist()) == list(range(1, 12))
    assert failures.select(["error_type", "stage", "uri"]).to_pylist() == [
        {"error_type": "WorkerKilledError", "stage": "rerank", "uri": deadly}
    ]
    assert verify(run.store.root, Storage(), collection="scores").problems == ()
