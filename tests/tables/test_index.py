from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from qvl_batch.errors import ConfigError
from qvl_batch.tables import catalog, index
from qvl_batch.tables.check import check_table
from qvl_batch.tables.index import Coverage, IndexRules, decide
from qvl_batch.tables.recall import probes_up_to, recall_at_k, sample_queries
from qvl_batch.tables.search import SHORTLIST, search
from qvl_batch.tables.store import TableStore
from tests.tables import clusters

NAME = "media__dt-1"
RULES = IndexRules(min_rows=1000, num_queries=200)
NO_FAILURES = pa.array([], pa.string())


def run(store, rules=RULES, table=NAME):
    done = index.refresh_index(store, table, rules)
    index.publish(store, done)
    return done


def published(store, table=NAME):
    return catalog.row_of(store, table, ["index"])["index"]


def test_an_index_is_built_measured_and_published(any_store) -> None:
    clusters.make(any_store, NAME, [3000, 3000])
    assert index.plan_table(any_store, NAME, RULES).action == index.BUILD
    done = run(any_store)
    assert (done.action, done.published, done.num_indexed) == (index.BUILD, True, 6000)
    state = published(any_store)
    assert state == done.state
    assert state["column"] == "vector_bits"
    assert state["num_rows"] == 6000
    assert state["num_queries"] == 200
    assert 0.99 <= state["recall"] <= 1
    assert state["version"] == any_store.open(NAME).version
    assert done.size_bytes >= 6000 * clusters.DIM // 8
    # What was measured is what search finds with what is published.
    dataset = any_store.open(NAME)
    queries, _ = sample_queries(dataset, 100)
    flat = search({NAME: dataset}, queries, 10)
    fast = search({NAME: dataset}, queries, 10, nprobes={NAME: state["nprobes"]})
    same = len(
        set(zip(flat["query"].to_pylist(), flat["row_id"].to_pylist(), strict=True))
        & set(zip(fast["query"].to_pylist(), fast["row_id"].to_pylist(), strict=True))
    )
    assert same >= 0.97 * flat.num_rows
    assert check_table(dataset, None, NO_FAILURES) == []


@pytest.mark.parametrize("encodings", [("binary", "int8"), ("binary", "float16"), ("binary",)])
def test_all_probes_are_the_exhaustive_search(store, encodings) -> None:
    clusters.make(store, NAME, [2000], encodings=encodings)
    done = run(store, dataclasses.replace(RULES, recall=1.0, max_nprobes=2))
    assert done.published
    assert index.num_lists(2000) == 2
    dataset = store.open(NAME)
    queries, _ = sample_queries(dataset, 50)
    flat = search({NAME: dataset}, queries, 10)
    fast = search({NAME: dataset}, queries, 10, nprobes={NAME: 2})
    np.testing.assert_allclose(fast["score"].to_numpy(), flat["score"].to_numpy(), atol=1e-6)


def test_floats_get_a_rabitq_index(store) -> None:
    clusters.make(store, NAME, [6000], encodings=("float16",))
    done = run(store)
    assert done.published
    assert published(store)["column"] == "vector"
    assert catalog.index_state(store.open(NAME)) == "vector:IVF_RQ"


def test_a_second_run_does_nothing(store) -> None:
    clusters.make(store, NAME, [4000])
    first = run(store)
    version, catalogued = store.open(NAME).version, store.open("_qvl_catalog").version
    again = index.refresh_index(store, NAME, RULES)
    assert again.action == index.NOTHING
    assert (again.published, again.recall) == (True, first.recall)
    assert store.open(NAME).version == version
    assert store.open("_qvl_catalog").version == catalogued


def test_new_rows_are_added_as_a_delta_and_many_rebuild(store) -> None:
    clusters.make(store, NAME, [4000])
    run(store)
    clusters.add(store, NAME, 500, seed=50)
    catalog.refresh(store, [NAME], {}, run_id="run-0")
    row = catalog.row_of(store, NAME, ["index", "num_rows"])
    assert catalog.unindexed_rows(row) == 500
    done = run(store)
    assert (done.action, done.num_indexed) == (index.EXTEND, 4500)
    assert index.coverage(store.open(NAME), "vector_bits_idx").segments == (4000, 500)
    assert catalog.unindexed_rows(catalog.row_of(store, NAME, ["index", "num_rows"])) == 0
    clusters.add(store, NAME, 2000, seed=51)
    done = run(store)
    assert done.action == index.BUILD
    assert index.coverage(store.open(NAME), "vector_bits_idx").segments == (6500,)


def test_an_index_below_the_target_is_not_published(any_store) -> None:
    clusters.make(any_store, NAME, [20_000], dim=32)
    rules = dataclasses.replace(RULES, recall=1.0, max_nprobes=1)
    done = run(any_store, rules)
    assert done.refused
    assert not done.published
    assert done.ladder[-1].nprobes == 1
    assert done.ladder[-1].recall < 1
    assert published(any_store) is None
    assert any_store.open(NAME).describe_indices() == []
    # With more lists to read it can be published.
    assert run(any_store, dataclasses.replace(rules, recall=0.9, max_nprobes=None)).published


def test_a_published_index_that_falls_below_is_taken_back(store) -> None:
    clusters.make(store, NAME, [20_000], dim=32)
    assert run(store, dataclasses.replace(RULES, recall=0.5, max_nprobes=1)).published
    done = run(store, dataclasses.replace(RULES, recall=1.0, max_nprobes=1))
    assert done.refused
    assert published(store) is None


def test_an_unpublished_index_is_measured_not_built_again(store) -> None:
    # As a kill between building and publishing leaves it.
    clusters.make(store, NAME, [4000])
    index.refresh_index(store, NAME, RULES)
    version = store.open(NAME).version
    done = run(store)
    assert done.action == index.MEASURE
    assert done.published
    assert store.open(NAME).version == version


def test_rows_that_come_while_an_index_is_built(store) -> None:
    clusters.make(store, NAME, [30_000])
    writer = TableStore(store.root)

    def write() -> None:
        for seed in range(40, 44):
            clusters.add(writer, NAME, 200, seed=seed)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        index.publish(store, index.refresh_index(store, NAME, RULES))
        writing.result()
    index.publish(store, index.refresh_index(store, NAME, RULES))
    assert index.refresh_index(store, NAME, RULES).num_indexed == 30_800
    assert check_table(store.open(NAME), None, NO_FAILURES) == []


def test_the_catalog_keeps_an_index_only_while_it_exists(store) -> None:
    clusters.make(store, NAME, [4000])
    state = run(store).state
    catalog.refresh(store, [NAME], {}, run_id="r2")
    assert published(store) == state
    store.open(NAME).drop_index("vector_bits_idx")
    catalog.refresh(store, [NAME], {}, run_id="r3")
    assert published(store) is None
    assert catalog.unindexed_rows(catalog.row_of(store, NAME, ["index", "num_rows"])) is None


def test_a_driver_that_saw_no_index_does_not_unpublish_it(store) -> None:
    # Its catalog row is made before the index is published, and merged after.
    clusters.make(store, NAME, [4000])
    catalog.refresh(store, [NAME], {}, run_id="run-0")
    stale = store.open("_qvl_catalog")
    state = run(store).state
    rows = stale.to_table(filter=f"table = '{NAME}'")
    merge = stale.merge_insert("table").when_matched_update_all().conflict_retries(0)
    with pytest.raises(OSError, match="concurrent writers"):
        merge.execute(rows)
    assert published(store) == state


def test_small_tables_and_int8_alone_get_none(store) -> None:
    clusters.make(store, NAME, [500])
    assert run(store).action == index.TOO_SMALL
    clusters.make(store, "media__dt-2", [500], encodings=("int8",))
    assert run(store, table="media__dt-2").action == index.NO_INDEX
    assert published(store) is None


def test_decide() -> None:
    state = {
        "column": "vector_bits",
        "num_rows": 1000,
        "recall": 0.995,
        "nprobes": 8,
        "shortlist": SHORTLIST,
    }
    for segments, published, wanted in (
        ((), None, index.BUILD),
        ((1000,), state, index.NOTHING),
        ((1000,), None, index.MEASURE),
        ((1000,), state | {"recall": 0.98}, index.MEASURE),
        ((900, 100), state | {"num_rows": 900}, index.MEASURE),
        ((1000,), state | {"shortlist": SHORTLIST // 2}, index.MEASURE),
        ((900,), state, index.EXTEND),
        ((710,), state, index.EXTEND),
        ((600, 300), state, index.BUILD),
        ((930, *[10] * 6), state, index.EXTEND),
        ((920, *[10] * 7), state, index.BUILD),
    ):
        covered = Coverage(num_rows=1000, segments=segments)
        assert decide(covered, published, IndexRules(min_rows=100)) == wanted, segments
    small = Coverage(num_rows=1000)
    assert decide(small, None, IndexRules(min_rows=1001)) == index.TOO_SMALL
    few = IndexRules(min_rows=100, max_nprobes=4)
    assert decide(Coverage(num_rows=1000, segments=(1000,)), state, few) == index.MEASURE


def test_rules() -> None:
    assert [IndexRules().allowed_nprobes(lists) for lists in (2, 20, 100)] == [2, 16, 25]
    assert IndexRules(max_nprobes=3).allowed_nprobes(100) == 3
    assert [probes_up_to(n) for n in (1, 6, 8)] == [[1], [1, 2, 4, 6], [1, 2, 4, 8]]
    assert [index.num_lists(n) for n in (1000, 20_000, 1_000_000, 16_000_000)] == [2, 9, 488, 4000]
    for wrong in ({"recall": 0}, {"recall": 1.1}, {"max_nprobes": 0}, {"min_rows": 1}):
        with pytest.raises(ConfigError):
            IndexRules(**wrong)


def test_recall_leaves_the_own_row_out_and_takes_ties() -> None:
    def found(*rows):
        columns = zip(*[(0, row, score) for row, score in rows], strict=True)
        return pa.table(dict(zip(("query", "row_id", "score"), columns, strict=True)))

    exact = found(("own", 0.9), ("a", 0.8), ("b", 0.7), ("c", 0.6))
    assert recall_at_k(exact, exact, ["own"], 2) == 1
    assert recall_at_k(exact, found(("own", 0.9), ("a", 0.8), ("c", 0.6)), ["own"], 2) == 0.5
    assert recall_at_k(exact, found(("a", 0.8), ("d", 0.7)), ["own"], 2) == 1
    assert recall_at_k(exact, found(("own", 0.9)), ["own"], 2) == 0


def test_queries_are_near_their_rows(store) -> None:
    clusters.make(store, NAME, [1000])
    queries, own = sample_queries(store.open(NAME), 200)
    assert (queries.shape, queries.dtype) == ((200, clusters.DIM), np.float32)
    values = clusters.vectors(1000, seed=0)
    cosines = [q @ values[int(row[2:-2])] for q, row in zip(queries, own, strict=True)]
    assert 0.75 < np.mean(cosines) < 0.85
    assert len(set(own)) == 200
