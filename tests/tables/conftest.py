from __future__ import annotations

import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest

from qvl_batch.storage import Storage
from qvl_batch.tables.store import TableStore
from tests.moto_in_process import moto_server


@pytest.fixture
def store(tmp_path) -> TableStore:
    store = TableStore(str(tmp_path / "root"))
    store.check_writable()
    return store


@dataclass(frozen=True)
class S3:
    """A real S3 server on loopback with one bucket of this test's own."""

    endpoint_url: str
    bucket: str

    @property
    def storage(self) -> Storage:
        return Storage(endpoint_url=self.endpoint_url, region="us-east-1")

    @property
    def root(self) -> str:
        return f"s3://{self.bucket}/tables"

    def check_credentials(self, on: bool) -> None:
        """Let the server look at credentials from now on, or not."""
        count = b"0" if on else b"inf"
        url = f"{self.endpoint_url}/moto-api/reset-auth"
        headers = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, count, headers)).read()


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture
def moto_s3(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> S3:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    bucket = f"bucket-{uuid.uuid4().hex}"
    client = boto3.client("s3", endpoint_url=moto_endpoint, region_name="us-east-1")
    client.create_bucket(Bucket=bucket)
    return S3(moto_endpoint, bucket)


@pytest.fixture(params=["local", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path) -> TableStore:
    """The same test on a directory and on S3."""
    if request.param == "local":
        return TableStore(str(tmp_path / "root"))
    s3 = request.getfixturevalue("moto_s3")
    return TableStore(s3.root, s3.storage)


@pytest.fixture
def start_worker() -> Iterator[Callable[[str, TableStore, str], subprocess.Popen[str]]]:
    """Start `worker.py` in a process of its own; whatever still runs at the end is killed."""
    root = Path(__file__).parents[2]
    started: list[subprocess.Popen[str]] = []

    def start(action: str, store: TableStore, name: str = "x") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.tables.worker", action, store.root, name],
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
