"""A replace that is open: what it has finished survives, and it ends at once."""

from __future__ import annotations

import pyarrow as pa
import pytest

from qvl_batch.errors import LeaseHeldError
from qvl_batch.tables import fragments, rewrite, staging
from tests.tables import rows

SCHEMA = rows.schema()
RUN = {"run_id": "r"}


def test_a_replace_from_begin_to_publish(any_store) -> None:
    store = any_store
    store.check_writable()
    store.create("media", SCHEMA)
    assert staging.read(store, "media") is None
    assert staging.open_replaces(store) == {}
    digest = staging.digest_of("recipe", pa.array(["b", "a", "c"]))
    assert digest == staging.digest_of("recipe", pa.array(["c", "b", "a"]))
    assert digest != staging.digest_of("other", pa.array(["a", "b", "c"]))
    begun = staging.begin(store, "media", session="s1", digest=digest, base_version=1, **RUN)
    for number, (unit, lost) in enumerate([("a", []), ("b", ["c"])]):
        table = rows.table_rows([unit], SCHEMA)
        written = fragments.write_fragments(store.root, store.storage, "media", table)
        for _ in range(2):
            named = {"marker": f"m{number}", "since": begun.version}
            staging.record(store, "media", written, [unit], lost, **named, **RUN)
    assert store.open("media").count_rows() == 0
    staged = staging.open_replaces(store)["media"]
    assert (staged.session, staged.digest) == ("s1", digest)
    assert sorted(staged.units.to_pylist()) == ["a", "b"]
    assert staged.failed.to_pylist() == ["c"]
    rewrite.publish(
        store, "media", staged.fragments, marker="s1/publish/media", planned_version=1, **RUN
    )
    staging.close(store, "media", "s1", **RUN)
    staging.close(store, "media", "s1", **RUN)
    assert staging.read(store, "media") is None
    assert store.open("media").count_rows() == 2
    staging.begin(store, "media", session="s2", digest=digest, base_version=2, **RUN)
    # Another session's end is none of this one's.
    staging.close(store, "media", "s1", **RUN)
    assert len(staging.read(store, "media").units) == 0


def test_a_run_that_was_overtaken_neither_begins_nor_records(any_store) -> None:
    store = any_store
    store.check_writable()
    store.create("media", SCHEMA)
    first = staging.begin(store, "media", session="s1", digest="d", base_version=1, run_id="r1")

    def overtaken() -> None:
        staging.begin(store, "media", session="s2", digest="d", base_version=1, run_id="r2")

    with pytest.raises(LeaseHeldError, match="r2"):
        staging.begin(
            store,
            "media",
            session="s3",
            digest="d",
            base_version=1,
            run_id="r3",
            still_held=overtaken,
        )
    with pytest.raises(LeaseHeldError, match="r2"):
        staging.record(store, "media", [], ["a"], [], marker="m", run_id="r1", since=first.version)
    assert staging.read(store, "media").session == "s2"
    assert len(staging.read(store, "media").units) == 0
