from __future__ import annotations

import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl_batch.errors import ConfigError
from qvl_batch.tables.search import search
from qvl_batch.tables.store import TableStore
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


def brute_force(held, queries, k, shortlist, rescore):
    """Return (table, row_id, score) of each query's best: the definition, one row at a time."""
    answers = []
    for query in queries:
        near, final = [], []
        for table, row_id, values in held:
            bits, vector = values.get("vector_bits"), values.get("vector")
            if "vector_int8" in values:
                vector = values["vector_int8"].astype(np.float32)
            if vector is not None:
                score = np.einsum("ij,j->i", vector[None].astype(np.float32), query)[0]
                score = score * values.get("vector_scale", np.float32(1))
            if bits is None:
                final.append((-float(score), table, row_id))
                continue
            distance = int(np.bitwise_count(bits ^ np.packbits(query > 0)).sum())
            if vector is None or not rescore:
                by_bits = np.float32(1 - 2 * distance / len(query))
                final.append((-float(by_bits), table, row_id))
            else:
                near.append((distance, row_id, table, -float(score)))
        final += [(score, table, row_id) for _, row_id, table, score in sorted(near)[:shortlist]]
        answers.append(sorted(final)[:k])
    return answers


KINDS = {"vector_bits": np.uint8, "vector_int8": np.int8, "vector_scale": np.float32}


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_search_is_what_its_definition_says(data) -> None:
    # Few distinct vectors, so that ties fall across every cut, in 1 to 4 tables of any encodings.
    dim = data.draw(st.sampled_from([8, 16, 24, 64]))
    distinct = data.draw(st.integers(1, 40))
    held, opened = [], {}
    with tempfile.TemporaryDirectory() as folder:
        store = TableStore(folder)
        for number in range(data.draw(st.integers(1, 4))):
            encodings = data.draw(st.sampled_from(ALL))
            name = f"table-{number}"
            schema = rows.schema(encodings=encodings, dim=dim)
            picks = data.draw(st.lists(st.integers(0, distinct - 1), min_size=1, max_size=60))
            encoded = [rows.encoded(f"v{pick}", encodings, dim) for pick in picks]
            ids = [f"{data.draw(st.integers(0, 9))}-{i}" for i in range(len(picks))]
            table = rows.table_rows(ids, schema, encodings=encodings, dim=dim)
            for field in schema:
                if field.name in encoded[0]:
                    kind = np.float32 if "float32" in encodings else np.float16
                    kind = KINDS.get(field.name, kind)
                    values = [
                        np.frombuffer(one[field.name], kind)
                        if isinstance(one[field.name], bytes)
                        else kind(one[field.name])
                        for one in encoded
                    ]
                    position = schema.get_field_index(field.name)
                    flat = pa.array(np.concatenate([np.atleast_1d(one) for one in values]))
                    if pa.types.is_fixed_size_list(field.type):
                        flat = pa.FixedSizeListArray.from_arrays(flat, type=field.type)
                    table = table.set_column(position, field, flat)
                    for one, value in zip(encoded, values, strict=True):
                        one[field.name] = value
            held += [(name, f"{i}:0", one) for i, one in zip(ids, encoded, strict=True)]
            store.create(name, schema)
            # Two fragments, and not in the order of row_ids.
            half = len(picks) // 2
            for marker, part in enumerate((table.slice(half), table.slice(0, half))):
                if part.num_rows:
                    rows.add(store, name, part, f"{name}-{marker}")
            opened[name] = store.open(name)
        shape = (data.draw(st.integers(1, 6)), dim)
        queries = np.random.default_rng(distinct).normal(size=shape).astype(np.float32)
        k = data.draw(st.integers(1, 12))
        shortlist = k + data.draw(st.integers(0, 30))
        rescore = data.draw(st.booleans())
        found = search(opened, queries, k, shortlist=shortlist, rescore=rescore)
        wanted = brute_force(held, queries, k, shortlist, rescore)
    got = [
        (row["query"], row["rank"], row["table"], row["row_id"], -row["score"])
        for row in found.to_pylist()
    ]
    assert got == [
        (number, rank, table, row_id, score)
        for number, answer in enumerate(wanted)
        for rank, (score, table, row_id) in enumerate(answer, 1)
    ]


def one_table(store, name, table: pa.Table):
    """Write rows as the table of this name."""
    store.create(name, table.schema)
    rows.add(store, name, table, name)
    return store.open(name)


def test_a_crowd_of_equal_rows_is_cut_by_row_id(store) -> None:
    # More ties than a scan keeps: 6,000 copies of one picture.
    encodings = ("binary", "int8")
    schema = rows.schema(encodings=encodings)
    first = rows.table_rows(["x"], schema, encodings=encodings)
    table = first.take(np.zeros(6000, np.int64))
    order = np.random.default_rng(0).permutation(6000)
    ids = pa.array([f"{i:04}:0" for i in order])
    table = table.set_column(0, schema.field("row_id"), ids)
    opened = {"t": one_table(store, "t", table)}
    queries = np.stack([rows.vector("x:0"), rows.vector("other")])
    found = search(opened, queries, 3, shortlist=5)
    assert found["row_id"].to_pylist() == ["0000:0", "0001:0", "0002:0"] * 2
    where = pc.field("row_id") > "3000:0"
    found = search(opened, queries, 3, shortlist=5, where=where, rescore=False)
    assert found["row_id"].to_pylist() == ["3001:0", "3002:0", "3003:0"] * 2


def test_partitions_and_their_union_give_the_same_hits(store) -> None:
    opened = tables(store, ("binary", "int8"), ("a", "b", "c", "d"))
    union = pa.concat_tables([dataset.to_table() for dataset in opened.values()])
    queries = np.stack([rows.vector(f"query {i}") for i in range(20)])
    split = search(opened, queries, 10, shortlist=12)
    whole = search({"all": one_table(store, "all", union)}, queries, 10, shortlist=12)
    assert split.drop_columns("table").equals(whole.drop_columns("table"))


@pytest.mark.parametrize("encodings", [("binary", "int8"), ("binary",), ("float16",)])
def test_an_index_is_used_where_it_is_named(store, encodings) -> None:
    ids = [f"u{i:04}" for i in range(2000)]
    schema = rows.schema(encodings=encodings, dim=64)
    table = rows.table_rows(ids, schema, encodings=encodings, dim=64)
    dataset = one_table(store, "t", table)
    if "binary" in encodings:
        dataset.create_index("vector_bits", "IVF_FLAT", num_partitions=8, metric="hamming")
    else:
        dataset.create_index("vector", "IVF_RQ", num_partitions=8, metric="dot", num_bits=1)
    queries = np.stack([rows.vector(f"query {i}", 64) for i in range(5)])
    exact = search({"t": dataset}, queries, 10, shortlist=400)
    everything = search({"t": dataset}, queries, 10, shortlist=400, nprobes={"t": 8})
    if "binary" in encodings:
        assert everything.equals(exact)
    few = search({"t": dataset}, queries, 10, shortlist=400, nprobes={"t": 1})
    # One list of eight: fewer hits than an exact search has, and true scores.
    score_of = {row["row_id"]: row["score"] for row in exact.to_pylist() if row["query"] == 0}
    mine = [row for row in few.to_pylist() if row["query"] == 0]
    assert 0 < len(score_of.keys() & {row["row_id"] for row in mine}) < 10
    assert all(row["score"] == score_of.get(row["row_id"], row["score"]) for row in mine)
    where = pc.field("unit_id") == "u0007"
    alone = search({"t": dataset}, queries, 10, nprobes={"t": 8}, where=where)
    assert alone["row_id"].to_pylist() == ["u0007:0"] * 5
    # Not indexed yet, and found all the same.
    late = rows.table_rows(["late"], schema, encodings=encodings, dim=64)
    rows.add(store, "t", late, "late")
    query = rows.vector("late:0", 64)
    found = search({"t": store.open("t")}, query, 1, nprobes={"t": 1})
    assert found["row_id"].to_pylist() == ["late:0"]


def test_a_column_named_as_lance_numbers_queries(store) -> None:
    table = rows.table_rows(IDS, rows.schema())
    table = table.append_column("query_index", pa.array(range(len(IDS))))
    dataset = one_table(store, "t", table)
    dataset.create_index("vector_bits", "IVF_FLAT", num_partitions=2, metric="hamming")
    queries = np.stack([QUERY, -QUERY])
    found = search({"t": dataset}, queries, 5, nprobes={"t": 2}, columns=["query_index"])
    assert found.equals(search({"t": dataset}, queries, 5, columns=["query_index"]))


@pytest.mark.parametrize("encodings", ALL)
def test_deleted_rows_and_empty_tables(store, encodings) -> None:
    opened = tables(store, encodings, ("a", "b"))
    store.create("empty", rows.schema(encodings=encodings))
    opened["empty"] = store.open("empty")
    before = search(opened, QUERY, 60)["row_id"].to_pylist()
    gone = before[::3]
    for name in ("a", "b"):
        opened[name].delete(" OR ".join(f"row_id = '{row}'" for row in gone))
        opened[name] = store.open(name)
    after = search(opened, QUERY, 60)["row_id"].to_pylist()
    assert after == [row for row in before if row not in gone]
    nothing = search({"empty": opened["empty"]}, QUERY, 5, nprobes={"empty": 3})
    assert nothing.num_rows == 0
    assert search(opened, np.empty((0, 16), np.float32), 5).num_rows == 0
