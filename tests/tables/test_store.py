from __future__ import annotations

import os
import pickle
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qvl_batch.errors import RecipeMismatchError, StorageError
from qvl_batch.storage import Storage
from qvl_batch.tables.store import TableStore, normal_root, storage_error
from tests.tables import rows


def one_line(error: pytest.ExceptionInfo[StorageError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_open_create_and_names(any_store) -> None:
    any_store.check_writable()
    assert any_store.names() == []
    assert any_store.open("media") is None
    made = any_store.create("media", rows.schema())
    assert made.count_rows() == 0
    assert any_store.open("media").schema.equals(rows.schema(), check_metadata=True)
    assert any_store.names() == ["media"]


def test_create_again_opens_the_same_and_refuses_another_schema(any_store) -> None:
    any_store.create("media", rows.schema())
    rows.add(any_store, "media", rows.table_rows(["u"], rows.schema()), "m")
    assert any_store.create("media", rows.schema()).count_rows() == 1
    with pytest.raises(RecipeMismatchError, match="vector"):
        any_store.create("media", rows.schema(encodings=("float16",)))


def test_many_creators_at_once_make_one_table_and_lose_no_row(any_store) -> None:
    any_store.check_writable()
    schema = rows.schema()
    start = threading.Barrier(8)

    def create_and_add(i: int) -> None:
        store = TableStore(any_store.root, any_store.storage)
        start.wait()
        store.create("media", schema)
        rows.add(store, "media", rows.table_rows([f"u{i}"], schema), f"m{i}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create_and_add, range(8)))
    table = any_store.open("media")
    assert sorted(table.to_table()["unit_id"].to_pylist()) == [f"u{i}" for i in range(8)]
    operations = [type(table.read_transaction(v).operation).__name__ for v in range(1, 10)]
    assert operations == ["Overwrite"] + ["Append"] * 8


def test_roots(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert normal_root("out/") == str(tmp_path / "out")
    assert normal_root(f"file://{tmp_path}/out") == str(tmp_path / "out")
    assert normal_root("s3://b/x/") == "s3://b/x"
    with pytest.raises(StorageError, match=r"gs://"):
        normal_root("gcs://b/x")
    with pytest.raises(StorageError, match="ftp"):
        normal_root("ftp://b/x")


def test_a_store_survives_pickling(store) -> None:
    store.create("media", rows.schema())
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.root, copy.storage, copy.names()) == (store.root, store.storage, ["media"])


def test_damage_is_an_error_and_not_absence(store) -> None:
    store.create("media", rows.schema())
    for manifest in Path(store.root, "media.lance", "_versions").glob("*.manifest"):
        manifest.write_bytes(b"x" * 100)
    with pytest.raises(StorageError) as error:
        TableStore(store.root).open("media")
    assert "media.lance" in one_line(error)


def test_check_writable_creates_the_root_and_leaves_nothing(tmp_path) -> None:
    store = TableStore(str(tmp_path / "root"))
    store.check_writable()
    assert os.listdir(store.root) == []


def test_local_roots_that_can_not_be_written(tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(StorageError, match="no directory"):
        TableStore(str(tmp_path / "absent" / "root")).check_writable()
    with pytest.raises(StorageError, match="not a directory"):
        TableStore(str(file)).check_writable()
    with pytest.raises(StorageError, match="no directory"):
        TableStore(str(file / "root")).check_writable()


def test_read_only_root(tmp_path) -> None:
    if os.geteuid() == 0:
        # Root passes permission bits; the kernel's own tree refuses root as well.
        root = "/proc/qvl-batch-root"
    else:
        tmp_path.chmod(0o500)
        root = str(tmp_path / "root")
    with pytest.raises(StorageError) as error:
        TableStore(root).check_writable()
    assert root in one_line(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[Errno 30] Read-only file system: '/mnt'", "read-only"),
        ("LanceError(IO): No space left on device (os error 28)", "no space left"),
        ("Permission denied (os error 13)", "permission is denied"),
        ("<Code>ExpiredToken</Code>", "credentials are refused"),
    ],
)
def test_one_line_for_what_the_system_says(text, said) -> None:
    assert said in str(storage_error("/mnt/out", OSError(text)))


def test_no_such_bucket(moto_s3) -> None:
    store = TableStore("s3://no-such-bucket-here/tables", moto_s3.storage)
    for call in (store.check_writable, store.names, lambda: store.open("media")):
        with pytest.raises(StorageError) as error:
            call()
        assert "the bucket does not exist" in one_line(error)


def test_refused_credentials(moto_s3) -> None:
    store = TableStore(moto_s3.root, moto_s3.storage)
    store.check_writable()
    moto_s3.check_credentials(True)
    try:
        for call in (store.check_writable, lambda: store.open("media")):
            with pytest.raises(StorageError) as error:
                call()
            assert "credentials are refused" in one_line(error)
    finally:
        moto_s3.check_credentials(False)


def test_no_credentials(moto_s3, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StorageError) as error:
        TableStore(moto_s3.root, moto_s3.storage).check_writable()
    assert "no credentials were found" in one_line(error)


def test_an_endpoint_that_refuses_is_told_in_seconds(moto_s3) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = TableStore(
        moto_s3.root, Storage(endpoint_url=f"http://127.0.0.1:{port}", region="us-east-1")
    )
    began = time.monotonic()
    with pytest.raises(StorageError) as error:
        store.check_writable()
    assert "does not answer" in one_line(error)
    assert time.monotonic() - began < 15


def test_an_endpoint_that_stays_silent_is_told_in_seconds(moto_s3) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        store = TableStore(moto_s3.root, Storage(endpoint_url=endpoint, region="us-east-1"))
        began = time.monotonic()
        with pytest.raises(StorageError) as error:
            store.check_writable()
        assert "does not answer" in one_line(error)
        assert time.monotonic() - began < 20
        for connection in held:
            connection.close()
