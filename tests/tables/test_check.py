from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from qvl_batch.tables import check
from qvl_batch.tables.store import TableStore
from tests.tables import rows

SCHEMA = rows.schema()
NONE = pa.array([], pa.string())


@pytest.fixture
def media(any_store) -> TableStore:
    """Three pages each of a, b and c, in two fragments."""
    any_store.check_writable()
    any_store.create("media", SCHEMA)
    rows.add(any_store, "media", rows.table_rows(["a", "b"], SCHEMA, num_segments=3), "m1")
    rows.add(any_store, "media", rows.table_rows(["c"], SCHEMA, num_segments=3), "m2")
    return any_store


def found(store: TableStore, expected: str | None = None, failed: str = "") -> list[tuple]:
    wanted = None if expected is None else pa.array(list(expected), pa.string())
    problems = check.check_table(store.open("media"), wanted, pa.array(list(failed), pa.string()))
    return [(p.kind, p.unit_id, p.detail) for p in problems]


def with_value(column: str, value: int) -> pa.Table:
    """Return the one row of unit d with another number in a column."""
    index = SCHEMA.get_field_index(column)
    table = rows.table_rows(["d"], SCHEMA)
    return table.set_column(index, SCHEMA.field(index), pa.array([value], pa.int32()))


def test_a_whole_table_has_no_problem(media) -> None:
    assert found(media, "abc") == []
    assert found(media) == []
    assert found(media, "abcd", failed="d") == []


def test_an_empty_table(store) -> None:
    store.create("media", SCHEMA)
    assert found(store, "") == []
    assert [(kind, unit) for kind, unit, _ in found(store, "a")] == [("lost", "a")]


def test_one_page_removed(media) -> None:
    media.open("media").delete("row_id = 'b:1'")
    (problem,) = check.check_table(media.open("media"), pa.array(["a", "b", "c"]), NONE)
    assert problem.uri == "s3://bucket/b.png"
    assert problem.is_error
    assert str(problem) == (
        "media: unit b (s3://bucket/b.png) incomplete: 1 of 3 segments are missing: 1"
    )


def test_the_last_page_removed(media) -> None:
    media.open("media").delete("row_id = 'c:2'")
    assert found(media, "abc") == [("incomplete", "c", "1 of 3 segments are missing: 2")]


def test_a_unit_removed(media) -> None:
    media.open("media").delete("unit_id = 'a'")
    detail = "expected, but it has neither rows nor a failure"
    assert found(media, "abc") == [("lost", "a", detail)]
    assert found(media, "abc", failed="a") == []
    assert found(media) == []


def test_a_page_doubled(media) -> None:
    page = rows.table_rows(["b"], SCHEMA, num_segments=3).slice(1, 1)
    rows.add(media, "media", page, "m3")
    assert found(media, "abc") == [
        ("doubled", "b", "segments that stand more than once: 1 (2 times)")
    ]


def test_a_unit_doubled(media) -> None:
    rows.add(media, "media", rows.table_rows(["c"], SCHEMA, num_segments=3), "m3")
    detail = "segments that stand more than once: 0 (2 times), 1 (2 times), 2 (2 times)"
    assert found(media, "abc") == [("doubled", "c", detail)]


@pytest.mark.parametrize("removed", [0, 2])
def test_one_page_removed_and_another_doubled(media, removed) -> None:
    # The count of rows is right, the rows are not.
    media.open("media").delete(f"row_id = 'b:{removed}'")
    rows.add(media, "media", rows.table_rows(["b"], SCHEMA, num_segments=3).slice(1, 1), "m3")
    assert [(kind, unit) for kind, unit, _ in found(media)] == [
        ("doubled", "b"),
        ("incomplete", "b"),
    ]


def test_num_segments_that_contradict_each_other(media) -> None:
    rows.add(media, "media", rows.table_rows(["c"], SCHEMA, num_segments=4).slice(3, 1), "m3")
    assert found(media) == [("contradiction", "c", "its rows state different num_segments: [3, 4]")]


def test_a_segment_out_of_range_and_a_wrong_row_id(media) -> None:
    table = rows.table_rows(["d"], SCHEMA)
    index = SCHEMA.get_field_index("segment")
    rows.add(
        media,
        "media",
        table.set_column(index, SCHEMA.field(index), pa.array([7], pa.int32())),
        "m3",
    )
    assert found(media) == [
        ("wrong row_id", "d", "row_id is not unit_id:segment: d:0"),
        ("incomplete", "d", "1 of 1 segments are missing: 0"),
        ("contradiction", "d", "segments outside 0..0: 7"),
    ]


def test_an_absurd_num_segments_costs_no_memory(media) -> None:
    table = rows.table_rows(["d"], SCHEMA)
    index = SCHEMA.get_field_index("num_segments")
    rows.add(
        media,
        "media",
        table.set_column(index, SCHEMA.field(index), pa.array([2**31 - 1], pa.int32())),
        "m3",
    )
    ((kind, unit, detail),) = found(media)
    assert (kind, unit) == ("incomplete", "d")
    assert detail.startswith("2147483646 of 2147483647 segments are missing: 1, 2, 3")


def test_an_unexpected_unit_is_information(media) -> None:
    problems = check.check_table(media.open("media"), pa.array(["a", "b"]), NONE)
    assert [(p.kind, p.unit_id, p.is_error) for p in problems] == [("unexpected", "c", False)]


def test_a_missing_data_file_and_its_units(store) -> None:
    store.create("media", SCHEMA)
    rows.add(store, "media", rows.table_rows(["a", "b"], SCHEMA), "m1")
    rows.add(store, "media", rows.table_rows(["c"], SCHEMA), "m2")
    lost = store.open("media").get_fragments()[0].metadata.files[0].path
    Path(store.root, "media.lance", "data", lost).unlink()
    reopened = TableStore(store.root)
    assert found(reopened, "abc") == [
        ("missing file", None, f"data/{lost} is missing; it held 2 rows"),
        ("lost", "a", "expected, but it has neither rows nor a failure"),
        ("lost", "b", "expected, but it has neither rows nor a failure"),
    ]


def test_a_cut_data_file(store) -> None:
    store.create("media", SCHEMA)
    rows.add(store, "media", rows.table_rows(["a"], SCHEMA), "m1")
    path = store.open("media").get_fragments()[0].metadata.files[0].path
    file = Path(store.root, "media.lance", "data", path)
    file.write_bytes(file.read_bytes()[:-1])
    assert [kind for kind, _, _ in found(TableStore(store.root))] == ["missing file"]


def test_a_missing_deletion_file(store) -> None:
    store.create("media", SCHEMA)
    rows.add(store, "media", rows.table_rows(["a", "b"], SCHEMA), "m1")
    store.open("media").delete("unit_id = 'a'")
    (deletions,) = Path(store.root, "media.lance", "_deletions").iterdir()
    deletions.unlink()
    ((kind, _, detail),) = found(TableStore(store.root))
    assert (kind, deletions.name in detail) == ("missing file", True)


def test_many_rows_in_seconds(store) -> None:
    num_units = 100_000
    names = np.char.mod("unit-%07d", np.arange(num_units))
    unit = pa.array(np.repeat(names, 3).tolist(), pa.string())
    segment = pa.array(np.tile(np.arange(3, dtype=np.int32), num_units))
    made = {
        "row_id": pa.compute.binary_join_element_wise(unit, segment.cast(pa.string()), ":"),
        "unit_id": unit,
        "uri": unit,
        "segment": segment,
        "num_segments": pa.array(np.full(3 * num_units, 3, np.int32)),
    }
    fields = [SCHEMA.field(name) for name in made]
    store.create("media", pa.schema(fields))
    rows.add(store, "media", pa.table(made, schema=pa.schema(fields)), "m")
    store.open("media").delete("row_id IN ('unit-0000007:1', 'unit-0099999:0')")
    began = time.monotonic()
    problems = check.check_table(store.open("media"), pa.array(names.tolist()), NONE)
    assert [(p.kind, p.unit_id) for p in problems] == [
        ("incomplete", "unit-0000007"),
        ("incomplete", "unit-0099999"),
    ]
    assert time.monotonic() - began < 15
