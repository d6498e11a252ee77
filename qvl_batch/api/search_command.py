"""`qvl-batch search`: a query in, a table in the terminal out; or JSON, or a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from rich.console import Console

from qvl_batch.api.collection import RERANK_TOP, Collection
from qvl_batch.api.query import Row
from qvl_batch.api.rescore import RERANK_ERRORS
from qvl_batch.api.root import Root
from qvl_batch.api.terminal import hits_table, printable
from qvl_batch.errors import InputError
from qvl_batch.storage import Storage

# For the page: which object it was, so that no other is shown.
_PAGE_COLUMNS = ("etag", "byte_offset", "byte_length")


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What was asked on the command line; ``like`` goes alone, the other three together."""

    text: str | None = None
    image: str | None = None
    video: str | None = None
    like: str | None = None
    partitions: Sequence[str] = ()
    where: Sequence[str] = ()
    columns: Sequence[str] = ()
    top_k: int = 10
    rerank: str | None = None
    rerank_top: int = RERANK_TOP

    def query(self) -> object:
        """Return what `Collection.search` takes.

        Raises:
            InputError: If nothing is asked, or a row and something else.
        """
        asked = {name: getattr(self, name) for name in ("text", "image", "video")}
        asked = {name: value for name, value in asked.items() if value is not None}
        if self.like is not None and asked:
            raise InputError("--like goes alone.", f"Leave out {', '.join(asked)}.")
        if self.like is not None:
            return Row(self.like)
        if not asked:
            raise InputError("Nothing is asked.", "Give a TEXT, --image, --video or --like.")
        return asked

    def title(self) -> str:
        """Return what was asked, for people."""
        if self.like is not None:
            return f"like {self.like}"
        return " + ".join(filter(None, [self.text, self.image, self.video]))


def run_search(
    root: Root,
    collection: str | None,
    request: SearchRequest,
    *,
    as_json: bool = False,
    html: str | None = None,
    storage: Storage | None = None,
) -> None:
    """Search and print the hits; write the page, too, if one is asked for.

    Raises:
        InputError, UnitError: As `Collection.search`; StorageError if the page can not be written.
    """
    query = request.query()
    chosen = root.collection(collection)
    hits = chosen.search(
        query,
        request.top_k,
        partitions=list(request.partitions) or None,
        where=list(request.where) or None,
        columns=[*request.columns, *(_PAGE_COLUMNS if html is not None else ())],
        rerank=request.rerank,
        rerank_top=request.rerank_top,
    )
    shown = hits.drop_columns(sorted({*_PAGE_COLUMNS} & {*hits.column_names} - {*request.columns}))
    if as_json:
        # Only ASCII: a name's control characters are written as escapes.
        print(json.dumps(_answer(chosen, request, shown), indent=1, default=str))
    else:
        _print(request.title(), shown)
    if html is not None:
        _write_page(html, chosen, request, hits, storage)
        if not as_json:
            print(f"wrote {printable(html)}")


def _answer(collection: Collection, request: SearchRequest, hits: pa.Table) -> dict[str, Any]:
    return {
        "query": request.title(),
        "collection": collection.name,
        "recipe_id": collection.recipe.recipe_id,
        "hits": hits.to_pylist(),
    }


def _print(title: str, hits: pa.Table) -> None:
    console = Console()
    if not hits.num_rows:
        console.print("no hits", markup=False)
        return
    console.print(hits_table(hits, f"“{title}”", width=console.width))
    lost = int((hits.schema.metadata or {}).get(RERANK_ERRORS, b"0"))
    if lost:
        reasons = [reason for reason in _reasons(hits) if reason]
        example = f", such as: {reasons[0]}" if reasons else " (they stand behind those shown)"
        line = printable(f"{lost} could not be read again and rescored{example}")
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _reasons(hits: pa.Table) -> list[str | None]:
    return hits["rerank_error"].to_pylist() if "rerank_error" in hits.column_names else []


def _write_page(
    path: str,
    collection: Collection,
    request: SearchRequest,
    hits: pa.Table,
    storage: Storage | None,
) -> None:
    from qvl_batch.api.gallery import GallerySection, write_gallery

    section = GallerySection(query=request.title(), hits=hits, query_image=request.image)
    facts = {
        "collection": collection.name,
        "rows": f"{collection.count:,}",
        "recipe": collection.recipe.recipe_id,
    }
    write_gallery(path, [section], facts=facts, storage=storage)
