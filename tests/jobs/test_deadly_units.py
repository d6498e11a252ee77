"""A unit that kills the embedding actor fails; the others are unharmed."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qvl_batch.config import ModelSection
from qvl_batch.demo.checkpoint import embedding_dir
from qvl_batch.jobs.checkpoint import QwenCheckpoint
from qvl_batch.jobs.embed import run_embed
from qvl_batch.jobs.verify import verify
from qvl_batch.storage import Storage
from tests.jobs.conftest import Job

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
