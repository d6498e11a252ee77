"""Local files: what is read, what is refused, and reading ahead."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from qvl_batch.errors import (
    AccessDeniedError,
    ChangedMediaError,
    EmptyMediaError,
    LimitExceededError,
    MissingMediaError,
    UnitError,
)
from qvl_batch.media.fetch import (
    Fetcher,
    FetchLimits,
    FetchRequest,
    Source,
    local_etag,
    printable_uri,
)
from qvl_batch.storage import Storage

LIMITS = FetchLimits(max_object_bytes=1000, max_memory_bytes=100, threads=2, attempts=2)


@pytest.fixture
def fetcher() -> Fetcher:
    return Fetcher(Storage(), LIMITS)


def written(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def test_a_small_file_is_read_into_memory(fetcher, tmp_path):
    uri = written(tmp_path / "ä b#?.txt", b"hello")
    status = os.stat(uri)
    for given in (uri, f"file://{uri}"):
        with fetcher.fetch(given, etag=local_etag(status), size_bytes=5) as source:
            assert (source.data, source.path, source.size_bytes) == (b"hello", None, 5)
            assert source.head(2) == b"he"


def test_a_large_file_is_opened_where_it_lies_and_never_deleted(fetcher, tmp_path):
    uri = written(tmp_path / "large", bytes(500))
    with fetcher.fetch(uri, size_bytes=500) as source:
        assert (source.data, source.path, source.size_bytes) == (None, uri, 500)
        source.check_unchanged()
        written(tmp_path / "large", bytes(501))
        with pytest.raises(ChangedMediaError):
            source.check_unchanged()
    assert os.path.exists(uri)


def test_a_file_that_changed_since_the_manifest_is_refused(fetcher, tmp_path):
    uri = written(tmp_path / "a", b"12345")
    listed = local_etag(os.stat(uri))
    os.utime(uri, ns=(1, 1))
    with pytest.raises(ChangedMediaError, match="etag is 5-1, the manifest lists 5-"):
        fetcher.fetch(uri, etag=listed, size_bytes=5)
    with pytest.raises(ChangedMediaError, match="5 bytes, the manifest lists 6"):
        fetcher.fetch(uri, size_bytes=6)
    assert fetcher.fetch(uri, etag="5-1", size_bytes=5).data == b"12345"


def test_a_byte_range_is_read_alone(fetcher, tmp_path):
    uri = written(tmp_path / "a", bytes(range(250)) * 4)
    etag = local_etag(os.stat(uri))
    part = fetcher.fetch(uri, etag=etag, size_bytes=1000, byte_offset=3, byte_length=4)
    assert part.data == bytes([3, 4, 5, 6])
    assert fetcher.fetch(uri, byte_offset=990).data == bytes(range(240, 250))
    with fetcher.fetch(uri, byte_offset=0, byte_length=300) as large:
        assert Path(large.path).read_bytes() == (bytes(range(250)) * 2)[:300]
    assert not os.path.exists(large.path)
    with pytest.raises(ChangedMediaError, match="4 bytes, 10 were listed"):
        fetcher.fetch(uri, byte_offset=996, byte_length=10)
    with pytest.raises(EmptyMediaError):
        fetcher.fetch(uri, byte_offset=0, byte_length=0)


def test_nothing_is_a_failure(fetcher, tmp_path):
    with pytest.raises(EmptyMediaError):
        fetcher.fetch(written(tmp_path / "empty", b""), size_bytes=0)
    for path in ("missing", "empty/below", "n\0ul"):
        with pytest.raises(UnitError) as caught:
            fetcher.fetch(str(tmp_path / path))
        assert isinstance(caught.value, MissingMediaError)


def test_a_file_above_the_limit_is_refused(fetcher, tmp_path):
    uri = written(tmp_path / "a", bytes(1001))
    for size in (1001, None):
        with pytest.raises(LimitExceededError, match="1001 bytes, the limit is 1000"):
            fetcher.fetch(uri, size_bytes=size)


def test_only_regular_files_are_opened(fetcher, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path in (tmp_path, *(tmp_path / n for n in ("fifo", "link", "socket")), "/dev/zero"):
            started = time.monotonic()
            with pytest.raises(AccessDeniedError, match="not a regular file"):
                fetcher.fetch(str(path))
            assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:1/a.png",
        "https://user:word@host/a.png?X-Amz-Signature=SECRET&x=1",
        "ftp://user:SECRET@host/a",
        "concat:///a|b",
    ],
)
def test_no_address_on_a_network_is_read(fetcher, uri):
    with pytest.raises(AccessDeniedError, match="is not read") as caught:
        fetcher.fetch(uri)
    assert "SECRET" not in str(caught.value)
    assert "word" not in str(caught.value)


def test_only_secrets_are_cut_from_a_uri():
    assert printable_uri("s3://b/a?b=c@d#e") == "s3://b/a?b=c@d#e"
    assert printable_uri("/a/b?token=1") == "/a/b?token=1"
    assert printable_uri("https://u:p@h/a?X-Amz-Signature=1") == "https://h/a"
    assert printable_uri("az://c/a?sv=1&sig=2") == "az://c/a"


def test_requests_come_back_in_order_each_as_source_or_error(fetcher, tmp_path):
    uris = [written(tmp_path / str(i), str(i).encode()) for i in range(30)]
    uris[7], uris[20] = str(tmp_path / "missing"), "http://127.0.0.1/"
    results = list(fetcher.fetch_all(FetchRequest(uri=uri) for uri in uris))
    assert isinstance(results[7], MissingMediaError)
    assert isinstance(results[20], AccessDeniedError)
    good = {i: r.data for i, r in enumerate(results) if isinstance(r, Source)}
    assert good == {i: str(i).encode() for i in range(30) if i not in (7, 20)}


def requests_counted(uris: list[str], size: int | None, taken: list[int]):
    for uri in uris:
        taken.append(1)
        yield FetchRequest(uri=uri, size_bytes=size)


@pytest.mark.parametrize(
    ("max_ahead_bytes", "most"), [(10**6, 2 * 2 + 1), (250, 3), (10, 2)], ids=["n", "bytes", "one"]
)
def test_reading_ahead_is_bounded_in_number_and_bytes(tmp_path, max_ahead_bytes, most):
    uris = [written(tmp_path / str(i), bytes(100)) for i in range(20)]
    limits = FetchLimits(threads=2, max_ahead_bytes=max_ahead_bytes)
    taken: list[int] = []
    results = Fetcher(Storage(), limits).fetch_all(requests_counted(uris, 100, taken))
    for done in range(20):
        next(results)
        # One request is looked at before it is known whether there is room for it.
        assert len(taken) <= done + most
    assert len(taken) == 20


def test_sources_that_nobody_took_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    uri = written(tmp_path / "a", bytes(400))
    limits = FetchLimits(max_memory_bytes=100, threads=2)
    requests = [FetchRequest(uri=uri, byte_offset=0, byte_length=300)] * 8
    results = Fetcher(Storage(), limits).fetch_all(requests)
    first = next(results)
    results.close()
    for thread in threading.enumerate():
        if thread.name.startswith("fetch"):
            thread.join(10)
            assert not thread.is_alive()
    assert os.listdir(tmp_path / "tmp") == [os.path.basename(first.path)]
    first.close()
    first.close()
    assert os.listdir(tmp_path / "tmp") == []
