"""Metrics against a plain implementation, one query and one document at a time."""

import math
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qvl_batch.errors import ConfigError
from qvl_batch.ranking import metrics, overlap_at_k


def ranking(rows):
    """Rows are (query_id, row_id, rank)."""
    names = ("query_id", "row_id", "rank")
    types = (pa.string(), pa.string(), pa.int32())
    return pa.table(
        {n: pa.array([r[i] for r in rows], types[i]) for i, n in enumerate(names)},
    )


def labels(rows, key="row_id"):
    """Rows are (query_id, document, relevance)."""
    return pa.table(
        {
            "query_id": pa.array([r[0] for r in rows], pa.string()),
            key: pa.array([r[1] for r in rows], pa.string()),
            "relevance": pa.array([r[2] for r in rows], pa.float64()),
        }
    )


def plain(rows, judged, asked, relevant_from):
    """Return nDCG@10, MRR@10 and recall by k, worked out the slow way."""
    ndcgs, reciprocals, recalls = [], [], []
    for query in asked:
        of_query = {doc: max(0, grade) for q, doc, grade in judged if q == query}
        relevant = {doc for doc, grade in of_query.items() if grade >= relevant_from}
        if not relevant:
            continue
        mine = [(math.inf if r is None else r, doc) for q, doc, r in rows if q == query]
        order = list(dict.fromkeys(doc for _, doc in sorted(mine)))
        gain = sum(
            (2 ** of_query.get(d, 0) - 1) / math.log2(i + 2) for i, d in enumerate(order[:10])
        )
        best = sorted(of_query.values(), reverse=True)[:10]
        ideal = sum((2**grade - 1) / math.log2(i + 2) for i, grade in enumerate(best))
        ndcgs.append(gain / ideal)
        first = [i for i, doc in enumerate(order[:10], 1) if doc in relevant]
        reciprocals.append(1 / first[0] if first else 0)
        recalls.append(lambda k, o=order, r=relevant: len(r & set(o[:k])) / len(r))
    recall = lambda k: float(np.mean([of(k) for of in recalls]))  # noqa: E731
    return float(np.mean(ndcgs)), float(np.mean(reciprocals)), recall, len(ndcgs)


QUERIES, DOCUMENTS = "abcd", "uvwxyz" + "klmnopqr"
RANKS = st.one_of(st.none(), st.integers(1, 20))
ROWS = st.lists(st.tuples(st.sampled_from(QUERIES), st.sampled_from(DOCUMENTS), RANKS), max_size=60)
GRADES = st.dictionaries(
    st.tuples(st.sampled_from(QUERIES + "e"), st.sampled_from(DOCUMENTS)),
    st.integers(-1, 3),
    max_size=40,
)


@given(ROWS, GRADES, st.sampled_from([1, 3]), st.booleans())
def test_equal_to_a_plain_implementation(rows, grades, relevant_from, name_queries):
    judged = [(query, doc, grade) for (query, doc), grade in grades.items()]
    asked = list(QUERIES) if name_queries else sorted({row[0] for row in rows})
    assume(any(query in asked and grade >= relevant_from for query, _, grade in judged))
    ndcg, mrr, recall, num = plain(rows, judged, asked, relevant_from)

    found = metrics(
        ranking(rows),
        labels(judged),
        rank="rank",
        relevant_from=relevant_from,
        query_ids=pa.array(asked) if name_queries else None,
    )

    assert found.num_queries == num
    assert found.num_unjudged == len(asked) - num
    assert found.ndcg_at_10 == pytest.approx(ndcg)
    assert found.mrr_at_10 == pytest.approx(mrr)
    assert {1, 10} <= set(found.recall_at_k)
    for k, value in found.recall_at_k.items():
        assert value == pytest.approx(recall(k)), k
    assert 0 <= found.ndcg_at_10 <= 1 + 1e-9


def test_worked_by_hand():
    # Grades 3, 0, 1 where 3, 1 is the best: (7 + 1 / log2(4)) / (7 + 1 / log2(3)).
    found = metrics(
        ranking([("q", "c", 3), ("q", "a", 1), ("q", "b", 2)]),
        labels([("q", "a", 3), ("q", "c", 1)]),
        rank="rank",
    )
    assert found.ndcg_at_10 == pytest.approx(7.5 / (7 + 1 / math.log2(3)))
    assert (found.mrr_at_10, found.recall_at_1, found.recall_at_10) == (1.0, 0.5, 1.0)
    assert list(found.recall_at_k) == [1, 2, 3, 10]


def test_the_order_of_rows_says_nothing():
    rows = [("q", doc, None if doc > "p" else 1) for doc in DOCUMENTS]
    judged = labels([("q", "x", 1), ("q", "k", 2)])
    there = metrics(ranking(rows), judged, rank="rank")
    back = metrics(ranking(rows[::-1]), judged, rank="rank")
    assert there == back
    assert there.num_unranked == sum(row[2] is None for row in rows)


def test_a_label_of_a_medium_stands_where_its_first_row_stands():
    rows = ranking([("q", f"r{n}", n) for n in range(1, 6)])
    uris = pa.array(["s3://b/1", "s3://b/2", "s3://b/1", "s3://b/2", "s3://b/3"])
    judged = labels([("q", "s3://b/3", 1)], key="uri")
    # Pages of two other documents stand before it: it is the third medium.
    found = metrics(rows.append_column("uri", uris), judged, rank="rank")
    assert found.mrr_at_10 == pytest.approx(1 / 3)
    assert max(k for k, _ in found.recall_at_k.items() if k != 10) == 3


def test_the_most_precise_key_of_the_labels_counts():
    rows = ranking([("q", "a", 1), ("q", "b", 2)]).append_column("uri", pa.array(["u", "u"]))
    judged = labels([("q", "b", 1)]).append_column("uri", pa.array(["u"]))
    assert metrics(rows, judged, rank="rank").recall_at_1 == 0


def test_a_query_that_found_nothing_scores_nothing_where_it_was_asked():
    rows, judged = ranking([("p", "a", 1)]), labels([("p", "a", 1), ("q", "a", 1)])
    assert metrics(rows, judged, rank="rank").recall_at_1 == 1
    asked = metrics(rows, judged, rank="rank", query_ids=pa.array(["p", "q", "r"]))
    assert (asked.recall_at_1, asked.num_queries, asked.num_unjudged) == (0.5, 2, 1)


def test_to_dict_is_fit_for_json():
    found = metrics(ranking([("q", "a", 1)]), labels([("q", "a", 1)]), rank="rank").to_dict()
    assert found == {
        "ndcg_at_10": 1.0,
        "mrr_at_10": 1.0,
        "recall_at_1": 1.0,
        "recall_at_10": 1.0,
        "num_queries": 1,
        "num_unjudged": 0,
        "num_unranked": 0,
    }


@pytest.mark.parametrize(
    ("rows", "judged", "rank", "message"),
    [
        (ranking([("q", "a", 1)]), labels([("q", "a", 1)]), "place", "no column 'place'"),
        (ranking([("q", "a", 1)]), labels([("q", "a", 1)], key="url"), "rank", "none of row_id"),
        (ranking([("q", "a", 1)]), labels([("p", "a", 1)]), "rank", "None of 1 queries"),
        (ranking([("q", "a", 1)]), labels([("q", "a", 0)]), "rank", "None of 1 queries"),
        (ranking([("q", "a", 1)]), labels([("q", "a", 1), ("q", "a", 2)]), "rank", "two labels"),
        (ranking([("q", "a", 1)]), labels([("q", "a", math.nan)]), "rank", "above 30"),
        (ranking([("q", "a", 1)]), labels([("q", "a", 31)]), "rank", "above 30"),
        (ranking([("q", "a", 1)]), labels([("q", "a", None)]), "rank", "above 30"),
        (ranking([("q", "a", 1)]), labels([("q", "a", 1)]), "row_id", "whole numbers"),
        (ranking([]), labels([("q", "a", 1)]), "rank", "None of 0 queries"),
    ],
)
def test_refused(rows, judged, rank, message):
    with pytest.raises(ConfigError, match=message):
        metrics(rows, judged, rank=rank)


LISTS = st.dictionaries(
    st.sampled_from(QUERIES), st.lists(st.sampled_from(DOCUMENTS), unique=True, max_size=8)
)


def listed(lists):
    return ranking([(q, doc, n) for q, docs in lists.items() for n, doc in enumerate(docs, 1)])


def test_what_is_relevant_lies_above_0():
    rows, judged = ranking([("q", "a", 1)]), labels([("q", "a", 0)])
    with pytest.raises(ConfigError, match="relevant_from is 0"):
        metrics(rows, judged, rank="rank", relevant_from=0)


@given(LISTS, LISTS, st.integers(1, 6))
def test_overlap_is_that_of_sets(a, b, k):
    tops = [{q: set(docs[:k]) for q, docs in lists.items() if docs} for lists in (a, b)]
    queries = tops[0].keys() | tops[1].keys()
    assume(queries)
    shares = []
    for query in queries:
        mine, yours = tops[0].get(query, set()), tops[1].get(query, set())
        shares.append(len(mine & yours) / max(len(mine), len(yours)))
    assert overlap_at_k(listed(a), listed(b), k) == pytest.approx(np.mean(shares))
    assert overlap_at_k(listed(b), listed(a), k) == pytest.approx(np.mean(shares))


def test_overlap_refuses():
    some, none = listed({"a": ["x"]}), listed({})
    with pytest.raises(ConfigError, match="empty"):
        overlap_at_k(none, none, 3)
    with pytest.raises(ConfigError, match="k is 0"):
        overlap_at_k(some, some, 0)
    with pytest.raises(ConfigError, match="no column 'query'"):
        overlap_at_k(some, some, 3, query="query")


def test_a_million_pairs_take_seconds():
    num_queries, depth = 10_000, 100
    rng = np.random.default_rng(0)
    query = np.repeat(np.arange(num_queries), depth)
    document = rng.integers(0, 200_000, len(query))
    rows = pa.table(
        {
            "query_id": pa.array([f"query-{n:08}" for n in query]),
            "row_id": pa.array([f"{n:032x}:0" for n in document]),
            "rank": pa.array(np.tile(np.arange(1, depth + 1), num_queries)),
        }
    )
    judged = rows.filter(pa.array(rng.random(len(query)) < 0.02)).drop_columns("rank")
    judged = judged.group_by(["query_id", "row_id"]).aggregate([])
    judged = judged.append_column("relevance", pa.array(np.ones(judged.num_rows)))
    start = time.process_time()
    found = metrics(rows, judged, rank="rank")
    seconds = time.process_time() - start
    assert found.num_queries > 8000
    # About one CPU second; a loop over pairs takes twenty.
    assert seconds < 8
