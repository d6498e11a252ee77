"""Queries, labels and candidates in every form; what is wrong with one is told by its place."""

import datetime as dt
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qvl_batch.errors import ManifestError, StorageError
from qvl_batch.media.queries import read_candidates, read_labels, read_queries
from qvl_batch.schema import QUERIES
from qvl_batch.storage import Storage
from qvl_batch.tables.lists import read_lance
from qvl_batch.units import query_id

HERE = Storage()


@pytest.fixture
def written(tmp_path):
    """Return what writes records (or raw text) as a list of some form and returns its path."""

    def write(content, form="jsonl"):
        path = tmp_path / f"list.{form}"
        if isinstance(content, str | bytes):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        elif form == "jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        elif form == "csv":
            names = list(dict.fromkeys(name for record in content for name in record))
            quoted = [names, *([record.get(name) for name in names] for record in content)]
            lines = [
                ",".join('"' + str("" if v is None else v).replace('"', '""') + '"' for v in row)
                for row in quoted
            ]
            path.write_text("\n".join(lines) + "\n")
        else:
            table = content
            if not isinstance(content, pa.Table):
                names = dict.fromkeys(name for record in content for name in record)
                table = pa.table({n: [record.get(n) for record in content] for n in names})
            if form == "lance":
                import lance

                lance.write_dataset(table, path)
            else:
                pq.write_table(table, path)
        return str(path)

    return write


def queries(path, **options):
    return read_queries(path, HERE, read_lance=read_lance, **options)


TWO = [
    {"query_id": "a", "text": "two red circles", "image": "pictures/1.png", "day": "mon"},
    {"query_id": "b", "text": "a star", "video": "s3://bucket/clip.mp4", "day": None},
]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "lance"])
def test_every_form_gives_the_same(written, tmp_path, form):
    found = queries(written(TWO, form), partition_by=["day"])
    assert found.rows.schema.equals(pa.schema([*QUERIES, pa.field("day", pa.string())]))
    assert found.rows.to_pylist() == [
        {
            "query_id": "a",
            "text": "two red circles",
            "image": str(tmp_path / "pictures" / "1.png"),
            "video": None,
            "instruction": None,
            "day": "mon",
        },
        {
            "query_id": "b",
            "text": "a star",
            "image": None,
            "video": "s3://bucket/clip.mp4",
            "instruction": None,
            "day": None,
        },
    ]
    assert (found.partition_by, found.num_duplicates) == (("day",), 0)


def test_a_folder_of_parquet_files(tmp_path):
    folder = tmp_path / "queries"
    folder.mkdir()
    for number, record in enumerate(TWO):
        pq.write_table(pa.Table.from_pylist([record], QUERIES), folder / f"{number}.parquet")
    (folder / "_SUCCESS").touch()
    found = queries(str(folder))
    assert found.rows["query_id"].to_pylist() == ["a", "b"]
    # Of a folder relative addresses begin in the folder itself.
    assert found.rows["image"][0].as_py() == str(folder / "pictures" / "1.png")


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_from_a_bucket(written, bucket, form):
    with open(written(TWO, form), "rb") as file:
        bucket.fs().pipe(bucket.uri(f"asked/list.{form}"), file.read())
    found = read_queries(bucket.uri(f"asked/list.{form}"), bucket.storage)
    assert found.rows["image"][0].as_py() == bucket.uri("asked/pictures/1.png")
    with pytest.raises(ManifestError, match="There is no list of queries"):
        read_queries(bucket.uri(f"other/list.{form}"), bucket.storage)
    with pytest.raises(StorageError, match="no bucket"):
        read_queries("s3://not-there-at-all/list.jsonl", bucket.storage)


def test_a_query_without_an_id_is_named_by_what_it_asks(written):
    found = queries(written([{"text": "a"}, {"text": "a"}, {"text": "a", "instruction": "b"}]))
    assert found.rows["query_id"].to_pylist() == [
        query_id("a", None, None, None),
        query_id("a", None, None, "b"),
    ]
    assert found.num_duplicates == 1


def test_whole_numbers_are_ids_too(written):
    assert queries(written([{"query_id": 7, "text": "a"}])).rows["query_id"][0].as_py() == "7"


def test_equal_rows_collapse_and_different_ones_are_named(written):
    same = [{"query_id": "a", "text": "x"}, {"query_id": "b", "text": "y"}]
    found = queries(written([*same, same[0], same[0]]))
    assert (found.rows["query_id"].to_pylist(), found.num_duplicates) == (["a", "b"], 2)
    with pytest.raises(ManifestError) as refused:
        queries(written([*same, {"query_id": "a", "text": "z"}]))
    assert "query_id 'a' twice, with text 'x' (line 1) and 'z' (line 3)" in str(refused.value)
    with pytest.raises(ManifestError, match="twice, with image None"):
        queries(written([*same, {"query_id": "a", "text": "x", "image": "/i.png"}]))


HOSTILE = [
    *("../../etc/passwd", "/", ".", "..", "a/b", "a\\b", "dt=1/x", "~", "$HOME", "%2e%2e%2f"),
    *("'; DROP TABLE scores; --", '" OR ""="', "x' OR '1'='1", "{}", "{0}", "%s", "NULL", "nan"),
    *("<script>alert(1)</script>", "a\nb", "a\rb", "a\tb", "a\x00b", "\u202egnp.exe", "\ufeff"),
    *(" ", " a ", "ａ", "\u00e9", "e\u0301", "😀", "-1", "1e5", "true", "a" * 5000, "s3://b/k"),
]


def test_hostile_ids_are_kept_as_they_are(written):
    records = [{"query_id": name, "text": "x"} for name in HOSTILE]
    for form in ("jsonl", "parquet", "lance"):
        assert queries(written(records, form)).rows["query_id"].to_pylist() == HOSTILE
    # Python's CSV reader drops a NUL; all else is kept there too.
    kept = [record for record in records if "\x00" not in record["query_id"]]
    found = queries(written(kept, "csv")).rows["query_id"].to_pylist()
    assert found == [record["query_id"] for record in kept]


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=8, unique=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_any_text_is_an_id(written, ids):
    listed = written([{"query_id": name, "text": "x"} for name in ids])
    assert queries(listed).rows["query_id"].to_pylist() == ids


def test_partition_columns_keep_their_types(written):
    days = pa.array([dt.date(2026, 1, 2), None])
    table = pa.table({"text": ["a", "b"], "day": days, "n": [1, 2], "ok": [True, False]})
    found = queries(written(table, "parquet"), partition_by=["day", "n", "ok"])
    types = [found.rows.schema.field(name).type for name in ("day", "n", "ok")]
    assert types == [pa.date32(), pa.int64(), pa.bool_()]


WRONG_QUERIES = [
    ([{"query_id": "a"}], [], "no column text, image or video"),
    ([{"text": "a"}, {"text": ""}], [], "line 2, has no text, image or video"),
    ([{"text": "a"}, {"instruction": "b", "image": None}], [], "line 2, has no text"),
    ([{"text": 5}], [], r"line 1, has text=5 \(int64\)"),
    ([{"text": "a"}, {"text": 5}], [], r"'text' mixes types: str \(line 1: 'a'\); int \(line 2: 5"),
    ([{"text": ["a"]}], [], "line 1, has text="),
    ([{"query_id": 1.5, "text": "a"}], [], "line 1, has query_id=1.5"),
    ([{"query_id": True, "text": "a"}], [], "line 1, has query_id=True"),
    ([{"text": "a", "image": "https://x/y.png"}], [], "image='https://x/y.png', whose scheme"),
    ([{"text": "a", "video": "s3://bucket"}], [], "which names no object"),
    ([{"text": "a"}], ["day"], "no column 'day' to partition by"),
    ([{"text": "a", "score": 0.5}], ["score"], "line 1, has score=0.5"),
    ([{"text": "a", "row_id": "b"}], ["row_id"], "can not be partitioned by 'row_id'"),
    ([{"text": "a"}], ["text"], "can not be partitioned by 'text'"),
    ([{"text": "a", "_x": "b"}], ["_x"], "can not be partitioned by '_x'"),
    ('{"text": "a"}\n\n{"text": \n', [], "line 3, is not JSON"),
    ('{"text": "a"}\n["b"]\n', [], "line 2, is not an object"),
    ('{"text": "\\ud800"}\n', [], "line 1, has text='.*', which is no valid Unicode"),
    (b"\xff\xfe\n", [], "line 1, is not JSON"),
    ("", [], "has no rows"),
    ("\n\n", [], "has no rows"),
]


@pytest.mark.parametrize(("content", "partition_by", "message"), WRONG_QUERIES)
def test_wrong_queries_are_refused(written, content, partition_by, message):
    with pytest.raises(ManifestError, match=message) as refused:
        queries(written(content), partition_by=partition_by)
    assert "list.jsonl" in str(refused.value)
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", "text,text\na,b\n", "names a column twice"),
        ("list.csv", "text\na,b\n", "line 2, has 2 fields"),
        ("list.csv", "text\n", "has no rows"),
        ("list.parquet", "not parquet", "is no Parquet: "),
        ("list.tsv", "text\na\n", "Give JSON lines"),
        ("list.lance", "text", "is no Lance table"),
    ],
)
def test_wrong_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ManifestError, match=message):
        queries(str(tmp_path / name))


def test_a_missing_list_says_what_may_be_given(tmp_path):
    with pytest.raises(ManifestError, match=r"There is no list of queries at .*none\.jsonl"):
        queries(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match="has no rows"):
        queries(str(tmp_path / "empty"))


def test_a_list_that_may_not_be_read(written):
    path = written(TWO)
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    os.chmod(path, 0)
    with pytest.raises(StorageError, match="may not be read"):
        queries(path)


LABELS = [
    {"query_id": "a", "uri": "pictures/1.png", "relevance": 3},
    {"query_id": "a", "uri": "s3://bucket/2.png", "relevance": 0.5},
]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "lance"])
def test_labels_of_every_form(written, tmp_path, form):
    found = read_labels(written(LABELS, form), HERE, read_lance=read_lance)
    assert found.key == "uri"
    assert found.rows.to_pylist() == [
        {"query_id": "a", "uri": str(tmp_path / "pictures/1.png"), "relevance": 3.0},
        {"query_id": "a", "uri": "s3://bucket/2.png", "relevance": 0.5},
    ]


def test_labels_that_are_said_twice(written):
    twice = [{"query_id": "a", "row_id": "r", "relevance": 1}] * 2
    assert read_labels(written(twice), HERE).num_duplicates == 1
    other = [*twice, {"query_id": "a", "row_id": "r", "relevance": 2}]
    with pytest.raises(
        ManifestError, match=r"'a', row_id 'r' twice, with relevance 1.0 \(line 1\)"
    ):
        read_labels(written(other), HERE)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"query_id": "a", "relevance": 1}], "no column row_id, media_id or uri"),
        ([{"query_id": "a", "row_id": "r"}], "no column relevance"),
        ([{"row_id": "r", "relevance": 1}], "line 1, has no query_id"),
        ([{"query_id": "a", "row_id": "", "relevance": 1}], "line 1, has no row_id"),
        ([{"query_id": "a", "row_id": "r", "relevance": "x"}], "line 1, has relevance='x'"),
        ([{"query_id": "a", "row_id": "r", "relevance": None}], "line 1, has relevance=None"),
        ([{"query_id": "a", "row_id": "r", "relevance": 31}], "line 1, has relevance=31"),
        ('{"query_id": "a", "row_id": "r", "relevance": NaN}\n', "line 1, has relevance=nan"),
    ],
)
def test_wrong_labels_are_refused(written, records, message):
    with pytest.raises(ManifestError, match=message):
        read_labels(written(records), HERE)


def test_labels_that_are_no_numbers_in_a_csv(written):
    with pytest.raises(ManifestError, match="line 3, has relevance='high'"):
        read_labels(written("query_id,row_id,relevance\na,r,1\na,s,high\n", "csv"), HERE)


def test_labels_of_other_queries_are_refused(written, tmp_path):
    asked = queries(written([{"query_id": "b", "text": "x"}], "parquet"))
    with pytest.raises(ManifestError, match="no label above 0 for any of the queries"):
        read_labels(written(LABELS), HERE, queries=asked)


PAIRS = [
    {"query_id": "b", "row_id": "r", "score": 0.2},
    {"query_id": "a", "row_id": "r", "score": 0.5},
    {"query_id": "b", "row_id": "s", "score": 0.9},
    {"query_id": "b", "row_id": "r", "score": 0.2},
]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "lance"])
def test_candidates_are_numbered_by_score(written, form):
    found = read_candidates(written(PAIRS, form), HERE, read_lance=read_lance)
    rows = found.rows.select(["query_id", "row_id", "rank_before"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [("b", "s", 1), ("b", "r", 2), ("a", "r", 1)]
    assert found.rows["first_score"].to_pylist() == pytest.approx([0.9, 0.2, 0.5])
    assert (found.num_duplicates, found.rows["table"].null_count) == (1, 3)


def test_candidates_by_rank_or_by_their_order(written):
    ranked = [
        {"query_id": "a", "row_id": name, "rank": rank} for name, rank in (("r", 9), ("s", 4))
    ]
    assert read_candidates(written(ranked), HERE).rows["row_id"].to_pylist() == ["s", "r"]
    plain = [{"query_id": "a", "row_id": name} for name in "zyx"]
    found = read_candidates(written(plain), HERE).rows
    assert found["row_id"].to_pylist() == ["z", "y", "x"]
    assert found["rank_before"].to_pylist() == [1, 2, 3]
    assert found["first_score"].null_count == 3


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"query_id": "a"}], "line 1, has no row_id"),
        ([{"query_id": "a", "row_id": 5}], "line 1, has row_id=5"),
        ([{"query_id": "a", "row_id": "r", "score": None}], "line 1, has score=None"),
        ([{"query_id": "c", "row_id": "r"}], "line 1, has query_id='c', which"),
        (
            [{"query_id": "a", "row_id": "r", "score": n} for n in (1, 2)],
            r"row_id 'r' twice, with score 1.0 \(line 1\) and 2.0 \(line 2\)",
        ),
    ],
)
def test_wrong_candidates_are_refused(written, records, message):
    asked = queries(written([{"query_id": "a", "text": "x"}], "parquet"))
    with pytest.raises(ManifestError, match=message):
        read_candidates(written(records), HERE, queries=asked)
