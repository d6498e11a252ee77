"""Search results as one HTML file to look at and to pass on: no script, nothing from outside.

Names and texts come from a bucket that anybody may have written to. They are escaped where the
page is put together (`markup`), and a content security policy forbids everything but the one
style sheet and pictures inside the file.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch import __version__
from qvl_batch.api.gallery_card import card, image, number, ordinal
from qvl_batch.api.markup import Markup, element, excerpt, visible
from qvl_batch.errors import ConfigError, StorageError, UnitError
from qvl_batch.media.thumbnail import MediaPart, Thumbnail, Thumbnailer
from qvl_batch.storage import Storage, is_local, local_path

# What a search must bring besides its own columns: without them another object, or another version
# of it, could be shown for the row.
GALLERY_COLUMNS = ("etag", "byte_offset", "byte_length")
_NEEDED = ("uri", "kind", "page", "start_s", "end_s", "text", *GALLERY_COLUMNS)
_SCORES = ("score", "first_score", "rerank_score")
_TITLE_CHARS = 200
# About 10 MB of pictures at the default sizes.
_CARDS_HELD = 64


@dataclass(frozen=True, kw_only=True)
class GallerySection:
    """A query and what was found for it.

    Args:
        query: Its text; may be empty where there is a picture.
        hits: Rows of one query as a search returns them, with `GALLERY_COLUMNS`; optionally
            ``rerank_score``, ``rank_before`` and ``first_score``. Without ``rank`` or
            ``rank_after`` their order is the rank.
        query_image: A path or address, bytes, a Pillow image or a uint8 array.
    """

    query: str
    hits: pa.Table
    query_image: Any = None

    def __post_init__(self) -> None:
        names = self.hits.column_names
        missing = [name for name in _NEEDED if name not in names]
        if missing:
            raise ConfigError(
                f"The hits have no column {', '.join(missing)}.",
                f"Search with columns={list(GALLERY_COLUMNS)}.",
            )
        if not set(_SCORES) & set(names):
            raise ConfigError("The hits have no score.", "Give them as a search returns them.")
        if "query" in names and pc.count_distinct(self.hits["query"]).as_py() > 1:
            raise ConfigError("The hits are of several queries.", "Use sections_of(queries, hits).")

    @property
    def is_reranked(self) -> bool:
        return "rerank_score" in self.hits.column_names

    def rows(self) -> list[dict[str, Any]]:
        """Return the hits in the order of their ``rank``, from 1 where they bring none."""
        rows = self.hits.to_pylist()
        for place, row in enumerate(rows, start=1):
            row["rank"] = row.get("rank") or row.get("rank_after") or place
        return sorted(rows, key=lambda row: row["rank"])


def sections_of(queries: Sequence[str], hits: pa.Table) -> list[GallerySection]:
    """Return one section a query from the result of one search for several.

    Args:
        queries: Their texts; ``hits["query"]`` is a place in them.
    """
    return [
        GallerySection(query=query, hits=hits.filter(pc.equal(hits["query"], place)))
        for place, query in enumerate(queries)
    ]


def write_gallery(
    path: str | os.PathLike[str],
    sections: Sequence[GallerySection],
    *,
    title: str = "Search results",
    facts: Mapping[str, object] | None = None,
    storage: Storage | None = None,
    thumbnailer: Thumbnailer | None = None,
) -> None:
    """Write one self-contained HTML file with a card for every hit.

    Media are fetched again and checked against the tables' etags; what can not be read or decoded
    shows its reason instead of a picture. Few pictures are held in memory at a time.

    Args:
        path: A local file; replaced only once the page is whole.
        sections: In the order of the page.
        title: Heading of the page.
        facts: What the page is about, such as the collection, its recipe and counts, by label.
        storage: How the media are reached; None: from the environment.
        thumbnailer: Made and closed here if None.

    Raises:
        StorageError: If the file can not be written.
    """
    target = local_path(os.fspath(path))
    if not is_local(target):
        raise StorageError(f"{path} is not a local file.", "Write it to a local path.")
    with contextlib.ExitStack() as stack:
        if thumbnailer is None:
            thumbnailer = stack.enter_context(Thumbnailer(storage or Storage.of()))
        part = f"{target}.{secrets.token_hex(4)}.part"
        try:
            with open(part, "x", encoding="utf-8", newline="\n") as file:
                stack.callback(_remove, part)
                file.writelines(_page(sections, thumbnailer, title, facts or {}))
            os.replace(part, target)
        except OSError as error:
            reason = error.strerror or error
            raise StorageError(f"{path} can not be written: {reason}.", "") from error


def _page(
    sections: Sequence[GallerySection],
    thumbnailer: Thumbnailer,
    title: str,
    facts: Mapping[str, object],
) -> Iterator[str]:
    style = Path(__file__).with_name("gallery.css").read_text(encoding="utf-8")
    title = visible(excerpt(title, _TITLE_CHARS))
    yield "<!doctype html>\n"
    # What stays open here is written piece by piece.
    yield '<html lang="en">\n'
    yield element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", **{"http-equiv": "Content-Security-Policy"}, content=_policy(style)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", Markup(style)),
    )
    yield "\n<body>\n"
    yield _header(sections, title, facts)
    yield "\n<main>\n"
    for place, section in enumerate(sections, start=1):
        yield from _section(section, place, thumbnailer)
    if not sections:
        yield element("p", "No query was asked.", class_="empty")
    yield "</main>\n"
    yield _footer(sections)
    yield "\n</body>\n</html>\n"


def _policy(style: str) -> str:
    """Return a policy that allows this style sheet, by its hash, and pictures inside the file."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )


def _header(sections: Sequence[GallerySection], title: str, facts: Mapping[str, object]) -> Markup:
    return element(
        "header",
        element("h1", title, dir="auto"),
        element(
            "dl",
            *(
                element("div", element("dt", label), element("dd", visible(str(value))))
                for label, value in facts.items()
            ),
            class_="facts",
        )
        if facts
        else None,
        element(
            "nav",
            *(
                element("a", excerpt(_name(section), 48), href=f"#q{place}", dir="auto")
                for place, section in enumerate(sections, start=1)
            ),
            aria_label="Queries",
        )
        if len(sections) > 1
        else None,
    )


def _section(section: GallerySection, place: int, thumbnailer: Thumbnailer) -> Iterator[str]:
    """Yield a section piece by piece: of many hits only some are held at a time."""
    rows = section.rows()
    yield f'<section id="q{place}">\n'
    yield element(
        "div",
        _asked(section, thumbnailer),
        element(
            "div",
            element("h2", excerpt(_name(section), 1000), dir="auto"),
            element("p", _summary(section, rows), class_="summary"),
        ),
        class_="asked",
    )
    if rows:
        yield '\n<ol class="cards">\n'
        for first in range(0, len(rows), _CARDS_HELD):
            yield from _cards(rows[first : first + _CARDS_HELD], thumbnailer)
        yield "</ol>"
    else:
        yield element("p", "Nothing was found.", class_="empty")
    yield "\n</section>\n"


def _cards(rows: Sequence[Mapping[str, Any]], thumbnailer: Thumbnailer) -> Iterator[str]:
    parts = [None if row["kind"] == "text" else _part(row) for row in rows]
    wanted = [part for part in parts if part is not None]
    made = dict(zip(wanted, thumbnailer.thumbnails(wanted), strict=True))
    for row, part in zip(rows, parts, strict=True):
        yield card(row, None if part is None else made[part])
        yield "\n"


def _name(section: GallerySection) -> str:
    return section.query or (
        "A picture" if section.query_image is not None else "A query without text"
    )


def _asked(section: GallerySection, thumbnailer: Thumbnailer) -> Markup | None:
    """Return the query's picture, or why it can not be shown."""
    if section.query_image is None:
        return None
    outcome: Thumbnail | UnitError = thumbnailer.picture(section.query_image, "the query's picture")
    if isinstance(outcome, UnitError):
        return element("p", visible(outcome.reason), class_="reason query")
    return element("div", image(outcome.pictures[0], "The query’s picture"), class_="query")


def _part(row: Mapping[str, Any]) -> MediaPart:
    return MediaPart(
        uri=row["uri"] or "",
        kind=row["kind"],
        etag=row["etag"],
        byte_offset=row["byte_offset"],
        byte_length=row["byte_length"],
        page=row["page"],
        start_s=number(row["start_s"]),
        end_s=number(row["end_s"]),
    )


def _summary(section: GallerySection, rows: Sequence[Mapping[str, Any]]) -> str:
    count = f"{len(rows)} hit{'' if len(rows) == 1 else 's'}"
    if not section.is_reranked:
        return count
    known = [row for row in rows if row.get("rank_before") is not None]
    moved = sum(row["rank_before"] != row["rank"] for row in known)
    first = next((row["rank_before"] for row in known if row["rank"] == 1), None)
    said = [count, f"reranking moved {moved}" if moved else "reranking moved none"]
    if first is not None and first != 1:
        said.append(f"the first was {ordinal(first)}")
    return " · ".join(said)


def _footer(sections: Sequence[GallerySection]) -> Markup:
    reranked = any(section.is_reranked for section in sections)
    return element(
        "footer",
        element(
            "p",
            "Rerank: the reranker’s probability that the medium answers the query. "
            if reranked
            else None,
            f"{'Search' if reranked else 'Score'}: similarity of the vectors, 1 at most. ",
            "Scores of different queries do not compare. ",
            "Pictures are read afresh from where the media lie and shown as the model sees them.",
        ),
        element("p", f"qvl-batch {__version__}"),
    )


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
