"""The S3 servers that the other tests stand on, reached as the package reaches any store."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import boto3
import lance
import pyarrow as pa
import pytest
import s3fs

HERE = Path(__file__).parent


def test_a_new_bucket_is_empty_and_takes_objects(any_bucket):
    fs = any_bucket.fs()
    assert fs.ls(any_bucket.name) == []

    fs.pipe(any_bucket.uri("dt=2026-01-02/a b.txt"), b"0123456789")

    assert fs.cat_file(any_bucket.uri("dt=2026-01-02/a b.txt"), start=2, end=5) == b"234"
    assert fs.find(any_bucket.uri(), refresh=True) == [f"{any_bucket.name}/dt=2026-01-02/a b.txt"]


def test_a_multipart_upload_comes_back_whole(any_bucket):
    content = os.urandom(6 * 2**20)
    fs = any_bucket.fs()

    with fs.open(any_bucket.uri("large"), "wb", block_size=5 * 2**20) as out:
        out.write(content)

    assert fs.cat_file(any_bucket.uri("large")) == content


def test_lance_creates_appends_and_reads(any_bucket):
    uri = any_bucket.uri("rows.lance")
    options = any_bucket.storage.lance_options(uri)

    lance.write_dataset(pa.table({"n": [1, 2]}), uri, storage_options=options)
    lance.write_dataset(pa.table({"n": [3]}), uri, mode="append", storage_options=options)

    dataset = lance.dataset(uri, storage_options=options)
    assert dataset.version == 2
    assert dataset.to_table()["n"].to_pylist() == [1, 2, 3]


def test_a_second_writer_of_the_same_key_loses(any_bucket):
    client = any_bucket.server.client()
    client.put_object(Bucket=any_bucket.name, Key="once", Body=b"first", IfNoneMatch="*")

    with pytest.raises(client.exceptions.ClientError) as refused:
        client.put_object(Bucket=any_bucket.name, Key="once", Body=b"second", IfNoneMatch="*")

    assert refused.value.response["Error"]["Code"] == "PreconditionFailed"
    assert any_bucket.fs().cat_file(any_bucket.uri("once")) == b"first"


@pytest.mark.s3real
def test_the_gateway_refuses_a_wrong_secret(real_bucket):
    real_bucket.fs().pipe(real_bucket.uri("key"), b"content")
    stranger = s3fs.S3FileSystem(
        key=real_bucket.server.access_key,
        secret="wrong",
        endpoint_url=real_bucket.endpoint_url,
        skip_instance_cache=True,
    )

    with pytest.raises(PermissionError):
        stranger.cat_file(real_bucket.uri("key"))

    uri = real_bucket.uri("rows.lance")
    options = real_bucket.storage.lance_options(uri) | {"aws_secret_access_key": "wrong"}
    with pytest.raises(OSError, match="SignatureDoesNotMatch"):
        lance.write_dataset(pa.table({"n": [1]}), uri, storage_options=options)


def test_buckets_of_two_tests_are_apart(bucket, s3):
    names = [entry["Name"] for entry in s3.client().list_buckets()["Buckets"]]
    assert bucket.name in names
    assert bucket.fs().find(bucket.uri()) == []


def test_no_setting_of_the_machine_reaches_a_test(aws_environment):
    assert {name for name in os.environ if name.startswith("AWS_")} == {
        name for name in aws_environment if name.startswith("AWS_")
    }
    assert boto3.Session().available_profiles == []


def started(command: list[str], log_path: Path) -> subprocess.Popen[bytes]:
    """Start a server whose standard input this process holds open, and wait until it is ready."""
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log)
    deadline = time.monotonic() + 120
    while b"ready " not in log_path.read_bytes():
        assert process.poll() is None, f"{command} ended with code {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def daemons_of(state: Path) -> list[int]:
    """Return the processes whose command line names `state`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command_line = (entry / "cmdline").read_bytes()
            except OSError:  # it has just ended
                continue
            if str(state).encode() in command_line:
                found.append(int(entry.name))
    return found


def test_moto_ends_when_its_parent_lets_go(tmp_path):
    process = started([sys.executable, str(HERE / "serve_moto.py")], tmp_path / "log")
    process.stdin.close()
    assert process.wait(timeout=20) == 0


@pytest.mark.s3real
def test_the_gateway_leaves_no_daemon_behind(tmp_path):
    state = tmp_path / "ceph"
    process = started([str(HERE / "start-rgw.sh"), str(state), "AK", "SK"], tmp_path / "log")
    assert len(daemons_of(state)) >= 4, "the script and its three daemons"

    process.stdin.close()

    assert process.wait(timeout=20) == 0
    assert daemons_of(state) == []


@pytest.mark.parametrize(("level", "outcome"), [("", "skipped"), ("all", "failed")])
def test_a_missing_gateway_skips_or_fails_with_the_packages_named(tmp_path, level, outcome):
    """A machine without Ceph is one whose PATH holds none of it: pytest runs on an empty PATH."""
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            f"{Path(__file__)}::test_the_gateway_refuses_a_wrong_secret",
        ],
        env=os.environ | {"PATH": str(tmp_path), "QVL_TESTS": level},
        capture_output=True,
        text=True,
    )

    assert f"1 {'error' if outcome == 'failed' else outcome} in" in run.stdout, run.stdout
    assert "radosgw ceph-mon ceph-osd ceph-common" in run.stdout
    assert run.returncode == (1 if outcome == "failed" else 0)
