from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
import pytest

from qvl_batch.errors import ConfigError
from qvl_batch.tables.search import search
from tests.tables import rows

IDS = [f"u{i:03}" for i in range(60)]
QUERY = rows.vector("query")
ALL = [("binary", "int8"), ("binary", "float16"), ("float32",), ("int8",), ("binary",)]


def tables(store, encodings, names=("media__dt-1", "media__dt-2")):
    store.check_writable()
    schema = rows.schema(encodings=encodings)
    half = len(IDS) // len(names)
    opened = {}
    for i, name in enumerate(names):
        store.create(name, schema)
        ids = IDS[i * half : (i + 1) * half]
        rows.add(store, name, rows.table_rows(ids, schema, encodings=encodings), name)
        opened[name] = store.open(name)
    return opened


def truth(encodings) -> list[tuple[float, str]]:
    scored = []
    for unit in IDS:
        values = rows.encoded(f"{unit}:0", encodings)
        if "vector" in values:
            kind = np.float32 if "float32" in encodings else np.float16
            score = np.frombuffer(values["vector"], kind).astype(np.float32) @ QUERY
        elif "vector_int8" in values:
            ints = np.frombuffer(values["vector_int8"], np.int8).astype(np.float32)
            score = ints @ QUERY * values["vector_scale"]
        else:
            signs = np.unpackbits(np.frombuffer(values["vector_bits"], np.uint8)).astype(bool)
            score = np.where(signs == (QUERY > 0), 1, -1).mean()
        scored.append((-float(score), f"{unit}:0"))
    return sorted(scored)


@pytest.mark.parametrize("encodings", ALL)
def test_every_encoding_finds_the_true_order_over_all_tables(any_store, encodings) -> None:
    found = search(tables(any_store, encodings), QUERY, 10)
    wanted = truth(encodings)[:10]
    np.testing.assert_allclose(found["score"].to_numpy(), [-s for s, _ in wanted], atol=1e-6)
    assert found["row_id"].to_pylist() == [row for _, row in wanted]
    assert found.schema.names == [
        "query",
        "rank",
        "score",
        "table",
        "row_id",
        "uri",
        "kind",
        "page",
        "start_s",
        "end_s",
        "text",
    ]


def test_the_shortlist_is_global(store) -> None:
    # Of the 12 nearest by Hamming distance, the best by int8: whichever tables they lie in.
    opened = tables(store, ("binary", "int8"))
    bits = np.packbits(QUERY > 0)

    def hamming(unit: str) -> int:
        packed = rows.encoded(f"{unit}:0", ("binary",))["vector_bits"]
        return int(np.bitwise_count(np.frombuffer(packed, np.uint8) ^ bits).sum())

    nearest = sorted((hamming(unit), unit) for unit in IDS)
    found = search(opened, QUERY, 12, shortlist=12)
    assert nearest[11][0] == nearest[12][0], "the cut shall fall among ties"
    assert {row.removesuffix(":0") for row in found["row_id"].to_pylist()} == {
        unit for _, unit in nearest[:12]
    }
    assert len(set(found["table"].to_pylist())) == 2


def test_ties_are_ordered_by_table_then_row_id(store) -> None:
    schema = rows.schema(encodings=("float32",))
    opened = {}
    for name in ("b", "a"):
        store.create(name, schema)
        same = rows.table_rows(["y", "x", "z"], schema, encodings=("float32",))
        vectors = same["vector"].combine_chunks().take(np.zeros(3, np.int64))
        index = schema.get_field_index("vector")
        rows.add(store, name, same.set_column(index, schema.field(index), vectors), name)
        opened[name] = store.open(name)
    found = search(opened, QUERY, 5)
    assert len(set(found["score"].to_pylist())) == 1
    order = list(zip(found["table"].to_pylist(), found["row_id"].to_pylist(), strict=True))
    assert order == [("a", "x:0"), ("a", "y:0"), ("a", "z:0"), ("b", "x:0"), ("b", "y:0")]


@pytest.mark.parametrize("encodings", ALL)
def test_columns_filter_and_few_rows(store, encodings) -> None:
    opened = tables(store, encodings)
    found = search(
        opened,
        QUERY,
        10,
        columns=["etag", "dt"],
        where=pc.field("unit_id").isin(["u001", "u040", "no"]),
    )
    assert sorted(found["etag"].to_pylist()) == ["etag-u001", "etag-u040"]
    assert set(found["dt"].to_pylist()) == {"2026-01-02"}
    nothing = search(opened, QUERY, 10, where=pc.field("unit_id") == "no")
    assert nothing.num_rows == 0
    assert nothing.schema.names == found.schema.names[:11]


def test_tables_of_different_encodings_are_searched_together(store) -> None:
    opened = tables(store, ("binary", "int8"), ["one"]) | tables(store, ("float32",), ["two"])
    found = search(opened, QUERY, 2)
    assert found["table"].to_pylist() == ["one", "two"] or found["table"].to_pylist() == [
        "two",
        "one",
    ]
    assert len(set(found["row_id"].to_pylist())) == 1


def test_no_table_no_hit() -> None:
    assert search({}, QUERY, 3).num_rows == 0


def test_wrong_questions(store) -> None:
    opened = tables(store, ("binary", "int8"))
    for call, said in (
        (lambda: search(opened, np.ones(8, np.float32)), "8 dimensions.*has 16"),
        (lambda: search(opened, np.full(16, np.nan, np.float32)), "finite"),
        (lambda: search(opened, QUERY[None, None]), "shape"),
        (lambda: search(opened, QUERY, 0), "top_k is 0"),
        (lambda: search(opened, QUERY, 300, shortlist=200), "shortlist"),
        (lambda: search(opened, QUERY, columns=["colour"]), "no column colour"),
        (lambda: search(opened, QUERY, where=pc.field("colour") == "red"), "filter"),
        (lambda: search(opened, QUERY, where=pc.field("page") == "one"), "exact types"),
        (lambda: search(opened, QUERY, where="uri = 'x'"), "where is a str"),
    ):
        with pytest.raises(ConfigError, match=said):
            call()


@pytest.mark.parametrize("encodings", ALL)
def test_many_queries_get_the_answers_of_each_alone(store, encodings) -> None:
    opened = tables(store, encodings, ("a", "b", "c"))
    queries = np.stack([rows.vector(f"query {i}") for i in range(7)])
    together = search(opened, queries, 9, shortlist=20, columns=["dt"])
    assert together["query"].to_pylist() == [i for i in range(7) for _ in range(9)]
    assert together["rank"].to_pylist() == list(range(1, 10)) * 7
    for i, query in enumerate(queries):
        alone = search(opened, query, 9, shortlist=20, columns=["dt"])
        mine = together.filter(pc.equal(together["query"], i))
        assert mine.drop_columns("query").equals(alone.drop_columns("query"))
