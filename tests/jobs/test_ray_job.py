"""`ray job submit` as the README shows it, on a cluster that asks for a token."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from qvl_batch.demo.corpus import write_corpus
from qvl_batch.jobs.verify import verify

REPOSITORY = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def cluster(tmp_path):
    """A head node in a session of its own; yields the environment and address of its clients."""
    token = tmp_path / "token"
    token.write_text(uuid.uuid4().hex * 2)
    ports = {
        name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")
    }
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_raylet_start_wait_time_s": "180",
    }
    head = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"]
        + [f"--{name}={port}" for name, port in ports.items()],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    yield environment, f"http://127.0.0.1:{ports['dashboard-port']}"
    family = psutil.Process(head.pid).children(recursive=True)
    os.killpg(head.pid, signal.SIGTERM)
    _, alive = psutil.wait_procs([*family, psutil.Process(head.pid)], timeout=5)
    for process in alive:
        process.kill()
    head.wait()


@pytest.mark.full
@pytest.mark.timeout(400)
def test_the_job_runs_through_ray_job_submit(cluster, make_job, tmp_path):
    environment, address = cluster
    job = make_job(str(write_corpus(tmp_path / "corpus").media_dir))
    clone = tmp_path / "clone"
    for folder in ("qvl_batch", "pipelines"):
        shutil.copytree(
            REPOSITORY / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    job.write(clone / "embed.yaml")
    command = [RAY, "job", "submit", "--address", address, "--working-dir", "."]
    command += ["--", "python", "pipelines/embed.py", "embed.yaml"]
    deadline = time.monotonic() + 240
    while True:
        done = subprocess.run(
            command, cwd=clone, env=environment, capture_output=True, text=True, check=False
        )
        # A head that has just started may answer before it can run anything.
        starting = any(
            text in done.stdout + done.stderr
            for text in ("No available agent", "Failed to connect", "Connection refused")
        )
        if not starting or time.monotonic() > deadline:
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "115 units embedded as 120 rows" in done.stdout
    assert verify(job.root, job.storage, manifest=job.manifest).problems == ()
