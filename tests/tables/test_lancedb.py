"""What plain LanceDB users do with these tables."""

from __future__ import annotations

import lancedb
import numpy as np
import pytest

from qvl_batch.storage import Storage
from tests.tables import rows


@pytest.mark.parametrize("encodings", [("float16",), ("binary", "int8")])
def test_open_and_read(any_store, encodings) -> None:
    any_store.check_writable()
    schema = rows.schema(encodings=encodings)
    name = "media__dt-2026-01-02"
    any_store.create(name, schema)
    rows.add(any_store, name, rows.table_rows(["a", "b"], schema, encodings=encodings), "m")
    database = lancedb.connect(any_store.root, storage_options=any_store.options)
    assert name in database.list_tables().tables
    frame = database.open_table(name).to_pandas()
    assert list(frame["row_id"]) == ["a:0", "b:0"]
    assert list(frame.columns) == schema.names


def test_a_float16_table_answers_a_search(store) -> None:
    schema = rows.schema(encodings=("float16",))
    store.create("media", schema)
    ids = [f"u{i}" for i in range(20)]
    rows.add(store, "media", rows.table_rows(ids, schema, encodings=("float16",)), "m")
    table = lancedb.connect(store.root).open_table("media")
    assert store.storage == Storage()
    hit = table.search(rows.vector("u7:0")).metric("cosine").limit(1).to_list()[0]
    assert hit["unit_id"] == "u7"
    plain = table.search(rows.vector("u7:0")).limit(3).to_list()
    assert plain[0]["unit_id"] == "u7"


def test_bits_answer_a_hamming_search(store) -> None:
    schema = rows.schema(encodings=("binary", "int8"))
    store.create("media", schema)
    ids = [f"u{i}" for i in range(20)]
    rows.add(store, "media", rows.table_rows(ids, schema), "m")
    table = lancedb.connect(store.root).open_table("media")
    bits = np.packbits(rows.vector("u7:0") > 0)
    hits = table.search(bits, vector_column_name="vector_bits").distance_type("hamming").limit(3)
    assert "u7" in [hit["unit_id"] for hit in hits.to_list() if hit["_distance"] == 0]
