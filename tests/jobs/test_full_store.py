"""No space left: one clear line, nothing lost, and the next run goes on."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from qvl_batch.errors import StorageError
from qvl_batch.jobs.verify import verify
from qvl_batch.storage import Storage
from qvl_batch.tables.store import TableStore
from tests.faults import plain_driver
from tests.jobs.upkeep_roots import DAYS, Root, many

LISTED = {DAYS[0]: [*many("a", 40), "a-bad"], DAYS[1]: many("b", 40)}
_SIZE_BYTES = 4 << 20


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MiB, where this user may mount one."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE_BYTES}", "tmpfs", str(where)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small file system can be mounted: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def leave(disk: Path, free_bytes: int) -> Path:
    """Fill a disk but for so many bytes; return the file that fills it."""
    ballast = disk / "ballast"
    found = os.statvfs(disk)
    with ballast.open("wb") as file:
        file.write(b"\0" * max(0, found.f_bavail * found.f_frsize - free_bytes))
    return ballast


def assert_one_line(error: StorageError) -> None:
    assert "there is no space left" in str(error)
    assert "\n" not in str(error)
    assert error.exit_code == 2


def test_a_full_disk_wherever_it_hits(small_disk, tmp_path):
    root = Root(TableStore(str(small_disk / "root")), tmp_path)
    manifest = root.manifest(LISTED)
    hit = 0
    # From no room for a lease to room for all but the catalog.
    for free_bytes in range(0, 400 << 10, 12 << 10):
        ballast = leave(small_disk, free_bytes)
        try:
            plain_driver.run(root.config(manifest))
        except StorageError as error:
            assert_one_line(error)
            hit += 1
        finally:
            ballast.unlink()
    assert hit >= 2
    plain_driver.run(root.config(manifest))
    found = verify(root.store.root, Storage(), manifest=str(manifest), deep=True)
    assert found.problems == ()
    assert (found.num_done, found.num_rows, found.num_failed) == (80, 80, 1)


class FullStore:
    """A proxy in front of an S3 server that refuses to take more while it is full."""

    def __init__(self, endpoint: str) -> None:
        self.left = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.command == "PUT" and outer.is_full():
                    self.answer(403, {}, _QUOTA)
                    return
                sent = {k: v for k, v in self.headers.items() if k != "Accept-Encoding"}
                url = f"{endpoint}{self.path}"
                got = requests.request(self.command, url, data=body, headers=sent, timeout=30)
                kept = {k: v for k, v in got.headers.items() if k.lower() not in _OWN}
                length = got.headers.get("Content-Length") if self.command == "HEAD" else None
                self.answer(got.status_code, kept, got.content, length)

            def answer(self, status, headers, body, length=None) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def is_full(self) -> bool:
        if self.left is None:
            return False
        self.left -= 1
        return self.left < 0


_OWN = {"content-length", "connection", "transfer-encoding", "date", "server"}
_QUOTA = (
    b'<?xml version="1.0"?><Error><Code>QuotaExceeded</Code>'
    b"<Message>The quota of the bucket is exceeded</Message></Error>"
)


def test_a_full_object_store_wherever_it_hits(bucket, tmp_path):
    proxy = FullStore(bucket.endpoint_url)
    storage = Storage(endpoint_url=proxy.endpoint, region="us-east-1")
    root = Root(TableStore(bucket.uri("root"), storage), tmp_path)
    manifest = root.manifest(LISTED)
    hit = 0
    for puts in (0, 160, 175, 190, 210):
        proxy.left = puts
        try:
            plain_driver.run(root.config(manifest))
        except StorageError as error:
            assert_one_line(error)
            hit += 1
    assert hit >= 2
    proxy.left = None
    plain_driver.run(root.config(manifest))
    found = verify(root.store.root, storage, manifest=str(manifest))
    assert found.problems == ()
    assert (found.num_done, found.num_rows, found.num_failed) == (80, 80, 1)
    proxy.server.shutdown()
