from __future__ import annotations

import shutil
import threading
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from qvl_batch.errors import ConfigError, StorageError
from qvl_batch.schema import CATALOG, scores
from qvl_batch.tables import catalog, layout
from qvl_batch.tables.open import OpenTables
from qvl_batch.tables.search import search
from qvl_batch.tables.store import TableStore
from tests.tables import rows
from tests.tables.test_filters import HOSTILE

DAYS = ("2026-01-01", "2026-01-02", "2026-01-03")


def add_table(store, collection: str, partition: layout.Partition, ids=("u0", "u1")) -> str:
    name = layout.table_name(collection, partition)
    schema = rows.schema(collection, partition)
    store.check_writable()
    store.create(name, schema)
    rows.add(store, name, rows.table_rows(list(ids), schema), name)
    return name


@pytest.fixture
def days(any_store) -> TableStore:
    for day in DAYS:
        for split in ("test", "train"):
            add_table(any_store, "media", (("dt", day), ("split", split)))
    add_table(any_store, "other", ())
    return any_store


def names(store, partitions=None, collection="media") -> list[str]:
    return list(OpenTables(store).of(collection, partitions))


ALL = [f"media__dt-{day}__split-{split}" for day in DAYS for split in ("test", "train")]


@pytest.mark.parametrize("catalogued", ["all", "some", "none"])
def test_partitions_are_found_and_pruned_with_or_without_the_catalog(days, catalogued) -> None:
    if catalogued != "none":
        known = days.names() if catalogued == "all" else ALL[:3]
        catalog.refresh(days, known, {}, run_id="r")
    assert names(days) == ALL
    assert names(days, {"dt": DAYS[1]}) == ALL[2:4]
    assert names(days, {"dt": date(2026, 1, 2), "split": "test"}) == ALL[2:3]
    assert names(days, {"dt": [DAYS[0], DAYS[2]]}) == ALL[:2] + ALL[4:]
    assert names(days, pc.field("dt") > DAYS[0]) == ALL[2:]
    assert names(days, ["dt>=2026-01-02", "split=train"]) == [ALL[3], ALL[5]]
    assert names(days, "split=none,null") == []
    assert names(days, collection="other") == ["other"]
    assert names(days, collection="media__dt-2026-01-01") == []
    assert names(days, collection="med") == []


def test_what_is_refused(days) -> None:
    for wrong in ({"day": "x"}, "day=x", pc.field("day") == "x", pc.field("dt") == 5, {"dt": 1.5}):
        with pytest.raises(ConfigError, match="dt"):
            names(days, wrong)


def test_only_matching_tables_are_opened(days) -> None:
    catalog.refresh(days, days.names(), {}, run_id="r")
    # A table of another day that can not be read is no reason to fail.
    broken = days.uri(ALL[0])
    if broken.startswith("s3://"):
        pytest.skip("one way to break a file suffices")
    for manifest in Path(broken, "_versions").glob("*.manifest"):
        manifest.write_bytes(b"not a manifest")
    assert names(days, {"dt": DAYS[1]}) == ALL[2:4]
    with pytest.raises(StorageError):
        names(days, {"dt": DAYS[0]})


def test_readers_see_the_latest_version_and_new_and_removed_tables(store) -> None:
    name = add_table(store, "media", (("dt", "1"),))
    catalog.refresh(store, [name], {}, run_id="r")
    tables = OpenTables(store)
    assert tables.of("media")[name].count_rows() == 2
    rows.add(store, name, rows.table_rows(["u2"], rows.schema("media", (("dt", "1"),))), "more")
    late = add_table(store, "media", (("dt", "2"),))
    assert {n: ds.count_rows() for n, ds in tables.of("media").items()} == {name: 3, late: 2}
    shutil.rmtree(store.uri(name))
    assert list(tables.of("media")) == [late]


def test_scores_are_no_collection(days) -> None:
    columns = [pa.field("dt", pa.string())]
    for collection, kind in (("judged", "scores"), ("asked", "candidates")):
        name = layout.table_name(collection, (("dt", "x"),))
        days.create(name, scores(columns, {layout.KIND_METADATA: kind}))
        assert names(days, collection=collection) == []
    catalog.refresh(days, ALL, {}, run_id="r")
    assert OpenTables(days).collections() == ["media", "other"]


def test_nothing_there(any_store) -> None:
    any_store.check_writable()
    assert OpenTables(any_store).collections() == []
    assert OpenTables(any_store).of("media") == {}
    assert OpenTables(any_store).nprobes(["media"]) == {}


def test_probes_of_published_indexes(store) -> None:
    first, second = (add_table(store, "media", (("dt", day),)) for day in DAYS[:2])
    catalog.refresh(store, [first, second], {}, run_id="r")
    tables = OpenTables(store)
    assert tables.nprobes([first, second]) == {}
    row = catalog.read(store).to_pylist()[0]
    row["index"] = {"column": "vector_bits", "nprobes": 7}
    dataset = store.open(layout.CATALOG_TABLE)
    changed = pa.Table.from_pylist([row], schema=CATALOG)
    dataset.merge_insert("table").when_matched_update_all().execute(changed)
    tables.of("media")
    assert tables.nprobes([first, second, "absent"]) == {first: 7}


def test_hostile_partition_values_select_their_own_table(store) -> None:
    values = [value for value in HOSTILE if len(value) < 1000]
    made = {value: add_table(store, "media", (("p", value),), ids=["u"]) for value in values}
    assert len(set(made.values())) == len(values)
    catalog.refresh(store, list(made.values())[::2], {}, run_id="r")
    tables = OpenTables(store)
    for value, name in made.items():
        assert list(tables.of("media", {"p": value})) == [name]
    for hostile in ("../media", "media__p-x/..", "_qvl_catalog", "*", "", "."):
        assert tables.of(hostile) == {}
    assert tables.collections() == ["media"]


def test_threads_share_one_reader(days) -> None:
    tables, found = OpenTables(days), []

    def read() -> None:
        opened = tables.of("media")
        found.append(search(opened, rows.vector("q"), 3)["row_id"].to_pylist())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(one == found[0] for one in found)
