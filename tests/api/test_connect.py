"""Searching real tables, made by the embed job's stages with the shipped checkpoint."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from qvl_batch import connect
from qvl_batch.api.query import Row
from qvl_batch.demo.checkpoint import embedding_dir, reranker_dir
from qvl_batch.demo.queries import DEMO_QUERIES
from qvl_batch.errors import (
    ConfigError,
    CorruptMediaError,
    InputError,
    MissingMediaError,
    ModelError,
    RecipeMismatchError,
    StorageError,
)
from qvl_batch.tables.search import COLUMNS
from tests.embedded_root import EmbeddedRoot, embed_into

PLAIN = ["rank", "score", "table", *COLUMNS]


@pytest.fixture(scope="module")
def media(embedded):
    with connect(embedded.root) as root:
        yield root.collection()


@pytest.fixture(scope="module")
def several(embedded, tmp_path_factory) -> EmbeddedRoot:
    """A root with collections of other encodings, a part of the corpus each."""
    made = replace(embedded, root=str(tmp_path_factory.mktemp("several") / "vectors"))
    part = {"limit": 14}
    embed_into(made, input=part)
    for name, encoding in (("half", "float16"), ("bits", "binary")):
        recipe = {"encodings": [encoding], "dim": 64}
        embed_into(made, input=part, output={"collection": name}, recipe=recipe)
    return made


def first_of(embedded, kind: str) -> str:
    return next(file.path for file in embedded.corpus.files if file.kind == kind and file.scenes)


def uris(hits: pa.Table) -> list[str]:
    return hits["uri"].to_pylist()


def test_every_demo_query_finds_its_answer(embedded, media):
    for query in DEMO_QUERIES:
        hits = media.search(query.text)
        assert hits.column_names == PLAIN
        assert hits["rank"].to_pylist() == list(range(1, 11))
        assert hits.schema.field("score").type == pa.float32()
        assert hits["score"].to_pylist() == sorted(hits["score"].to_pylist(), reverse=True)
        path = str(Path(uris(hits)[0]).relative_to(embedded.corpus.media_dir.resolve()))
        segment = int(hits["row_id"][0].as_py().rpartition(":")[2])
        assert (path, segment) in embedded.corpus.answers(query), query.text


def test_a_picture_finds_itself_in_every_form(embedded, media):
    path = embedded.path(first_of(embedded, "image"))
    picture = Image.open(path).convert("RGB")
    forms = [
        path,
        {"image": str(path)},
        {"image": path},
        path.read_bytes(),
        picture,
        np.asarray(picture),
        # Of the document's own instruction the vector is the document's.
        {"image": [path], "instruction": media.recipe.instruction},
    ]
    for form in forms:
        hits = media.search(form, 2)
        assert uris(hits)[0] == str(path)
        assert hits["score"][0].as_py() == pytest.approx(1, abs=0.01)
    # The same words as a str are a text.
    assert media.search(str(path), 1)["score"][0].as_py() < 0.9


def test_a_clip_finds_itself(embedded, media):
    path = embedded.path(first_of(embedded, "video"))
    for form in (path, {"video": str(path)}, path.read_bytes()):
        hits = media.search(form, 1)
        assert uris(hits) == [str(path)]
        assert hits["score"][0].as_py() == pytest.approx(1, abs=0.01)


def test_a_mix_and_a_page_of_a_document(embedded, media):
    document = embedded.path(first_of(embedded, "document"))
    hits = media.search({"document": document, "page": 2}, 1).to_pylist()
    assert (hits[0]["uri"], hits[0]["page"]) == (str(document), 2)
    picture = embedded.path(first_of(embedded, "image"))
    alone = media.search(picture, 5)["row_id"].to_pylist()
    mixed = media.search({"image": picture, "text": "a page that says tiger"}, 5)
    assert mixed["row_id"].to_pylist() != alone


def test_a_query_whose_medium_is_of_no_use(embedded, media, tmp_path):
    with pytest.raises(MissingMediaError, match=r"query .*absent\.png"):
        media.search(tmp_path / "absent.png")
    broken = next(path for path in embedded.corpus.broken if path.endswith(".mp4"))
    with pytest.raises(CorruptMediaError, match="query"):
        media.search(embedded.path(broken))


def test_a_vector_of_any_length_is_a_query(media):
    vector = media.embed("two red circles")
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1)
    expected = media.search("two red circles")
    wide = vector.astype(np.float64)
    for form in (vector, vector * 1000, vector.tolist(), wide * 1e300, wide * 1e-300):
        hits = media.search(form)
        assert hits["row_id"].equals(expected["row_id"])
        np.testing.assert_allclose(hits["score"], expected["score"], rtol=1e-5)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (np.ones(64), "64 dimensions, collection media has 128"),
        (np.zeros(128), "0 everywhere"),
        (np.full(128, np.nan), "128 of 128 values"),
        (np.r_[np.ones(127), np.inf], "1 of 128 values"),
        (np.ones((2, 128), np.float32), r"\(2, 128\)"),
        (np.array(["a"] * 128), "no vector"),
        (np.ones(128, np.complex128), "complex128"),
        ([], "0 dimensions"),
        ([1.0, [2.0]], "no vector"),
        (None, "a NoneType is no item"),
        (3.5, "a float is no item"),
        ({"picture": "x.png"}, "Unknown key 'picture'"),
        ({"text": 3}, "text is a int"),
        (Row("absent:0"), "media has no row 'absent:0'"),
        (Row("x' OR '1'='1"), "has no row"),
        (Row("a:0", table="../etc"), r"no table '\.\./etc'"),
    ],
)
def test_what_is_no_query(media, query, expected):
    with pytest.raises(InputError, match=expected):
        media.search(query)


@pytest.mark.parametrize("counts", [{"top_k": 0}, {"rerank_top": 0}, {"shortlist": 0}])
def test_counts_are_one_or_more(media, counts):
    with pytest.raises(InputError, match=f"{next(iter(counts))} is 0"):
        media.search("x", **counts)


def test_more_like_this_leaves_the_row_out(embedded, media):
    asked = media.search("two red circles", 1).to_pylist()[0]
    hits = media.like(asked["row_id"], 5)
    assert hits.column_names == PLAIN
    assert hits["rank"].to_pylist() == [1, 2, 3, 4, 5]
    assert asked["row_id"] not in hits["row_id"].to_pylist()
    # The stored vector is that of the file, but for its rounding to 8 bits.
    by_file = media.search({"image": asked["uri"], "instruction": media.recipe.instruction}, 6)
    assert by_file["row_id"][1:].to_pylist() == hits["row_id"].to_pylist()
    with_table = media.search(Row(asked["row_id"], table=asked["table"]), 5)
    assert with_table.equals(hits)


def test_a_row_has_its_columns_and_its_vector(media):
    asked = media.search("a blue star moving left", 1).to_pylist()[0]
    row = media.row(asked["row_id"])
    assert (row["table"], row["uri"], row["kind"]) == (asked["table"], asked["uri"], "video")
    assert row["num_frames"] == 8
    assert not {"vector_int8", "vector_scale", "vector_bits"} & set(row)
    assert row["vector"].shape == (128,)
    assert np.linalg.norm(row["vector"]) == pytest.approx(1)
    assert row["vector"] @ media.embed("a blue star moving left") == pytest.approx(
        asked["score"], abs=0.01
    )


@pytest.mark.parametrize("collection", ["half", "bits"])
def test_rows_and_vectors_of_other_encodings(several, collection):
    with connect(several.root) as root:
        chosen = root.collection(collection)
        assert chosen.dim == 64
        asked = chosen.search("two red circles", 1)["row_id"][0].as_py()
        row = chosen.row(asked)
        assert row["vector"].shape == (64,)
        hits = chosen.like(asked, 5)
        assert asked not in hits["row_id"].to_pylist()
        assert hits.num_rows == 5
        by_vector = chosen.search(row["vector"], 1)
        assert by_vector["score"][0].as_py() == pytest.approx(1, abs=1e-3)


def test_partitions_are_chosen_in_every_form(media):
    day = "2026-01-02"
    forms = [
        {"dt": day},
        {"dt": [day]},
        [f"dt={day}"],
        f"dt={day}",
        ["dt>2026-01-01", "dt<2026-01-03"],
        pc.field("dt") == day,
    ]
    expected = media.search("two red circles", 40, where={"dt": day})
    assert expected.num_rows == 40
    for form in forms:
        hits = media.search("two red circles", 40, partitions=form)
        assert set(hits["table"].to_pylist()) == {f"media__dt-{day}"}
        assert hits.equals(expected)


@pytest.mark.parametrize(
    "partitions",
    [
        {"dt": "2030-01-01"},
        {"dt": "2026-01-01' OR '1'='1"},
        {"dt": "../../etc"},
        ["dt=2026-01-01/../2026-01-02"],
        {"absent": "x"},
        ["nonsense"],
    ],
)
def test_partitions_that_are_not_there(media, partitions):
    with pytest.raises(ConfigError):
        media.search("x", partitions=partitions)


def test_filters_choose_rows(embedded, media):
    for form in ({"kind": "video"}, "kind=video", ["kind=video"], pc.field("kind") == "video"):
        hits = media.search("a blue star moving left", 20, where=form, columns=["dt", "num_frames"])
        assert set(hits["kind"].to_pylist()) == {"video"}
        assert hits.num_rows == 14
        assert hits.column_names == [*PLAIN, "dt", "num_frames"]
    both = media.search("x", 50, where=["kind=image,text", "dt=2026-01-03"])
    assert set(both["kind"].to_pylist()) == {"image", "text"}
    assert set(both["table"].to_pylist()) == {"media__dt-2026-01-03"}
    # What would end a quotation is a value like another.
    assert media.search("x", where={"uri": "x' OR '1'='1"}).num_rows == 0
    assert media.search("x", where="uri=x' OR '1'='1").num_rows == 0
    with pytest.raises(ConfigError, match="nosuch"):
        media.search("x", where={"nosuch": 1})
    with pytest.raises(ConfigError, match="nosuch"):
        media.search("x", columns=["nosuch"])


def test_many_queries_at_once_are_the_same_as_one_by_one(media):
    queries = ["two red circles", media.embed("five pink crosses"), "a page that says tiger"]
    together = media.search_many(queries, 3)
    assert together.column_names == ["query", *PLAIN]
    for place, query in enumerate(queries):
        mine = together.filter(pc.equal(together["query"], place))
        alone = media.search(query, 3)
        assert mine["row_id"].equals(alone["row_id"])
        np.testing.assert_allclose(mine["score"], alone["score"], atol=1e-4)
    assert media.search_many([], 3).num_rows == 0


def test_what_a_collection_says_of_itself(embedded, media):
    assert (media.dim, media.count) == (128, 120)
    assert media.recipe.encodings == ("binary", "int8")
    assert "dt" in media.schema.names
    assert repr(media) == "Collection('media': 120 rows in 3 tables, 128 dimensions, binary + int8)"
    partitions = media.partitions()
    assert partitions["dt"].to_pylist() == ["2026-01-01", "2026-01-02", "2026-01-03"]
    assert pc.sum(partitions["num_rows"]).as_py() == 120
    assert "files" not in partitions.column_names


def test_what_a_root_says_of_itself(several):
    with connect(several.root) as root:
        listed = root.collections().to_pylist()
        assert [(row["collection"], row["dim"]) for row in listed] == [
            ("bits", 64),
            ("half", 64),
            ("media", 128),
        ]
        assert [row["model"] for row in listed] == [str(embedding_dir())] * 3
        assert set(root.partitions()["collection"].to_pylist()) == {"bits", "half", "media"}
        health = root.health()
        assert health.ok, health
        assert "no problems found" in str(health)
        assert "half: " in repr(root)


def test_a_collection_must_be_named_where_there_are_several(several):
    with connect(several.root) as root:
        with pytest.raises(ConfigError, match="bits, half, media"):
            root.collection()
        for name in ("absent", "../media", "media'", "_qvl_catalog", "media__dt-2026-01-01", ""):
            with pytest.raises(ConfigError, match="bits, half, media"):
                root.collection(name)


def test_an_alias_is_switched_under_a_reader(several):
    with connect(several.root) as root, connect(several.root) as other:
        root.switch_alias("live", "half")
        held = other.collection("live")
        assert held.name == "half"
        root.switch_alias("live", "bits")
        # Who holds the old one goes on with it; who asks gets the new one.
        assert held.search("two red circles", 1).num_rows == 1
        assert held.name == "half"
        assert other.collection("live").name == "bits"
        assert other.aliases() == {"live": "bits"}
        assert root.collections().to_pylist()[0]["aliases"] == ["live"]


def test_a_collection_is_not_written_under_an_alias(embedded, tmp_path):
    made = replace(embedded, root=str(tmp_path / "vectors"))
    embed_into(made, input={"limit": 2})
    with connect(made.root) as root:
        root.switch_alias("live", "media")
        with pytest.raises(ConfigError, match="alias of media"):
            embed_into(made, output={"collection": "live"})
        # Made by hand, it is neither guessed nor hidden.
        shutil.copytree(f"{made.root}/media__dt-2026-01-01.lance", f"{made.root}/live.lance")
        rows = lance.dataset(f"{made.root}/live.lance")
        rows.update_schema_metadata({"qvl.collection": "live"})
        with pytest.raises(ConfigError, match="an alias of media and a collection as well"):
            root.collection("live")
        assert "alias" in {problem.kind for problem in root.health().problems}


def test_tables_of_other_makers_are_no_collections(embedded, tmp_path):
    made = replace(embedded, root=str(tmp_path / "vectors"))
    embed_into(made, input={"limit": 2})
    lance.write_dataset(pa.table({"x": [1]}), f"{made.root}/theirs.lance")
    with connect(made.root) as root:
        assert root.collections()["collection"].to_pylist() == ["media"]
        assert root.collection().name == "media"
        assert "theirs" not in repr(root)


def test_there_is_no_such_root(tmp_path):
    with pytest.raises(StorageError, match="no directory"):
        connect(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="no directory"):
        connect(tmp_path / "file")
    with pytest.raises(StorageError, match="ftp"):
        connect("ftp://host/x")


def test_an_empty_root_holds_nothing(tmp_path):
    root = connect(str(tmp_path))
    assert root.collections().num_rows == 0
    assert root.partitions().num_rows == 0
    assert root.health().ok
    assert "no collections" in repr(root)
    with pytest.raises(ConfigError, match="holds no collection"):
        root.collection()


def test_another_model_is_refused_naming_both(embedded):
    with connect(embedded.root, model=reranker_dir()) as root:
        media = root.collection()
        with pytest.raises(RecipeMismatchError) as caught:
            media.search("two red circles")
        digest = media.recipe.model_digest
        for part in (str(reranker_dir()), str(embedding_dir()), digest[:12], "connect(..., model"):
            assert part in str(caught.value)
        # What needs no model works without the right one.
        row_id = media.search(np.ones(128), 1)["row_id"][0].as_py()
        assert media.like(row_id, 1).num_rows == 1


def test_the_same_weights_elsewhere_are_the_same_model(embedded, tmp_path):
    shutil.copytree(embedding_dir(), tmp_path / "copy")
    with connect(embedded.root, model=tmp_path / "copy") as root:
        assert root.collection().search("two red circles", 1).num_rows == 1
    with connect(embedded.root, model=tmp_path / "absent") as root, pytest.raises(ModelError):
        root.collection().search("two red circles", 1)


def test_a_model_that_lies_elsewhere_now(embedded, tmp_path):
    shutil.copytree(embedding_dir(), tmp_path / "model")
    made = replace(embedded, root=str(tmp_path / "vectors"))
    embed_into(made, input={"limit": 4}, model={"path": str(tmp_path / "model")})
    shutil.rmtree(tmp_path / "model")
    with connect(made.root) as root, pytest.raises(ModelError, match=r"connect\(..., model=...\)"):
        root.collection().search("two red circles", 1)


def test_tables_of_two_recipes_are_not_searched_as_one(embedded, tmp_path):
    made = replace(embedded, root=str(tmp_path / "vectors"))
    embed_into(made, input={"limit": 4})
    rows = lance.dataset(f"{made.root}/media__dt-2026-01-01.lance").to_table()
    stated = rows.schema.metadata
    stated[b"qvl.recipe"] = stated[b"qvl.recipe"].replace(b'"dim":128', b'"dim":64')
    other = rows.replace_schema_metadata(stated)
    lance.write_dataset(other, f"{made.root}/media__dt-2026-01-09.lance")
    with connect(made.root) as root:
        with pytest.raises(RecipeMismatchError, match=r"dim is 128 in .*, 64 in"):
            root.collection().search("two red circles")
        kinds = {problem.kind for problem in root.health().problems}
        assert kinds == {"recipe", "uncatalogued"}


def test_new_rows_are_seen(embedded, tmp_path):
    made = replace(embedded, root=str(tmp_path / "vectors"))
    embed_into(made, input={"limit": 10})
    with connect(made.root) as root:
        media = root.collection()
        assert media.count == 10
        assert root.partitions()["num_rows"].to_pylist() == [10]
        embed_into(made, input={"limit": 5})
        assert media.count == 15
        assert media.search("two red circles", 20).num_rows == 15
        assert root.partitions()["num_rows"].to_pylist() == [15]


def test_several_threads_may_ask(media):
    expected = {query.text: media.search(query.text, 3) for query in DEMO_QUERIES}
    start = threading.Barrier(4)

    def ask(turn: int) -> None:
        start.wait()
        for query in DEMO_QUERIES[turn:] + DEMO_QUERIES[:turn]:
            assert media.search(query.text, 3).equals(expected[query.text])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))


def test_tables_in_a_bucket(embedded, bucket):
    made = replace(embedded, root=bucket.uri("vectors"), storage=bucket.storage)
    embed_into(made, input={"limit": 20})
    with connect(made.root, storage=bucket.storage) as root:
        media = root.collection()
        hits = media.search("two red circles", 3)
        # The same rows of the local tables, which have the others as well.
        there = media.search(np.ones(128), 20)["row_id"].to_pylist()
        local = connect(embedded.root).collection()
        expected = local.search("two red circles", 3, where={"row_id": there})
        assert hits.equals(expected)
        assert media.like(hits["row_id"][0].as_py(), 1).num_rows == 1
        root.switch_alias("live", "media")
        assert root.collection("live").name == "media"
        assert root.health().ok
    with pytest.raises(StorageError, match="no-such-bucket"):
        connect("s3://no-such-bucket/vectors", storage=bucket.storage)
    with connect(bucket.uri("empty"), storage=bucket.storage) as root:
        assert root.collections().num_rows == 0
