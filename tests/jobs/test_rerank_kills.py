"""The rerank command on an S3 server, killed in both halves, then run again."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from qvl_batch.demo.corpus import write_corpus
from qvl_batch.demo.queries import DEMO_QUERIES
from qvl_batch.jobs.embed import run_embed
from qvl_batch.jobs.verify import verify
from tests.jobs.rerank_jobs import RerankRun, write_lines

# Small blocks and quick commits: a kill finds some work committed and some in flight.
SLICED = [
    "pools.media_per_block=2",
    "pools.queries_per_wave=50",
    "commit.interval_s=0.3",
    "commit.fragment_bytes=65536",
    "search.top_k=20",
]
NUM_QUERIES = 140


@pytest.fixture
def run(bucket, tmp_path, monkeypatch, make_job):
    """The corpus in a bucket, embedded; scores go beside the vectors."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint_url)
    corpus = write_corpus(tmp_path / "corpus")
    bucket.fs().put(f"{corpus.media_dir}/", f"{bucket.name}/media", recursive=True)
    job = make_job(bucket.uri("media"), bucket.uri("vectors"))
    run_embed(job.config())
    import ray

    ray.shutdown()
    queries = [
        {"query_id": f"q{i}", "text": f"{DEMO_QUERIES[i % 7].text} {i // 7}"}
        for i in range(NUM_QUERIES)
    ]
    picture = next(
        file.path
        for file in corpus.files
        if file.path.endswith(".png") and file.path not in corpus.broken
    )
    queries[3]["image"] = f"{bucket.uri('media')}/{picture}"
    path = write_lines(tmp_path / "queries.jsonl", queries)
    return RerankRun(queries=path, root=job.root, storage=job.storage)


class Running:
    """`qvl-batch rerank` in a process group of its own, with the local Ray that it starts."""

    def __init__(self, run: RerankRun, path):
        config = run.write(path / "rerank.yaml")
        sets = [part for text in SLICED for part in ("--set", text)]
        self.log = (path / "log.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qvl_batch.cli", "rerank", config, *sets],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def output(self) -> str:
        self.log.flush()
        with open(self.log.name) as file:
            return file.read()

    def kill_all(self) -> None:
        """SIGKILL the driver; its Ray goes with it."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=30)

    def actors(self, name: str) -> list[psutil.Process]:
        """Ray titles a worker's process with its actor's class."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in family if any(name in part for part in p.cmdline())]


def num_rows(run: RerankRun, name: str) -> int:
    dataset = run.store.open(name)
    return dataset.count_rows() if dataset is not None else 0


def wait_for(running: Running, condition, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert running.process.poll() is None, running.output()
        assert time.monotonic() < deadline, running.output()
        time.sleep(0.05)


@pytest.mark.timeout(600)
def test_kills_in_both_halves_lose_and_double_nothing(run, tmp_path):
    first = Running(run, tmp_path)
    wait_for(first, lambda: num_rows(run, "scores.candidates") > 0)
    first.kill_all()
    assert num_rows(run, "scores") < NUM_QUERIES * 20

    second = Running(run, tmp_path)
    wait_for(second, lambda: num_rows(run, "scores") > 0)
    victim = second.actors("RerankPairs")
    assert victim, "no actor to kill"
    victim[0].kill()
    before = num_rows(run, "scores")
    wait_for(second, lambda: num_rows(run, "scores") > before)
    second.kill_all()
    committed = num_rows(run, "scores")
    assert 0 < committed < NUM_QUERIES * 20

    last = Running(run, tmp_path)
    assert last.process.wait(300) == 0, last.output()
    skipped = re.search(r"\(([\d,]+) scored before", last.output())
    assert skipped, last.output()
    assert int(skipped[1].replace(",", "")) >= committed
    rows = run.rows()
    assert rows.num_rows == len(set(rows["pair_id"].to_pylist())) == NUM_QUERIES * 20
    assert rows["rank_after"].null_count == 0
    checked = verify(run.root, run.storage)
    assert checked.problems == (), str(checked)
    assert checked.scores[0].num_scored == NUM_QUERIES * 20


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_signal_commits_and_exits_in_order(run, tmp_path):
    first = Running(run, tmp_path)
    wait_for(first, lambda: num_rows(run, "scores") > 0)
    os.kill(first.process.pid, signal.SIGTERM)
    assert first.process.wait(90) == 143, first.output()
    assert "Traceback" not in first.output()
    assert "not reached: run the same command again" in first.output()
    last = Running(run, tmp_path)
    assert last.process.wait(300) == 0, last.output()
    rows = run.rows()
    assert rows.num_rows == len(set(rows["pair_id"].to_pylist())) == NUM_QUERIES * 20
    assert rows["rank_after"].null_count == 0
