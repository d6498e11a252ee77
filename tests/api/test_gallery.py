"""The gallery: what is on it, and that no name, text or file can be more than shown."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from qvl_batch.api.gallery import GALLERY_COLUMNS, GallerySection, sections_of, write_gallery
from qvl_batch.api.gallery_card import clock, ordinal
from qvl_batch.api.markup import Markup, element, excerpt, shortened, visible
from qvl_batch.errors import ConfigError, StorageError
from qvl_batch.media.fetch import local_etag
from qvl_batch.storage import Storage
from tests.api.browser import chromium
from tests.media.clips import clip, image_bytes, moving_picture, pdf

# A name may hold anything but "/" and NUL; a slash makes a folder, which an address may have too.
HOSTILE = (
    "<script>document.title='owned'<",
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=1">',
    "'><svg onload=document.title=1>",
    "x' onmouseover='document.title=1",
    '" style="position:fixed;inset:0;background:red',
    "</h3></article></li></ol><h1>Your session is over<",
    "<!-- ",
    "--><iframe src=javascript:alert(1)>",
    "]]><![CDATA[<b>",
    "javascript:document.title=1",
    "java\nscript:alert(1)",
    "data:text,html;<b>",
    "&lt;b&gt; &amp;#60;i&#62; &quot;",
    "</title><script>1<",
    "</style><style>*{display:none}<",
    "evil\u202egnp.exe",
    "\u2066isolate\u2067 \u200f\u061c",
    "tab\tbell\x07escape\x1b[31m\x7f\x9b",
    "line\u2028paragraph\u2029next\x85",
    "{{7*7}} ${7*7} <%= 7 %>",
    "long-" * 45,
    "zalgo" + "\u0301\u0489" * 40,
    "שלום עולם",
    "日本語 👩‍👩‍👧‍👦 émoji",
    "  leading and trailing  ",
    "%3Cscript%3E",
)
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "dl", "dt"),
    *("dd", "div", "nav", "a", "main", "section", "p", "ol", "li", "article", "img", "span", "bdi"),
    *("figure", "figcaption", "blockquote", "strong", "svg", "rect", "details", "summary"),
    "footer",
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "id", "href", "title", "dir"),
    *("src", "alt", "width", "height", "aria-label", "aria-hidden", "viewbox"),
    "preserveaspectratio",
}


@dataclass
class Reading(HTMLParser):
    """What a parser makes of a page: the elements with their attributes' names, and the rest."""

    shape: list[tuple[str, ...]] = field(default_factory=list)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.shape.append((tag, *(name for name, _ in attrs)))
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self.shape.append((f"/{tag}",))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.other.append(data)

    def handle_pi(self, data: str) -> None:
        self.other.append(data)

    def unknown_decl(self, data: str) -> None:
        self.other.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def values(self, tag: str, name: str) -> list[str]:
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]


def read(path: Path) -> Reading:
    reading = Reading()
    reading.feed(path.read_text(encoding="utf-8"))
    reading.close()
    return reading


def row(uri: str, kind: str = "image", **fields: Any) -> dict[str, Any]:
    if "etag" not in fields:
        fields["etag"] = local_etag(os.stat(uri)) if os.path.exists(uri) else None
    nothing = dict.fromkeys(("page", "start_s", "end_s", "text", "byte_offset", "byte_length"))
    known = {"row_id": "0f" * 16 + ":0", "table": "media__dt-1", "score": 0.5}
    return nothing | known | {"uri": uri, "kind": kind} | fields


def table(*rows: dict[str, Any]) -> pa.Table:
    names = list(dict.fromkeys(name for one in rows for name in one))
    return pa.Table.from_pylist([{name: one.get(name) for name in names} for one in rows])


def section(*rows: dict[str, Any], query: str = "a query") -> GallerySection:
    return GallerySection(query=query, hits=table(*rows))


def picture(number: int = 1, width: int = 96, height: int = 48) -> bytes:
    return image_bytes(Image.fromarray(moving_picture(number, width, height)))


def named_file(folder: Path, name: str, content: bytes) -> str:
    """Write a file of a hostile name as far as the file system has it; return its path."""
    path = Path(os.fsdecode(os.path.join(os.fsencode(folder), os.fsencode(name + ".png"))))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def hostile_page(folder: Path, names: tuple[str, ...]) -> Path:
    """Write a page on which every name stands in every place that takes one."""
    rows = []
    for number, name in enumerate(names):
        # As many files and as many texts for every list of names: only the words differ.
        here = folder / f"{number}"
        uri = named_file(here, name, picture(number))
        fields = {"text": f"caption {name}", "camera": f"made by {name}", "rank": number + 1}
        rows.append(row(uri, **fields, row_id=f"{name}:0", table=f"t {name}"))
    rows += [
        row(str(folder / f"gone {name}"), etag=f"e {name}", rank=len(rows) + 1) for name in names
    ]
    rows += [row("", kind="text", text=f"note {name}", rank=len(rows) + 1) for name in names]
    sections = [section(*rows, query=f"query {name}") for name in names[:2]]
    sections += [section(rows[0], query=f"query {name}") for name in names[2:]]
    path = folder / "gallery.html"
    write_gallery(
        path, sections, title=f"title {names[1]}", facts={f"fact {n}": f"value {n}" for n in names}
    )
    return path


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    return hostile_page(tmp_path_factory.mktemp("hostile"), HOSTILE)


def test_hostile_names_change_nothing_of_the_structure(hostile, tmp_path):
    harmless = hostile_page(tmp_path, tuple(f"name {i}" for i in range(len(HOSTILE))))
    assert read(hostile).shape == read(harmless).shape


def test_the_page_has_only_elements_and_attributes_of_ours(hostile):
    reading = read(hostile)
    assert {tag.removeprefix("/") for tag, *_ in reading.shape} == TAGS - {"figure", "figcaption"}
    assert {name for _, name, _ in reading.attributes} <= ATTRIBUTES
    assert not reading.other
    assert reading.shape.count(("style",)) == 1


def test_nothing_on_the_page_leads_or_asks_outside(hostile):
    reading = read(hostile)
    sources = reading.values("img", "src")
    assert len(sources) >= len(HOSTILE)
    for source in sources:
        kind, _, content = source.partition(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
            assert image.size == (96, 48)
    links = reading.values("a", "href")
    assert len(links) == len(HOSTILE)
    assert all(re.fullmatch(r"#q\d+", link) for link in links)
    assert set(map("#{}".format, reading.values("section", "id"))) == set(links)
    style = re.search(r"<style>(.*?)</style>", hostile.read_text(), re.S)[1]
    assert not re.search(r"url\(|@import|expression|</", style)


@pytest.mark.parametrize("name", HOSTILE)
def test_every_name_can_be_read(hostile, name):
    reading = read(hostile)
    last = visible(f"{name}.png".rpartition("/")[2])
    assert last in reading.values("h3", "title")
    assert last in reading.values("img", "alt")
    assert any(address.endswith(visible(f"{name}.png")) for address in reading.values("p", "title"))
    assert " ".join(visible(f"value {name}").split()) in reading.text
    shown = [char for text in reading.texts for char in text]
    assert not {c for c in shown if c < " " and c not in "\n\t"}


def test_marks_that_turn_the_writing_are_shown_in_names(hostile):
    addresses = [*read(hostile).values("h3", "title"), *read(hostile).values("p", "title")]
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\u061c]", "".join(addresses))
    assert any("evil\\u202egnp.exe.png" in address for address in addresses)


def test_the_policy_allows_this_style_and_pictures_inside_the_file_only(hostile):
    (policy,) = [v for v in read(hostile).values("meta", "content") if "default-src" in v]
    style = re.search(r"<style>(.*?)</style>", hostile.read_text(), re.S)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )


def test_every_kind_of_medium_is_shown(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.mp4").write_bytes(clip(40))
    (tmp_path / "c.pdf").write_bytes(pdf((50, 80), (60, 80), (70, 80)))
    path = tmp_path / "gallery.html"
    write_gallery(
        path,
        [
            section(
                row(str(tmp_path / "a.png"), text="a ramp", score=0.91),
                row(str(tmp_path / "b.mp4"), "video", start_s=2.0, end_s=4.0, score=0.8),
                row(str(tmp_path / "c.pdf"), "document", page=1, score=0.7),
                row("", "text", text="one two three", score=0.6),
            )
        ],
        title="Findings",
        facts={"Collection": "media", "Rows": 4},
    )
    reading = read(path)
    assert reading.values("html", "lang") == ["en"]
    assert reading.values("img", "alt") == [
        "a.png",
        *(f"b.mp4 at {seconds} s" for seconds in ("2.2", "2.7", "3.2", "3.7")),
        "Page 2 of c.pdf",
    ]
    for words in (
        *("Findings", "Collection media", "a query", "4 hits", "0.910", "0.800"),
        *("Image · 96 × 48 px", "Video · 2 s – 4 s of 4 s", "Page 2 of 3", "a ramp"),
        *("2.2 s", "one two three", str(tmp_path / "a.png")),
    ):
        assert words in reading.text, words


def test_what_can_not_be_shown_says_why(tmp_path):
    good, cut = picture(), picture(width=200, height=200)
    files = {"good.png": good, "new.png": good, "cut.png": cut[: len(cut) // 2], "page.png": b"<p>"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    write_gallery(
        tmp_path / "gallery.html",
        [
            section(
                row(str(tmp_path / "good.png")),
                row(str(tmp_path / "new.png"), etag="1-1"),
                row(str(tmp_path / "cut.png")),
                row(str(tmp_path / "page.png")),
                row(str(tmp_path / "gone.png")),
                row("ftp://host/a.png"),
            )
        ],
    )
    reading = read(tmp_path / "gallery.html")
    assert len(reading.values("img", "src")) == 1
    for words in (
        *("Changed since it was embedded", "Can not be decoded", "No longer there"),
        *("Another kind of file than listed", "May not be read", "ftp:// is not read"),
    ):
        assert words in reading.text, words


def test_both_scores_and_ranks_are_shown_after_reranking(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    uri = str(tmp_path / "a.png")
    hits = [
        row(uri, rank=3, rank_before=1, first_score=0.83, rerank_score=0.02, score=0.02),
        row(uri, rank=1, rank_before=4, first_score=0.41, rerank_score=0.97, score=0.97),
        row(uri, rank=2, rank_before=2, first_score=0.62, rerank_score=0.55, score=0.55),
        row(uri, rank=4, rank_before=3, first_score=0.52, rerank_score=float("nan"), score=0.0),
    ]
    write_gallery(tmp_path / "gallery.html", [section(*hits)])
    text = read(tmp_path / "gallery.html").text
    first, second, third, fourth = (
        text[text.index(f"{a}. a.png") - 110 : text.index(f"{a}. a.png")] for a in "1234"
    )
    assert re.search(r"1 ▲.3 4th → 1st Rerank 0\.970 Search 0\.410 $", first)
    assert re.search(r"2 = stayed 2nd Rerank 0\.550 Search 0\.620 $", second)
    assert re.search(r"3 ▼.2 1st → 3rd Rerank 0\.020 Search 0\.830 $", third)
    assert re.search(r"4 ▼.1 3rd → 4th Rerank – Search 0\.520 $", fourth)
    assert "4 hits · reranking moved 3 · the first was 4th" in text


def test_bars_are_as_long_as_their_scores(tmp_path):
    scores = [1.5, 1.0, 0.25, 0.0, -0.5, None]
    write_gallery(
        tmp_path / "g.html", [section(*(row("", "text", text="x", score=s) for s in scores))]
    )
    widths = read(tmp_path / "g.html").values("rect", "width")
    assert widths[0::2] == ["100"] * 6
    assert widths[1::2] == ["100.0", "100.0", "25.0", "0.0", "0.0", "0.0"]


@pytest.mark.parametrize("form", ["path", "bytes", "array", "broken"])
def test_a_query_by_picture(tmp_path, form):
    (tmp_path / "q.png").write_bytes(picture())
    value = {
        "path": tmp_path / "q.png",
        "bytes": picture(),
        "array": moving_picture(1, 96, 48),
        "broken": b"<script>",
    }[form]
    asked = GallerySection(query="", hits=table(row("", "text", text="x")), query_image=value)
    write_gallery(tmp_path / "gallery.html", [asked])
    reading = read(tmp_path / "gallery.html")
    shown = reading.values("img", "alt")
    assert shown == ([] if form == "broken" else ["The query’s picture"])
    assert "A picture" in reading.text
    assert ("the bytes are text" in reading.text) == (form == "broken")


def test_credentials_in_an_address_are_not_shown(tmp_path):
    uri = "s3://me:hunter2@bucket/a.png?X-Amz-Signature=abc&token=hunter3"
    write_gallery(
        tmp_path / "g.html",
        [section(row(uri))],
        storage=Storage(endpoint_url="http://127.0.0.1:1", anonymous=True),
    )
    page = (tmp_path / "g.html").read_text()
    assert "hunter" not in page
    assert "s3://bucket/a.png" in page


def test_pages_without_hits_and_without_queries(tmp_path):
    nothing = table(row("", "text", text="x")).slice(0, 0)
    write_gallery(tmp_path / "a.html", [GallerySection(query="q", hits=nothing)])
    write_gallery(tmp_path / "b.html", [])
    assert "Nothing was found." in read(tmp_path / "a.html").text
    assert "No query was asked." in read(tmp_path / "b.html").text


@pytest.mark.parametrize("column", ["uri", "page", *GALLERY_COLUMNS])
def test_hits_that_could_show_the_wrong_medium_are_refused(column):
    hits = table(row("", "text", text="x")).drop_columns(column)
    with pytest.raises(ConfigError, match=f"no column {column}"):
        GallerySection(query="q", hits=hits)


def test_hits_of_several_queries_are_split():
    hits = table(*(row("", "text", text=str(i), query=i % 2) for i in range(4)))
    with pytest.raises(ConfigError, match="several queries"):
        GallerySection(query="q", hits=hits)
    parts = sections_of(["even", "odd", "none"], hits)
    texts = [[one["text"] for one in part.rows()] for part in parts]
    assert texts == [["0", "2"], ["1", "3"], []]


def test_many_hits_are_all_there_in_their_order(tmp_path):
    files = []
    for number in range(150):
        path = tmp_path / f"{number:03}.png"
        path.write_bytes(picture(number, 8, 4))
        files.append(row(str(path), score=1 - number / 150))
    write_gallery(tmp_path / "gallery.html", [section(*files)])
    names = read(tmp_path / "gallery.html").values("h3", "title")
    assert names == [f"{number:03}.png" for number in range(150)]
    assert len(read(tmp_path / "gallery.html").values("img", "src")) == 150


class Untold:
    """A fact that fails when it is written."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_a_page_that_fails_leaves_the_one_before(tmp_path):
    path = tmp_path / "gallery.html"
    write_gallery(path, [], title="before")
    with pytest.raises(RuntimeError):
        write_gallery(path, [], title="after", facts={"x": Untold()})
    assert "before" in path.read_text()
    assert os.listdir(tmp_path) == ["gallery.html"]


def test_where_it_can_not_be_written(tmp_path):
    with pytest.raises(StorageError, match=r"nowhere.* can not be written"):
        write_gallery(tmp_path / "nowhere" / "g.html", [])
    with pytest.raises(StorageError, match="not a local file"):
        write_gallery("s3://bucket/g.html", [])


def test_markup_escapes_what_is_not_markup():
    made = element("p", "<b>", Markup("<i>"), None, 7, title='"<', hidden=True, lang=None)
    assert made == '<p title="&quot;&lt;" hidden>&lt;b&gt;<i>7</p>'
    assert element("p", "\ud800\x00\x0b") == "<p>\\ud800\\x00\\x0b</p>"
    for tag, attributes in (("p onload=x", {}), ("p", {"a b": 1}), ("p", {'x"': 1})):
        with pytest.raises(ValueError, match="is no"):
            element(tag, **attributes)


def test_shortening():
    assert shortened("a" * 40, 40) == "a" * 40
    assert shortened("0123456789" * 9, 21) == "01234567…890123456789"[-22:]
    assert len(shortened("0123456789" * 9, 21)) == 21
    assert excerpt("one  two\nthree", 20) == "one two three"
    assert excerpt("one two three four", 12) == "one two…"
    assert len(excerpt("x" * 10**6, 50)) == 50


def test_words_for_times_and_ranks():
    assert [clock(s) for s in (0, 2.5, 59.9, 65, 3665)] == [
        *("0 s", "2.5 s", "59.9 s", "1:05", "1:01:05")
    ]
    assert [ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 102, 111)] == [
        *("1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "111th")
    ]


@pytest.mark.chromium
def test_a_browser_runs_no_script_and_shows_every_picture(hostile):
    pictures = (
        "[...document.images].map(i => i.complete && i.naturalWidth > 0 && "
        "i.getBoundingClientRect().width > 0)"
    )
    with chromium() as page:
        page.open(hostile)
        assert page.evaluate("document.title") == visible(f"title {HOSTILE[1]}")
        shown = page.evaluate(pictures)
        assert len(shown) >= len(HOSTILE)
        assert all(shown)
        assert page.evaluate("document.scripts.length") == 0
        assert page.evaluate("document.querySelectorAll('iframe, object, embed, form').length") == 0
        # The one style sheet passed the policy; nothing else was asked for or complained of.
        assert page.evaluate("getComputedStyle(document.querySelector('.cards')).display") == "grid"
        asked = {url.partition(":")[0] for url in page.requests}
        assert asked <= {"file", "data", "about"}
        assert [url for url in page.requests if url.startswith("file:")] == [hostile.as_uri()]
        assert page.complaints == []


@pytest.mark.chromium
def test_the_policy_stops_a_script_that_got_in(tmp_path):
    write_gallery(tmp_path / "g.html", [section(row("", "text", text="x"))], title="as it was")
    page_text = (tmp_path / "g.html").read_text()
    attack = "<script>document.title='owned'</script><img src=x onerror=document.title='owned'>"
    (tmp_path / "attacked.html").write_text(page_text.replace("<main>", f"<main>{attack}"))
    with chromium() as page:
        page.open(tmp_path / "attacked.html")
        assert page.evaluate("document.scripts.length") == 1
        assert page.evaluate("document.title") == "as it was"
        assert any("Content Security Policy" in complaint for complaint in page.complaints)


@pytest.mark.chromium
def test_it_fits_a_phone_and_follows_the_readers_colours(hostile):
    brightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    with chromium() as page:
        page.open(hostile, width_px=390)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert np.mean(page.evaluate(brightness)) > 200
        page.open(hostile, width_px=390, dark=True)
        assert np.mean(page.evaluate(brightness)) < 60
