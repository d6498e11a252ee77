from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl_batch.errors import ConfigError
from qvl_batch.tables.layout import (
    check_collection_name,
    partition_from_json,
    partition_json,
    table_name,
    table_uri,
)

# Few letters, so that parts of different partitions do collide where the rule lets them.
TRICKY = st.text(alphabet="ab-_.0/ é", max_size=8)
VALUES = st.none() | TRICKY | st.text(max_size=90) | st.sampled_from(["null", "a-00000000"])
PARTITIONS = st.lists(
    st.tuples(TRICKY | st.text(max_size=90), VALUES), max_size=4, unique_by=lambda pair: pair[0]
).map(tuple)
COLLECTIONS = st.from_regex(r"[ab][ab.-]{0,3}(_[ab.-]{1,3})?", fullmatch=True)


def test_plain_values_stay_readable() -> None:
    assert table_name("media", (("dt", "2026-01-02"),)) == "media__dt-2026-01-02"
    assert table_name("media", (("dt", "2026"), ("lang", "en"))) == "media__dt-2026__lang-en"
    assert table_name("my_media", ()) == "my_media"


def test_other_values_become_slug_and_hash() -> None:
    names = {
        value: table_name("m", (("k", value),))
        for value in (None, "", "null", "a/b", "a b", "a-b", "ü", ".a", "a_b", "x" * 65)
    }
    assert names["a-b"] == "m__k-a-b"
    assert names["null"] == "m__k-null"
    assert len(set(names.values())) == len(names)
    slugged = re.compile(r"m__k-[A-Za-z0-9.-]+-[0-9a-f]{8}")
    plain = ("a-b", "null")
    assert [v for v, n in names.items() if not slugged.fullmatch(n)] == ["null", "a-b"], plain


def test_a_value_that_looks_like_a_slug_is_slugged() -> None:
    spoofed = table_name("m", (("k", "a/b"),)).removeprefix("m__k-")
    assert table_name("m", (("k", spoofed),)) != f"m__k-{spoofed}"


def test_the_hash_of_a_key_is_never_taken_for_a_value() -> None:
    slugged = table_name("m", (("a-b", "v"),))
    digest = re.fullmatch(r"m__a_b.([0-9a-f]{8})-v", slugged)[1]
    assert table_name("m", (("a_b", f"{digest}-v"),)) != slugged


@settings(max_examples=150, deadline=None)
@given(COLLECTIONS, PARTITIONS)
def test_names_are_lance_names(collection, partition) -> None:
    name = table_name(collection, partition)
    assert re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", name)
    assert name == table_name(collection, partition)


@settings(max_examples=200, deadline=None)
@given(COLLECTIONS, PARTITIONS, COLLECTIONS, PARTITIONS)
def test_different_partitions_have_different_names(one, first, other, second) -> None:
    same = (one, first) == (other, second)
    assert (table_name(one, first) == table_name(other, second)) == same


def test_no_two_of_all_short_partitions_share_a_name() -> None:
    def texts(longest: int) -> list[str]:
        return ["".join(t) for n in range(longest + 1) for t in itertools.product("a-_", repeat=n)]

    pairs = list(itertools.product(texts(3), [None, *texts(3)]))
    partitions = [(pair,) for pair in pairs]
    short = list(itertools.product(texts(2), [None, *texts(2)]))
    partitions += [(p, q) for p, q in itertools.product(short, short) if p[0] != q[0]]
    named: dict[str, object] = {}
    for partition in partitions:
        name = table_name("a", partition)
        assert name not in named, (partition, named[name])
        named[name] = partition


def test_a_long_name_is_cut_and_stays_unique() -> None:
    long = tuple((f"key{i}", "v" * 60) for i in range(6))
    other = (*long[:-1], ("key5", "v" * 59))
    names = {table_name("m", long), table_name("m", other)}
    assert {len(name) <= 200 for name in names} == {True}
    assert len(names) == 2


@given(PARTITIONS)
def test_partition_json_round_trip(partition) -> None:
    assert partition_from_json(partition_json(partition)) == partition


def test_partition_json_keeps_order_and_refuses_a_key_named_twice() -> None:
    assert partition_json((("b", "1"), ("a", None))) == '{"b":"1","a":null}'
    with pytest.raises(ConfigError, match="twice"):
        partition_json((("a", "1"), ("a", "2")))


@pytest.mark.parametrize("name", ["", "_m", ".m", "-m", "a__b", "a_", "a/b", "a b", "é", "x" * 65])
def test_refused_collection_names(name) -> None:
    with pytest.raises(ConfigError, match=r"output\.collection"):
        check_collection_name(name)


@pytest.mark.parametrize("name", ["m", "media_2", "media-2.1", "M9"])
def test_accepted_collection_names(name) -> None:
    assert check_collection_name(name) == name


def test_uris() -> None:
    assert table_uri("s3://b/t/", "m") == "s3://b/t/m.lance"
