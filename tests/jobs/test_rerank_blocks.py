"""Pairs grouped by medium, and cut into blocks and waves, by what the plan says alone."""

import pyarrow as pa
import pytest

from qvl_batch import schema
from qvl_batch.jobs.rerank_blocks import cut_media, cut_queries, cut_waves, group_by_medium
from qvl_batch.recipe import DocumentBudget, ImageBudget, RerankRecipe, VideoBudget

MIB = 2**20
RECIPE = RerankRecipe(
    model_digest="",
    instruction="",
    # 16 MiB an image or a page, 32 MiB a frame pair.
    image=ImageBudget(max_px=16 * MIB // 3),
    document=DocumentBudget(max_px=16 * MIB // 3),
    video=VideoBudget(max_frames=2, max_px=16 * MIB // 3),
)
KIND = schema.found_pair([])


def pair(query, uri, *, kind="image", segment=0, rank=1, etag="e", offset=None, unit=None):
    unit = unit or f"{uri}-{etag}"
    values = dict.fromkeys((field.name for field in KIND), None)
    return values | {
        "pair_id": f"{query}/{unit}:{segment}",
        "query_id": query,
        "query_digest": "d",
        "row_id": f"{unit}:{segment}",
        "unit_id": unit,
        "media_id": "m",
        "table": "media",
        "uri": uri,
        "etag": etag,
        "byte_offset": offset,
        "kind": kind,
        "segment": segment,
        "rank_before": rank,
        "_table": "scores",
        "_attempt": 0,
    }


def grouped(*pairs, queries=("q0", "q1", "q2")):
    table = pa.Table.from_pylist(list(pairs), pa.schema(list(KIND)))
    return group_by_medium(table, pa.array(queries, pa.string()))


def test_a_medium_comes_once_with_all_its_pairs():
    media = grouped(
        pair("q1", "b", kind="document", segment=4),
        pair("q0", "a"),
        pair("q1", "a", rank=2),
        pair("q0", "b", kind="document", segment=1, rank=2),
        pair("q2", "c"),
    )
    assert media["uri"].to_pylist() == ["b", "a", "c"]
    assert media["_ordinal"].to_pylist() == [0, 1, 2]
    found = [
        [(p["query_id"], p["segment"]) for p in pairs] for pairs in media["_pairs"].to_pylist()
    ]
    assert found == [[("q0", 1), ("q1", 4)], [("q0", 0), ("q1", 0)], [("q2", 0)]]


def test_other_bytes_are_another_medium():
    media = grouped(
        pair("q0", "a", offset=0),
        pair("q0", "a", offset=5),
        pair("q0", "a", etag="f"),
        pair("q0", "a", kind="mixed"),
        pair("q0", "a", offset=0, rank=2),
    )
    sizes = [len(pairs) for pairs in media["_pairs"].to_pylist()]
    assert sorted(sizes) == [1, 1, 1, 2]


def test_texts_stand_for_themselves():
    media = grouped(
        pair("q0", None, kind="text", unit="t0"),
        pair("q1", None, kind="text", unit="t1"),
        pair("q1", None, kind="text", unit="t0", rank=2),
    )
    assert [len(pairs) for pairs in media["_pairs"].to_pylist()] == [2, 1]


def test_nothing_to_score():
    media = grouped()
    assert media.num_rows == 0
    assert cut_media(media, RECIPE, 4) == []


def test_blocks_are_full_by_number_bytes_or_pairs():
    by_number = grouped(*(pair("q0", f"{i}", kind="text", unit=f"{i}") for i in range(10)))
    assert [block.num_rows for block in cut_media(by_number, RECIPE, 4)] == [4, 4, 2]
    # 128 MiB hold 8 pictures of 16 MiB, and one document of which 8 pages are wanted.
    by_bytes = grouped(*(pair("q0", f"{i:02}") for i in range(10)))
    assert [block.num_rows for block in cut_media(by_bytes, RECIPE, 64)] == [8, 2]
    pages = [pair("q0", "a", kind="document", segment=i) for i in range(8)]
    by_pages = grouped(*pages, pair("q1", "b"))
    assert [block.num_rows for block in cut_media(by_pages, RECIPE, 64)] == [1, 1]
    queries = [f"q{i}" for i in range(5000)]
    many = grouped(
        *(pair(query, "a", kind="text", unit="a") for query in queries),
        pair("q1", "b", kind="text", unit="b"),
        queries=queries,
    )
    blocks = cut_media(many, RECIPE, 64)
    assert [len(block["_pairs"][0]) for block in blocks] == [5000, 1]


@pytest.mark.parametrize(("per_wave", "sizes"), [(100, [12, 12, 1]), (10, [10, 10, 5])])
def test_waves_hold_so_many_queries_or_so_many_bytes(per_wave, sizes):
    # 2 GiB hold 128 pictures of 16 MiB, or 64 clips of two frames; texts weigh nothing.
    recipe = RerankRecipe(model_digest="", instruction="", image=ImageBudget(max_px=170 * MIB // 3))
    rows = [{"query_id": f"{i}", "image": "a.png", "video": None} for i in range(25)]
    table = pa.Table.from_pylist(
        rows, pa.schema([("query_id", "string"), ("image", "string"), ("video", "string")])
    )
    assert [wave.num_rows for wave in cut_waves(table, recipe, per_wave)] == sizes


def test_query_blocks():
    rows = [{"image": None, "video": None}] * 300 + [{"image": "a", "video": None}] * 10
    table = pa.Table.from_pylist(rows, pa.schema([("image", "string"), ("video", "string")]))
    sizes = [block.num_rows for block in cut_queries(table, RECIPE)]
    assert sizes == [256, 50, 4]
