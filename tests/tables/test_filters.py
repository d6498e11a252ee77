from __future__ import annotations

import math
from datetime import UTC, date, datetime

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from qvl_batch.errors import ConfigError
from qvl_batch.tables.filters import filter_of, parse_filter

# Texts that mean something to SQL, to LIKE, to an expression parser, to a shell or to C.
HOSTILE = [
    "' OR '1'='1",
    "' OR 1=1 --",
    "x'; DROP TABLE media; --",
    "x' UNION SELECT * FROM _qvl_catalog --",
    '" OR ""="',
    "') OR ('1'='1",
    "/* */ OR true",
    "-- comment",
    "# comment",
    "; delete",
    "\\' OR 1=1",
    "\\",
    "%",
    "_",
    "50%_",
    "a%' ESCAPE '%",
    "CAST('1' AS INT)",
    "is_null(uri)",
    "row_id IS NOT NULL",
    "NULL",
    "true",
    "$1",
    "{0}",
    "%s",
    "${HOME}",
    "$(id)",
    "`id`",
    "../../etc/passwd",
    "..\\..\\secret",
    "media__dt-2026-01-02",
    "__class__",
    "{{7*7}}",
    "<script>alert('x')</script>",
    "line\nbreak",
    "tab\there",
    "cr\r\nlf",
    "nul\0byte",
    "ünïcödé ✓ 🎉",
    "ʼ quote＇like",
    "\u202eright to left",
    "\ufeffbom",
    "e\u0301",
    "\u00e9",
    "=",
    "==x",
    ">=1",
    "~x",
    "9" * 400,
    "a" * 100_000,
    "kind=image",
]
TIME = datetime(2026, 1, 2, 3, 4, 5, 678, UTC)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> lance.LanceDataset:
    rows = pa.table(
        {
            "row_id": [f"r{i}" for i in range(len(HOSTILE))],
            "text": HOSTILE,
            'odd "name" -- = 1': HOSTILE,
            "page": pa.array(range(len(HOSTILE)), pa.int32()),
            "vector_bits": pa.FixedSizeListArray.from_arrays(
                pa.array(np.zeros(len(HOSTILE) * 2, np.uint8)), 2
            ),
        }
    )
    return lance.write_dataset(rows, str(tmp_path_factory.mktemp("hostile") / "rows.lance"))


def found(dataset: lance.LanceDataset, where: pc.Expression) -> list[str]:
    return dataset.to_table(columns=["row_id"], filter=where)["row_id"].to_pylist()


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_value_finds_the_rows_that_hold_it(hostile, number: int) -> None:
    value, row = HOSTILE[number], f"r{number}"
    for column in ("text", 'odd "name" -- = 1'):
        assert found(hostile, filter_of({column: value}, hostile.schema)) == [row]
        assert found(hostile, filter_of({column: [value, "no"]}, hostile.schema)) == [row]
        assert found(hostile, parse_filter(f"{column}={value}", hostile.schema)) == [row]
        rest = found(hostile, parse_filter(f"{column}!={value}", hostile.schema))
        assert len(rest) == len(HOSTILE) - 1
        assert row not in rest
        within = [f"r{i}" for i, text in enumerate(HOSTILE) if value in text]
        assert found(hostile, parse_filter(f"{column}~{value}", hostile.schema)) == within


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_name_or_number_is_refused(hostile, number: int) -> None:
    value = HOSTILE[number]
    with pytest.raises(ConfigError):
        filter_of({value: "x"}, hostile.schema)
    with pytest.raises(ConfigError):
        filter_of({"page": value}, hostile.schema)
    with pytest.raises(ConfigError):
        parse_filter(f"page={value}", hostile.schema)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("vector_bits=1", "type fixed_size_list"),
        ("vector_bits~x", "type fixed_size_list"),
        ("colour=red", "'colour', which is not there.*row_id"),
        ("_rowid=1", "'_rowid', which is not there"),
        ("_distance<1", "not there"),
        ("text", "no operator"),
        ("", "no operator"),
        ("=x", "'', which is not there"),
        ("text.x=1", "'text.x', which is not there"),
        ("text OR page=1", "'text OR page', which is not there"),
        ("page=2147483648", "page .int32. with 2147483648.*int32 holds"),
        ("page=-99999999999999999999999999", "int32 holds"),
        ("page=1_000", "int32 holds"),
        ("page=١", "int32 holds"),
        ("page=1.0", "int32 holds"),
        ("page=0x10", "int32 holds"),
        ("page=", "int32 holds"),
        ("page=1,", "int32 holds"),
        ("page~1", "searches text"),
        ("page>null", "int32 holds"),
        ("text=\ud800", "valid Unicode"),
    ],
)
def test_what_is_refused(hostile, line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_filter(line, hostile.schema)


@pytest.fixture(scope="module")
def typed(tmp_path_factory) -> lance.LanceDataset:
    days = [date(2026, 1, day) for day in (1, 2, 3)]
    rows = pa.table(
        {
            "row_id": ["a", "b", "c", "none"],
            "kind": ["image", "video", "text, spoken", None],
            "dt": pa.array([*days, None], pa.date32()),
            "made": pa.array([TIME.replace(day=day) for day in (1, 2, 3)] + [None]),
            "nano": pa.array(
                [TIME.replace(day=day, tzinfo=None) for day in (1, 2, 3)] + [None],
                pa.timestamp("ns"),
            ),
            "page": pa.array([1, 2, -3, None], pa.int32()),
            "big": pa.array([2**62, 0, -(2**63), None], pa.int64()),
            "start_s": pa.array([0.5, 1.25, 1e300, None], pa.float64()),
            "sharp": pa.array([0.1, 0.2, 3e38, None], pa.float32()),
            "truncated": [True, False, False, None],
            "tags": [["a"], [], [], None],
            "unsigned": pa.array([1, 2, 3, None], pa.uint32()),
        }
    )
    return lance.write_dataset(rows, str(tmp_path_factory.mktemp("typed") / "rows.lance"))


@pytest.mark.parametrize(
    ("line", "rows"),
    [
        ("kind=image", "a"),
        ("kind = image, video", "a b"),
        ("kind!=image", "b c none"),
        ("kind!=image,null", "b c"),
        ("kind=null", "none"),
        ("kind!=null", "a b c"),
        ("kind=image,null", "a none"),
        ("kind~, sp", "c"),
        ("kind>=text", "b c"),
        ("dt>=2026-01-02", "b c"),
        ("dt<2026-01-02", "a"),
        ("dt=2026-01-01,2026-01-03", "a c"),
        ("made>2026-01-02", "b c"),
        ("made<=2026-01-02T04:04:05.000678+01:00", "a b"),
        ("nano=2026-01-02T03:04:05.000678", "b"),
        ("page=-3", "c"),
        ("page>=1", "a b"),
        ("big=4611686018427387904", "a"),
        ("big>=-9223372036854775808", "a b c"),
        ("start_s>1.0", "b c"),
        ("start_s=1e300", "c"),
        ("sharp=0.1", "a"),
        ("truncated=false", "b c"),
        ("truncated!=true", "b c none"),
    ],
)
def test_lines_of_every_type(typed, line: str, rows: str) -> None:
    assert found(typed, parse_filter(line, typed.schema)) == rows.split()


@pytest.mark.parametrize(
    ("mapping", "rows"),
    [
        ({"kind": "text, spoken"}, "c"),
        ({"kind": None}, "none"),
        ({"kind": ["image", None]}, "a none"),
        ({"kind": []}, ""),
        ({"dt": date(2026, 1, 2)}, "b"),
        ({"dt": "2026-01-02"}, "b"),
        ({"made": TIME}, "b"),
        ({"page": np.int64(2)}, "b"),
        ({"page": {1, 2}, "kind": "video"}, "b"),
        ({"start_s": 0.5}, "a"),
        ({"truncated": True}, "a"),
        ({"page": np.array([1, -3])}, "a c"),
    ],
)
def test_mappings_of_every_type(typed, mapping: dict, rows: str) -> None:
    assert found(typed, filter_of(mapping, typed.schema)) == rows.split()


@pytest.mark.parametrize(
    "mapping",
    [
        {"page": True},
        {"page": 1.5},
        {"page": 2**31},
        {"big": 2**63},
        {"big": 10**5000},
        {"kind": 5},
        {"kind": b"image"},
        {"kind": object()},
        {"kind": {"$ne": None}},
        {"dt": TIME},
        {"dt": "yesterday"},
        {"start_s": math.nan},
        {"start_s": math.inf},
        {"start_s": 10**400},
        {"sharp": 1e300},
        {"truncated": 1},
        {"truncated": "yes"},
        {"tags": "a"},
        {"unsigned": 1},
        {5: "x"},
        {None: "x"},
    ],
)
def test_mappings_that_do_not_fit(typed, mapping: dict) -> None:
    with pytest.raises(ConfigError, match=r"A filter (compares|names) the column"):
        filter_of(mapping, typed.schema)


def test_forms_of_a_filter(typed) -> None:
    schema = typed.schema
    expression = pc.field("kind") == "image"
    assert filter_of(expression, schema) is expression
    assert filter_of(None, schema) is None
    assert filter_of({}, schema) is None
    assert filter_of([], schema) is None
    assert found(typed, filter_of("page=2", schema)) == ["b"]
    assert found(typed, filter_of(["page>0", "kind~vid"], schema)) == ["b"]
    for wrong in (5, [5], b"kind=image"):
        with pytest.raises(ConfigError, match="A filter is a"):
            filter_of(wrong, schema)
    # SQL is a line like any other: the value is all of it.
    assert found(typed, filter_of("kind = 'image' OR page = 1", schema)) == []
