"""The stages of the rerank job as plain callables, with the shipped reranker, without Ray."""

import random

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from qvl_batch import schema
from qvl_batch.demo.checkpoint import reranker_dir
from qvl_batch.demo.corpus import CLIP_FRAMES, clip_bytes
from qvl_batch.demo.world import random_scene
from qvl_batch.errors import NoCandidatesError
from qvl_batch.jobs.media_reader import ReadMedia
from qvl_batch.jobs.rerank_blocks import group_by_medium
from qvl_batch.jobs.rerank_stages import DecodeDocuments, RerankPairs, WriteScores
from qvl_batch.jobs.retrieve_stages import (
    DecodeQueries,
    EmbedQueries,
    LookUpRows,
    SearchTables,
    WriteCandidates,
)
from qvl_batch.jobs.retrieve_stages import FirstStage as First
from qvl_batch.jobs.stages import failure_value
from qvl_batch.media.decoder import DecodeLimits
from qvl_batch.media.fetch import FetchLimits
from qvl_batch.model.rerank import RerankEngine
from qvl_batch.recipe import ImageBudget, Recipe, RerankRecipe, Segmentation, VideoBudget
from qvl_batch.storage import Storage
from qvl_batch.tables.commit import append
from qvl_batch.tables.fragments import write_to
from qvl_batch.tables.store import TableStore
from qvl_batch.units import EmbedInput, pair_id
from tests.jobs.test_rerank_blocks import KIND, pair
from tests.jobs.test_stages import MeanColourEngine

BUDGET = ImageBudget(max_px=4096)


def reading(recipe):
    return ReadMedia(
        storage=Storage(),
        recipe=recipe,
        fetch_limits=FetchLimits(attempts=1),
        decode_limits=DecodeLimits(),
        resize="qvl_batch.model.resize:resize_frame",
    )


RERANK = reading(RerankRecipe(model_digest="", instruction="", image=BUDGET))
FIRST = reading(Recipe(model_digest="", dim=8, encodings=("float32",), image=BUDGET))


@pytest.fixture(scope="module")
def engine():
    return RerankEngine(reranker_dir(), threads=1)


@pytest.fixture
def pictures(tmp_path):
    """A red, a green and a blue picture."""
    paths = {}
    for name, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255))):
        paths[name] = str(tmp_path / f"{name}.png")
        Image.new("RGB", (64, 64), colour).save(paths[name])
    return paths


@pytest.fixture
def store(tmp_path):
    return TableStore(str(tmp_path / "tables"))


def planned(*queries):
    fields = [
        *schema.QUERIES,
        pa.field("query_digest", pa.string()),
        pa.field("_table", pa.string()),
        pa.field("_attempt", pa.int32()),
        pa.field("_ordinal", pa.int64()),
    ]
    rows = [
        dict.fromkeys(field.name for field in fields)
        | {"query_digest": "d", "_table": "c", "_attempt": 0, "_ordinal": i}
        | query
        for i, query in enumerate(queries)
    ]
    return pa.Table.from_pylist(rows, pa.schema(fields))


def put_vectors(store, colours):
    """Write a table of one row a colour, found by its mean colour."""
    recipe = Recipe(model_digest="", dim=8, encodings=("float32",))
    target = schema.table_rows(recipe, [], {})
    rows = [
        {field.name: None for field in target}
        | {
            "row_id": f"{name}:0",
            "unit_id": name,
            "media_id": name,
            "uri": f"{name}.png",
            "kind": "image",
            "segment": 0,
            "num_segments": 1,
            "num_tokens": 1,
            "truncated": False,
            "text": f"about {name}",
            "vector": np.array([*colour, 0, 0, 0, 0, 0], np.float32),
            "run_id": "r",
            "embedded_at": 0,
        }
        for name, colour in colours.items()
    ]
    store.create("media", target)
    fragments = write_to(store, "media", pa.Table.from_pylist(rows, target))
    append(store, "media", fragments, marker="m", run_id="r")


def first_stage(store, **changed):
    values = {
        "root": store.root,
        "storage": Storage(),
        "versions": {"media": store.open("media").version},
        "top_k": 2,
        "shortlist": 200,
        "rescore": True,
        "where": (),
        "nprobes": {},
    }
    return First(**values | changed)


def writer(stage, store, name, target):
    store.create(name, target)
    return stage(
        root=store.root,
        storage=Storage(),
        collection="scores",
        schemas={name: target},
        partitions={name: "{}"},
        run_id="run",
    )


COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}


def test_queries_find_their_candidates(pictures, store):
    put_vectors(store, COLOURS)
    asked = planned(
        {"query_id": "a", "image": pictures["green"]},
        {"query_id": "b", "image": "/nowhere.png"},
        {"query_id": "c", "image": pictures["blue"], "text": ""},
    )
    decoded = DecodeQueries(media=FIRST).open()(asked)
    embedded = EmbedQueries(MeanColourEngine)(decoded)
    searched = SearchTables(first_stage(store))(embedded)
    write = writer(WriteCandidates, store, "c", schema.candidates([], {}))
    written = write([searched], frozenset())
    assert written.ordinals.tolist() == [0, 1, 2]
    assert (written.num_units, written.num_rows) == (2, 4)
    failure = written.failures.to_pylist()[0]
    assert (failure["unit_id"], failure["uri"], failure["attempt"]) == ("b", "/nowhere.png", 1)
    append(store, "c", written.fragments["c"], marker="m", run_id="run")
    rows = (
        store.open("c")
        .to_table()
        .sort_by([("query_id", "ascending"), ("rank_before", "ascending")])
    )
    firsts = rows.filter(pc.equal(rows["rank_before"], 1))
    assert firsts["row_id"].to_pylist() == ["green:0", "blue:0"]
    # The row's text, not the query's.
    assert firsts["text"].to_pylist() == ["about green", "about blue"]
    assert firsts["pair_id"].to_pylist() == [pair_id("a", "green:0"), pair_id("c", "blue:0")]
    np.testing.assert_allclose(firsts["first_score"], [1, 1], atol=1e-5)
    again = write([searched], frozenset([0]))
    assert (again.ordinals.tolist(), again.num_units) == ([1, 2], 1)


def test_nothing_found_and_nothing_begun(store):
    put_vectors(store, COLOURS)
    asked = planned({"query_id": "a", "text": "x"})
    embedded = EmbedQueries(MeanColourEngine)(DecodeQueries(media=FIRST).open()(asked))
    none = SearchTables(first_stage(store, where=("kind=video",)))(embedded)
    write = writer(WriteCandidates, store, "c", schema.candidates([], {}))
    written = write([none], frozenset())
    assert written.failures["error_type"].to_pylist() == [NoCandidatesError.__name__]
    stopped = DecodeQueries(media=FIRST, may_start=lambda _: False).open()(asked)
    searched = SearchTables(first_stage(store))(EmbedQueries(MeanColourEngine)(stopped))
    written = write([searched], frozenset())
    assert written.not_started.tolist() == [0]
    assert (written.num_units, written.failures.num_rows) == (0, 0)


def test_given_rows_are_looked_up(store):
    put_vectors(store, COLOURS)
    given = [
        [
            {"row_id": "blue:0", "first_score": None, "rank_before": 1},
            {"row_id": "gone:0", "first_score": None, "rank_before": 2},
        ],
        [],
    ]
    asked = planned({"query_id": "a", "text": "x"}, {"query_id": "b", "text": "x"})
    found = LookUpRows(first_stage(store))(asked.append_column("_given", pa.array(given)))
    write = writer(WriteCandidates, store, "c", schema.candidates([], {}))
    written = write([found], frozenset())
    assert written.num_rows == 1
    failures = {row["unit_id"]: row["error_type"] for row in written.failures.to_pylist()}
    assert failures == {pair_id("a", "gone:0"): "MissingRowError", "b": "NoCandidatesError"}


def media_of(*pairs):
    table = pa.Table.from_pylist(list(pairs), pa.schema(list(KIND)))
    return group_by_medium(table, pa.array(["q0", "q1", "bad"]))


def ask(query_id):
    if query_id == "bad":
        return failure_value(NoCandidatesError("", "of this query"))
    return EmbedInput(texts=(f"a {query_id} circle",))


def rerank(engine, media, may_start=lambda _: True):
    decoded = DecodeDocuments(media=RERANK, may_start=may_start).open()(media)
    return RerankPairs(lambda: engine, lambda: ask)(decoded)


def test_media_become_scores(engine, pictures, store):
    pairs = [
        pair("q0", pictures["red"], etag=None),
        pair("q1", pictures["red"], etag=None),
        pair("bad", pictures["red"], etag=None),
        pair("q0", pictures["blue"], etag=None, segment=3, unit="three"),
        pair("q0", "/nowhere.png", etag=None),
        pair("q1", None, kind="text", unit="t") | {"text": "a red circle"},
        pair("q1", pictures["green"], etag="another", rank=9),
    ]
    before = engine.counts.num_visions_encoded
    scored = rerank(engine, media_of(*pairs))
    write = writer(WriteScores, store, "scores", schema.scores([], {}))
    written = write([scored], frozenset())
    assert sorted(written.ordinals.tolist()) == list(range(5))
    assert (written.num_units, written.num_rows, written.failures.num_rows) == (3, 3, 4)
    reasons = {row["unit_id"]: row["error_type"] for row in written.failures.to_pylist()}
    assert reasons == {
        pairs[2]["pair_id"]: "NoCandidatesError",
        pairs[3]["pair_id"]: "CorruptMediaError",
        pairs[4]["pair_id"]: "MissingMediaError",
        pairs[6]["pair_id"]: "ChangedMediaError",
    }
    # Red served two queries and was fetched, decoded and encoded once.
    work = written.work
    assert (work["media_fetched"], work["media_decoded"]) == (2, 1)
    assert (work["visions"], work["visions_encoded"]) == (2, 1)
    assert engine.counts.num_visions_encoded == before + 1
    append(store, "scores", written.fragments["scores"], marker="m", run_id="run")
    rows = {row["pair_id"]: row for row in store.open("scores").to_table().to_pylist()}
    assert rows.keys() == {pairs[i]["pair_id"] for i in (0, 1, 5)}
    text = EmbedInput(texts=("a red circle",))
    expected = engine.score(EmbedInput(texts=("a q1 circle",)), [text])[0]
    row = rows[pairs[5]["pair_id"]]
    assert row["rerank_score"] == pytest.approx(expected, abs=1e-6)
    assert (row["rank_after"], row["truncated"]) == (None, False)
    assert row["num_tokens"] > 40


def test_only_the_wanted_segment_of_a_video_is_decoded(engine, tmp_path):
    rng = random.Random(0)
    frames = random_scene("clip", rng).frames(64, CLIP_FRAMES, rng)
    (tmp_path / "clip.mp4").write_bytes(clip_bytes(frames))
    recipe = RerankRecipe(
        model_digest="",
        instruction="",
        video=VideoBudget(fps=2.0, min_px=4096, max_px=4096),
        segmentation=Segmentation(video_s=2.0),
    )
    uri = str(tmp_path / "clip.mp4")
    media = media_of(pair("q0", uri, kind="video", segment=1, etag=None))
    decoded = DecodeDocuments(media=reading(recipe)).open()(media)
    parts = pc.list_flatten(decoded["_parts"]).to_pylist()
    assert [(part["segment"], part["start_s"], part["num_frames"]) for part in parts] == [(1, 2, 4)]
    scored = RerankPairs(lambda: engine, lambda: ask)(decoded)
    (score,) = pc.list_flatten(scored["_scores"]).to_pylist()
    assert 0 < score["rerank_score"] < 1


def test_a_block_that_is_not_begun_is_neither_scored_nor_failed(engine, pictures, store):
    media = media_of(pair("q0", pictures["red"], etag=None))
    scored = rerank(engine, media, may_start=lambda _: False)
    write = writer(WriteScores, store, "scores", schema.scores([], {}))
    written = write([scored], frozenset())
    assert (written.ordinals.tolist(), written.not_started.tolist()) == ([0], [0])
    assert (written.num_rows, written.failures.num_rows) == (0, 0)


class DiedBefore:
    """What the control actor knows when a worker has died on one medium again and again."""

    def __init__(self, deadly):
        self.deadly = deadly

    def begin(self, stage, ordinal, alone):
        return 2 if not alone or ordinal == self.deadly else 0

    def end(self, stage, ordinal, alone):
        return


def test_a_medium_that_kills_workers_fails_alone(engine, pictures, store):
    media = media_of(
        *(pair("q0", uri, etag=None, rank=i) for i, uri in enumerate(pictures.values()))
    )
    decoded = DecodeDocuments(media=RERANK).open()(media)
    whole = RerankPairs(lambda: engine, lambda: ask)(decoded)
    careful = RerankPairs(lambda: engine, lambda: ask, DiedBefore(1), 3)(decoded)
    scores = [pc.list_flatten(one["_scores"]).to_pylist() for one in (whole, careful)]
    assert scores[1][1]["failure"]["error_type"] == "WorkerKilledError"
    for place in (0, 2):
        score = scores[1][place]["rerank_score"]
        assert score == pytest.approx(scores[0][place]["rerank_score"], abs=1e-6)
    undecoded = DecodeDocuments(media=RERANK, attempts=DiedBefore(2)).open()(media)
    failed = [one is not None for one in undecoded["_failure"].to_pylist()]
    assert failed == [False, False, True]
    assert pc.sum(pc.struct_field(undecoded["_work"], "media_fetched")).as_py() == 2
