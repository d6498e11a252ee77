"""The LanceDB plug-ins through LanceDB's own API, with small models that are not torch's."""

from __future__ import annotations

import warnings

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from lancedb.embeddings import EmbeddingFunctionConfig, get_registry
from lancedb.index import FTS
from pydantic import ValidationError

from qvl_batch.errors import InputError, MissingMediaError
from qvl_batch.tables.lancedb_plugins import (
    EmbeddingPlugin,
    Int8Rescorer,
    PairReranker,
    merge_results,
)
from tests.tables import rows

IDS = [f"u{i:02}" for i in range(40)]
WANTED = "u07:0"


class KeyVectors:
    """Embeds a text as `rows.vector` does a key."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def embed_query(self, query):
        self.asked.append(query)
        return rows.vector(query)

    def embed(self, items):
        return np.stack([rows.vector(item) for item in items])


@get_registry().register("key-vectors")
class KeyFunction(EmbeddingPlugin):
    def embedder(self):
        return KeyVectors()


@pytest.fixture
def table(store):
    schema = rows.schema()
    store.create("media", schema)
    rows.add(store, "media", rows.table_rows(IDS, schema), "m")
    table = lancedb.connect(store.root).open_table("media")
    table.create_index("text", config=FTS())
    return table


def truth(query: str) -> list[tuple[float, str]]:
    scored = []
    for unit in IDS:
        values = rows.encoded(f"{unit}:0", ("int8",))
        ints = np.frombuffer(values["vector_int8"], np.int8).astype(np.float32)
        scored.append((float(ints @ rows.vector(query)) * values["vector_scale"], f"{unit}:0"))
    return sorted(scored, reverse=True)


def by_bits(table, query: str):
    return table.search(np.packbits(rows.vector(query) > 0)).distance_type("hamming")


@pytest.mark.parametrize("by", [KeyVectors(), "vector", "list"])
def test_a_rescored_hamming_search_gives_the_int8_order(table, by) -> None:
    query = "what u07 looks like"
    given = {"vector": rows.vector(query), "list": rows.vector(query).tolist()}
    rescorer = Int8Rescorer(given.get(by, by) if isinstance(by, str) else by)
    found = by_bits(table, query).limit(len(IDS)).rerank(rescorer, query_string=query).to_arrow()
    wanted = truth(query)
    assert found["row_id"].to_pylist() == [row for _, row in wanted]
    np.testing.assert_allclose(found["_relevance_score"], [score for score, _ in wanted], atol=1e-6)
    assert "_distance" not in found.schema.names


def test_all_scores_are_kept_when_asked_for(table) -> None:
    rescorer = Int8Rescorer(rows.vector(WANTED), return_score="all")
    found = by_bits(table, WANTED).limit(5).rerank(rescorer, query_string="x").to_arrow()
    assert found["row_id"][0].as_py() == WANTED
    assert found["_distance"][0].as_py() == 0
    assert found["_relevance_score"][0].as_py() > 0.99


def test_text_and_hybrid_searches_are_rescored_too(table) -> None:
    rescorer = Int8Rescorer(rows.vector(WANTED))
    texts = table.search("u07 u12", query_type="fts").limit(5).rerank(rescorer).to_arrow()
    assert texts["row_id"].to_pylist() == [WANTED, "u12:0"]
    bits = np.packbits(rows.vector(WANTED) > 0)
    hybrid = (
        table.search(query_type="hybrid")
        .vector(bits)
        .text("u07 u12")
        .distance_type("hamming")
        .limit(len(IDS))
        .rerank(Int8Rescorer(rows.vector(WANTED), return_score="all"))
        .to_arrow()
    )
    assert hybrid["row_id"].to_pylist() == [row for _, row in truth(WANTED)]
    scored = hybrid.filter(pc.is_valid(hybrid["_score"]))
    assert sorted(scored["row_id"].to_pylist()) == [WANTED, "u12:0"]
    assert hybrid["_distance"][0].as_py() == 0
    none = table.search("nothing", query_type="fts").limit(5).rerank(rescorer).to_arrow()
    assert none.num_rows == 0
    assert "_relevance_score" in none.schema.names


def test_what_was_not_selected_is_named(table) -> None:
    search = by_bits(table, WANTED).select(["row_id", "vector_scale"]).limit(3)
    with pytest.raises(InputError, match=r"needs the column\(s\) vector_int8.*\.select\(\["):
        search.rerank(Int8Rescorer(rows.vector(WANTED)), query_string="x").to_arrow()


def test_a_vector_that_does_not_fit_is_refused(table) -> None:
    with pytest.raises(InputError, match="4 dimensions, the table 16"):
        by_bits(table, WANTED).rerank(Int8Rescorer([1, 0, 0, 0]), query_string="x").to_arrow()
    with pytest.raises(InputError, match="one finite float vector"):
        Int8Rescorer(np.ones((2, 16)))
    with pytest.raises(InputError, match="one finite float vector"):
        Int8Rescorer([float("nan")] * 16)


def test_without_a_stated_function_the_rescorer_wants_a_vector(table) -> None:
    with pytest.raises(InputError, match="states no embedding_functions"):
        by_bits(table, WANTED).rerank(Int8Rescorer(), query_string="x").to_arrow()


def test_ties_and_rows_without_a_score() -> None:
    class Fixed(PairReranker):
        def pair_scores(self, query, given, metadata):
            assert query == "q"
            gone = MissingMediaError("a.png", "no such file")
            return [gone if row["uri"] == "a.png" else 0.5 for row in given]

        def failed(self, errors):
            warnings.warn(str(errors[0]), stacklevel=1)

    columns = ("kind", "uri", "etag", "byte_offset", "byte_length", "segment", "page")
    given = pa.Table.from_pylist(
        [
            dict.fromkeys(columns) | {"row_id": row, "uri": uri, "text": None, "_distance": 1.0}
            for row, uri in [("c", "c.png"), ("a", "a.png"), ("b", "b.png")]
        ]
    )
    with pytest.warns(UserWarning, match="no such file"):
        ranked = Fixed().rerank_vector("q", given)
    assert ranked["row_id"].to_pylist() == ["b", "c", "a"]
    assert ranked["_relevance_score"].to_pylist() == [0.5, 0.5, None]
    assert ranked.schema.field("_relevance_score").type == pa.float32()
    with pytest.raises(InputError, match=r"needs the column\(s\) etag, page"):
        Fixed().rerank_vector("q", given.drop_columns(["page", "etag"]))


def test_merged_results_hold_each_row_once() -> None:
    vectors = pa.table({"_rowid": [1, 2, 3], "x": ["a", "b", "c"], "_distance": [0.1, 0.2, 0.3]})
    texts = pa.table({"_rowid": [3, 9], "x": ["c", "z"], "_score": [5.0, 4.0]})
    merged = merge_results(vectors, texts)
    assert merged["_rowid"].to_pylist() == [1, 2, 3, 9]
    assert merged["_score"].to_pylist() == [None, None, 5.0, 4.0]
    assert merged["_distance"].to_pylist() == [0.1, 0.2, 0.3, None]
    assert merge_results(vectors, texts.slice(0, 0)) is vectors
    assert merge_results(vectors.slice(0, 0), texts) is texts


@pytest.mark.parametrize("binary", [True, False])
def test_a_users_own_table_is_embedded_and_searched(tmp_path, binary) -> None:
    function = get_registry().get("key-vectors").create(model="m", dim=rows.DIM, binary=binary)
    assert function.ndims() == (2 if binary else 16)
    item = pa.uint8() if binary else pa.float32()
    schema = pa.schema(
        [pa.field("text", pa.string()), pa.field("vector", pa.list_(item, function.ndims()))]
    )
    database = lancedb.connect(str(tmp_path))
    bound = EmbeddingFunctionConfig(vector_column="vector", source_column="text", function=function)
    table = database.create_table("own", schema=schema, embedding_functions=[bound])
    table.add([{"text": word} for word in ("one", "two", "three")])
    opened = database.open_table("own")
    hit = opened.search("two").limit(1).to_list()[0]
    assert hit["text"] == "two"
    assert hit["_distance"] < 1e-6
    assert hash(function) == hash(KeyFunction(**function.settings()))


def test_a_table_states_every_argument_defaults_too() -> None:
    stated = KeyFunction.create(model="m", dim=8).safe_model_dump()
    assert stated.keys() == KeyFunction.model_fields.keys() - {"max_retries"}
    assert stated["query_instruction"].startswith("Retrieve")
    assert stated["video"]["max_frames"] == 64
    # A variable stays a variable: what it stands for may be private.
    get_registry().set_var("where", "/somewhere")
    variable = KeyFunction.create(model="$var:where", dim=8)
    assert variable.model == "/somewhere"
    assert variable.safe_model_dump()["model"] == "$var:where"


def test_an_argument_of_another_version_is_refused() -> None:
    with pytest.raises(ValidationError, match="pooling"):
        KeyFunction.create(model="m", dim=8, pooling="mean")


def test_an_error_is_neither_retried_nor_wrapped() -> None:
    class Refusing(KeyVectors):
        def embed_query(self, query):
            self.asked.append(query)
            raise InputError("No.", "Ask something else.")

    refusing = Refusing()

    class RefusingFunction(EmbeddingPlugin):
        def embedder(self):
            return refusing

    function = RefusingFunction.create(model="m", dim=8)
    with pytest.raises(InputError, match=r"^No\."):
        function.compute_query_embeddings_with_retry("x")
    assert refusing.asked == ["x"]
