from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from qvl_batch import schema as schemas
from qvl_batch.errors import InvariantBrokenError
from qvl_batch.tables import fragments
from tests.tables import rows

ALL = ("float32", "int8", "binary")


@pytest.mark.parametrize("encodings", [ALL, ("float16",), ("binary", "int8"), ("binary",)])
def test_explode_gives_each_row_its_own_vector(encodings) -> None:
    schema = rows.schema(encodings=encodings)
    ids = [f"u{i}" for i in range(7)]
    units = rows.embedded(
        ids, num_segments=3, failed={"u3": rows.DECODE_FAILURE}, encodings=encodings
    )
    table = fragments.explode(units, schema, "run-7", rows.NOW)
    kept = [unit for unit in ids if unit != "u3"]
    assert table.schema.equals(schema, check_metadata=True)
    assert table["row_id"].to_pylist() == [f"{u}:{s}" for u in kept for s in range(3)]
    assert table["uri"][3].as_py() == "s3://bucket/u1.png"
    assert set(table["run_id"].to_pylist()) == {"run-7"}
    assert set(table["embedded_at"].to_pylist()) == {rows.NOW}
    dtypes = {"vector_int8": np.int8, "vector_bits": np.uint8}
    dtypes["vector"] = np.float16 if "float16" in encodings else np.float32
    for row in table.to_pylist():
        for name, value in rows.encoded(row["row_id"], encodings).items():
            if name == "vector_scale":
                assert row[name] == pytest.approx(value)
            else:
                np.testing.assert_array_equal(row[name], np.frombuffer(value, dtypes[name]))


def test_explode_of_slices_and_chunks_is_the_same() -> None:
    units = rows.embedded([f"u{i}" for i in range(9)], num_segments=2, encodings=ALL)
    schema = rows.schema(encodings=ALL)
    whole = fragments.explode(units, schema, "r", rows.NOW)
    parts = pa.concat_tables([units.slice(0, 4), units.slice(4)])
    assert fragments.explode(parts, schema, "r", rows.NOW).equals(whole)
    assert fragments.explode(units.slice(3, 4), schema, "r", rows.NOW).equals(whole.slice(6, 8))


def test_explode_of_nothing() -> None:
    schema = rows.schema()
    units = rows.embedded(["u"], failed={"u": rows.DECODE_FAILURE})
    assert fragments.explode(units, schema, "r", rows.NOW).num_rows == 0
    assert fragments.explode(units.slice(0, 0), schema, "r", rows.NOW).num_rows == 0


def test_a_unit_without_rows_and_failure_is_no_silent_loss() -> None:
    units = rows.embedded(["u0", "u1"])
    for empty in (None, []):
        broken = units.to_pylist()
        broken[1]["_rows"] = empty
        table = pa.Table.from_pylist(broken, schema=units.schema)
        with pytest.raises(InvariantBrokenError, match="u1 has neither"):
            fragments.explode(table, rows.schema(), "r", rows.NOW)


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(InvariantBrokenError, match="vector_int8 must have 16 bytes"):
        fragments.explode(rows.embedded(["u"], dim=8), rows.schema(), "r", rows.NOW)
    with pytest.raises(InvariantBrokenError, match="no vector_bits"):
        fragments.explode(rows.embedded(["u"], encodings=("int8",)), rows.schema(), "r", rows.NOW)


def test_failure_rows() -> None:
    units = rows.embedded(["a", "b", "c"], failed={"b": rows.DECODE_FAILURE}, attempt=2)
    table = fragments.failure_rows(
        units, collection="media", partition_json='{"dt":"x"}', run_id="r", failed_at=rows.NOW
    )
    assert table.schema.equals(schemas.FAILURES)
    assert table.to_pylist() == [
        {
            "collection": "media",
            "partition": '{"dt":"x"}',
            "unit_id": "b",
            "media_id": "media-b",
            "uri": "s3://bucket/b.png",
            "etag": "etag-b",
            "attempt": 3,
            "run_id": "r",
            "failed_at": rows.NOW,
            **rows.DECODE_FAILURE,
        }
    ]


def test_written_fragments_are_plain_records_and_not_visible(any_store) -> None:
    any_store.check_writable()
    any_store.create("media", rows.schema())
    table = rows.table_rows(["a", "b"], rows.schema())
    written = fragments.write_fragments(any_store.root, any_store.storage, "media", table)
    assert json.loads(json.dumps(written)) == written
    assert [w["num_rows"] for w in written] == [2]
    assert any_store.open("media").count_rows() == 0
    (file,) = written[0]["files"]
    content = any_store.files("media").read_range(file["path"], 0, file["size_bytes"])
    assert hashlib.sha256(content).hexdigest() == file["sha256"]
    assert fragments.file_problem(any_store.files("media"), file["path"], len(content)) is None


def test_no_rows_no_fragments(store) -> None:
    store.create("media", rows.schema())
    nothing = rows.table_rows(["a"], rows.schema()).slice(0, 0)
    assert fragments.write_fragments(store.root, None, "media", nothing) == []


def test_rows_of_another_schema_are_refused(store) -> None:
    schema = rows.schema()
    store.create("media", schema)
    table = rows.table_rows(["a"], schema)
    nulled = table.set_column(0, schema.field("row_id"), pa.array([None], pa.string()))
    for wrong, said in (
        (rows.table_rows(["a"], rows.schema(dim=32), dim=32), "vector_int8"),
        (table.drop_columns(["dt"]), "dt"),
        (table.append_column("more", pa.array([1])), "more"),
        (nulled, "null in column row_id"),
    ):
        with pytest.raises(InvariantBrokenError, match=said):
            fragments.write_fragments(store.root, None, "media", wrong)
    with pytest.raises(InvariantBrokenError, match="does not exist"):
        fragments.write_fragments(store.root, None, "absent", table)


@pytest.mark.parametrize("on_s3", [False, True])
def test_missing_and_cut_files_are_found(store, moto_s3, on_s3) -> None:
    from qvl_batch.tables.store import TableStore

    store = TableStore(moto_s3.root, moto_s3.storage) if on_s3 else store
    store.create("media", rows.schema())
    rows.add(store, "media", rows.table_rows(["a"], rows.schema()), "m")
    files = store.files("media")
    (path,) = [f"data/{name}".replace("data/data", "data") for name in files.list("data")]
    size = store.open("media").get_fragments()[0].metadata.files[0].file_size_bytes
    assert fragments.file_problem(files, path, size) is None
    assert "has not its" in fragments.file_problem(files, path, size + 2)
    assert "has not its" in fragments.file_problem(files, path, size + 100)
    assert fragments.file_problem(files, path + "x", size) == "is missing"
    if not on_s3:
        file = Path(store.root, "media.lance", path)
        file.write_bytes(file.read_bytes()[:-1])
        assert "has not its" in fragments.file_problem(files, path, size)
