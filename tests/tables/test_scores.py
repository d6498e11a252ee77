"""Ranks that follow from scores, set in one commit; and what is wrong with a table of scores."""

import datetime as dt

import lance
import pyarrow as pa
import pytest

from qvl_batch import schema
from qvl_batch.errors import LeaseHeldError
from qvl_batch.tables.check import DOUBLED, LOST
from qvl_batch.tables.check_scores import (
    UNKNOWN_PAIR,
    WRONG_PAIR_ID,
    WRONG_RANK,
    check_scores,
)
from qvl_batch.tables.commit import append, commit_transaction
from qvl_batch.tables.fragments import write_to
from qvl_batch.tables.scores import (
    incomplete_queries,
    ranks_to_set,
    read_where_in,
    set_ranks,
)
from qvl_batch.tables.store import TableStore
from qvl_batch.units import pair_id

NOW = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
NONE = pa.array([], pa.string())


@pytest.fixture
def store(tmp_path):
    return TableStore(str(tmp_path))


def row(query, number, *, score=None, first=None, **changed):
    values = {
        "query_id": query,
        "row_id": f"r{number}:0",
        "pair_id": pair_id(query, f"r{number}:0"),
        "query_digest": "d",
        "unit_id": f"r{number}",
        "media_id": "m",
        "table": "media",
        "kind": "text",
        "segment": 0,
        "rank_before": first or number,
        "run_id": "run",
        "made_at": NOW,
    }
    if score is not None:
        values |= {"rerank_score": score, "num_tokens": 5, "truncated": False}
    return values | changed


def put(store, name, rows, run_id="run", marker=None):
    target = (schema.scores if name == "scores" else schema.candidates)([], {})
    store.create(name, target)
    fragments = write_to(store, name, pa.Table.from_pylist(rows, target))
    append(store, name, fragments, marker=marker or f"{run_id}/{name}", run_id=run_id)
    return store.open(name)


def ranks_of(dataset):
    rows = dataset.to_table(columns=["query_id", "row_id", "rank_after"]).to_pylist()
    return {(one["query_id"], one["row_id"][:-2]): one["rank_after"] for one in rows}


def planned(waiting=NONE):
    columns = ["pair_id", "query_id", "rerank_score", "rank_before", "rank_after"]
    return lambda latest: ranks_to_set(latest.to_table(columns=columns), waiting)


SCORED = [
    row("a", 1, score=0.1),
    row("a", 2, score=0.9),
    row("b", 1, score=0.5),
    row("b", 2, score=0.5),
    row("b", 3, score=0.7),
    row("c", 1, score=0.3),
]


def test_ranks_fall_with_the_score_then_with_the_rank_before(store):
    dataset = put(store, "scores", SCORED)
    version = dataset.version
    waiting = pa.array(["c"])
    arguments = {"run_id": "run", "planned_version": version}
    assert set_ranks(store, "scores", planned(waiting), marker="run/ranks", **arguments) == 5
    latest = store.open("scores")
    # One commit: no version holds a part of them.
    assert latest.version == version + 1
    assert ranks_of(latest) == {
        ("a", "r2"): 1,
        ("a", "r1"): 2,
        ("b", "r3"): 1,
        ("b", "r1"): 2,
        ("b", "r2"): 3,
        ("c", "r1"): None,
    }
    assert latest.schema.equals(dataset.schema, check_metadata=True)
    assert set_ranks(store, "scores", planned(waiting), marker="run/again", **arguments) == 0
    assert store.open("scores").version == version + 1


def test_a_score_that_comes_later_ranks_its_query_anew(store):
    put(store, "scores", SCORED)
    set_ranks(store, "scores", planned(), marker="1", run_id="run", planned_version=2)
    dataset = put(store, "scores", [row("a", 3, score=0.5)], run_id="later")
    changed = set_ranks(
        store, "scores", planned(), marker="2", run_id="later", planned_version=dataset.version
    )
    # The best one keeps its rank.
    assert changed == 2
    ranks = ranks_of(store.open("scores"))
    assert [ranks["a", name] for name in ("r2", "r3", "r1")] == [1, 2, 3]


def test_a_lost_acknowledgement_sets_ranks_once(store):
    version = put(store, "scores", SCORED).version
    calls = []

    def lost(store, table, transaction):
        calls.append(commit_transaction(store, table, transaction))
        raise OSError("the answer was lost")

    set_ranks(
        store,
        "scores",
        planned(),
        marker="run/ranks",
        run_id="run",
        planned_version=version,
        commit=lost,
    )
    assert calls == [version + 1]
    assert store.open("scores").version == version + 1


def test_rows_of_another_run_are_refused(store):
    version = put(store, "scores", SCORED[:2]).version
    put(store, "scores", SCORED[2:], run_id="other")
    with pytest.raises(LeaseHeldError, match="other"):
        set_ranks(store, "scores", planned(), marker="m", run_id="run", planned_version=version)
    assert set(ranks_of(store.open("scores")).values()) == {None}


def test_a_query_waits_for_its_last_pair():
    candidates = pa.table({"query_id": ["a", "a", "b", "b", "c"], "pair_id": list("12345")})
    scored, failed = pa.array(["1", "3"]), pa.array(["2"])
    waiting = incomplete_queries(candidates, scored, failed)
    assert sorted(waiting.to_pylist()) == ["b", "c"]
    assert len(incomplete_queries(candidates, scored, pa.array(["2", "4", "5"]))) == 0


def test_rows_are_found_by_any_id(store):
    hostile = ["' OR 1=1 --", '"', "x" * 5000, "é\n"]
    dataset = put(store, "scores.candidates", [row(name, 1) for name in [*hostile, "plain"]])
    for name in hostile:
        found = read_where_in(dataset, "query_id", pa.array([name]), ["pair_id"])
        assert found.to_pylist() == [{"pair_id": pair_id(name, "r1:0")}]
    assert read_where_in(dataset, "query_id", pa.array(["no"]), ["row_id"]).num_rows == 0
    assert read_where_in(None, "query_id", pa.array(["no"]), ["row_id"]) is None


def kinds(problems):
    return sorted({problem.kind for problem in problems})


def both(store, candidates, scores):
    found = put(store, "scores.candidates", candidates)
    return found, put(store, "scores", scores) if scores else None


def test_whole_scores_have_no_problem(store):
    ranked = [
        one | {"rank_after": rank} for one, rank in zip(SCORED, (2, 1, 2, 3, 1, 1), strict=True)
    ]
    candidates = [row(one["query_id"], int(one["row_id"][1])) for one in ranked]
    lost = row("c", 2)
    found, scores = both(store, [*candidates, lost], ranked)
    assert check_scores(found, scores, pa.array([lost["pair_id"]])) == []
    problems = check_scores(found, scores, NONE)
    assert [(one.kind, one.unit_id) for one in problems] == [(LOST, lost["pair_id"])]


@pytest.mark.parametrize(
    ("candidates", "scores", "kind"),
    [
        ([row("a", 1)], [], LOST),
        ([row("a", 1)], [row("a", 1, score=0.5, rank_after=1)] * 2, DOUBLED),
        ([row("a", 1)] * 2, [row("a", 1, score=0.5, rank_after=1)], DOUBLED),
        ([row("a", 1)], [row("a", 1, score=0.5)], WRONG_RANK),
        ([row("a", 1)], [row("a", 1, score=0.5, rank_after=2)], WRONG_RANK),
        ([row("a", 1), row("a", 2, first=1)], [], WRONG_RANK),
        ([row("a", 1, pair_id="p")], [], WRONG_PAIR_ID),
        ([], [row("a", 1, score=0.5, rank_after=1)], UNKNOWN_PAIR),
    ],
)
def test_each_problem_is_found(store, candidates, scores, kind):
    found, scored = both(store, candidates, scores)
    assert kind in kinds(check_scores(found, scored, NONE))


def test_a_missing_file_is_found(store, tmp_path):
    found, scores = both(store, [row("a", 1)], [row("a", 1, score=0.5, rank_after=1)])
    for path in (tmp_path / "scores.lance" / "data").iterdir():
        path.unlink()
    assert kinds(check_scores(found, scores, NONE)) == [LOST, "missing file"]


def test_lance_keeps_the_metadata_when_ranks_are_set(store):
    target = schema.scores([], {"qvl.kind": "scores"})
    store.create("scores", target)
    fragments = write_to(store, "scores", pa.Table.from_pylist(SCORED, target))
    append(store, "scores", fragments, marker="m", run_id="run")
    set_ranks(store, "scores", planned(), marker="r", run_id="run", planned_version=2)
    assert lance.dataset(store.uri("scores")).schema.metadata[b"qvl.kind"] == b"scores"
