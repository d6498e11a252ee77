"""One hit as a card: its picture, its scores and ranks, its name; pure functions, no reading."""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import math
from collections.abc import Mapping
from typing import Any

from qvl_batch import errors
from qvl_batch.api.markup import Markup, element, excerpt, joined, shortened, visible
from qvl_batch.errors import UnitError
from qvl_batch.media.fetch import printable_uri
from qvl_batch.media.thumbnail import Picture, Thumbnail

_NAME_CHARS, _ADDRESS_CHARS, _VALUE_CHARS = 40, 56, 1200
_SHORT_NOTE_CHARS = 90
# What stands elsewhere on the card, or says nothing to a reader.
_SHOWN_ELSEWHERE = frozenset(
    (
        *("query", "rank", "rank_after", "rank_before", "score", "first_score", "rerank_score"),
        *("uri", "kind", "page", "start_s", "end_s", "text", "byte_offset", "byte_length"),
        *("row_id", "table", "unit_id", "media_id", "segment", "etag", "pair_id", "query_id"),
        *("run_id", "made_at", "num_tokens", "truncated"),
    )
)
_PLAIN = (str, int, float, bool, dt.date, dt.time, dt.timedelta, decimal.Decimal)
_REASONS: Mapping[type[UnitError], str] = {
    errors.AccessDeniedError: "May not be read",
    errors.ChangedMediaError: "Changed since it was embedded",
    errors.CorruptMediaError: "Can not be decoded",
    errors.DecoderKilledError: "The decoder had to be stopped",
    errors.EmptyMediaError: "Empty",
    errors.FetchError: "Can not be reached",
    errors.KindMismatchError: "Another kind of file than listed",
    errors.LimitExceededError: "Over a limit",
    errors.MissingMediaError: "No longer there",
}


def card(hit: Mapping[str, Any], outcome: Thumbnail | UnitError | None) -> Markup:
    """Return a list item.

    Args:
        hit: A row of a section's hits, with ``rank``.
        outcome: Its thumbnail, or why there is none; None for a text.
    """
    uri = printable_uri(hit["uri"] or "")
    name = visible(uri.rstrip("/").rpartition("/")[2]) or "Text"
    text = hit.get("text") or ""
    if outcome is None:
        quoted = element("span", excerpt(text, 260), dir="auto")
        length = " long" if len(text) > _SHORT_NOTE_CHARS else ""
        stage = element("blockquote", quoted, class_=f"stage note{length}")
        said = None
    else:
        stage = stage_of(outcome, hit, name)
        said = element("p", excerpt(text, 160), class_="said", dir="auto") if text else None
    return element(
        "li",
        element(
            "article",
            stage,
            element(
                "div",
                scores(hit),
                element(
                    "h3",
                    element("span", f"{hit['rank']}. ", class_="aside"),
                    # Not turned round for a Hebrew name: its ending stays where endings are.
                    element("bdi", shortened(name, _NAME_CHARS), dir="ltr"),
                    title=name,
                ),
                element("p", described(hit, outcome), class_="about"),
                said,
                element(
                    "p",
                    element("bdi", shortened(visible(uri), _ADDRESS_CHARS), dir="ltr"),
                    class_="address",
                    title=visible(uri),
                )
                if uri
                else None,
                details(hit, uri),
                class_="body",
            ),
        ),
    )


def stage_of(outcome: Thumbnail | UnitError, hit: Mapping[str, Any], name: str) -> Markup:
    """Return the picture, the frames with their times, or the reason why there is none."""
    if isinstance(outcome, UnitError):
        return element(
            "div",
            element("strong", _REASONS.get(type(outcome), "Can not be shown")),
            element("span", excerpt(visible(outcome.reason), 140), title=visible(outcome.reason)),
            class_="stage reason",
        )
    pictures = outcome.pictures
    if outcome.header.kind != "video":
        page = f"Page {(hit.get('page') or 0) + 1} of " if outcome.header.kind == "document" else ""
        # Photographs of about the stage's own shape fill it, at the cost of an edge.
        kind = "paper" if page else "photo" if shape_of(pictures[0]) == "tv" else "whole"
        return element("div", image(pictures[0], f"{page}{name}"), class_=f"stage {kind}")
    frames = []
    for picture in pictures:
        at = clock(picture.time_s) if picture.time_s is not None else ""
        frames.append(
            element(
                "figure",
                image(picture, f"{name} at {at}" if at else name),
                element("figcaption", at) if at else None,
            )
        )
    return element(
        "div",
        element("div", *frames, class_=f"mosaic {shape_of(pictures[0])} n{min(len(frames), 4)}"),
        class_="stage",
    )


def shape_of(picture: Picture) -> str:
    """Return the name of a picture's shape; the style sheet knows a mosaic of frames for each."""
    ratio = picture.width_px / picture.height_px
    return next(
        name
        for most, name in ((0.8, "tall"), (1.15, "square"), (1.55, "tv"), (math.inf, "wide"))
        if ratio < most
    )


def image(picture: Picture, alt: str) -> Markup:
    return element(
        "img",
        src=f"data:image/jpeg;base64,{base64.b64encode(picture.jpeg).decode()}",
        width=picture.width_px,
        height=picture.height_px,
        alt=alt,
    )


def scores(hit: Mapping[str, Any]) -> Markup:
    """Return the rank, what reranking did to it, and one bar a score, the reranker's first."""
    first = number(hit.get("first_score", hit.get("score")))
    # Heard with the name; here for the eye.
    rank = element("span", hit["rank"], class_="rank", aria_hidden="true")
    if "rerank_score" not in hit:
        return element("div", rank, score("Score", first, "second"), class_="place")
    badge = moved(hit.get("rank_before"), hit["rank"])
    return joined(
        element("div", rank, badge, class_="place"),
        score("Rerank", number(hit["rerank_score"]), "second"),
        score("Search", first, "first"),
    )


def score(label: str, value: float | None, kind: str) -> Markup:
    """Return a labelled number with a bar from 0 to 1."""
    share = 0.0 if value is None else min(max(value, 0.0), 1.0)
    return element(
        "div",
        element("span", label, class_="label"),
        # Drawn, not styled: the page's policy allows no style but its own sheet.
        element(
            "svg",
            element("rect", width="100", height="1", class_="track"),
            element("rect", width=f"{100 * share:.1f}", height="1", class_="fill"),
            viewBox="0 0 100 1",
            preserveAspectRatio="none",
            aria_hidden="true",
        ),
        element("span", "–" if value is None else f"{value:.3f}", class_="value"),
        class_=f"score {kind}",
    )


def moved(before: int | None, after: int) -> Markup | None:
    """Return the badge that says how reranking moved the hit."""
    if before is None:
        return None
    if before == after:
        return element("p", "=", element("span", f" stayed {ordinal(after)}"), class_="moved same")
    sign, way = ("▲", "up") if before > after else ("▼", "down")
    return element(
        "p",
        f"{sign}\u2009{abs(before - after)}",
        element("span", f" {ordinal(before)} → {ordinal(after)}"),
        class_=f"moved {way}",
        title=f"Search ranked it {ordinal(before)}, the reranker {ordinal(after)}",
    )


def described(hit: Mapping[str, Any], outcome: Thumbnail | UnitError | None) -> str:
    """Return a line such as ``Page 2 of 6 · 612 × 792 px``."""
    kind = str(hit["kind"]).capitalize()
    start, end = number(hit.get("start_s")), number(hit.get("end_s"))
    span = f"{clock(start)} – {clock(end)}" if start is not None and end is not None else ""
    if not isinstance(outcome, Thumbnail):
        page = f"page {hit['page'] + 1}" if hit.get("page") is not None else ""
        return " · ".join(filter(None, [kind, page, span]))
    header = outcome.header
    if header.kind == "document":
        return f"Page {(hit.get('page') or 0) + 1} of {len(header.page_sizes_px)}"
    size = f"{header.width_px} × {header.height_px} px"
    if header.kind == "video":
        whole = clock(header.duration_s) if header.duration_s else ""
        is_part = span and (start or (end or 0) < header.duration_s - 0.1)
        return " · ".join(filter(None, ["Video", f"{span} of {whole}" if is_part else whole, size]))
    return f"Image · {size}"


def details(hit: Mapping[str, Any], uri: str) -> Markup:
    """Return what a reader may want to copy, folded away."""
    facts: dict[str, object] = {"address": visible(uri)} if uri else {}
    if hit.get("byte_offset") is not None or hit.get("byte_length") is not None:
        facts["bytes"] = f"{hit.get('byte_length') or 'rest'} from {hit.get('byte_offset') or 0}"
    facts |= {
        key: visible(str(value))
        for key, value in hit.items()
        if key not in _SHOWN_ELSEWHERE and isinstance(value, _PLAIN)
    }
    facts |= {name: visible(str(hit[name])) for name in ("table", "row_id") if hit.get(name)}
    return element(
        "details",
        element("summary", "Details"),
        element(
            "dl",
            *(
                joined(
                    element("dt", visible(key)),
                    element("dd", element("bdi", shortened(str(value), _VALUE_CHARS))),
                )
                for key, value in facts.items()
            ),
        ),
    )


def number(value: object) -> float | None:
    """Return a finite float, or None."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def clock(seconds: float) -> str:
    """Return ``2.5 s``, and ``1:05`` or ``1:01:05`` from a minute on."""
    if seconds < 60:
        return f"{seconds:.1f} s".replace(".0 s", " s")
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def ordinal(rank: int) -> str:
    """Return ``1st``, ``2nd``, …"""
    teen = 10 < rank % 100 < 14
    return f"{rank}{'th' if teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(rank % 10, 'th')}"
