"""Listing real trees, and a bucket on a loopback S3 server."""

import os
import socket
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer

import boto3
import fsspec
import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from qvl_batch.errors import StorageError
from qvl_batch.media.left_out import LeftOut
from qvl_batch.media.listing import (
    BAD_NAME,
    BROKEN_LINK,
    HIDDEN,
    LINK_CYCLE,
    MARKER,
    NOT_A_FILE,
    glob_regex,
    list_source,
    walk_objects,
)
from qvl_batch.media.objects import MediaObject, Objects
from qvl_batch.storage import Storage
from tests.moto_in_process import moto_server

LOCAL = Storage()
WEIRD = [
    "with space.txt",
    'it\'s "quoted".txt',
    "größe 東京 🦊.txt",
    "line\nbreak.txt",
    "-dash.txt",
    "per%20cent.txt",
    "hash#mark?query&x=1.txt",
    "a.txt?versionId=1",
    "[brackets] {braces} *star.txt",
    "back\\slash.txt",
    "_DSC0001.JPG",
]


def listed(source, storage=LOCAL):
    """Return (uris, {uri: reason}) of a source."""
    items = list(list_source(str(source), storage=storage))
    uris = [item.uri for item in items if isinstance(item, MediaObject)]
    return uris, {item.uri: item.reason for item in items if isinstance(item, LeftOut)}


def write(path, content=b"hello"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


# --- local -----------------------------------------------------------------------------------


def test_a_tree_comes_sorted_with_sizes_etags_and_times(tmp_path):
    paths = [write(tmp_path / name, b"x" * 3) for name in ("b/2.txt", "a.txt", "b/10.txt")]
    os.utime(paths[1], ns=(0, 1_700_000_000_123_456_789))
    items = list(list_source(str(tmp_path), storage=LOCAL))
    assert [item.uri for item in items] == [paths[1], paths[2], paths[0]]
    assert items[0].etag == "3-1700000000123456789"
    assert items[0].size_bytes == 3
    assert items[0].mtime == datetime(2023, 11, 14, 22, 13, 20, 123456, UTC)


@pytest.mark.parametrize("name", WEIRD)
def test_weird_names_round_trip(tmp_path, name):
    path = write(tmp_path / name, name.encode())
    uris, left_out = listed(tmp_path)
    assert (uris, left_out) == ([path], {})
    assert Objects(LOCAL).head(uris[0]) == name.encode()
    assert listed(path) == ([path], {})


def test_file_scheme_and_relative_paths_become_absolute(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt")
    monkeypatch.chdir(tmp_path)
    assert listed(".")[0] == listed(f"file://{tmp_path}")[0] == listed("a.txt")[0] == [path]


def test_what_is_no_medium_is_left_out_with_its_reason(tmp_path):
    kept = write(tmp_path / "kept.txt")
    write(tmp_path / ".DS_Store")
    write(tmp_path / ".git/config")
    write(tmp_path / "_SUCCESS", b"")
    write(tmp_path / "_metadata")
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    uris, left_out = listed(tmp_path)
    assert uris == [kept]
    assert left_out == {
        str(tmp_path / ".DS_Store"): HIDDEN,
        f"{tmp_path}/.git/": HIDDEN,
        str(tmp_path / "_SUCCESS"): MARKER,
        str(tmp_path / "_metadata"): MARKER,
        str(tmp_path / "dead"): BROKEN_LINK,
        str(tmp_path / "pipe.txt"): NOT_A_FILE,
    }


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "real/a.txt")
    (tmp_path / "top/sub").mkdir(parents=True)
    (tmp_path / "top/linked").symlink_to(tmp_path / "real")
    (tmp_path / "top/sub/up").symlink_to(tmp_path / "top")
    (tmp_path / "top/self").symlink_to("self")
    uris, left_out = listed(tmp_path / "top")
    assert uris == [f"{tmp_path}/top/linked/a.txt"]
    assert left_out == {
        f"{tmp_path}/top/sub/up/": LINK_CYCLE,
        f"{tmp_path}/top/self": BROKEN_LINK,
    }


def test_a_glob_tells_of_folders_that_it_could_not_enter(tmp_path):
    path = write(tmp_path / "top/a.txt")
    (tmp_path / "top/up").symlink_to(tmp_path / "top")
    assert listed(f"{tmp_path}/top/**/*.txt") == ([path], {f"{tmp_path}/top/up/": LINK_CYCLE})


def test_a_name_that_is_not_utf8_is_left_out(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    assert listed(tmp_path) == ([], {f"{tmp_path}/caf\\xe9.txt": BAD_NAME})


def test_globs(tmp_path):
    for name in ("a.jpg", "b.png", "sub/c.jpg", "sub/deep/d.jpg", ".h.jpg", "x[1].jpg"):
        write(tmp_path / name)

    def names(pattern):
        return [uri.removeprefix(f"{tmp_path}/") for uri in listed(f"{tmp_path}/{pattern}")[0]]

    assert names("*.jpg") == ["a.jpg", "x[1].jpg"]
    assert names("**/*.jpg") == ["a.jpg", "sub/c.jpg", "sub/deep/d.jpg", "x[1].jpg"]
    assert names("*/*.jpg") == ["sub/c.jpg"]
    assert names("sub/**") == ["sub/c.jpg", "sub/deep/d.jpg"]
    assert names("?.[jp][pn]g") == ["a.jpg", "b.png"]
    assert names("[!a-b]*.jpg") == ["x[1].jpg"]
    assert names("x[1].jpg") == ["x[1].jpg"], "a path that exists is no glob"
    assert names("*.gif") == []
    assert listed(f"{tmp_path}/*.jpg")[1] == {f"{tmp_path}/.h.jpg": HIDDEN}


def test_a_glob_keeps_to_its_depth(tmp_path):
    write(tmp_path / "a/x.jpg")
    (tmp_path / "a/closed").mkdir()
    write(tmp_path / "a/closed/_SUCCESS")
    assert listed(f"{tmp_path}/*/*.jpg") == ([f"{tmp_path}/a/x.jpg"], {})


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("/a/**/b", "/a/b", True),
        ("/a/**/b", "/a/x/y/b", True),
        ("/a/*/b", "/a/x/y/b", False),
        ("/a/b.jpg", "/a/bxjpg", False),
        ("/a/[^b]", "/a/^", True),
        ("/a/*\n*", "/a/x\ny", True),
        ("/a/[", "/a/[", True),
    ],
)
def test_glob_regex(pattern, path, matches):
    assert bool(glob_regex(pattern).fullmatch(path)) is matches


def test_no_such_path_is_one_line(tmp_path):
    with pytest.raises(StorageError, match="There is no file or folder") as caught:
        listed(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="There is no file or folder"):
        listed(tmp_path / "nowhere/*.jpg")


@pytest.mark.parametrize("source", ["http://example.org/a.jpg", "https://example.org/", "ftp://x/"])
def test_other_schemes_are_refused(source):
    with pytest.raises(StorageError, match=r"web address|unknown scheme"):
        listed(source)


def test_walk_of_any_other_store():
    memory = fsspec.filesystem("memory")
    for name in ("a.txt", "sub/b.txt", "sub/.hidden", "sub/_SUCCESS", "zz/c.txt"):
        memory.pipe_file(f"/walked/{name}", b"hello")
    items = list(walk_objects(memory, "memory", "memory://walked", LOCAL))
    media = [item.uri for item in items if isinstance(item, MediaObject)]
    assert media == [f"memory://walked/{name}" for name in ("a.txt", "sub/b.txt", "zz/c.txt")]
    assert {item.reason for item in items if isinstance(item, LeftOut)} == {HIDDEN, MARKER}


# --- S3 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3():
    """A loopback S3 server with one bucket; yields (client, storage)."""
    with moto_server() as endpoint_url, pytest.MonkeyPatch.context() as patch:
        for name in ("PROFILE", "DEFAULT_PROFILE", "SESSION_TOKEN", "ENDPOINT_URL"):
            patch.delenv(f"AWS_{name}", raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "a")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        storage = Storage(endpoint_url=endpoint_url, region="us-east-1")
        client = boto3.client("s3", endpoint_url=storage.endpoint_url, region_name=storage.region)
        client.create_bucket(Bucket="media")
        yield client, storage


def put(client, *keys, body=b"hello"):
    for key in keys:
        client.put_object(Bucket="media", Key=key, Body=body)


def test_more_than_a_page(s3):
    _, storage = s3
    keys = [f"many/{number:04d}.jpg" for number in range(1010)]
    # Straight into the server's memory: a thousand requests would take most of this file's time.
    for key in keys:
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object("media", key, b"x")
    items = list(list_source("s3://media/many", storage=storage))
    assert [item.uri for item in items] == [f"s3://media/{key}" for key in keys]
    assert {item.size_bytes for item in items} == {1}
    assert {item.etag for item in items} == {"9dd4e461268c8034f5c8564e155c67a6"}
    assert abs((datetime.now(UTC) - items[0].mtime).total_seconds()) < 600


# moto's routes do not match a line break; it has a test of its own below.
@pytest.mark.parametrize("name", [name for name in WEIRD if "\n" not in name])
def test_weird_keys_round_trip(s3, name):
    client, storage = s3
    put(client, f"weird/{name}", body=name.encode())
    uri = f"s3://media/weird/{name}"
    objects = Objects(storage)
    assert uri in listed("s3://media/weird", storage)[0]
    assert objects.head(uri) == name.encode()
    assert objects.stat(uri).size_bytes == len(name.encode())
    assert listed(uri, storage) == ([uri], {}), "a literal key is no glob"


def test_a_prefix_is_a_folder(s3):
    client, storage = s3
    put(client, "shop", "shop/a.txt", "shop2/b.txt", "shop/sub/c.txt")
    under = ["s3://media/shop/a.txt", "s3://media/shop/sub/c.txt"]
    assert listed("s3://media/shop", storage)[0] == ["s3://media/shop", *under]
    assert listed("s3://media/shop/", storage)[0] == under
    assert listed("s3://media/sho", storage) == ([], {})
    assert "s3://media/shop2/b.txt" in listed("s3://media", storage)[0]
    assert "s3://media/shop2/b.txt" in listed("s3://media/", storage)[0]


def test_markers_and_hidden_keys_are_left_out(s3):
    client, storage = s3
    put(client, "marks/", "marks/sub/", "marks/sub_$folder$", "marks/_SUCCESS", body=b"")
    put(client, "marks/.hid/a.txt", "marks/ok.txt")
    uris, left_out = listed("s3://media/marks", storage)
    assert uris == ["s3://media/marks/ok.txt"]
    assert left_out == {
        "s3://media/marks/": MARKER,
        "s3://media/marks/sub/": MARKER,
        "s3://media/marks/sub_$folder$": MARKER,
        "s3://media/marks/_SUCCESS": MARKER,
        "s3://media/marks/.hid/a.txt": HIDDEN,
    }


def test_remote_globs(s3):
    client, storage = s3
    put(client, "g/a.jpg", "g/b.png", "g/sub/c.jpg", "g/sub/deep/d.jpg", "g/s/e.jpg")

    def names(pattern):
        return [
            uri.removeprefix("s3://media/g/") for uri in listed(f"s3://media/{pattern}", storage)[0]
        ]

    assert names("g/*.jpg") == ["a.jpg"]
    assert names("g/**/*.jpg") == ["a.jpg", "s/e.jpg", "sub/c.jpg", "sub/deep/d.jpg"]
    assert names("g/s*/?.jpg") == ["s/e.jpg", "sub/c.jpg"]
    assert names("g/su**") == ["sub/c.jpg", "sub/deep/d.jpg"]
    assert names("?/*.png") == ["b.png"]


def test_new_objects_are_seen_at_once(s3):
    client, storage = s3
    assert listed("s3://media/fresh", storage)[0] == []
    put(client, "fresh/a.txt")
    assert listed("s3://media/fresh", storage)[0] == ["s3://media/fresh/a.txt"]


def test_absent_objects(s3):
    _, storage = s3
    objects = Objects(storage)
    assert objects.stat("s3://media/absent") is None
    assert objects.head("s3://media/absent") is None
    put(s3[0], "short")
    assert objects.head("s3://media/short", 2, 2) == b"ll"
    assert objects.head("s3://media/short", 99, 2) == b""
    assert objects.stat("s3://no-such-bucket/absent") is None


@pytest.mark.parametrize("source", ["s3://no-such-bucket/x", "s3://no-such-bucket/*.jpg"])
def test_no_such_bucket(s3, source):
    with pytest.raises(StorageError, match="There is no bucket 'no-such-bucket'") as caught:
        listed(source, s3[1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["s3://", "s3:///key", "s3://*/key", "s3://a[b/key", "s3://a b/key"]
)
def test_bucket_names_of_no_use(s3, source):
    with pytest.raises(StorageError, match=r"names no bucket|Name one bucket|There is no bucket"):
        listed(source, s3[1])


def test_no_credentials(s3, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    # Another region makes other file systems than those that fsspec keeps.
    storage = Storage(endpoint_url=s3[1].endpoint_url, region="eu-west-1")
    with pytest.raises(StorageError, match=r"credentials.*AWS_ACCESS_KEY_ID"):
        listed("s3://media/x", storage)
    with pytest.raises(StorageError, match="credentials"):
        Objects(storage).stat("s3://media/x")


@contextmanager
def serving(answer):
    """Run a server whose GETs are answered by ``answer(path) -> (status, body)``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = answer(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Storage(endpoint_url=f"http://127.0.0.1:{server.server_port}", region="r")
    finally:
        server.shutdown()
        server.server_close()


def test_a_line_break_in_a_key_round_trips(s3):
    page = (
        b"<ListBucketResult><EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>"
        b"<Contents><Key>n/line%0Abreak%2B.txt</Key><Size>5</Size><ETag>&quot;e&quot;</ETag>"
        b"<LastModified>2026-01-02T03:04:05Z</LastModified></Contents></ListBucketResult>"
    )
    paths = []

    def answer(path):
        paths.append(path)
        return (200, page) if "list-type" in path else (206, b"hello")

    with serving(answer) as storage:
        (found,) = list_source("s3://media/n", storage=storage)
        assert found.uri == "s3://media/n/line\nbreak+.txt"
        assert found.mtime == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
        assert Objects(storage).head(found.uri) == b"hello"
    assert paths[-1].partition("?")[0] == "/media/n/line%0Abreak%2B.txt"


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "InvalidAccessKeyId", "does not accept the credentials"),
        (403, "SignatureDoesNotMatch", "does not accept the credentials"),
        (400, "ExpiredToken", "does not accept the credentials"),
        (403, "AccessDenied", "refuses access to s3://media/x"),
        (400, "AuthorizationHeaderMalformed", "another region.*--region"),
        (418, "Teapot", "Reading s3://media/x failed"),
    ],
)
def test_what_a_server_refuses_is_one_line(s3, status, code, message):
    body = f"<Error><Code>{code}</Code><Message>Said\nin two lines</Message></Error>".encode()
    with (
        serving(lambda _: (status, body)) as storage,
        pytest.raises(StorageError, match=message) as caught,
    ):
        listed("s3://media/x", storage)
    assert "\n" not in str(caught.value)
    assert code in str(caught.value)


def test_a_closed_port_is_told_within_seconds(s3):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        storage = Storage(endpoint_url=f"http://127.0.0.1:{free.getsockname()[1]}", region="r")
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"can not be reached.*--endpoint-url"):
            listed("s3://media/x", storage)
    assert time.monotonic() - began < 10


def test_a_server_that_never_answers_is_told_within_seconds(s3):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        storage = Storage(endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}", region="r")
        began = time.monotonic()
        with pytest.raises(StorageError, match="can not be reached"):
            listed("s3://media/x", storage)
    assert time.monotonic() - began < 20
