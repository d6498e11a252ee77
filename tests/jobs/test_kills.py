"""The embed command on an S3 server, killed and stopped in every way, then run again."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from qvl_batch.demo.corpus import write_corpus
from qvl_batch.jobs.verify import verify
from tests.jobs.conftest import Job

# Small blocks and quick commits: a kill finds some work committed and some in flight.
SLICED = ["pools.units_per_block=8", "commit.interval_s=0.5", "commit.fragment_bytes=65536"]


@pytest.fixture
def job(bucket, tmp_path, monkeypatch, make_job):
    """More than 500 units in a bucket, listed."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint_url)
    corpus = write_corpus(tmp_path / "corpus", scale=5)
    bucket.fs().put(f"{corpus.media_dir}/", f"{bucket.name}/media", recursive=True)
    return make_job(bucket.uri("media"), bucket.uri("vectors"))


class Running:
    """`qvl-batch embed` in a process group of its own, with the local Ray that it starts."""

    def __init__(self, job: Job, path, *overrides: str):
        config = job.write(path / "embed.yaml")
        sets = [part for text in (*SLICED, *overrides) for part in ("--set", text)]
        self.log = (path / "log.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qvl_batch.cli", "embed", config, *sets],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def output(self) -> str:
        self.log.flush()
        with open(self.log.name) as file:
            return file.read()

    def wait(self, timeout_s: float = 120) -> int:
        return self.process.wait(timeout_s)

    def actors(self, name: str) -> list[psutil.Process]:
        """Ray titles a worker's process with its actor's class."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in family if any(name in part for part in p.cmdline())]

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


def rows_committed(job: Job) -> int:
    from qvl_batch.tables.store import TableStore

    store = TableStore(job.root, job.storage)
    return sum(store.open(name).count_rows() for name in job.tables())


def wait_for(condition, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.1)


def check(job: Job) -> None:
    checked = verify(job.root, job.storage, manifest=job.manifest)
    assert checked.problems == (), str(checked)
    assert checked.num_done + checked.num_failed == checked.num_units


@pytest.mark.timeout(400)
def test_kills_of_driver_and_actor_lose_and_double_nothing(job, tmp_path):
    done = 0
    for round_ in range(2):
        run = Running(job, tmp_path)
        wait_for(lambda before=done, run=run: rows_committed(job) > before or run.process.poll())
        assert run.process.poll() is None, run.output()
        if round_ == 1:
            victim = run.actors("EmbedMedia")
            assert victim, "no actor to kill"
            victim[0].kill()
            before = rows_committed(job)
            wait_for(
                lambda before=before, run=run: rows_committed(job) > before or run.process.poll()
            )
        run.kill_all()
        done = rows_committed(job)
    last = Running(job, tmp_path)
    assert last.wait() == 0, last.output()
    skipped = re.search(r"([\d,]+) skipped", last.output())
    assert skipped, last.output()
    assert int(skipped[1].replace(",", "")) > 0
    check(job)


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_commits_and_exits_in_order(job, tmp_path, number, code):
    run = Running(job, tmp_path)
    wait_for(lambda: rows_committed(job) > 0 or run.process.poll())
    os.kill(run.process.pid, number)
    stopped = time.monotonic()
    assert run.wait(60) == code, run.output()
    assert time.monotonic() - stopped < 45
    assert "Traceback" not in run.output()
    assert re.search(r"units not reached: run the same command again", run.output())
    committed = rows_committed(job)
    last = Running(job, tmp_path)
    assert last.wait() == 0, last.output()
    assert rows_committed(job) > committed
    check(job)
