from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from qvl_batch.errors import ConfigError
from qvl_batch.schema import ALIASES
from qvl_batch.tables import aliases
from qvl_batch.tables.store import TableStore
from tests.tables import rows

DAY = (("dt", "2026-01-02"),)


@pytest.fixture
def collections(any_store) -> TableStore:
    """A root with two collections, one of them partitioned, and a table of scores."""
    any_store.check_writable()
    any_store.create("media", rows.schema("media"))
    any_store.create("media_v2__dt-2026-01-02", rows.schema("media_v2", DAY))
    scores = rows.schema("scores")
    any_store.create("scores", scores.with_metadata(scores.metadata | {b"qvl.kind": b"scores"}))
    return any_store


def test_there_are_no_aliases_yet(collections) -> None:
    assert aliases.read(collections) == {}
    assert aliases.resolve(collections, "media") == "media"
    assert aliases.resolve(collections, "absent") == "absent"


def test_one_commit_switches_what_readers_get(collections) -> None:
    aliases.switch(collections, "live", "media")
    aliases.switch(collections, "all", "media")
    assert aliases.resolve(collections, "live") == "media"
    before = collections.open(aliases.ALIASES_TABLE)
    aliases.switch(collections, "live", "media_v2")
    assert aliases.read(collections) == {"all": "media", "live": "media_v2"}
    assert aliases.resolve(collections, "live") == "media_v2"
    # One commit, and who holds the version before still reads it.
    assert collections.open(aliases.ALIASES_TABLE).version == before.version + 1
    held = before.to_table(columns=["alias", "collection"]).to_pylist()
    assert {"alias": "live", "collection": "media"} in held


@pytest.mark.parametrize(
    ("alias", "collection", "expected"),
    [
        ("media", "media_v2", "would hide it"),
        ("media_v2", "media", "would hide it"),
        ("live", "absent", "media, media_v2"),
        ("live", "scores", "of vectors"),
        ("_live", "media", "The alias is '_live'"),
        ("a/b", "media", "The alias is 'a/b'"),
        ("../media", "media", "The alias is '../media'"),
        ("a__b", "media", "The alias is 'a__b'"),
        ("", "media", "The alias is ''"),
        ("x'; drop table media; --", "media", "The alias is"),
        ("live", "x' OR '1'='1", "no collection"),
        ("live", "live", "no collection 'live'"),
    ],
)
def test_what_is_refused_changes_nothing(collections, alias, collection, expected) -> None:
    with pytest.raises(ConfigError, match=expected):
        aliases.switch(collections, alias, collection)
    assert aliases.read(collections) == {}


def test_an_alias_that_became_a_collection_is_not_guessed(collections) -> None:
    aliases.switch(collections, "live", "media")
    collections.create("live__dt-2026-01-02", rows.schema("live", DAY))
    with pytest.raises(ConfigError, match="'live' is an alias of media and a collection"):
        aliases.resolve(collections, "live")


def test_nothing_is_written_under_an_alias(collections) -> None:
    aliases.refuse_alias(collections, "live")
    aliases.switch(collections, "live", "media")
    aliases.refuse_alias(collections, "media")
    with pytest.raises(ConfigError, match="'live', which is an alias of media"):
        aliases.refuse_alias(collections, "live")


def test_many_at_once_leave_one_row_an_alias(tmp_path) -> None:
    store = TableStore(str(tmp_path / "root"))
    store.check_writable()
    for name in ("a", "b"):
        store.create(name, rows.schema(name))
    wanted = [(alias, collection) for collection in "ab" for alias in ("live", "next")] * 3

    def switch(pair: tuple[str, str]) -> None:
        aliases.switch(TableStore(store.root), *pair)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(switch, wanted))

    held = store.open(aliases.ALIASES_TABLE).to_table()
    assert sorted(held["alias"].to_pylist()) == ["live", "next"]
    assert set(held["collection"].to_pylist()) <= {"a", "b"}
    assert held.schema.equals(ALIASES)
    assert isinstance(held, pa.Table)
