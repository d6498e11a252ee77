"""Hits looked at again by the shipped reranker, where they lie."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest

from qvl_batch import Reranker, connect
from qvl_batch.api.query import row_item
from qvl_batch.api.rescore import RERANK_ERRORS
from qvl_batch.demo.checkpoint import DEMO_RECIPE, reranker_dir
from qvl_batch.errors import ChangedMediaError, InputError, MissingMediaError
from qvl_batch.media.source import local_etag
from tests.embedded_root import embed_into

BUDGETS = {name: DEMO_RECIPE[name] for name in ("image", "video", "document")}


@pytest.fixture(scope="module")
def media(embedded):
    with connect(embedded.root) as root:
        yield root.collection()


@pytest.fixture
def gone(embedded, media):
    """A picture that was embedded and is not there for this test."""
    uri = media.search("two red circles", 1)["uri"][0].as_py()
    os.rename(uri, f"{uri}.away")
    yield uri
    os.rename(f"{uri}.away", uri)


def test_hits_are_sorted_by_what_the_reranker_says(media):
    before = media.search("two red circles", 30)
    hits = media.search("two red circles", 30, rerank=reranker_dir(), rerank_top=20)
    assert hits.column_names[:5] == ["rank", "score", "rerank_score", "rank_before", "rerank_error"]
    assert "etag" not in hits.column_names
    assert hits["rank"].to_pylist() == list(range(1, 31))
    first = dict(zip(before["row_id"].to_pylist(), before.to_pylist(), strict=True))
    scores = hits["rerank_score"].to_pylist()
    assert scores[:20] == sorted(scores[:20], reverse=True)
    assert all(0 <= score <= 1 for score in scores[:20])
    # Those beyond rerank_top stand behind, as they stood.
    assert scores[20:] == [None] * 10
    assert hits["rank_before"].to_pylist()[20:] == list(range(21, 31))
    for hit in hits.to_pylist():
        assert first[hit["row_id"]]["rank"] == hit["rank_before"]
        assert first[hit["row_id"]]["score"] == hit["score"]
    assert hits["rerank_error"].null_count == 30
    assert hits.schema.metadata[RERANK_ERRORS] == b"0"


def test_scores_are_those_of_the_same_pairs(embedded, media):
    """Pictures, pages, clips and notes, each as the reranker sees them by themselves."""
    hits = media.search("a page that says tiger", 120, rerank=reranker_dir(), rerank_top=120)
    chosen = {kind: None for kind in ("image", "video", "document", "text")}
    for hit in hits.to_pylist():
        chosen[hit["kind"]] = chosen[hit["kind"]] or hit
    items = {
        "image": lambda hit: {"image": hit["uri"]},
        "video": lambda hit: {"video": hit["uri"]},
        "document": lambda hit: {"document": hit["uri"], "page": hit["page"]},
        "text": lambda hit: hit["text"],
    }
    with Reranker(reranker_dir(), **BUDGETS) as reranker:
        for kind, hit in chosen.items():
            (alone,) = reranker.score("a page that says tiger", [items[kind](hit)])
            assert hit["rerank_score"] == pytest.approx(alone, abs=1e-3), kind


def test_a_row_of_a_byte_range_is_read_from_there(embedded, media, tmp_path):
    """Pictures in one file, as a manifest of archive members lists them."""
    files = [file for file in embedded.corpus.files if file.kind == "image" and file.scenes][:3]
    contents = [embedded.path(file.path).read_bytes() for file in files]
    packed = tmp_path / "packed.bin"
    packed.write_bytes(b"".join(contents))
    etag = local_etag(packed.stat())
    row = {"uri": str(packed), "kind": "image", "page": None, "text": None, "segment": 0}
    starts = [0, len(contents[0]), len(contents[0]) + len(contents[1])]
    members = [
        row_item(
            row | {"etag": etag, "byte_offset": start, "byte_length": len(content)}, media.recipe
        )
        for start, content in zip(starts, contents, strict=True)
    ]
    changed = row_item(
        row | {"etag": "other", "byte_offset": 0, "byte_length": len(contents[0])}, media.recipe
    )
    caption = files[1].captions[0]
    with Reranker(reranker_dir(), **BUDGETS) as reranker:
        scores, errors = reranker.score(caption, [*members, changed], errors="return")
        alone = reranker.score(caption, [embedded.path(file.path) for file in files])
    np.testing.assert_allclose(scores[:3], alone, atol=1e-5)
    assert isinstance(errors[3], ChangedMediaError)


def test_a_reranker_of_ones_own(media):
    by_path = media.search("two red circles", 5, rerank=str(reranker_dir()), rerank_top=10)
    with Reranker(reranker_dir(), **BUDGETS) as reranker:
        assert media.search("two red circles", 5, rerank=reranker, rerank_top=10).equals(by_path)


def test_a_medium_that_is_gone_stands_behind_the_scored(media, gone):
    hits = media.search("two red circles", 10, rerank=reranker_dir(), rerank_top=10).to_pylist()
    assert [hit["uri"] for hit in hits][-1] == gone
    assert hits[-1]["rank_before"] == 1
    assert hits[-1]["rerank_score"] is None
    assert hits[-1]["rerank_error"] == "MissingMediaError: no such file"
    assert all(hit["rerank_error"] is None for hit in hits[:-1])
    few = media.search("two red circles", 3, rerank=reranker_dir(), rerank_top=10)
    assert gone not in few["uri"].to_pylist()
    assert few.schema.metadata[RERANK_ERRORS] == b"1"


def test_a_medium_that_changed_is_not_scored(media):
    uri = media.search("two red circles", 1)["uri"][0].as_py()
    status = os.stat(uri)
    os.utime(uri, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    try:
        hits = media.search("two red circles", 5, rerank=reranker_dir(), rerank_top=5).to_pylist()
    finally:
        os.utime(uri, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hits[-1]["uri"] == uri
    assert hits[-1]["rerank_error"].startswith("ChangedMediaError: etag is")


def test_a_row_and_a_picture_may_be_reranked_a_vector_may_not(media):
    asked = media.search("two red circles", 1).to_pylist()[0]
    hits = media.like(asked["row_id"], 3, rerank=reranker_dir(), rerank_top=5)
    assert asked["row_id"] not in hits["row_id"].to_pylist()
    assert hits["rerank_score"].null_count == 0
    by_picture = media.search(
        {"image": asked["uri"], "instruction": "anything"}, 3, rerank=reranker_dir(), rerank_top=5
    )
    assert by_picture["rerank_score"].null_count == 0
    with pytest.raises(InputError, match="A vector can not be reranked"):
        media.search(np.ones(128), rerank=reranker_dir())


def test_a_query_row_whose_medium_is_gone(media, gone):
    row_id = media.search("two red circles", 1)["row_id"][0].as_py()
    assert media.like(row_id, 3).num_rows == 3
    with pytest.raises(MissingMediaError, match="query"):
        media.like(row_id, 3, rerank=reranker_dir(), rerank_top=5)


def test_a_segment_of_a_clip_is_looked_at_alone(embedded, tmp_path):
    """Clips of 4 s cut in two: both halves are scored, each by its own frames."""
    made = replace(embedded, root=str(tmp_path / "vectors"))
    embed_into(made, recipe={"segmentation": {"video_s": 2.0}}, input={"limit": 60})
    with connect(made.root) as root:
        media = root.collection()
        hits = media.search(
            "an orange ring turning cyan",
            40,
            where={"kind": "video"},
            columns=["segment"],
            rerank=reranker_dir(),
            rerank_top=40,
        ).to_pylist()
    assert {hit["segment"] for hit in hits} == {0, 1}
    assert all(hit["rerank_error"] is None for hit in hits)
    by_clip: dict[str, set[float]] = {}
    for hit in hits:
        by_clip.setdefault(hit["uri"], set()).add(hit["rerank_score"])
    assert all(len(scores) == 2 for scores in by_clip.values())
