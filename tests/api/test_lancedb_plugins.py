"""Plain LanceDB on tables that the embed job wrote: text queries, rescoring, reranking."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import duckdb
import lancedb
import numpy as np
import pyarrow.compute as pc
import pytest
from lancedb.index import FTS

import qvl_batch.lancedb as plugins
from qvl_batch import Embedder, Reranker
from qvl_batch.demo.checkpoint import embedding_dir, reranker_dir
from qvl_batch.demo.corpus import write_corpus
from qvl_batch.demo.queries import DEMO_QUERIES
from qvl_batch.errors import InputError, ModelError
from qvl_batch.media.manifest import build_manifest
from qvl_batch.recipe import DEFAULT_INSTRUCTION
from qvl_batch.storage import Storage
from tests.api.conftest import BUDGETS
from tests.embedded_root import EmbeddedRoot, embed_into

QUERY = DEMO_QUERIES[0].text
PACKED = "pictures.bin"


@dataclass(frozen=True)
class Tables:
    """The same media by two recipes; `first_picture` also lies inside another file."""

    root: Path
    media: Path
    first_picture: Path

    def open(self, name: str) -> lancedb.table.Table:
        return lancedb.connect(str(self.root)).open_table(name)


def listed(media: Path) -> tuple[list[dict], Path]:
    """Return the lines of a source list over some of the corpus, and a picture in a file."""
    pictures = sorted(media.glob("dt=*/pictures/*"))
    chosen = [
        *pictures[:24],
        *sorted(media.glob("dt=*/clips/*.mp4"))[:3],
        *sorted(media.glob("dt=*/**/*.pdf"))[:1],
    ]
    lines = [{"uri": str(path)} for path in chosen]
    lines += [{"text": "two red circles on a white background"}, {"text": "nothing of the sort"}]
    lines.append({"uri": str(pictures[0]), "text": "with a caption"})
    first = pictures[0].read_bytes()
    (media / PACKED).write_bytes(b"\0" * 100 + first + b"\0" * 50)
    lines.append(
        {
            "uri": str(media / PACKED),
            "kind": "image",
            "byte_offset": 100,
            "byte_length": len(first),
        }
    )
    return lines, pictures[0]


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Tables:
    folder = tmp_path_factory.mktemp("plugins")
    corpus = write_corpus(folder)
    lines, first_picture = listed(corpus.media_dir)
    source = folder / "list.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = str(folder / "manifest.parquet")
    build_manifest(str(source), manifest, storage=Storage(), partition_from=None)
    made = EmbeddedRoot(corpus, manifest, str(folder / "vectors"))
    embed_into(made, output={"collection": "bits", "partition_by": []})
    halves = {"encodings": ["float16"], "segmentation": {"video_s": 2}}
    embed_into(made, output={"collection": "floats", "partition_by": []}, recipe=halves)
    return Tables(Path(made.root), corpus.media_dir, first_picture)


@pytest.fixture(scope="module")
def reranker() -> plugins.QwenReranker:
    made = plugins.QwenReranker(reranker_dir())
    yield made
    made.close()


def floats(rows) -> np.ndarray:
    return np.stack(rows["vector_int8"].to_numpy(zero_copy_only=False)).astype(np.float32)


def test_a_text_query_is_embedded_with_the_tables_model_and_instruction(tables) -> None:
    found = tables.open("floats").search(QUERY).distance_type("cosine").limit(5).to_arrow()
    with Embedder(
        embedding_dir(), dim=128, max_tokens=4096, query_instruction=DEFAULT_INSTRUCTION, **BUDGETS
    ) as embedder:
        vector = embedder.embed_query(QUERY)
    by_vector = tables.open("floats").search(vector).distance_type("cosine").limit(5).to_arrow()
    assert found["row_id"].to_pylist() == by_vector["row_id"].to_pylist()
    np.testing.assert_allclose(found["_distance"], by_vector["_distance"], atol=1e-6)


def test_bits_are_searched_by_hamming_and_rescored_by_int8(tables, embedder) -> None:
    table = tables.open("bits")
    found = table.search(QUERY).limit(10).to_arrow()
    assert found["_distance"].to_pylist() == sorted(found["_distance"].to_pylist())
    whole = table.to_arrow()
    vector = embedder.embed_query(QUERY, instruction=DEFAULT_INSTRUCTION)
    scores = floats(whole) @ vector * whole["vector_scale"].to_numpy()
    wanted = whole["row_id"].take(np.argsort(-scores)[:5]).to_pylist()
    # Three ways to say which vector rescores.
    for given in (None, vector, SameInstruction(embedder)):
        search = table.search(QUERY).limit(whole.num_rows)
        rescored = search.rerank(plugins.Int8Rescorer(given)).to_arrow()
        assert rescored["row_id"].to_pylist()[:5] == wanted
        np.testing.assert_allclose(
            rescored["_relevance_score"].to_numpy()[:5], -np.sort(-scores)[:5], atol=1e-5
        )


class SameInstruction:
    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def embed_query(self, query):
        return self._embedder.embed_query(query, instruction=DEFAULT_INSTRUCTION)


def test_duckdb_reads_a_float16_table_by_chosen_columns(tables) -> None:
    whole = tables.open("floats").to_lance()
    chosen = whole.scanner(["kind", "num_tokens"])  # noqa: F841 (DuckDB finds it by its name)
    counted = dict(duckdb.sql("select kind, count(*) from chosen group by kind").fetchall())
    assert sum(counted.values()) == whole.count_rows()
    assert counted["text"] == 2
    # If this ever works, the notebook's README need not warn any more.
    with pytest.raises(duckdb.NotImplementedException):
        duckdb.sql("select kind from whole")


def test_a_picture_is_a_query_too(tables) -> None:
    hits = tables.open("floats").search(tables.first_picture).limit(2).to_list()
    assert {Path(hit["uri"]).name for hit in hits} == {tables.first_picture.name, PACKED}


def test_hybrid_search_finds_by_text_and_by_vector(tables) -> None:
    table = tables.open("bits")
    table.create_index("text", config=FTS())
    found = (
        table.search(QUERY, query_type="hybrid")
        .distance_type("hamming")
        .limit(12)
        .rerank(plugins.Int8Rescorer(return_score="all"))
        .to_arrow()
    )
    scores = found["_relevance_score"].to_pylist()
    assert scores == sorted(scores, reverse=True)
    assert "two red circles on a white background" in found["text"].to_pylist()
    assert {None} < set(found["text"].to_pylist())


@pytest.mark.parametrize("name", ["bits", "floats"])
def test_the_reranker_sees_what_was_embedded(tables, reranker, name) -> None:
    found = tables.open(name).search(QUERY).limit(200).rerank(reranker).to_arrow()
    scores = {row["row_id"]: row["_relevance_score"] for row in found.to_pylist()}
    assert None not in scores.values()
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    rows = tables.open(name).to_arrow().to_pylist()
    assert len(scores) == len(rows)
    # Whole videos, pages, captions and texts can also be given by hand.
    by_hand = {row["row_id"]: item_of(row, tables) for row in rows if row["kind"] != "video"}
    if name == "bits":
        by_hand |= {r["row_id"]: {"video": r["uri"]} for r in rows if r["kind"] == "video"}
    with Reranker(reranker_dir(), **BUDGETS) as plain:
        wanted = plain.score(QUERY, list(by_hand.values()))
    np.testing.assert_allclose([scores[row] for row in by_hand], wanted, atol=1e-5)
    segments = [row for row in rows if row["kind"] == "video"]
    assert {row["num_segments"] for row in segments} == {1 if name == "bits" else 2}
    # Halves of clips in which something moves are told apart.
    assert len({scores[row["row_id"]] for row in segments}) > len(segments) // 2


def item_of(row: dict, tables: Tables) -> object:
    if row["kind"] == "text":
        return row["text"]
    if row["kind"] == "document":
        return {"document": row["uri"], "page": row["page"]}
    place = tables.first_picture if row["byte_offset"] is not None else row["uri"]
    return {"image": str(place)} | ({"text": row["text"]} if row["text"] else {})


def test_a_changed_or_missing_medium_comes_last_with_a_warning(
    tables, reranker, tmp_path, recwarn
) -> None:
    table = tables.open("bits")
    pictures = table.search(QUERY).where("kind = 'image' AND text IS NULL").limit(4)
    uris = [row["uri"] for row in pictures.to_list() if row["byte_offset"] is None]
    kept = tmp_path / "kept"
    shutil.move(uris[0], kept)
    try:
        with pytest.warns(UserWarning, match=r"1 row\(s\) have no score.*MissingMediaError"):
            ranked = pictures.rerank(reranker).to_arrow()
        # Written again: the same bytes, another time.
        shutil.copy(kept, uris[0])
        with pytest.warns(UserWarning, match=r"1 row\(s\) have no score.*ChangedMediaError"):
            again = pictures.rerank(reranker).to_arrow()
    finally:
        shutil.move(kept, uris[0])
    for one in (ranked, again):
        last = one.slice(one.num_rows - 1).to_pylist()[0]
        assert (last["uri"], last["_relevance_score"]) == (uris[0], None)
        assert one["_relevance_score"].null_count == 1
    assert pictures.rerank(reranker).to_arrow()["_relevance_score"].null_count == 0


def test_a_reranker_that_is_there_is_used_as_it_is(tables, reranker) -> None:
    search = tables.open("bits").search(QUERY).where("kind = 'image'").limit(5)
    by_path = search.rerank(reranker).to_arrow()
    with Reranker(reranker_dir(), **BUDGETS) as there:
        by_object = search.rerank(plugins.QwenReranker(there, return_score="all")).to_arrow()
        other = search.rerank(plugins.QwenReranker(there, instruction="Is it a clip?")).to_arrow()
        with pytest.raises(InputError, match="device: a Reranker has its options"):
            plugins.QwenReranker(there, device="cpu")
    assert by_object["row_id"].to_pylist() == by_path["row_id"].to_pylist()
    assert "_distance" in by_object.schema.names
    scores = by_object["_relevance_score"].to_pylist()
    np.testing.assert_allclose(scores, by_path["_relevance_score"].to_pylist(), atol=1e-6)
    assert sorted(other["_relevance_score"].to_pylist()) != pytest.approx(sorted(scores))


def test_the_reranker_names_the_columns_it_needs(tables, reranker) -> None:
    search = tables.open("bits").search(QUERY).select(["uri", "kind"]).limit(2)
    with pytest.raises(InputError, match=r"QwenReranker needs the column\(s\) .*byte_offset"):
        search.rerank(reranker).to_arrow()


def test_without_the_import_lancedb_says_key_error(tables) -> None:
    script = (
        "import sys, lancedb, numpy as np, qvl_batch\n"
        "table = lancedb.connect(sys.argv[1]).open_table('floats')\n"
        "print(table.search(np.ones(128, np.float32)).limit(1).to_arrow().num_rows)\n"
        "try:\n    table.search('a red circle')\n"
        "except KeyError as error:\n    print(error)\n"
        "import qvl_batch.lancedb\n"
        "print(table.search('a red circle').limit(3).to_arrow().num_rows)\n"
    )
    command = [sys.executable, "-c", script, str(tables.root)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1", "'qwen3-vl'", "3"]


def test_a_copy_elsewhere_is_used_and_another_model_refused(tables, tmp_path) -> None:
    table = tables.open("bits")
    found = table.search(QUERY).limit(3).to_arrow()["row_id"].to_pylist()
    copy = shutil.copytree(embedding_dir(), tmp_path / "copy")
    try:
        plugins.use_model(copy, device="cpu")
        assert table.search(QUERY).limit(3).to_arrow()["row_id"].to_pylist() == found
        plugins.use_model(reranker_dir())
        with pytest.raises(ModelError, match="other weights than the table's model"):
            table.search(QUERY)
        plugins.use_model(tmp_path / "nowhere")
        with pytest.raises(ModelError, match="use_model"):
            table.search(QUERY)
    finally:
        plugins.use_model()
    assert table.search(QUERY).limit(3).to_arrow()["row_id"].to_pylist() == found


def test_tables_state_no_secret_and_the_whole_function(tables) -> None:
    (function,) = json.loads(tables.open("bits").schema.metadata[b"embedding_functions"])
    assert function["name"] == "qwen3-vl"
    assert function["model"]["model"] == str(embedding_dir())
    assert function["model"]["query_instruction"] == DEFAULT_INSTRUCTION
    assert function["model"]["image"] == {"min_px": 4096, "max_px": 4096}
    stated = plugins.QwenEmbedding.create(**function["model"]).settings()
    assert stated == function["model"]
    assert pc.all(pc.is_valid(tables.open("bits").to_arrow()["vector_scale"])).as_py()
