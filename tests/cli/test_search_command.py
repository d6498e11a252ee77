"""`qvl-batch search`, `alias` and `compare` as they are typed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qvl_batch.cli import main
from qvl_batch.demo.checkpoint import embedding_dir, reranker_dir
from qvl_batch.demo.queries import DEMO_QUERIES
from tests.embedded_root import EmbeddedRoot, embed_into


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command in this process; return its code and what it printed."""
    # As wide as a person's window: rich asks the environment.
    monkeypatch.setenv("COLUMNS", "140")

    def run(*arguments: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert (ended.value.code or 0) == code, printed.out + printed.err
        return printed.err if code else printed.out

    return run


@pytest.fixture(scope="module")
def pair(embedded, tmp_path_factory) -> EmbeddedRoot:
    """A root with the same units in two collections, the second of 16 bits."""
    made = replace(embedded, root=str(tmp_path_factory.mktemp("pair") / "vectors"))
    part = {"limit": 40}
    embed_into(made, input=part)
    tiny = {"encodings": ["binary"], "dim": 16}
    embed_into(made, input=part, output={"collection": "tiny"}, recipe=tiny)
    return made


def found(run, *arguments):
    return json.loads(run("search", *arguments, "--json"))["hits"]


def test_a_text_gives_a_table(embedded, run):
    printed = run("search", embedded.root, "two red circles", "--top-k", 3)
    lines = [line for line in printed.splitlines() if "pictures/" in line]
    assert "“two red circles”" in printed
    assert len(lines) == 3
    assert lines[0].split()[0] == "1"
    assert "image" in lines[0]


def test_every_way_to_ask(embedded, run):
    query = DEMO_QUERIES[0]
    hits = found(run, embedded.root, query.text, "--top-k", 2)
    assert [hit["rank"] for hit in hits] == [1, 2]
    picture, row_id = hits[0]["uri"], hits[0]["row_id"]
    by_picture = found(run, embedded.root, "--image", picture, "--top-k", 1)
    assert by_picture[0]["row_id"] == row_id
    both = found(run, embedded.root, query.text, "--image", picture, "--top-k", 1)
    assert both[0]["row_id"] == row_id
    like = found(run, embedded.root, "--like", row_id, "--top-k", 3)
    assert row_id not in [hit["row_id"] for hit in like]
    clip = next(file.path for file in embedded.corpus.files if file.kind == "video" and file.scenes)
    by_clip = found(run, embedded.root, "--video", embedded.path(clip), "--top-k", 1)
    assert by_clip[0]["uri"] == str(embedded.path(clip))
    assert by_clip[0]["start_s"] == 0.0


def test_partitions_filters_and_columns(embedded, run):
    hits = found(
        run,
        *(embedded.root, "a blue star", "--partition", "dt>=2026-01-02", "--where", "kind=video"),
        *("--where", "num_frames=8", "--column", "dt", "--top-k", 50),
    )
    assert {hit["dt"] for hit in hits} == {"2026-01-02", "2026-01-03"}
    assert {hit["kind"] for hit in hits} == {"video"}
    assert "no hits" in run("search", embedded.root, "x", "--where", "uri=x' OR '1'='1")


def test_reranked_hits_say_where_they_stood(embedded, run):
    arguments = (embedded.root, "two red circles", "--rerank", reranker_dir(), "--rerank-top", 10)
    printed = run("search", *arguments, "--top-k", 3)
    assert "before" in printed
    assert "rerank" in printed
    hits = found(run, *arguments, "--top-k", 3)
    assert all(0 <= hit["rerank_score"] <= 1 for hit in hits)
    assert {"rank_before", "rerank_error"} <= set(hits[0])
    assert "etag" not in hits[0]


def test_a_hit_that_can_not_be_read_again_is_told(embedded, run):
    uri = found(run, embedded.root, "two red circles", "--top-k", 1)[0]["uri"]
    away = embedded.path(uri).rename(f"{uri}.away")
    try:
        printed = run(
            *("search", embedded.root, "two red circles", "--rerank", reranker_dir()),
            *("--rerank-top", 5, "--top-k", 5),
        )
    finally:
        away.rename(uri)
    assert "1 could not be read again and rescored" in printed
    assert "MissingMediaError: no such file" in printed


def test_a_page_with_the_media(embedded, run, tmp_path):
    page = tmp_path / "hits.html"
    text = "two red circles <script>alert(1)</script>"
    asked = ("search", embedded.root, text, "--where", "kind=image", "--top-k", 3)
    printed = run(*asked, "--html", page)
    assert f"wrote {page}" in printed
    html = page.read_text()
    assert html.count("data:image/") >= 3
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    hits = json.loads(run("search", embedded.root, "x", "--json", "--html", page))["hits"]
    assert "etag" not in hits[0]
    refused = run("search", embedded.root, "x", "--html", tmp_path / "no" / "x.html", code=2)
    assert "x.html" in refused


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), ["Nothing is asked", "--like"]),
        (("x", "--like", "a:0"), ["--like goes alone", "text"]),
        (("--like", "absent:0"), ["absent:0"]),
        (("x", "--collection", "absent"), ["absent", "There are: media"]),
        (("x", "--where", "kind"), ["kind", "operator"]),
        (("x", "--where", "nosuch=1"), ["nosuch", "kind"]),
        (("x", "--partition", "dt=2030-01-01"), ["2030-01-01"]),
        (("x", "--column", "nosuch"), ["nosuch"]),
        (("x", "--model", reranker_dir()), [str(reranker_dir()), str(embedding_dir())]),
        (("x", "--rerank", "/no/such/model"), ["/no/such/model"]),
    ],
)
def test_what_is_wrong_is_one_line(embedded, run, arguments, expected):
    printed = run("search", embedded.root, *arguments, code=2)
    assert len(printed.strip().splitlines()) == 1
    assert printed.startswith("error: ")
    for part in expected:
        assert part in printed


def test_a_picture_that_is_not_there(embedded, run, tmp_path):
    printed = run("search", embedded.root, "--image", tmp_path / "absent.png", code=1)
    assert "absent.png" in printed
    assert "no such file" in printed


def test_a_root_that_is_not_there(run, tmp_path):
    assert "no directory" in run("search", tmp_path / "absent", "x", code=2)
    assert "holds no collection" in run("search", tmp_path, "x", code=2)
    assert "no directory" in run("alias", tmp_path / "absent", code=2)


def test_tables_in_a_bucket(embedded, bucket, run):
    made = replace(embedded, root=bucket.uri("vectors"), storage=bucket.storage)
    embed_into(made, input={"limit": 6})
    reach = ("--endpoint-url", bucket.endpoint_url)
    assert len(found(run, made.root, "two red circles", "--top-k", 3, *reach)) == 3
    assert run("alias", made.root, "live", "media", *reach) == "live: media\n"
    missing = run("search", "s3://no-such-bucket/v", "x", *reach, code=2)
    assert "no-such-bucket" in missing


def test_an_alias_is_listed_and_switched(pair, run):
    assert run("alias", pair.root) == ""
    assert run("alias", pair.root, "live", "media") == "live: media\n"
    assert run("alias", pair.root, "live", "tiny") == "live: tiny (was media)\n"
    assert run("alias", pair.root) == "live: tiny\n"
    answer = json.loads(run("search", pair.root, "x", "--collection", "live", "--json"))
    assert answer["collection"] == "tiny"
    assert "stand for" in run("alias", pair.root, "live", code=2)
    assert "would hide it" in run("alias", pair.root, "media", "tiny", code=2)
    assert "absent" in run("alias", pair.root, "live", "absent", code=2)
    assert run("alias", pair.root) == "live: tiny\n"


@pytest.fixture(scope="module")
def questions(pair, tmp_path_factory):
    """Captions of embedded pictures as queries, and labels that say which picture each is of."""
    folder = tmp_path_factory.mktemp("questions")
    pictures = [
        file for file in pair.corpus.files if file.kind == "image" and "01-01/pictures" in file.path
    ]
    pictures = [file for file in pictures if file.scenes]
    asked = [{"query_id": str(i), "text": f.captions[0]} for i, f in enumerate(pictures)]
    told = [
        {"query_id": str(i), "uri": str(pair.path(f.path)), "relevance": 1}
        for i, f in enumerate(pictures)
    ]
    for name, records in (("queries", asked), ("labels", told)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text)
    return folder / "queries.jsonl", folder / "labels.jsonl"


def test_two_collections_are_compared(pair, questions, run):
    queries, labels = questions
    same = run("compare", pair.root, "media", "media", "--queries", queries, "--json")
    assert json.loads(same)["overlap"] == 1.0
    arguments = ("compare", pair.root, "media", "tiny", "--queries", queries)
    compared = json.loads(run(*arguments, "--relevance", labels, "--json"))
    assert 0.2 < compared["overlap"] < 1
    full, tiny = compared["collections"]
    assert (full["collection"], tiny["collection"]) == ("media", "tiny")
    assert full["recall_at_1"] > 0.8
    # 16 bits of a vector are few: every measure falls.
    for name in ("ndcg_at_10", "mrr_at_10", "recall_at_1"):
        assert tiny[name] < full[name]
    assert (full["bytes_per_row"], tiny["bytes_per_row"]) == (148, 2)
    printed = run(*arguments, "--relevance", labels, "--top-k", 5)
    assert "ndcg at 10" in printed
    assert "the first 5 rows of both have" in printed
    assert "ndcg" not in run(*arguments)


def test_what_can_not_be_compared(pair, questions, run, tmp_path):
    queries, _ = questions
    arguments = ("compare", pair.root, "media", "tiny", "--queries")
    assert "absent.jsonl" in run(*arguments, tmp_path / "absent.jsonl", code=2)
    (tmp_path / "empty.jsonl").write_text("")
    run(*arguments, tmp_path / "empty.jsonl", code=2)
    (tmp_path / "labels.jsonl").write_text('{"query_id": "z", "uri": "x", "relevance": 1}\n')
    assert "labels.jsonl" in run(
        *arguments, queries, "--relevance", tmp_path / "labels.jsonl", code=2
    )
    absent = run("compare", pair.root, "media", "absent", "--queries", queries, code=2)
    assert "absent" in absent
