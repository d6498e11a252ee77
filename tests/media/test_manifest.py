"""Manifests of real folders, a bucket on a loopback S3 server, and lists."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qvl_batch import schema
from qvl_batch.errors import ConfigError, ManifestError, StorageError
from qvl_batch.media.kinds import EMPTY, UNKNOWN, UNREADABLE, decide_kind
from qvl_batch.media.listing import HIDDEN
from qvl_batch.media.manifest import build_manifest, parse_partition_rule
from qvl_batch.media.manifest_parts import NO_MATCH
from qvl_batch.storage import Storage
from tests.moto_in_process import moto_server

LOCAL = Storage()


def picture():
    out = io.BytesIO()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(out, "png")
    return out.getvalue()


PNG = picture()


def write(path, content=b"hello"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def build(source, tmp_path, rule=None, **options):
    """Return (report, rows, schema) of a manifest written beside the sources."""
    out = tmp_path / "out" / "manifest.parquet"
    out.parent.mkdir(exist_ok=True)
    options.setdefault("storage", LOCAL)
    by = parse_partition_rule(rule) if rule else None
    report = build_manifest(str(source), str(out), partition_from=by, **options)
    table = pq.read_table(out)
    assert report.rows == table.num_rows
    assert json.loads(table.schema.metadata[b"qvl.partition_by"]) == list(report.partition_keys)
    assert sum(report.by_kind.values()) == report.rows
    return report, table.to_pylist(), table.schema


def refused(source, tmp_path, rule=None, error=ManifestError, **options):
    """Return the one-line message with which a source is refused; nothing may be left behind."""
    (tmp_path / "out").mkdir(exist_ok=True)
    before = sorted((tmp_path / "out").iterdir())
    with pytest.raises(error) as caught:
        build(source, tmp_path, rule, **options)
    assert sorted((tmp_path / "out").iterdir()) == before
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- folders ---------------------------------------------------------------------------------


def test_a_folder(tmp_path):
    write(tmp_path / "src/a.txt", "some words")
    os.utime(tmp_path / "src/a.txt", ns=(0, 1_700_000_000_000_001_000))
    write(tmp_path / "src/note", "words without an extension")
    write(tmp_path / "src/picture.txt", PNG)
    write(tmp_path / "src/broken.jpg", b"\0garbage")
    write(tmp_path / "src/error.jpg", "<html>404</html>")
    write(tmp_path / "src/zero.mp4", b"")
    write(tmp_path / "src/zero.bin", b"")
    write(tmp_path / "src/code.bin", b"\x7fELF\0\0")
    write(tmp_path / "src/.hidden", b"x")
    report, rows, found = build(tmp_path / "src", tmp_path)
    assert found.names == ["uri", "kind", "etag", "size_bytes", "mtime"]
    assert all(found.field(name).type == schema.MANIFEST.field(name).type for name in found.names)
    kinds = {os.path.basename(row["uri"]): row["kind"] for row in rows}
    assert kinds == {
        "a.txt": "text",
        "note": "text",
        "picture.txt": "image",
        "broken.jpg": "image",
        "error.jpg": "image",
        "zero.mp4": "video",
    }
    assert rows[0] == {
        "uri": f"{tmp_path}/src/a.txt",
        "kind": "text",
        "etag": "10-1700000000000001000",
        "size_bytes": 10,
        "mtime": datetime(2023, 11, 14, 22, 13, 20, 1, UTC),
    }
    assert report.by_kind == {"image": 3, "text": 2, "video": 1}
    assert report.left_out == {UNKNOWN: 1, EMPTY: 1, HIDDEN: 1}
    lines = [json.loads(line) for line in Path(report.left_out_file).read_text().splitlines()]
    assert {(line["uri"], line["reason"]) for line in lines} == set(report.left_out_examples)
    assert (f"{tmp_path}/src/zero.bin", EMPTY) in report.left_out_examples


def test_a_second_run_replaces_the_first(tmp_path):
    write(tmp_path / "src/a.txt")
    write(tmp_path / "src/.hidden")
    first, _, _ = build(tmp_path / "src", tmp_path)
    (tmp_path / "src/.hidden").unlink()
    second, _, _ = build(tmp_path / "src", tmp_path)
    assert (os.path.basename(first.left_out_file), second.left_out_file) == (
        "manifest.parquet.left_out.jsonl",
        None,
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.parquet"]


def test_examples_are_bounded_and_the_file_has_all(tmp_path):
    write(tmp_path / "src/a.txt")
    for number in range(50):
        write(tmp_path / f"src/.{number}")
    report, _, _ = build(tmp_path / "src", tmp_path)
    assert (report.left_out[HIDDEN], len(report.left_out_examples)) == (50, 20)
    assert len(Path(report.left_out_file).read_text().splitlines()) == 50


def test_batches_do_not_change_the_manifest(tmp_path):
    for number in range(23):
        write(tmp_path / f"src/k={number % 3}/{number}.txt")
    write(tmp_path / "src/zz.txt")
    _, whole, _ = build(tmp_path / "src", tmp_path)
    report, batched, _ = build(tmp_path / "src", tmp_path, batch_rows=5)
    assert batched == whole
    assert pq.ParquetFile(report.out).num_row_groups == 5


def test_an_out_below_hive_folders_takes_no_columns_from_them(tmp_path):
    path = write(tmp_path / "run=7/l.jsonl", '{"text": "a"}\n')
    report = build_manifest(path, str(tmp_path / "run=7/m.parquet"), storage=LOCAL)
    assert report.partition_keys == ()
    names = pq.ParquetFile(report.out).schema_arrow.names
    assert names == ["uri", "kind", "etag", "size_bytes", "mtime", "text"]


def test_an_empty_source_says_what_was_seen(tmp_path):
    (tmp_path / "src").mkdir()
    message = refused(tmp_path / "src", tmp_path)
    assert f"Nothing to embed was found in {tmp_path}/src." in message
    write(tmp_path / "src/.hidden")
    write(tmp_path / "src/x.bin", b"\0")
    assert f"left out: 1 {HIDDEN}; 1 {UNKNOWN}" in refused(tmp_path / "src", tmp_path)
    assert "no file or folder" in refused(tmp_path / "none", tmp_path, error=StorageError)


def test_an_out_of_no_use_is_refused_first(tmp_path):
    write(tmp_path / "src/a.txt")
    for out, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "none/m.parquet", "There is no folder"),
        ("http://127.0.0.1/m.parquet", "web address"),
        ("ftp://127.0.0.1/m.parquet", "unknown scheme"),
    ):
        with pytest.raises(StorageError, match=message):
            build_manifest(str(tmp_path / "src"), str(out), storage=LOCAL)
    out = write(tmp_path / "list.csv", "uri\nsrc/a.txt\n")
    with pytest.raises(ManifestError, match="both the source and the manifest"):
        build_manifest(out, out, storage=LOCAL)


def opened_for_writing(pipe, reader):
    """Wait for the process to open its end, but not for ever."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert reader.poll() is None, "the reader is gone"
            assert time.monotonic() < deadline, "nobody reads"
            time.sleep(0.05)


def test_a_kill_leaves_no_half_file(tmp_path):
    # The list is a pipe that stops in the middle: the process is killed while it waits for more.
    os.mkfifo(tmp_path / "slow.jsonl")
    code = (
        "from qvl_batch.media.manifest import build_manifest;"
        "from qvl_batch.storage import Storage;"
        "build_manifest('slow.jsonl', 'm.parquet', storage=Storage(), batch_rows=10)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    with open(opened_for_writing(tmp_path / "slow.jsonl", process), "w") as pipe:
        for number in range(1000):
            pipe.write(json.dumps({"text": f"note {number}"}) + "\n")
        pipe.flush()
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".m.parquet.*/part-000050.parquet")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    assert not (tmp_path / "m.parquet").exists()
    write(tmp_path / "ok.jsonl", '{"text": "a"}\n')
    build_manifest(f"{tmp_path}/ok.jsonl", f"{tmp_path}/m.parquet", storage=LOCAL)
    assert pq.read_table(tmp_path / "m.parquet").num_rows == 1


@pytest.mark.parametrize(
    ("uri", "head", "kind"),
    [
        ("a.txt", PNG, "image"),
        ("a", PNG, "image"),
        ("a.jpg", b"#EXTM3U\n", "image"),
        ("a.mp4", b"\0\1\2", "video"),
        ("a.m3u8", b"#EXTM3U\n", "text"),
        ("a.bin", b"\0\1\2", None),
        ("a.png", None, "image"),
        ("a", None, None),
    ],
)
def test_decide_kind(uri, head, kind):
    assert decide_kind(uri, head) == kind


# --- partitions ------------------------------------------------------------------------------


def test_hive_keys_that_come_late_are_not_lost(tmp_path):
    write(tmp_path / "src/a.txt")
    write(tmp_path / "src/dt=2026-01-02/b.txt")
    write(tmp_path / "src/dt=2026-01-03/lang=d%65/c=x.txt")
    write(tmp_path / "src/dt=__HIVE_DEFAULT_PARTITION__/d.txt")
    report, rows, found = build(tmp_path / "src", tmp_path, batch_rows=1)
    assert report.partition_keys == ("dt", "lang")
    assert found.field("dt").type == found.field("lang").type == pa.string()
    assert [(row["dt"], row["lang"]) for row in rows] == [
        (None, None),
        ("2026-01-02", None),
        ("2026-01-03", "de"),
        (None, None),
    ]
    assert report.null_partitions == {"dt": 2, "lang": 3}


def test_hive_can_be_switched_off(tmp_path):
    write(tmp_path / "src/dt=1/a.txt")
    assert build(tmp_path / "src", tmp_path, "none")[0].partition_keys == ()


def test_hive_key_of_a_table_column_is_refused(tmp_path):
    write(tmp_path / "src/page=1/a.txt")
    assert "'page' is a column" in refused(tmp_path / "src", tmp_path)


def test_hive_asked_for_and_not_there(tmp_path):
    write(tmp_path / "src/a.txt")
    assert "no key=value folder" in refused(tmp_path / "src", tmp_path, "hive")


def test_regex(tmp_path):
    write(tmp_path / "src/2026/01/a.txt")
    write(tmp_path / "src/other/b.txt")
    rule = r"regex:/(?P<year>\d{4})/(?P<month>\d\d)/"
    report, rows, _ = build(tmp_path / "src", tmp_path, rule)
    assert [(row["year"], row["month"]) for row in rows] == [("2026", "01")]
    assert report.left_out == {NO_MATCH: 1}


def test_modification_date_is_utc(tmp_path):
    path = write(tmp_path / "src/a.txt")
    os.utime(path, (0, datetime(2026, 1, 2, 23, 59, 59, tzinfo=UTC).timestamp()))
    assert build(tmp_path / "src", tmp_path, "mtime")[1][0]["dt"] == "2026-01-02"
    assert build(tmp_path / "src", tmp_path, "mtime:%Y-%m")[1][0]["dt"] == "2026-01"


def test_column(tmp_path):
    write(tmp_path / "src/a.txt")
    path = write(
        tmp_path / "l.jsonl", '{"uri":"src/a.txt","n":1}\n{"text":"b","lang":"de","n":2}\n'
    )
    report, rows, found = build(path, tmp_path, "column:lang,n")
    assert found.names[-2:] == ["lang", "n"]
    assert [(row["lang"], row["n"]) for row in rows] == [(None, "1"), ("de", "2")]
    assert report.null_partitions == {"lang": 1}
    assert "has no column 'size'" in refused(path, tmp_path, "column:size")
    assert "is no list" in refused(tmp_path / "src", tmp_path, "column:lang")


def test_a_list_column_and_a_hive_key_of_one_name(tmp_path):
    write(tmp_path / "dt=1/a.txt")
    path = write(tmp_path / "l.jsonl", '{"uri": "dt=1/a.txt", "dt": "1"}\n')
    assert "column 'dt'" in refused(path, tmp_path)
    assert build(path, tmp_path, "column:dt")[0].partition_keys == ("dt",)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hive:x",
        "day",
        "mtime:",
        "mtime:%H",
        "column",
        "column:",
        "column:a,,b",
        "column:a,a",
        "column:uri",
        "regex",
        "regex:(",
        "regex:(\\d+)",
        "regex:(?P<unit_id>x)",
    ],
)
def test_rules_that_make_no_sense(text):
    with pytest.raises(ConfigError) as caught:
        parse_partition_rule(text)
    assert "--partition-by" in str(caught.value)


# --- lists -----------------------------------------------------------------------------------


def test_json_lines(tmp_path):
    picture_path = write(tmp_path / "pics/p.bin", PNG)
    lines = [
        {"uri": "pics/p.bin", "text": "a caption", "fps": 2, "tags": ["x", "y"], "n": 1},
        {"text": "inline", "n": 2.5, "instruction": "Find."},
        {"uri": "gone.jpg", "max_frames": 8, "more": {"k": "v"}},
        {"uri": "gone", "kind": "video"},
        {"uri": "gone"},
        {"uri": f"file://{picture_path}", "etag": '"given"', "mtime": "2026-01-02T03:04:05+01:00"},
    ]
    text = "\ufeff" + "\n\n".join(json.dumps(line) for line in lines)
    report, rows, found = build(write(tmp_path / "l.ndjson", text), tmp_path, batch_rows=2)
    assert found.names == [
        *("uri", "kind", "etag", "size_bytes", "mtime", "text", "instruction", "fps"),
        *("max_frames", "tags", "n", "more"),
    ]
    assert found.field("fps").type == pa.float64()
    assert found.field("max_frames").type == pa.int32()
    assert found.field("n").type == pa.float64()
    first, inline, gone, gone_video, given = rows
    assert (first["uri"], first["kind"], first["text"]) == (picture_path, "image", "a caption")
    assert (first["fps"], first["tags"], first["n"]) == (2.0, ["x", "y"], 1.0)
    assert first["size_bytes"] == len(PNG)
    assert first["etag"].startswith(f"{len(PNG)}-")
    assert (inline["uri"], inline["kind"], inline["etag"]) == (None, "text", None)
    assert (inline["size_bytes"], inline["instruction"]) == (6, "Find.")
    assert (gone["uri"], gone["kind"]) == (f"{tmp_path}/gone.jpg", "image")
    assert (gone["etag"], gone["max_frames"], gone["more"]) == (None, 8, {"k": "v"})
    assert (gone_video["kind"], gone_video["etag"]) == ("video", None)
    assert (given["etag"], given["mtime"]) == ("given", datetime(2026, 1, 2, 2, 4, 5, tzinfo=UTC))
    assert report.not_found == 2
    assert report.left_out == {UNREADABLE: 1}


def test_csv(tmp_path):
    write(tmp_path / "a b.txt", "words")
    text = 'uri,kind,max_frames,zip,text\r\n"a b.txt",,,00420,\r\n,,,,"two\r\nlines, quoted"\r\n'
    _, rows, found = build(write(tmp_path / "L.CSV", text), tmp_path)
    assert found.names == ["uri", "kind", "etag", "size_bytes", "mtime", "text", "zip"]
    assert (rows[0]["uri"], rows[0]["zip"]) == (f"{tmp_path}/a b.txt", "00420")
    assert (rows[1]["text"], rows[1]["zip"]) == ("two\r\nlines, quoted", None)


def test_parquet_keeps_further_types(tmp_path):
    times = pa.array([datetime(2026, 1, 2), None], pa.timestamp("ns"))
    table = pa.table(
        {
            "score": pa.array([1, 2], pa.int8()),
            "text": ["one", "two"],
            "day": times.cast(pa.date32()),
            "mtime": times,
            "label": pa.array(["x", "y"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "l.parquet")
    _, rows, found = build(tmp_path / "l.parquet", tmp_path, "column:day")
    assert found.names == [
        *("uri", "kind", "etag", "size_bytes", "mtime", "text", "day", "score", "label")
    ]
    assert found.field("score").type == pa.int8()
    assert [row["day"] for row in rows] == ["2026-01-02", None]
    assert rows[0]["mtime"] == datetime(2026, 1, 2, tzinfo=UTC)
    assert [row["label"] for row in rows] == ["x", "y"]


def test_a_part_of_a_file_is_sniffed_where_it_lies(tmp_path):
    write(tmp_path / "pack.bin", b"\0" * 10 + PNG + b"plain words")
    lines = [
        {"uri": "pack.bin", "byte_offset": 10, "byte_length": len(PNG)},
        {"uri": "pack.bin", "byte_offset": 10 + len(PNG), "byte_length": 5},
        {"uri": "pack.bin", "byte_offset": 999_999, "byte_length": 5},
    ]
    path = write(tmp_path / "l.jsonl", "\n".join(map(json.dumps, lines)))
    report, rows, _ = build(path, tmp_path)
    assert [row["kind"] for row in rows] == ["image", "text"]
    assert rows[0]["byte_offset"] == 10
    assert report.left_out == {UNKNOWN: 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2, is not JSON"),
        ("[1]", "line 2, is not an object"),
        ('{"kind": "text"}', "line 2, has neither uri nor text"),
        ('{"uri": "", "text": null}', "line 2, has neither uri nor text"),
        ('{"text": "a", "kind": "sound"}', "kind='sound', which is not one of text, image"),
        ('{"text": "a", "kind": "image"}', "has kind 'image' and no uri"),
        ('{"text": "a", "byte_offset": 1}', "byte range and no uri"),
        ('{"text": 5}', "text=5, which is not a string"),
        ('{"text": "a", "fps": 0}', "fps=0, which is not a positive number"),
        ('{"text": "a", "fps": NaN}', "fps=nan"),
        ('{"text": "a", "fps": "2"}', "fps='2'"),
        ('{"text": "a", "max_frames": 1.5}', "max_frames=1.5, which is not a whole number"),
        ('{"text": "a", "max_frames": 9999999999}', "max_frames=9999999999"),
        ('{"text": "a", "size_bytes": true}', "size_bytes=True"),
        ('{"text": "a", "size_bytes": -1}', "size_bytes=-1"),
        ('{"text": "a", "mtime": "yesterday"}', "mtime='yesterday', which is not an ISO 8601"),
        ('{"text": "a", "mtime": 1700000000}', "mtime=1700000000"),
        ('{"text": "\\ud800"}', "valid Unicode"),
        ('{"uri": "http://h/a.jpg"}', "whose scheme http:// is none of"),
        ('{"uri": "s3://bucket"}', "which names no object"),
        ('{"text": "a", "unit_id": "x"}', "column 'unit_id'"),
        ('{"text": "a", "_table": "x"}', "column '_table'"),
        ('{"text": "a", "n": "x"}', "column 'n' mixes types: int (line 1), str (line 2)"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "l.jsonl", '{"text": "fine", "n": 1}\n' + line + "\n")
    said = refused(path, tmp_path)
    assert message in said
    assert path in said


def test_types_that_change_between_batches(tmp_path):
    path = write(tmp_path / "l.jsonl", '{"text": "a", "n": 1}\n{"text": "b", "n": "x"}\n')
    assert "column 'n' is int64 in some rows and string" in refused(path, tmp_path, batch_rows=1)


def test_nested_columns_that_differ(tmp_path):
    lines = ['{"text": "a", "m": {"k": 1}}', '{"text": "b", "m": {"j": 2}}']
    path = write(tmp_path / "l.jsonl", "\n".join(lines))
    whole = build(path, tmp_path)[1]
    assert [row["m"] for row in whole] == [{"k": 1, "j": None}, {"k": None, "j": 2}]
    assert build(path, tmp_path, batch_rows=1)[1] == whole
    path = write(tmp_path / "empty.jsonl", '{"text": "a", "m": {}}\n')
    assert "does not fit into one Parquet type" in refused(path, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uri,x\na.txt\n", "line 2, has 1 fields, the header has 2"),
        ("uri,uri\na,b\n", "names a column twice"),
        ("uri,\na,b\n", "a column without a name"),
        ('uri\n"open', "is not CSV"),
        ("uri,fps\na.txt,fast\n", "line 2, has fps='fast', which is not a positive number"),
        ("uri,size_bytes\na.txt,1.5\n", "size_bytes='1.5'"),
        ("name\na.txt\n", "line 2, has neither uri nor text"),
        ("", "Nothing to embed"),
        (b"text\ncaf\xe9\n", "is not CSV"),
    ],
)
def test_a_bad_csv_is_named(tmp_path, text, message):
    assert message in refused(write(tmp_path / "l.csv", text), tmp_path)


def test_a_bad_parquet_is_named(tmp_path):
    assert "can not be read as Parquet" in refused(
        write(tmp_path / "l.parquet", b"PAR1nonsense"), tmp_path
    )
    pq.write_table(pa.table({"uri": [1, 2]}), tmp_path / "l.parquet")
    assert "row 1, has uri=1, which is not a string" in refused(tmp_path / "l.parquet", tmp_path)
    assert "No such file" in refused(tmp_path / "none.csv", tmp_path, error=StorageError)


# --- S3 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3():
    """A loopback S3 server with one bucket; yields (client, storage)."""
    with moto_server() as endpoint_url, pytest.MonkeyPatch.context() as patch:
        for name in ("PROFILE", "DEFAULT_PROFILE", "SESSION_TOKEN", "ENDPOINT_URL"):
            patch.delenv(f"AWS_{name}", raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "a")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        storage = Storage(endpoint_url=endpoint_url, region="us-east-1")
        client = boto3.client("s3", endpoint_url=storage.endpoint_url, region_name=storage.region)
        client.create_bucket(Bucket="media")
        yield client, storage


def put(client, key, body=b"hello"):
    client.put_object(Bucket="media", Key=key, Body=body)


def test_a_bucket_by_extension_and_by_first_bytes(s3, tmp_path):
    client, storage = s3
    put(client, "a/dt=1/really.txt", PNG)
    put(client, "a/dt=2/noext", PNG)
    put(client, "a/dt=2/zero.jpg", b"")
    put(client, "a/dt=2/code.bin", b"\x7fELF\0")
    report, rows, _ = build("s3://media/a", tmp_path, storage=storage)
    assert [(row["uri"], row["kind"], row["dt"]) for row in rows] == [
        ("s3://media/a/dt=1/really.txt", "text", "1"),
        ("s3://media/a/dt=2/noext", "image", "2"),
        ("s3://media/a/dt=2/zero.jpg", "image", "2"),
    ]
    assert rows[0]["size_bytes"] == len(PNG)
    assert len(rows[0]["etag"]) == 32
    assert report.left_out == {UNKNOWN: 1}
    _, rows, _ = build("s3://media/a", tmp_path, storage=storage, sniff=True)
    assert [row["kind"] for row in rows] == ["image", "image", "image"]


def test_a_manifest_in_a_bucket(s3, tmp_path):
    client, storage = s3
    put(client, "b/a.txt")
    put(client, "b/.hidden")
    out = "s3://media/made/manifest.parquet"
    report = build_manifest("s3://media/b", out, storage=storage)
    assert report.left_out_file == f"{out}.left_out.jsonl"
    body = client.get_object(Bucket="media", Key="made/manifest.parquet")["Body"].read()
    assert pq.read_table(io.BytesIO(body))["uri"].to_pylist() == ["s3://media/b/a.txt"]
    client.delete_object(Bucket="media", Key="b/.hidden")
    assert build_manifest("s3://media/b", out, storage=storage).left_out_file is None
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="media")["Contents"]]
    assert [key for key in keys if key.startswith("made/")] == ["made/manifest.parquet"]
    with pytest.raises(StorageError, match="There is no bucket 'none'"):
        build_manifest("s3://media/b", "s3://none/m.parquet", storage=storage)


def test_a_list_in_a_bucket(s3, tmp_path):
    client, storage = s3
    put(client, "c/pics/1.png", PNG)
    put(client, "c/shared.txt", b"words")
    lines = [
        {"uri": "pics/1.png"},
        {"uri": "../c/./shared.txt"},
        {"uri": "s3://media/c/pics/gone.png"},
        {"uri": "s3://none/x.png"},
        {"text": "inline"},
    ]
    put(client, "c/list.jsonl", "\n".join(map(json.dumps, lines)).encode())
    report, rows, _ = build("s3://media/c/list.jsonl", tmp_path, storage=storage, batch_rows=2)
    assert [(row["uri"], row["size_bytes"]) for row in rows] == [
        ("s3://media/c/pics/1.png", len(PNG)),
        ("s3://media/c/shared.txt", 5),
        ("s3://media/c/pics/gone.png", None),
        ("s3://none/x.png", None),
        (None, 6),
    ]
    assert report.not_found == 2
    pq.write_table(pa.table({"uri": ["pics/1.png"]}), tmp_path / "l.parquet")
    client.upload_file(str(tmp_path / "l.parquet"), "media", "c/l.parquet")
    assert build("s3://media/c/l.parquet", tmp_path, storage=storage)[0].by_kind == {"image": 1}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = Storage(endpoint_url=f"http://127.0.0.1:{free.getsockname()[1]}", region="r")
        path = write(tmp_path / "dead.jsonl", '{"uri": "s3://media/x.png"}\n' * 100)
        began = time.monotonic()
        message = refused(path, tmp_path, storage=dead, error=StorageError)
        assert "can not be reached" in message
        assert time.monotonic() - began < 15
    with pytest.raises(StorageError, match=r"none\.csv is not there"):
        build("s3://media/c/none.csv", tmp_path, storage=storage)
