"""The rerank job through real local Ray, on tables that a real embed job made."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from qvl_batch import Reranker, connect
from qvl_batch.demo.checkpoint import embedding_dir
from qvl_batch.demo.corpus import write_corpus
from qvl_batch.demo.queries import DEMO_QUERIES
from qvl_batch.errors import (
    ConfigError,
    ManifestError,
    ModelError,
    RecipeMismatchError,
    StorageError,
)
from qvl_batch.jobs.embed import run_embed
from qvl_batch.jobs.rerank import run_rerank
from qvl_batch.jobs.verify import verify
from qvl_batch.recipe import DEFAULT_INSTRUCTION
from qvl_batch.storage import Storage
from qvl_batch.tables.aliases import switch
from qvl_batch.units import pair_id
from tests.jobs.conftest import Job
from tests.jobs.rerank_jobs import RERANKER, RerankRun, write_lines

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def embedded(corpus, folder, media=None):
    """Embed a corpus, or a copy of it, into a root; return the root."""
    from qvl_batch.media.manifest import build_manifest

    manifest, root = str(folder / "manifest.parquet"), str(folder / "vectors")
    source = str(media or corpus.media_dir)
    build_manifest(source, manifest, storage=Storage(), partition_from=None)
    # The shipped checkpoint was trained with one instruction for both sides.
    stated = f"model.query_instruction={DEFAULT_INSTRUCTION}"
    run_embed(Job(manifest=manifest, root=root).config(stated), echo=lambda _: None)
    return root


@pytest.fixture(scope="module")
def vectors(corpus, tmp_path_factory):
    return embedded(corpus, tmp_path_factory.mktemp("vectors"))


@pytest.fixture
def make_run(vectors, tmp_path):
    """Return a function that writes queries and returns a job on the vectors."""

    def make(queries, root=vectors):
        path = write_lines(tmp_path / "queries.jsonl", queries)
        return RerankRun(queries=path, root=root, out=str(tmp_path / "scores"))

    return make


TEXTS = [{"query_id": f"q{i}", "text": query.text} for i, query in enumerate(DEMO_QUERIES)]


def document_of(row):
    item = {"text": row["text"]} if row["text"] is not None else {}
    if row["kind"] == "document":
        item |= {"document": row["uri"], "page": row["page"]}
    elif row["kind"] != "text":
        item |= {row["kind"]: row["uri"]}
    return item


def expected_scores(queries, rows):
    """Return the notebook reranker's score of each row, by pair_id."""
    scores = {}
    settings = {name: RERANKER[name] for name in ("image", "video", "document")}
    with Reranker(RERANKER["path"], **settings) as reranker:
        for query in queries:
            mine = rows.filter(pc.equal(rows["query_id"], query["query_id"])).to_pylist()
            asked = {key: query[key] for key in ("text", "image", "video") if key in query}
            found = reranker.score(
                asked, [document_of(row) for row in mine], query.get("instruction")
            )
            scores |= {row["pair_id"]: score for row, score in zip(mine, found, strict=True)}
    return scores


def check(run, *, collection="scores"):
    checked = verify(str(run.store.root), run.storage, collection=collection)
    assert checked.problems == (), str(checked)
    return checked.scores[0]


def assert_ranked(rows):
    for query in pc.unique(rows["query_id"]).to_pylist():
        mine = rows.filter(pc.equal(rows["query_id"], query)).sort_by("rank_after")
        assert mine["rank_after"].to_pylist() == list(range(1, mine.num_rows + 1))
        scores = mine["rerank_score"].to_numpy()
        assert (np.diff(scores) <= 0).all()


@pytest.fixture(scope="module")
def scored(corpus, vectors, tmp_path_factory):
    """A finished run: queries in two partitions, with labels; its settings and its report."""
    folder = tmp_path_factory.mktemp("scored")
    queries = [query | {"lang": "en" if i % 2 else None} for i, query in enumerate(TEXTS)]
    labels = [
        {"query_id": f"q{i}", "uri": str(corpus.media_dir.resolve() / path), "relevance": 1}
        for i, query in enumerate(DEMO_QUERIES)
        for path in dict.fromkeys(path for path, _ in corpus.answers(query))
    ]
    run = RerankRun(
        queries=write_lines(folder / "queries.jsonl", queries),
        root=vectors,
        out=str(folder / "scores"),
    )
    labelled = write_lines(folder / "labels.jsonl", labels)
    settings = ("output.partition_by=[lang]", f"input.relevance={labelled}")
    return run, settings, run_rerank(run.config(*settings))


def test_queries_become_scores_once(scored):
    run, settings, report = scored
    assert (report.queries_searched, report.pairs_scored) == (7, 70)
    rows = run.rows()
    assert len(set(rows["pair_id"].to_pylist())) == rows.num_rows == 70
    assert_ranked(rows)
    expected = expected_scores(TEXTS, rows)
    ours = dict(zip(rows["pair_id"].to_pylist(), rows["rerank_score"].to_pylist(), strict=True))
    assert ours.keys() == expected.keys()
    for pair, score in expected.items():
        assert ours[pair] == pytest.approx(score, abs=1e-5)
    media = connect(run.root).collection("media")
    for number, query in enumerate(DEMO_QUERIES):
        hits = media.search(query.text, top_k=10)
        mine = rows.filter(pc.equal(rows["query_id"], f"q{number}")).sort_by("rank_before")
        assert mine["row_id"].to_pylist() == hits["row_id"].to_pylist()
        np.testing.assert_allclose(mine["first_score"], hits["score"], atol=1e-5)
    for row in rows.to_pylist():
        assert row["pair_id"] == pair_id(row["query_id"], row["row_id"])
        assert (row["lang"] == "en") == (int(row["query_id"][1:]) % 2 == 1)
        assert row["num_tokens"] > 50
        assert not row["truncated"]
    assert [name.partition("-")[0] for name in run.store.names()] == [
        *["scores.candidates__lang"] * 2,
        *["scores__lang"] * 2,
    ]

    lines = []
    again = run_rerank(run.config(*settings), echo=lines.append)
    assert (again.queries_found_before, again.pairs_scored_before) == (7, 70)
    assert again.pairs_scored == again.queries_searched == again.ranks_set == 0
    assert again.after == report.after
    assert any("Nothing to do" in line for line in lines)
    assert run.rows().num_rows == 70


def test_the_report_proves_that_media_were_read_and_encoded_once(scored):
    run, _, report = scored
    visual = run.rows()
    visual = visual.filter(pc.not_equal(visual["kind"], "text"))
    assert report.media == report.media_fetched == report.media_decoded
    assert report.media == len(pc.unique(visual["uri"]))
    # Pages of one document are parts of one medium; a part is used by several pairs.
    assert report.media_decoded < report.parts_decoded < visual.num_rows
    assert report.parts_decoded == len(pc.unique(visual["row_id"])) == report.visions_encoded
    assert report.visions == visual.num_rows
    assert report.prefix_tokens_saved > 0
    assert report.before["recall_at_10"] == report.after["recall_at_10"] > 0.5
    assert report.before["num_queries"] == report.after["num_queries"] == 7
    stored = f"{run.store.root}/_qvl_runs/{report.run_id}.json"
    with open(stored) as file:
        assert json.load(file) == json.loads(report.to_json())
    counts = check(run)
    assert (counts.num_queries, counts.num_candidates, counts.num_scored) == (7, 70, 70)


def test_waves_blocks_and_pools_do_not_change_scores(scored, tmp_path):
    run, _, _ = scored
    whole = run.rows().sort_by("pair_id")
    other = RerankRun(queries=run.queries, root=run.root, out=str(tmp_path / "other"))
    report = run_rerank(
        other.config(
            "pools.queries_per_wave=4",
            "pools.media_per_block=4",
            "pools.rerank.batch_tokens=300",
            "pools.decode.cpus=0.5",
            "pools.rerank.cpus=0.5",
            "pools.rerank.actors=2",
            "commit.interval_s=0.5",
        )
    )
    assert report.waves == 2
    cut = other.rows().sort_by("pair_id")
    for column in ("pair_id", "rank_before", "rank_after", "num_tokens"):
        assert cut[column].to_pylist() == whole[column].to_pylist()
    np.testing.assert_allclose(cut["rerank_score"], whole["rerank_score"], atol=1e-5)
    # Once a wave, that is: fewer than pairs, more than media.
    assert report.media_fetched == report.media_decoded
    assert report.visions_encoded == report.parts_decoded < report.visions


def test_queries_may_be_pictures_and_videos(corpus, make_run, tmp_path):
    media = corpus.media_dir.resolve()
    picture = next(path for path in corpus.files if path.path.endswith(".png")).path
    clip = next(path for path in corpus.files if path.path.endswith(".mp4")).path
    gone = tmp_path / "gone.png"
    queries = [
        {"query_id": "picture", "image": str(media / picture)},
        {"query_id": "both", "image": str(media / picture), "text": "on a white background"},
        {"query_id": "clip", "video": str(media / clip), "instruction": "Find the same clip."},
        {"query_id": "gone", "image": str(gone)},
        {"query_id": "words", "text": "two red circles"},
    ]
    run = make_run(queries)
    report = run_rerank(run.config("search.top_k=5"))
    assert (report.queries_searched, report.queries_failed) == (4, 1)
    assert (report.pairs_scored, report.pairs_failed) == (20, 0)
    assert report.query_media_decoded == 3
    assert report.visions_encoded <= report.parts_decoded + 3
    rows = run.rows()
    expected = expected_scores([query for query in queries if query["query_id"] != "gone"], rows)
    ours = dict(zip(rows["pair_id"].to_pylist(), rows["rerank_score"].to_pylist(), strict=True))
    assert ours.keys() == expected.keys()
    for pair, score in expected.items():
        assert ours[pair] == pytest.approx(score, abs=1e-5)
    failure = run.rows("_qvl_failures").to_pylist()[0]
    assert (failure["unit_id"], failure["uri"]) == ("gone", str(gone))
    assert failure["error_type"] == "MissingMediaError"
    assert failure["collection"] == "scores"

    assert run_rerank(run.config("search.top_k=5")).queries_failed_before == 1
    shutil.copy(media / picture, gone)
    mended = run_rerank(run.config("search.top_k=5"), retry_failed=True)
    assert (mended.queries_searched, mended.pairs_scored) == (1, 5)
    rows = run.rows()
    twin = {
        name: rows.filter(pc.equal(rows["query_id"], name)).sort_by("row_id")["rerank_score"]
        for name in ("gone", "picture")
    }
    np.testing.assert_allclose(twin["gone"], twin["picture"], atol=1e-5)
    check(run)


def test_a_lost_medium_fails_its_pairs_alone(corpus, make_run, tmp_path):
    media = tmp_path / "media"
    shutil.copytree(corpus.media_dir, media)
    root = embedded(corpus, tmp_path, media)
    # Answers of two queries: candidates without a doubt.
    lost, changed = (
        media.resolve() / corpus.answers(DEMO_QUERIES[number])[0][0] for number in (0, 3)
    )
    kept = shutil.copy2(lost, tmp_path / "kept")
    lost.unlink()
    with changed.open("ab") as file:
        file.write(b"more")
    run = make_run(TEXTS, root)
    report = run_rerank(run.config())
    uses = run.rows("scores.candidates")["uri"].to_pylist()
    num_lost, num_changed = uses.count(str(lost)), uses.count(str(changed))
    assert num_lost
    assert num_changed
    assert report.failures_by_reason == {
        "ChangedMediaError": num_changed,
        "MissingMediaError": num_lost,
    }
    assert report.pairs_failed == num_lost + num_changed == 70 - report.pairs_scored
    failures = run.rows("_qvl_failures").to_pylist()
    assert {row["uri"] for row in failures if row["collection"] == "scores"} == {
        str(lost),
        str(changed),
    }
    rows = run.rows()
    assert not set(rows["uri"].to_pylist()) & {str(lost), str(changed)}
    assert_ranked(rows)
    check(run)
    assert run_rerank(run.config()).pairs_failed_before == num_lost + num_changed

    shutil.copy2(kept, lost)
    mended = run_rerank(run.config(), retry_failed=True)
    assert (mended.pairs_scored, mended.pairs_failed) == (num_lost, num_changed)
    # The queries that gained a pair are ranked anew.
    assert_ranked(run.rows())
    check(run)


HOSTILE = [
    "'; DROP TABLE scores; --",
    '"quoted" and \\back\\slash',
    "../../../../etc/passwd",
    "line\nbreak\tand\ttab",
    "ünïcode 東京 🚲 \u202e",
    "x" * 10_000,
    "<script>alert(1)</script>",
    "%s {0} ${HOME} $(id)",
    " ",
    "\x00nul",
]


def test_hostile_query_ids_are_data(make_run, tmp_path):
    queries = [
        {"query_id": name, "text": DEMO_QUERIES[i % 7].text, "part": name}
        for i, name in enumerate(HOSTILE)
    ]
    run = make_run(queries)
    settings = (
        "search.top_k=3",
        "search.rescore=false",
        "search.where=[kind=image]",
        "output.partition_by=[part]",
    )
    before = {path.name for path in tmp_path.iterdir()}
    report = run_rerank(run.config(*settings))
    assert (report.queries_searched, report.pairs_scored) == (len(HOSTILE), 3 * len(HOSTILE))
    rows = run.rows()
    assert set(rows["query_id"].to_pylist()) == set(HOSTILE)
    assert rows["query_id"].to_pylist() == rows["part"].to_pylist()
    assert set(rows["kind"].to_pylist()) == {"image"}
    # By the bits alone: 1 - 2 * hamming / 128.
    firsts = rows["first_score"].to_numpy() * 64
    np.testing.assert_allclose(firsts, np.round(firsts), atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == before | {"scores"}
    again = run_rerank(run.config(*settings))
    assert again.pairs_scored_before == 3 * len(HOSTILE)
    assert again.queries_searched == 0
    check(run)


def test_given_candidates_are_scored_as_they_are(make_run, vectors, tmp_path):
    run = make_run(TEXTS[:2])
    known = Job(manifest="", root=vectors).all_rows()["row_id"].to_pylist()
    rows = [("q0", known[3], 0.5), ("q0", known[40], 0.9), ("q0", "nowhere:0", 0.7)]
    path = str(tmp_path / "candidates.parquet")
    columns = {
        name: [row[i] for row in rows] for i, name in enumerate(("query_id", "row_id", "score"))
    }
    pq.write_table(pa.table(columns), path)
    settings = f"input.candidates={path}"
    report = run_rerank(run.config(settings))
    assert (report.pairs_scored, report.candidates_missing, report.queries_failed) == (2, 1, 1)
    # The unknown row, and the query that was given nothing.
    assert report.failures_by_reason == {"MissingRowError": 1, "NoCandidatesError": 1}
    scored = run.rows().sort_by("rank_before")
    assert scored["row_id"].to_pylist() == [known[40], known[3]]
    assert scored["rank_before"].to_pylist() == [1, 3]
    np.testing.assert_allclose(scored["first_score"], [0.9, 0.5])
    assert_ranked(scored)
    again = run_rerank(run.config(settings))
    assert again.pairs_scored_before == 2
    assert again.queries_failed_before == 1
    check(run)
    pq.write_table(pa.table(columns).slice(0, 1), path)
    with pytest.raises(ConfigError, match="other candidates"):
        run_rerank(run.config(settings))
    with pytest.raises(RecipeMismatchError, match=r"search\.given"):
        run_rerank(run.config())


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("model.instruction=Find it.", "reranker.instruction"),
        ("model.image.max_px=8192", "reranker.image.max_px"),
        ("model.max_tokens=512", "reranker.max_tokens"),
        ("search.top_k=4", "search.top_k"),
        ("search.rescore=false", "search.rescore"),
        ("search.where=[kind=image]", "search.where"),
        ("search.query_instruction=Find it.", "search.query_instruction"),
    ],
)
def test_what_was_scored_otherwise_is_refused(scored, setting, field):
    run, settings, _ = scored
    with pytest.raises(RecipeMismatchError, match=field.replace(".", r"\.")):
        run_rerank(run.config(*settings, setting))


def test_a_query_that_was_changed_under_its_id_is_refused(scored, tmp_path):
    run, settings, _ = scored
    queries = write_lines(tmp_path / "q.jsonl", [TEXTS[1] | {"text": "another", "lang": "en"}])
    with pytest.raises(ConfigError, match="asks something else"):
        run_rerank(run.config(*settings, f"input.queries={queries}"))


def test_wrong_input_is_told_before_ray(make_run, vectors, tmp_path):
    run = make_run(TEXTS[:1])
    out = f"output.root={tmp_path / 'out'}"
    with pytest.raises(ModelError, match=r"search\.model"):
        run_rerank(run.config(out, f"search.model={RERANKER['path']}"))
    with pytest.raises(ConfigError, match="colour"):
        run_rerank(run.config(out, "search.where=[colour=red]"))
    with pytest.raises(ConfigError, match="holds vectors"):
        run_rerank(run.config(f"output.root={vectors}", "output.collection=media"))
    with pytest.raises(ModelError):
        run_rerank(run.config(out, f"model.path={tmp_path}"))
    with pytest.raises(ManifestError):
        run_rerank(run.config(out, "output.partition_by=[nothing]"))
    label = {"query_id": "q0", "row_id": "r:0", "relevance": 1}
    labels = f"input.relevance={write_lines(tmp_path / 'labels.jsonl', [label])}"
    with pytest.raises(ConfigError, match="no label of 2 or more"):
        run_rerank(run.config(out, labels, "input.relevant_from=2.0"))
    with pytest.raises(StorageError, match="no collection 'other'"):
        run_rerank(run.config(out, "search.collection=other"))
    assert not list((tmp_path / "out").glob("*.lance"))


def test_nothing_found_is_a_failure_and_not_searched_for_ever(make_run):
    run = make_run(TEXTS[:2])
    none = ("search.where=[kind=image, text=no such text]", "limits.max_failure_rate=1")
    report = run_rerank(run.config(*none))
    assert report.failures_by_reason == {"NoCandidatesError": 2}
    again = run_rerank(run.config(*none))
    assert (again.queries_failed_before, again.queries_failed) == (2, 0)
    check_none = verify(str(run.store.root), run.storage)
    assert check_none.problems == ()


def test_byte_ranges_are_read_again_as_ranges(corpus, tmp_path):
    """Two pictures in one file: each row is scored by its own bytes."""
    pictures = [
        corpus.media_dir.resolve() / file.path
        for file in corpus.files
        if file.path.endswith(".png") and file.path not in corpus.broken
    ][:2]
    blobs = [path.read_bytes() for path in pictures]
    shard = tmp_path / "shard.bin"
    shard.write_bytes(b"".join(blobs))
    manifest = str(tmp_path / "manifest.parquet")
    starts = [0, len(blobs[0])]
    pq.write_table(
        pa.table(
            {
                "uri": [str(shard)] * 2,
                "kind": ["image"] * 2,
                "byte_offset": starts,
                "byte_length": [len(blob) for blob in blobs],
            }
        ),
        manifest,
    )
    root = str(tmp_path / "vectors")
    run_embed(Job(manifest=manifest, root=root).config())
    queries = write_lines(tmp_path / "queries.jsonl", TEXTS[:1])
    run = RerankRun(queries=queries, root=root)
    switch(run.store, "current", "media")
    report = run_rerank(run.config("search.collection=current"))
    assert report.media_fetched == 2
    rows = run.rows().sort_by("byte_offset")
    with Reranker(RERANKER["path"], image=RERANKER["image"]) as reranker:
        expected = reranker.score(TEXTS[0]["text"], pictures)
    np.testing.assert_allclose(rows["rerank_score"], expected, atol=1e-5)
    # In the root that is searched, vectors and scores are told apart.
    checked = verify(root, Storage(), manifest=manifest)
    assert checked.problems == ()
    assert (checked.num_done, checked.scores[0].num_scored) == (2, 2)
    assert run_embed(Job(manifest=manifest, root=root).config()).skipped_done == 2
    assert str(embedding_dir()) in str(run.store.open("media").schema.metadata)
