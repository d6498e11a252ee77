"""Hits in a terminal: nothing that a file or its text is called can reach the terminal itself."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

# What rank, score, kind and the gaps take, what the columns of a reranker do, and what a name or a
# text is left at the least.
_OTHER_CELLS, _RERANK_CELLS = 32, 18
_LEAST_CELLS = 20
_KIND_STYLES = {"image": "green", "video": "magenta", "document": "yellow", "text": "blue"}


def printable(text: str) -> str:
    """Return the text with every character that could steer a terminal written as an escape.

    Control characters, direction marks, line separators and lone surrogates; what is left may be
    wide or unusual, but stands where it is put.
    """
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else c
        for c in text
    )


def shortened(text: str, cells: int) -> str:
    """Return the text with its middle left out, so that it takes at most so many cells.

    The end, where a file's own name stands, keeps two thirds.
    """
    if cell_len(text) <= cells:
        return text
    tail = _fitting(text[::-1], (cells - 1) * 2 // 3)[::-1]
    return f"{_fitting(text, cells - 1 - cell_len(tail))}…{tail}"


def place(hit: Mapping[str, Any]) -> str:
    """Return where in its medium a hit lies, for people: pages count from 1; '' for all of it."""
    if hit["page"] is not None:
        return f"page {hit['page'] + 1}"
    if hit["start_s"] is not None and hit["end_s"] is not None:
        return f"{_clock(hit['start_s'])}–{_clock(hit['end_s'])}"
    return ""


def hits_table(hits: pa.Table, title: str, *, width: int = 120) -> Table:
    """Return a table of hits, as `Collection.search` gives them, for a `rich` console.

    Args:
        hits: Of one query.
        title: Above them; as unsafe as they are.
        width: Cells of a line: what names and texts are shortened to.
    """
    is_reranked = "rerank_score" in hits.column_names
    names = [printable(uri or "") for uri in hits["uri"].to_pylist()]
    texts = [printable(" ".join((text or "").split())) for text in hits["text"].to_pylist()]
    places = [place(hit) for hit in hits.select(["page", "start_s", "end_s"]).to_pylist()]
    taken = _OTHER_CELLS + _RERANK_CELLS * is_reranked + max(map(cell_len, places), default=0)
    left = max(_LEAST_CELLS, width - taken)
    # A narrow window shows names rather than texts.
    with_texts = any(texts) and left >= 2 * _LEAST_CELLS
    name_cells = max(map(cell_len, names), default=0)
    name_cells = min(name_cells, max(_LEAST_CELLS, left * 3 // 5) if with_texts else left)
    table = Table(
        title=Text(printable(title), "bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("#", justify="right", style="dim")
    if is_reranked:
        table.add_column("before", justify="right", style="dim")
        table.add_column("rerank", justify="right", style="bold cyan")
    table.add_column("score", justify="right", style="cyan", min_width=5)
    table.add_column("kind", min_width=8)
    table.add_column("file", no_wrap=True)
    table.add_column("place", no_wrap=True)
    if with_texts:
        table.add_column("text", no_wrap=True)
    for hit, name, at, text in zip(hits.to_pylist(), names, places, texts, strict=True):
        cells = [Text(str(hit["rank"]))]
        if is_reranked:
            score = hit["rerank_score"]
            cells += [Text(str(hit["rank_before"])), Text("–" if score is None else f"{score:.3f}")]
        table.add_row(
            *cells,
            Text(f"{hit['score']:.3f}"),
            Text(printable(hit["kind"]), _KIND_STYLES.get(hit["kind"], "")),
            Text(shortened(name, name_cells)),
            Text(at),
            *([Text(_begin(text, left - name_cells))] if with_texts else []),
        )
    return table


def _fitting(text: str, cells: int) -> str:
    """Return the longest beginning that takes at most so many cells."""
    taken = 0
    for i, c in enumerate(text):
        taken += cell_len(c)
        if taken > cells:
            return text[:i]
    return text


def _begin(text: str, cells: int) -> str:
    return text if cell_len(text) <= cells else f"{_fitting(text, cells - 1)}…"


def _clock(seconds: float) -> str:
    # Rounded first: 59.97 is a minute.
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    whole = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{whole}:{rest:04.1f}"
