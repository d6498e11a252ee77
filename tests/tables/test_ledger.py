from __future__ import annotations

import dataclasses
from datetime import timedelta

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl_batch import schema as schemas
from qvl_batch.errors import RecipeMismatchError
from qvl_batch.recipe import ImageBudget
from qvl_batch.tables import commit, fragments, ledger
from qvl_batch.tables.layout import FAILURES_TABLE, partition_json
from tests.tables import rows

SCHEMA = rows.schema()


def test_done_units_are_those_with_any_row(any_store) -> None:
    any_store.check_writable()
    any_store.create("media", SCHEMA)
    assert ledger.done_units(any_store.open("media")).to_pylist() == []
    rows.add(any_store, "media", rows.table_rows(["a", "b"], SCHEMA, num_segments=3), "m1")
    rows.add(any_store, "media", rows.table_rows(["c"], SCHEMA), "m2")
    any_store.open("media").delete("unit_id = 'b' AND segment = 0")
    any_store.open("media").delete("unit_id = 'c'")
    done = ledger.done_units(any_store.open("media"))
    assert done.type == pa.string()
    assert sorted(done.to_pylist()) == ["a", "b"]


def test_no_failures_table_means_no_failures(store) -> None:
    view = ledger.failed_units(store, "media", "{}")
    assert view.num_rows == 0
    assert view.schema.names == [
        "unit_id",
        "stage",
        "error_type",
        "message",
        "retryable",
        "attempt",
        "uri",
        "failed_at",
    ]


def test_rows_win_over_failures_and_the_latest_attempt_counts(any_store) -> None:
    any_store.check_writable()
    any_store.create("media", SCHEMA)
    for attempt in (1, 0):
        found = rows.failures(["a", "b"], attempt=attempt)
        commit.append_failures(any_store, found, f"f{attempt}", "r")
    view = ledger.failed_units(any_store, "media", "{}")
    assert view.select(["unit_id", "attempt"]).to_pylist() == [
        {"unit_id": "a", "attempt": 2},
        {"unit_id": "b", "attempt": 2},
    ]
    rows.add(any_store, "media", rows.table_rows(["a"], SCHEMA), "m")
    view = ledger.failed_units(any_store, "media", "{}")
    assert view["unit_id"].to_pylist() == ["b"]
    assert view["message"].to_pylist() == ["not a picture"]
    assert view["uri"].to_pylist() == ["s3://bucket/b.png"]


def test_of_equal_attempts_the_later_one_counts() -> None:
    table = rows.failures(["a", "a"]).set_column(
        schemas.FAILURES.get_field_index("failed_at"),
        schemas.FAILURES.field("failed_at"),
        pa.array([rows.NOW + timedelta(seconds=1), rows.NOW], schemas.UTC_TIME),
    )
    latest = ledger.latest_failures(table, None)
    assert latest["failed_at"].to_pylist() == [rows.NOW + timedelta(seconds=1)]


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 3), st.integers(0, 5)), max_size=12),
    st.sets(st.sampled_from("abcd")),
)
def test_the_view_is_what_a_loop_over_the_failures_says(events, done) -> None:
    table = pa.table(
        {
            "unit_id": pa.array([unit for unit, _, _ in events], pa.string()),
            "attempt": pa.array([attempt for _, attempt, _ in events], pa.int32()),
            "failed_at": pa.array([time for _, _, time in events], pa.int64()),
        }
    )
    wanted: dict[str, tuple[int, int]] = {}
    for unit, attempt, time in events:
        if unit not in done:
            wanted[unit] = max(wanted.get(unit, (0, 0)), (attempt, time))
    view = ledger.latest_failures(table, pa.array(sorted(done), pa.string())).to_pylist()
    assert [(r["unit_id"], (r["attempt"], r["failed_at"])) for r in view] == sorted(wanted.items())


@pytest.mark.parametrize("value", ["it's", "''", "a;--", "\\", "ü'", '"'])
def test_partitions_with_quotes_are_found_and_others_are_not(store, value) -> None:
    partition = (("k", value),)
    text = partition_json(partition)
    units = rows.embedded(["a"], failed={"a": rows.DECODE_FAILURE})
    for collection, json_text in (("media", text), ("other", text), ("media", "{}")):
        found = fragments.failure_rows(
            units, collection=collection, partition_json=json_text, run_id="r", failed_at=rows.NOW
        )
        commit.append_failures(store, found, f"{collection}{json_text}", "r")
    assert store.open(FAILURES_TABLE).count_rows() == 3
    assert ledger.failed_units(store, "media", text).num_rows == 1


def test_a_table_states_its_recipe_and_partition(store) -> None:
    partition = (("dt", "2026-01-02"), ("lang", None))
    ds = store.create("m", rows.schema("media", partition, ("float16",)))
    assert ledger.table_recipe(ds) == rows.recipe(("float16",))
    assert ledger.table_partition(ds) == partition
    assert ledger.table_collection(ds) == "media"
    plain = store.create("plain", pa.schema([pa.field("a", pa.int32())]))
    assert ledger.table_recipe(plain) is None
    assert ledger.table_partition(plain) == ()


def test_another_recipe_is_refused_with_the_field_that_differs(store) -> None:
    ds = store.create("media", SCHEMA)
    ledger.check_recipe(ds, rows.recipe())
    other = dataclasses.replace(
        rows.recipe(), instruction="Find it.", image=ImageBudget(max_px=8192)
    )
    with pytest.raises(RecipeMismatchError) as error:
        ledger.check_recipe(ds, other)
    text = str(error.value)
    assert "image.max_px is 1843200 there, 8192 here" in text
    assert "instruction is \"Represent the user's input.\" there, 'Find it.' here" in text
    assert "output.collection" in text
    # Same columns, another recipe: a table that is already there is not taken.
    stated = schemas.table_rows(other, [pa.field("dt", pa.string())], {})
    with pytest.raises(RecipeMismatchError, match="instruction"):
        store.create("media", stated)
