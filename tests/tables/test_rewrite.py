"""Commits that take rows away: before or after, never between, and once."""

from __future__ import annotations

import lance
import pytest

from qvl_batch.errors import LeaseHeldError
from qvl_batch.tables import commit, fragments, rewrite
from qvl_batch.tables.store import TableStore
from tests.tables import rows

SCHEMA = rows.schema()
RUN = {"run_id": "r"}


@pytest.fixture
def media(any_store) -> TableStore:
    """Three fragments: (a, b), (c), (d, e)."""
    any_store.check_writable()
    any_store.create("media", SCHEMA)
    for number, ids in enumerate((["a", "b"], ["c"], ["d", "e"])):
        commit.append(any_store, "media", write(any_store, ids), marker=f"m{number}", run_id="old")
    return any_store


def write(store: TableStore, ids: list[str]) -> list[fragments.WrittenFragment]:
    return fragments.write_fragments(
        store.root, store.storage, "media", rows.table_rows(ids, SCHEMA)
    )


def units(store: TableStore) -> list[str]:
    return sorted(store.open("media").to_table(columns=["unit_id"])["unit_id"].to_pylist())


def test_new_rows_for_old_ones_in_one_commit(media) -> None:
    written = write(media, ["c2", "e2", "x"])
    for _ in range(2):
        version = rewrite.replace_units(
            media, "media", written, ["c", "e", "nowhere"], marker="u", planned_version=4, **RUN
        )
        assert version == 5
        assert units(media) == ["a", "b", "c2", "d", "e2", "x"]
    assert type(media.open("media").read_transaction(5).operation).__name__ == "Update"


def test_nothing_old_is_an_append_and_nothing_new_a_delete(media) -> None:
    rewrite.replace_units(
        media, "media", write(media, ["f"]), [], marker="1", planned_version=4, **RUN
    )
    rewrite.replace_units(media, "media", [], ["a", "c"], marker="2", planned_version=4, **RUN)
    assert units(media) == ["b", "d", "e", "f"]
    version = media.open("media").version
    rewrite.replace_units(media, "media", [], ["gone"], marker="3", planned_version=4, **RUN)
    assert media.open("media").version == version


def test_a_lost_acknowledgement_replaces_once(media) -> None:
    def lose(store: TableStore, table: str, transaction: lance.Transaction) -> int:
        commit.commit_transaction(store, table, transaction)
        raise OSError("connection reset")

    rewrite.replace_units(
        media,
        "media",
        write(media, ["a2"]),
        ["a"],
        marker="u",
        planned_version=4,
        commit=lose,
        **RUN,
    )
    assert units(media) == ["a2", "b", "c", "d", "e"]


def test_a_foreign_commit_between_is_noticed(media) -> None:
    commit.append(media, "media", write(media, ["z"]), marker="z", run_id="other")
    for change in (
        lambda: rewrite.replace_units(
            media, "media", write(media, ["a2"]), ["a"], marker="u", planned_version=4, **RUN
        ),
        lambda: rewrite.publish(
            media, "media", write(media, ["n"]), marker="p", planned_version=4, **RUN
        ),
    ):
        with pytest.raises(LeaseHeldError, match="other"):
            change()
    assert units(media) == ["a", "b", "c", "d", "e", "z"]


def test_publish_is_the_whole_content_and_once(media) -> None:
    written = write(media, ["n", "m"])
    old = media.open("media")
    for _ in range(2):
        assert rewrite.publish(media, "media", written, marker="p", planned_version=4, **RUN) == 5
    assert units(media) == ["m", "n"]
    # A reader that had opened the old version keeps it.
    assert old.count_rows() == 5
    assert media.open("media").schema.metadata == SCHEMA.metadata
    rewrite.publish(media, "media", [], marker="empty", planned_version=4, **RUN)
    assert units(media) == []


@pytest.mark.parametrize("prepared", ["append", "update", "overwrite"])
def test_what_was_prepared_before_the_fence_is_refused_by_lance_itself(media, prepared) -> None:
    dataset = media.open("media")
    new = list(fragments.iter_fragments(write(media, ["late"])))
    operation = {
        "append": lance.LanceOperation.Append(new),
        "update": lance.LanceOperation.Update([], [], new, []),
        "overwrite": lance.LanceOperation.Overwrite(dataset.lance_schema, new),
    }[prepared]
    version = rewrite.fence(media, "media", run_id="heir")
    assert version == 5
    assert rewrite.fence(media, "media", run_id="heir") == 5
    with pytest.raises(OSError, match=r"(?i)conflict|incompatible"):
        commit.commit_transaction(media, "media", lance.Transaction(4, operation))
    assert units(media) == ["a", "b", "c", "d", "e"]


def test_the_fenced_run_finds_out_and_the_heir_goes_on(media) -> None:
    version = rewrite.fence(media, "media", run_id="heir")
    with pytest.raises(LeaseHeldError, match="heir"):
        commit.append(
            media, "media", write(media, ["x"]), marker="m", run_id="slept", planned_version=4
        )
    commit.append(
        media, "media", write(media, ["y"]), marker="m", run_id="heir", planned_version=version
    )
    assert units(media) == ["a", "b", "c", "d", "e", "y"]
