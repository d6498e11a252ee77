"""Objects on an S3 server, and on a server that misbehaves."""

from __future__ import annotations

import http.server
import os
import threading
import time
from collections.abc import Callable, Iterator

import boto3
import pytest

from qvl_batch.errors import (
    AccessDeniedError,
    ChangedMediaError,
    EmptyMediaError,
    FetchError,
    LimitExceededError,
    MissingMediaError,
)
from qvl_batch.media.fetch import Fetcher, FetchLimits, FetchRequest
from qvl_batch.storage import Storage
from tests.moto_in_process import moto_server

SECRET = "the-secret-key"


@pytest.fixture(scope="module", autouse=True)
def _credentials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # The client's own retries would hide ours and take seconds.
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        yield


@pytest.fixture(scope="module")
def moto_s3(_credentials) -> Iterator[tuple[str, object]]:
    with moto_server() as url:
        client = boto3.client("s3", endpoint_url=url)
        client.create_bucket(Bucket="media")
        yield url, client


@pytest.fixture
def put(moto_s3) -> Callable[[str, bytes], str]:
    """Put an object and return its etag as a listing states it."""

    def put_object(key: str, data: bytes) -> str:
        return moto_s3[1].put_object(Bucket="media", Key=key, Body=data)["ETag"].strip('"')

    return put_object


def fetcher_at(url: str, **limits: float) -> Fetcher:
    return Fetcher(Storage(endpoint_url=url, region="us-east-1"), FetchLimits(**limits))


def test_an_object_is_read_and_is_the_listed_one(moto_s3, put):
    for key in ("a.txt", "dt=2026-01-02/ä b+c%20?d=1#e&f", "trailing /x", "-/..a"):
        etag = put(key, key.encode())
        size = len(key.encode())
        with fetcher_at(moto_s3[0]).fetch(f"s3://media/{key}", etag=etag, size_bytes=size) as got:
            assert got.data == key.encode()
        assert fetcher_at(moto_s3[0]).fetch(f"s3://media/{key}", etag=f'"{etag}"').data


def test_an_object_that_changed_since_the_manifest_is_refused(moto_s3, put):
    listed = put("changed", b"first")
    now = put("changed", b"other")
    fetcher = fetcher_at(moto_s3[0])
    with pytest.raises(ChangedMediaError, match=f"etag is {now}, the manifest lists {listed}"):
        fetcher.fetch("s3://media/changed", etag=listed, size_bytes=5)
    with pytest.raises(ChangedMediaError, match="5 bytes, the manifest lists 4"):
        fetcher.fetch("s3://media/changed", size_bytes=4)
    with pytest.raises(ChangedMediaError):
        fetcher.fetch("s3://media/changed", etag=listed, byte_offset=0, byte_length=2)


def test_a_byte_range_is_one_ranged_get(moto_s3, put):
    etag = put("range", b"0123456789")
    fetcher = fetcher_at(moto_s3[0], max_object_bytes=5)
    part = fetcher.fetch("s3://media/range", etag=etag, size_bytes=10, byte_offset=2, byte_length=3)
    assert part.data == b"234"
    assert fetcher.fetch("s3://media/range", byte_offset=6).data == b"6789"
    for offset, length in ((8, 5), (100, 1)):
        with pytest.raises(ChangedMediaError):
            fetcher.fetch("s3://media/range", byte_offset=offset, byte_length=length)


def test_what_is_missing_or_empty_or_too_large(moto_s3, put):
    fetcher = fetcher_at(moto_s3[0], max_object_bytes=10)
    for uri in ("s3://media/none", "s3://no-such-bucket/a", "s3://media", "s3://Not_A_Bucket!/a"):
        with pytest.raises(MissingMediaError):
            fetcher.fetch(uri)
    put("empty", b"")
    with pytest.raises(EmptyMediaError):
        fetcher.fetch("s3://media/empty")
    put("large", bytes(11))
    with pytest.raises(LimitExceededError, match="11 bytes, the limit is 10"):
        fetcher.fetch("s3://media/large")


def test_a_large_object_goes_to_a_temporary_file(moto_s3, put):
    data = os.urandom(3 << 20)
    put("spill", data)
    with fetcher_at(moto_s3[0], max_memory_bytes=1 << 20).fetch("s3://media/spill") as source:
        assert source.data is None
        with source.open() as file:
            assert file.read() == data
    assert not os.path.exists(source.path)


def test_many_objects_come_in_order(moto_s3, put):
    etags = [put(f"many/{i}", f"object {i}".encode()) for i in range(25)]
    requests = [FetchRequest(uri=f"s3://media/many/{i}", etag=etags[i]) for i in range(25)]
    requests[3] = FetchRequest(uri="s3://media/many/none")
    results = list(fetcher_at(moto_s3[0], threads=4).fetch_all(requests))
    assert isinstance(results.pop(3), MissingMediaError)
    assert [r.data for r in results] == [f"object {i}".encode() for i in range(25) if i != 3]


class Misbehaving(http.server.BaseHTTPRequestHandler):
    """Answers each GET by the next of its server's replies; the last one stays."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        replies = self.server.replies
        self.server.requests.append(self.command)
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if reply == "hang":
            time.sleep(3)
            self.close_connection = True
            return
        if reply == "reset":
            self.close_connection = True
            return
        status, body, announced = reply
        self.send_response(status)
        self.send_header("ETag", '"e"')
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def misbehaving() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    server.requests = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def refusal(status: int, code: str) -> tuple[int, bytes, int]:
    body = f"<Error><Code>{code}</Code><Message>no {SECRET}</Message></Error>".encode()
    return status, body, len(body)


GOOD = (200, b"bytes", 5)


@pytest.mark.parametrize(
    "trouble",
    [refusal(503, "SlowDown"), refusal(500, "InternalError"), (200, b"byt", 5), "reset"],
    ids=["throttled", "server error", "cut", "reset"],
)
def test_what_may_pass_is_tried_again_and_then_given_up(misbehaving, trouble):
    misbehaving.replies = [trouble, GOOD]
    fetcher = fetcher_at(misbehaving.url, attempts=2)
    assert fetcher.fetch("s3://media/a", etag="e").data == b"bytes"
    assert misbehaving.requests == ["GET", "GET"]

    misbehaving.replies, misbehaving.requests = [trouble], []
    with pytest.raises(FetchError, match="2 attempts") as caught:
        fetcher.fetch("s3://media/a", etag="e")
    assert caught.value.retryable
    assert SECRET not in str(caught.value)
    # The HTTP client itself may repeat a GET once on a connection that was closed.
    most = 4 if trouble == "reset" else 2
    assert 2 <= len(misbehaving.requests) <= most


def test_a_server_that_does_not_answer_is_left_in_time(misbehaving):
    misbehaving.replies = ["hang"]
    started = time.monotonic()
    with pytest.raises(FetchError, match=r"within 0\.5 s"):
        fetcher_at(misbehaving.url, attempts=1, timeout_s=0.5).fetch("s3://media/a")
    assert time.monotonic() - started < 3


def test_whoever_stops_does_not_wait_for_a_server(misbehaving, tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    misbehaving.replies = ["hang"]
    requests = [FetchRequest(uri=str(tmp_path / "a"))]
    requests += [FetchRequest(uri=f"s3://media/{i}") for i in range(40)]
    results = fetcher_at(misbehaving.url, threads=2, timeout_s=1).fetch_all(requests)
    assert next(results).data == b"a"
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 0.5


@pytest.mark.parametrize("code", ["AccessDenied", "SignatureDoesNotMatch", "InvalidAccessKeyId"])
def test_a_refusal_is_final(misbehaving, code):
    misbehaving.replies = [refusal(403, code)]
    with pytest.raises(AccessDeniedError, match=code) as caught:
        fetcher_at(misbehaving.url).fetch("s3://media/a")
    assert SECRET not in str(caught.value)
    assert len(misbehaving.requests) == 1


def test_a_body_is_not_taken_when_its_etag_is_wrong(misbehaving):
    # 1 TB announced: only a reader that looks at the header first returns at all.
    misbehaving.replies = [(200, b"x" * 1000, 1 << 40)]
    with pytest.raises(ChangedMediaError, match="etag is e, the manifest lists f"):
        fetcher_at(misbehaving.url).fetch("s3://media/a", etag="f")
    with pytest.raises(LimitExceededError):
        fetcher_at(misbehaving.url).fetch("s3://media/a", etag="e")
    assert len(misbehaving.requests) == 2


def test_nobody_there_is_worth_another_try():
    with pytest.raises(FetchError, match="1 attempts"):
        fetcher_at("http://127.0.0.1:9", attempts=1, timeout_s=20).fetch("s3://media/a")
