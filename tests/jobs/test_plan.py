import datetime as dt
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qvl_batch.errors import ManifestError
from qvl_batch.jobs.identify import identify
from qvl_batch.jobs.manifest import check_manifest, read_manifest
from qvl_batch.jobs.plan import cut_blocks, split_failed, units_per_block
from qvl_batch.recipe import DocumentBudget, ImageBudget, Recipe, VideoBudget
from qvl_batch.storage import Storage
from qvl_batch.units import media_id, unit_id


def manifest_of(rows, partition_by=(), **columns):
    table = pa.Table.from_pylist(rows)
    for name, values in columns.items():
        table = table.append_column(name, values)
    return check_manifest("m.parquet", table, list(partition_by))


def test_ids_follow_place_caption_and_etag():
    units = identify(
        manifest_of(
            [
                {"uri": "s3://b/a.png", "kind": "image", "etag": "1", "text": None},
                {"uri": "s3://b/a.png", "kind": "image", "etag": "2", "text": None},
                {"uri": "s3://b/a.png", "kind": "image", "etag": "1", "text": "a caption"},
                {"uri": None, "kind": None, "etag": None, "text": "only text"},
            ]
        ),
        "media",
    )
    units = units.take(np.arange(len(units)))
    media = units["media_id"].to_pylist()
    assert media[0] == media[1] != media[2]
    assert units["unit_id"].to_pylist()[0] == unit_id(media_id("s3://b/a.png"), "1")
    assert len(set(units["unit_id"].to_pylist())) == 4
    assert units["kind"].to_pylist()[3] == "text"
    assert media[3] == media_id(None, text="only text")


def test_equal_rows_collapse_within_a_partition_only():
    row = {"uri": "/a.png", "kind": "image", "etag": "1", "dt": "1"}
    units = identify(manifest_of([row, row, row | {"dt": "2"}], ["dt"]), "media")
    assert len(units) == 2
    assert units.num_duplicates == 1
    assert sorted(units.partitions) == ["media__dt-1", "media__dt-2"]


def test_of_many_rows_the_first_of_equal_ones_stands():
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 400, 1000)
    rows = [{"uri": f"/{n}.png", "kind": "image", "dt": str(n % 3)} for n in numbers.tolist()]
    units = identify(manifest_of(rows, ["dt"]), "media")
    firsts = {n: i for i, n in reversed(list(enumerate(numbers.tolist())))}
    assert units.rows.tolist() == sorted(firsts.values())
    assert units.num_duplicates == 1000 - len(firsts)
    for day in "012":
        positions = units.of_table(f"media__dt-{day}")
        taken = units.take(positions)
        assert set(taken["dt"].to_pylist()) == {day}
        assert set(taken["_table"].to_pylist()) == {f"media__dt-{day}"}
        assert taken["unit_id"].to_pylist() == units.ids_of(f"media__dt-{day}").to_pylist()
    assert len(units.of_table("media__dt-9")) == 0


def test_values_of_several_keys_make_one_table_each():
    rows = [{"uri": f"/{i}", "kind": "image", "a": i % 2, "b": f"x{i % 3}"} for i in range(12)]
    units = identify(manifest_of(rows, ["a", "b"]), "media")
    assert len(units.tables) == len(set(units.tables)) == 6
    for name, partition in units.partitions.items():
        taken = units.take(units.of_table(name))
        found = set(zip(taken["a"].to_pylist(), taken["b"].to_pylist(), strict=True))
        assert found == {(int(dict(partition)["a"]), dict(partition)["b"])}


def test_rows_of_one_unit_that_differ_are_refused_with_the_column():
    row = {"uri": "/a.png", "kind": "image", "etag": "1", "label": "cat"}
    with pytest.raises(ManifestError, match=r"/a\.png.*label.*cat.*dog"):
        identify(manifest_of([row, row | {"label": "dog"}]), "media")


def test_partition_values_of_every_type():
    rows = [{"uri": f"/{i}", "kind": "image", "n": i} for i in range(2)]
    days = pa.array([dt.date(2026, 1, 2), None])
    units = identify(manifest_of(rows, ["day", "n"], day=days), "media")
    assert (("day", "2026-01-02"), ("n", "0")) in units.partitions.values()
    assert (("day", None), ("n", "1")) in units.partitions.values()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"uri": "/a", "kind": "picture"}], ["row 0", "'picture'", "document"]),
        ([{"uri": "/a", "kind": None}], ["row 0", "None"]),
        ([{"uri": None, "kind": "image", "text": "t"}], ["row 0", "no uri"]),
        ([{"uri": "", "kind": "text", "text": None}], ["row 0", "neither uri nor text"]),
        ([{"uri": "/a", "kind": "mixed", "text": None}], ["mixed", "text"]),
        ([{"uri": 3, "kind": "image"}], ["'uri'", "int64", "string"]),
        ([{"uri": "/a", "kind": "video", "fps": 0.0}], ["fps", "above 0"]),
        ([{"uri": "/a", "kind": "image", "vector": 1}], ["'vector'", "reserved"]),
        ([{"uri": "/a", "kind": "image", "_x": 1}], ["'_x'", "reserved"]),
        ([{"path": "/a"}], ["'uri'", "path"]),
    ],
)
def test_a_bad_manifest_names_row_column_and_value(rows, expected):
    with pytest.raises(ManifestError) as caught:
        manifest_of(rows)
    for part in expected:
        assert part in str(caught.value)


def test_an_unknown_partition_column_lists_the_columns():
    with pytest.raises(ManifestError, match=r"'day'.*dt"):
        manifest_of([{"uri": "/a", "kind": "image", "dt": "1"}], ["day"])


def test_the_partition_keys_come_from_the_manifest_unless_given(tmp_path):
    table = pa.table({"uri": ["/a"], "kind": ["image"], "dt": ["1"], "lang": ["en"]})
    table = table.replace_schema_metadata({"qvl.partition_by": json.dumps(["dt"])})
    path = str(tmp_path / "m.parquet")
    pq.write_table(table, path)
    assert read_manifest(path, Storage(), None).partition_by == ("dt",)
    assert read_manifest(path, Storage(), ["lang"]).partition_by == ("lang",)
    assert read_manifest(path, Storage(), []).partition_by == ()


def test_manifests_that_can_not_be_read(tmp_path):
    with pytest.raises(ManifestError, match="no manifest"):
        read_manifest(str(tmp_path / "absent.parquet"), Storage(), None)
    text = tmp_path / "list.csv"
    text.write_text("uri\n/a\n")
    with pytest.raises(ManifestError, match="not a Parquet file"):
        read_manifest(str(text), Storage(), None)
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"uri": pa.array([], pa.string())}), empty)
    with pytest.raises(ManifestError, match="no rows"):
        read_manifest(str(empty), Storage(), None)


def test_blocks_are_cut_by_unit_count_alone():
    kinds = ["image"] * 130 + ["video"] * 5 + ["text"] * 300
    todo = pa.table({"kind": kinds, "_ordinal": np.arange(len(kinds))})
    per_block = {"image": 64, "video": 2, "text": 256}
    blocks = cut_blocks(todo, per_block)
    assert [b.num_rows for b in blocks[:2]] == [64, 64]
    assert pa.concat_tables(blocks).equals(todo)
    for block in blocks:
        assert sum(1 / per_block[kind] for kind in block["kind"].to_pylist()) <= 1.001
    assert cut_blocks(todo.slice(0, 0), per_block) == []


def test_a_block_stays_under_its_bytes_by_the_recipes_budgets():
    official = Recipe(model_digest="d", dim=64)
    small = Recipe(
        model_digest="d",
        dim=64,
        image=ImageBudget(max_px=4096),
        video=VideoBudget(min_px=4096, max_px=4096),
        document=DocumentBudget(max_px=4096),
    )
    mib = 2**20
    assert units_per_block(official, 128 * mib, None)["image"] == 24
    assert units_per_block(official, 128 * mib, None)["document"] == 1
    assert units_per_block(small, 128 * mib, None)["image"] == 64
    assert set(units_per_block(small, 128 * mib, 7).values()) == {7}


def test_failed_units_are_skipped_or_tried_again():
    failed = pa.table(
        {
            "unit_id": ["final", "passing", "tired"],
            "retryable": [False, True, True],
            "attempt": pa.array([1, 1, 3], pa.int32()),
        }
    )
    skip, retry = split_failed(failed, retry_failed=False, max_attempts=3)
    assert skip.to_pylist() == ["final", "tired"]
    assert retry["unit_id"].to_pylist() == ["passing"]
    skip, retry = split_failed(failed, retry_failed=True, max_attempts=3)
    assert skip.to_pylist() == []
    assert retry.num_rows == 3
