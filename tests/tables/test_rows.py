from __future__ import annotations

import lance
import numpy as np
import pyarrow as pa
import pytest

from qvl_batch import schema as schemas
from qvl_batch.tables.rows import find_row, read_scores
from tests.tables import rows


@pytest.mark.parametrize(
    ("encodings", "least"),
    [
        (("float32",), 1 - 1e-6),
        (("float16",), 1 - 1e-5),
        (("binary", "int8"), 0.9999),
        (("int8",), 0.9999),
        # Signs alone: what 16 of them leave of a vector of 16 values.
        (("binary",), 0.6),
    ],
)
def test_a_stored_vector_points_where_it_did(store, encodings, least) -> None:
    schema = rows.schema(encodings=encodings)
    store.create("media", schema)
    ids = [f"u{i}" for i in range(20)]
    rows.add(store, "media", rows.table_rows(ids, schema, encodings=encodings), "m")
    opened = {"media": store.open("media")}
    for unit in ids:
        found = find_row(opened, f"{unit}:0")
        assert found["table"] == "media"
        assert found["unit_id"] == unit
        assert found["vector"].dtype == np.float32
        assert np.linalg.norm(found["vector"]) == pytest.approx(1, abs=1e-6)
        assert found["vector"] @ rows.vector(f"{unit}:0") > least
        if encodings == ("binary",):
            assert np.array_equal(found["vector"] > 0, rows.vector(f"{unit}:0") > 0)


@pytest.mark.parametrize(
    "row_id",
    ["absent:0", "", "u0:0' OR '1'='1", "u0:0'; DROP TABLE media; --", "u0:0\x00", "%", "*"],
)
def test_a_row_that_is_not_there(any_store, row_id) -> None:
    any_store.check_writable()
    schema = rows.schema()
    any_store.create("media", schema)
    rows.add(any_store, "media", rows.table_rows(["u0"], schema), "m")
    assert find_row({"media": any_store.open("media")}, row_id) is None
    assert find_row({}, "u0:0") is None


def scores(tables: list[str], day: str, *, kind: str = "scores") -> pa.Table:
    schema = schemas.scores([pa.field("dt", pa.string())], {"qvl.kind": kind})
    # What no test asks for is empty.
    empty = {pa.string(): "", pa.int32(): 0, pa.float32(): 0.0, pa.bool_(): False}
    plain = {field.name: None if field.nullable else empty.get(field.type) for field in schema}
    made = [
        plain
        | {"pair_id": f"{day}-{i}", "query_id": "q", "row_id": f"u{i}:0", "table": table}
        | {"rank_before": i + 1, "made_at": rows.NOW, "dt": day}
        for i, table in enumerate(tables)
    ]
    return pa.Table.from_pylist(made, schema=schema)


def test_scores_of_a_collection(store) -> None:
    for day in ("b2", "a1"):
        made = scores(["media__dt-a1", "other", "media"], day)
        lance.write_dataset(made, store.uri(f"scores__dt-{day}"))
    lance.write_dataset(scores(["media"], "a1", kind="candidates"), store.uri("scores.candidates"))
    found = read_scores(store, "scores", "media")
    assert found["table"].to_pylist() == ["media__dt-a1"] * 2 + ["media"] * 2
    assert found["rank_before"].to_pylist() == [1, 1, 3, 3]
    assert found.schema.names == schemas.scores([pa.field("dt", pa.string())], {}).names
    assert read_scores(store, "scores", "nothing").num_rows == 0
    assert read_scores(store, "scores.candidates", "media") is None
    assert read_scores(store, "absent", "media") is None
