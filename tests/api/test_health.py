"""What is wrong with a root is named, with what to do about it."""

from __future__ import annotations

import shutil

import lance
import pyarrow as pa
import pytest

from qvl_batch.api.health import check_health
from qvl_batch.schema import CATALOG
from qvl_batch.tables import aliases, catalog, commit
from qvl_batch.tables.store import TableStore
from tests.tables import rows


@pytest.fixture
def store(tmp_path) -> TableStore:
    store = TableStore(str(tmp_path / "root"))
    store.check_writable()
    return store


def make(store: TableStore, collection: str, day: str, ids: list[str], **options: object) -> str:
    partition = (("dt", day),)
    name = f"{collection}__dt-{day}"
    schema = rows.schema(collection, partition, **options)
    store.create(name, schema)
    rows.add(store, name, rows.table_rows(ids, schema, **options), f"{name}:{ids}")
    return name


def kinds(store: TableStore) -> dict[str, str]:
    return {problem.place: problem.kind for problem in check_health(store).problems}


def test_all_is_well(store):
    names = [make(store, "media", day, [f"{day}-{i}" for i in range(3)]) for day in ("a1", "b2")]
    commit.append_failures(store, rows.failures(["f"]), "f", "r")
    catalog.refresh(store, names, {}, run_id="r")
    health = check_health(store)
    assert health.ok
    (counts,) = health.counts.to_pylist()
    assert counts == {
        "collection": "media",
        "num_tables": 2,
        "num_rows": 6,
        "num_units": 6,
        "num_failures": 0,
        "num_unindexed_rows": None,
    }
    assert "media: 6 rows of 6 units in 2 tables, 0 failures" in str(health)


def test_a_table_that_the_catalog_does_not_know(store):
    name = make(store, "media", "a1", ["x", "y"])
    assert kinds(store) == {name: "uncatalogued"}
    (counts,) = check_health(store).counts.to_pylist()
    assert (counts["num_rows"], counts["num_units"]) == (2, 2)


def test_a_table_that_went_on(store):
    name = make(store, "media", "a1", ["x"])
    catalog.refresh(store, [name], {}, run_id="r")
    make(store, "media", "a1", ["y"])
    (problem,) = check_health(store).problems
    assert problem.kind == "catalog"
    assert "describes version 2, the table has 3" in str(problem)
    # Counted anew, since the catalog is behind.
    assert check_health(store).counts["num_units"].to_pylist() == [2]


def test_a_table_that_is_gone(store):
    name = make(store, "media", "a1", ["x"])
    catalog.refresh(store, [name], {}, run_id="r")
    shutil.rmtree(f"{store.root}/{name}.lance")
    assert kinds(store) == {name: "gone"}


def test_recipes_that_are_mixed(store):
    names = [
        make(store, "media", "a1", ["x"]),
        make(store, "media", "b2", ["y"], dim=8),
        make(store, "other", "b2", ["y"], dim=8),
    ]
    catalog.refresh(store, names, {}, run_id="r")
    assert kinds(store) == {"media": "recipe"}


def test_an_alias_that_leads_nowhere_or_two_ways(store):
    for collection in ("media", "next"):
        catalog.refresh(store, [make(store, collection, "a1", ["x"])], {}, run_id="r")
    aliases.switch(store, "live", "next")
    assert check_health(store).ok
    shutil.rmtree(f"{store.root}/next__dt-a1.lance")
    catalog.refresh(store, [make(store, "live", "a1", ["x"])], {}, run_id="r")
    found = check_health(store).problems
    assert [(p.kind, p.place) for p in found] == [
        ("gone", "next__dt-a1"),
        ("alias", "live"),
        ("alias", "live"),
    ]


def test_rows_that_the_published_index_does_not_cover(store):
    name = make(store, "media", "a1", [f"x{i}" for i in range(300)])
    store.open(name).create_index(
        "vector_bits", "IVF_FLAT", name="bits", num_partitions=2, metric="hamming"
    )
    # Published by name, as an index job does once the recall suffices.
    state = dict.fromkeys(CATALOG.field("index").type.names) | {"name": "bits", "num_rows": 300}
    catalog.refresh(store, [name], {}, run_id="r", indexes={name: state})
    assert check_health(store).ok
    assert check_health(store).counts["num_unindexed_rows"].to_pylist() == [0]
    make(store, "media", "a1", ["y", "z"])
    catalog.refresh(store, [name], {}, run_id="r")
    health = check_health(store)
    assert [problem.kind for problem in health.problems] == ["unindexed"]
    assert "2 of 302 rows" in str(health)
    assert health.counts["num_unindexed_rows"].to_pylist() == [2]


def test_somebody_elses_table_is_left_alone(store):
    lance.write_dataset(pa.table({"x": [1]}), f"{store.root}/theirs.lance")
    health = check_health(store)
    assert health.ok
    assert health.counts.num_rows == 0
