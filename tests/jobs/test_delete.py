"""What is deleted is in no table and, at last, in no file."""

from __future__ import annotations

import datetime as dt
import time
from datetime import timedelta

import pyarrow as pa
import pytest

from qvl_batch import schema
from qvl_batch.errors import ConfigError, LeaseHeldError, StorageError
from qvl_batch.jobs.delete import run_delete
from qvl_batch.jobs.verify import verify
from qvl_batch.storage import is_local
from qvl_batch.tables import commit, rewrite, staging
from qvl_batch.tables.fragments import write_to
from qvl_batch.tables.garbage import gc
from qvl_batch.tables.layout import FAILURES_TABLE
from qvl_batch.tables.lease import Leases, lease_place
from qvl_batch.units import pair_id
from tests.jobs.upkeep_roots import DAYS, Root, many, table_of, uri_of

FIRST, SECOND = DAYS
SECRET, BAD = "secret-007", "secret-bad"


def score_all(root: Root) -> None:
    """Give one query all rows of the first day as candidates, and scores in their order."""
    found = root.store.open(table_of(FIRST)).to_table().sort_by("uri").to_pylist()
    pairs = [
        {key: row.get(key) for key in schema.candidates([], {}).names}
        | {
            "pair_id": pair_id("q", row["row_id"]),
            "query_id": "q",
            "query_digest": "d",
            "table": table_of(FIRST),
            "rank_before": rank,
            "run_id": "scoring",
            "made_at": dt.datetime(2026, 1, 2, tzinfo=dt.UTC),
        }
        for rank, row in enumerate(found, start=1)
    ]
    said = {"num_tokens": 5, "truncated": False}
    scored = [
        pair | said | {"rerank_score": 1 / pair["rank_before"], "rank_after": pair["rank_before"]}
        for pair in pairs
    ]
    own = {"qvl.partition": "{}"}
    for name, make, kind, rows in (
        ("scores.candidates", schema.candidates, "candidates", pairs),
        ("scores", schema.scores, "scores", scored),
    ):
        target = make([], own | {"qvl.kind": kind, "qvl.collection": name})
        root.store.create(name, target)
        written = write_to(root.store, name, pa.Table.from_pylist(rows, schema=target))
        commit.append(root.store, name, written, marker=f"scoring/{name}", run_id="scoring")


@pytest.fixture
def root(plain_root) -> Root:
    """Two days, one medium of each with a secret name, one that failed, and scores."""
    plain_root.embed({FIRST: [*many("a"), SECRET, BAD], SECOND: [*many("b"), SECRET]})
    score_all(plain_root)
    return plain_root


def test_rows_go_from_every_table_and_bytes_from_every_current_file(root):
    storage = root.store.storage
    words = f"words about {SECRET}"
    assert {path.split("/")[0] for path in root.holding(words)} == {
        f"{table_of(FIRST)}.lance",
        f"{table_of(SECOND)}.lance",
        "scores.lance",
        "scores.candidates.lance",
    }
    assert {path.split("/")[0] for path in root.holding(uri_of(BAD))} == {f"{FAILURES_TABLE}.lance"}
    said = []
    uris = [uri_of(SECRET), uri_of(BAD), "s3://nobody/knows.png"]
    report = run_delete(root.store.root, storage, uris, echo=said.append)
    assert report.removed == {
        table_of(FIRST): 1,
        table_of(SECOND): 1,
        "scores": 1,
        "scores.candidates": 1,
        FAILURES_TABLE: 1,
    }
    assert report.unknown == ("s3://nobody/knows.png",)
    assert "unknown, no row has it: s3://nobody/knows.png" in said[-1]
    assert f"qvl-batch gc {root.store.root} --older-than" in said[-1]
    assert root.names(FIRST) == many("a")
    # Ranks follow each other again, and nothing that is left is without its other half.
    assert verify(root.store.root, storage, collection="scores").problems == ()
    assert verify(root.store.root, storage, collection="media").problems == ()
    for name in root.store.names():
        dataset = root.store.open(name)
        current = {f"data/{f.path}" for g in dataset.get_fragments() for f in g.metadata.files}
        for secret in (SECRET, BAD):
            held = {p.removeprefix(f"{name}.lance/") for p in root.holding(secret)}
            assert not current & held, f"{name} still holds {secret}"
    # The old versions hold it still, until they are removed.
    assert root.holding(SECRET)
    time.sleep(0.02 if is_local(root.store.root) else 1.1)
    for name in root.store.names():
        gc(root.store, name, timedelta(0))
    for secret in (SECRET, BAD):
        assert root.holding(secret) == []


def test_now_removes_the_bytes_at_once(root):
    storage = root.store.storage
    report = run_delete(root.store.root, storage, [uri_of(SECRET), uri_of(BAD)], now=True)
    assert report.left == ()
    for secret in (SECRET, BAD):
        assert root.holding(secret) == []
    assert root.names(SECOND) == many("b")
    assert verify(root.store.root, storage, collection="media", deep=True).problems == ()
    again = run_delete(root.store.root, storage, [uri_of(SECRET)], now=True)
    assert (again.removed, again.unknown) == ({}, (uri_of(SECRET),))


def test_it_goes_on_where_it_was_killed(root):
    # Killed after the commit, before the files were written anew: then after a deletion that kept
    # its old versions.
    store = root.store
    version = store.open(table_of(FIRST)).version
    rewrite.remove_rows(
        store,
        table_of(FIRST),
        "uri",
        [uri_of(SECRET)],
        marker=f"killed/delete/{table_of(FIRST)}",
        run_id="killed",
        planned_version=version,
    )
    run_delete(store.root, store.storage, [uri_of(SECRET), uri_of(BAD)])
    assert not any(g.num_deletions for g in store.open(table_of(FIRST)).get_fragments())
    assert root.holding(SECRET)
    run_delete(store.root, store.storage, [uri_of(SECRET), uri_of(BAD)], now=True)
    assert root.holding(SECRET) == []
    assert root.holding(BAD) == []


def test_what_stands_in_the_way(root):
    store = root.store
    with pytest.raises(ConfigError, match="--uri"):
        run_delete(store.root, store.storage, [""])
    with Leases(lease_place(store.root, store.storage), "at-work") as other:
        other.acquire([table_of(SECOND)])
        with pytest.raises(LeaseHeldError, match="at-work"):
            run_delete(store.root, store.storage, [uri_of(SECRET)])
        assert SECRET in root.names(FIRST)
    staging.begin(
        store, table_of(SECOND), session="s", digest="d", base_version=1, run_id="replacing"
    )
    with pytest.raises(StorageError, match="--give-up"):
        run_delete(store.root, store.storage, [uri_of(SECRET)])
