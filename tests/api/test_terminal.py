"""Names and texts of a bucket in a terminal: seen, never obeyed."""

from __future__ import annotations

import io

import pyarrow as pa
import pytest
from rich.cells import cell_len
from rich.console import Console

from qvl_batch.api.terminal import hits_table, place, printable, shortened


def hit(**values: object) -> dict[str, object]:
    plain = {"rank": 1, "score": 0.5, "uri": "a.png", "kind": "image", "text": None}
    return plain | {"page": None, "start_s": None, "end_s": None} | values


def shown(hits: list[dict[str, object]], title: str = "title", width: int = 120) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    console.print(hits_table(pa.Table.from_pylist(hits), title, width=width))
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("[red]x[/red].png", "[red]x[/red].png"),
        ("[link=http://x]y", "[link=http://x]y"),
        ("a\x1b[31mred.png", "a\\x1b[31mred.png"),
        ("a\x1b]0;title\x07.png", "a\\x1b]0;title\\x07.png"),
        ("a\nb\rc\td.png", "a\\nb\\rc\\td.png"),
        ("a\x00b", "a\\x00b"),
        ("a\x9b31m", "a\\x9b31m"),
        # Turns what follows around: gnp.exe would read exe.png.
        ("a\u202egnp.exe", "a\\u202egnp.exe"),
        ("a\u2028b", "a\\u2028b"),
        ("a\udcffb", "a\\udcffb"),
        ("<script>alert('x')</script>", "<script>alert('x')</script>"),
        (":smile: 'quoted' \"twice\"", ":smile: 'quoted' \"twice\""),
        ("Ünïcödé 図.png", "Ünïcödé 図.png"),
    ],
)
def test_a_name_is_printed_as_it_is_or_escaped(name, expected):
    assert printable(name) == expected
    assert expected in shown([hit()], title=name)
    # Arrow's strings hold no lone surrogates; a command line may.
    if "\udcff" not in name:
        out = shown([hit(uri=name)])
        assert expected in out
        assert "\x1b" not in out


def test_a_text_is_one_line():
    assert "one two [b]three\\x1b[0m" in shown([hit(text="one\n\ttwo\u2028[b]three\x1b[0m")])


def test_a_long_name_loses_its_middle_and_keeps_its_end():
    name = "s3://bucket/" + "folder/" * 30 + "photo_0001.jpg"
    cut = shortened(name, 40)
    assert cell_len(cut) <= 40
    assert cut.startswith("s3://bucket")
    assert cut.endswith("photo_0001.jpg")
    assert "…" in cut
    wide = shortened("図" * 100, 20)
    assert cell_len(wide) <= 20
    assert shortened("short", 40) == "short"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_lines_fit_the_terminal_and_names_keep_their_ends(width):
    hits = [hit(uri="/data/" + "x" * 300 + "0001.png", text="word " * 100)]
    lines = shown(hits, width=width).splitlines()
    assert max(map(cell_len, lines)) <= width
    (line,) = [line for line in lines if "/data/x" in line]
    assert line.split()[:3] == ["1", "0.500", "image"]
    assert "0001.png" in line
    assert ("word" in line) == (width >= 80)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"page": 0}, "page 1"),
        ({"start_s": 0.0, "end_s": 4.0}, "0:00.0–0:04.0"),
        ({"start_s": 59.97, "end_s": 3725.5}, "1:00.0–1:02:05.5"),
        ({}, ""),
    ],
)
def test_where_in_its_medium_a_hit_lies(values, expected):
    assert place(hit(**values)) == expected


def test_ranks_before_and_after():
    hits = [
        hit(rank=1, rank_before=7, rerank_score=0.9, rerank_error=None),
        hit(rank=2, rank_before=1, rerank_score=None, rerank_error="MissingMediaError: gone"),
    ]
    out = shown(hits)
    assert "before" in out
    assert "0.900" in out
    assert "–" in out
