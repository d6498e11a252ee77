"""Fixtures for all tests: object stores on loopback, and no way out to real ones.

* ``bucket``: a new bucket on the moto server. Fast, but moto checks neither secrets nor expiry.
* ``real_bucket``: a new bucket on a Ceph RADOS gateway; its tests are marked ``s3real``.
* ``any_bucket``: the test runs on both.

Ceph comes from Debian packages. Without them the marked tests are skipped, or fail where
``QVL_TESTS=all`` says that everything must run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qvl_batch.storage import Storage

if TYPE_CHECKING:
    import fsspec

    from tests.embedded_root import EmbeddedRoot

S3_DIR = Path(__file__).parent / "s3"
# What a marked test needs on PATH, and the Debian packages that bring it.
PROGRAMS = {
    "s3real": (
        ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd"),
        "radosgw ceph-mon ceph-osd ceph-common",
    ),
    "chromium": (("chromium",), "chromium"),
}
REGION = "us-east-1"


@dataclass(frozen=True)
class Server:
    """An S3 server on loopback; its one user's keys are also in the environment."""

    endpoint_url: str
    access_key: str
    secret_key: str

    def client(self) -> Any:
        """Return a boto3 client, for what fsspec has no words for."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=REGION,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
        )


@dataclass(frozen=True)
class Bucket:
    """One empty bucket of a server, for one test."""

    server: Server
    name: str

    @property
    def endpoint_url(self) -> str:
        return self.server.endpoint_url

    @property
    def storage(self) -> Storage:
        return Storage(endpoint_url=self.endpoint_url, region=REGION)

    def uri(self, key: str = "") -> str:
        """Return ``s3://name/key``, or ``s3://name`` for the bucket itself."""
        return f"s3://{self.name}/{key}".rstrip("/")

    def fs(self) -> fsspec.AbstractFileSystem:
        """Return the file system that the package itself would use."""
        return self.storage.filesystem(self.uri())


@pytest.fixture(scope="session", autouse=True)
def aws_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Replace every AWS setting of the machine, so that no test reaches a real account.

    Child processes, Ray's workers among them, inherit it.
    """
    nowhere = tmp_path_factory.mktemp("aws") / "absent"
    # Proxies are for the outside: requests to loopback must not go through one.
    no_proxy = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"]))
    settings = {
        "AWS_ACCESS_KEY_ID": "qvltests",
        "AWS_SECRET_ACCESS_KEY": f"secret{uuid.uuid4().hex}",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_REGION": REGION,
        "AWS_CONFIG_FILE": str(nowhere),
        "AWS_SHARED_CREDENTIALS_FILE": str(nowhere),
        # Without it a wrong key costs seconds of asking an instance's metadata service.
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in settings.items():
            patch.setenv(name, value)
        yield settings


@contextmanager
def serve(command: list[str], log_path: Path, timeout_s: float) -> Iterator[str]:
    """Run a server that prints ``ready URL`` and ends when its standard input closes.

    Yields:
        The URL.

    Raises:
        RuntimeError: With the end of the log, if it ends or is not ready within `timeout_s`.
    """
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + timeout_s
        url = None
        while url is None:
            ended = process.poll() is not None
            lines = log_path.read_text(errors="replace").splitlines()
            url = next((line.split()[1] for line in lines if line.startswith("ready ")), None)
            if url is None and (ended or time.monotonic() > deadline):
                state = f"ended with code {process.returncode}" if ended else "is not ready"
                tail = "\n".join(lines[-30:])
                raise RuntimeError(f"{command[0]} {state} after at most {timeout_s} s:\n{tail}")
            time.sleep(0.05)
        yield url
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def s3(
    aws_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """An S3 server in memory (moto) in a process of its own."""
    command = [sys.executable, str(S3_DIR / "serve_moto.py")]
    with serve(command, tmp_path_factory.mktemp("moto") / "log", timeout_s=90) as url:
        yield Server(
            url, aws_environment["AWS_ACCESS_KEY_ID"], aws_environment["AWS_SECRET_ACCESS_KEY"]
        )


@pytest.fixture(scope="session")
def rgw(
    aws_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A Ceph RADOS gateway with its state under a temporary directory."""
    state = tmp_path_factory.mktemp("rgw")
    keys = (aws_environment["AWS_ACCESS_KEY_ID"], aws_environment["AWS_SECRET_ACCESS_KEY"])
    command = [str(S3_DIR / "start-rgw.sh"), str(state / "ceph"), *keys]
    with serve(command, state / "log", timeout_s=240) as url:
        yield Server(url, *keys)


@contextmanager
def new_bucket(server: Server) -> Iterator[Bucket]:
    bucket = Bucket(server, f"test-{uuid.uuid4().hex[:12]}")
    client = server.client()
    client.create_bucket(Bucket=bucket.name)
    yield bucket
    # Both servers hold their objects in memory. The empty bucket stays: a worker that outlives its
    # test may still write to it, which is no reason to fail.
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket.name):
        keys = [{"Key": entry["Key"]} for entry in page.get("Contents", [])]
        if keys:
            client.delete_objects(Bucket=bucket.name, Delete={"Objects": keys, "Quiet": True})


@pytest.fixture
def bucket(s3: Server) -> Iterator[Bucket]:
    with new_bucket(s3) as new:
        yield new


@pytest.fixture
def real_bucket(rgw: Server) -> Iterator[Bucket]:
    with new_bucket(rgw) as new:
        yield new


@pytest.fixture(params=["s3", pytest.param("rgw", marks=pytest.mark.s3real)])
def any_bucket(request: pytest.FixtureRequest) -> Iterator[Bucket]:
    with new_bucket(request.getfixturevalue(request.param)) as new:
        yield new


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedRoot:
    """The shipped corpus embedded once, for tests that only read; see `tests.embedded_root`."""
    from tests.embedded_root import embed_corpus

    return embed_corpus(tmp_path_factory.mktemp("embedded"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what asks for the gateway, so that no test can forget to; leave the long ones to CI."""
    for item in items:
        if "rgw" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.s3real)
    if os.environ.get("QVL_TESTS") == "all" or config.getoption("-m"):
        return
    long = [item for item in items if item.get_closest_marker("full") is not None]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item.get_closest_marker("full") is None]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what the machine lacks the programs for, or fail where everything must run."""
    for marker, (programs, packages) in PROGRAMS.items():
        if item.get_closest_marker(marker) is None:
            continue
        missing = [name for name in programs if shutil.which(name) is None]
        if missing:
            reason = f"no {', '.join(missing)} on PATH; Debian packages: {packages}"
            if os.environ.get("QVL_TESTS") == "all":
                pytest.fail(f"QVL_TESTS=all: {reason}", pytrace=False)
            pytest.skip(reason)
