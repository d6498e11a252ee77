"""Two collections asked the same: how far their answers agree, and whose are better."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from rich import box
from rich.table import Table
from rich.text import Text

from qvl_batch.api.collection import Collection
from qvl_batch.api.root import Root
from qvl_batch.api.terminal import printable
from qvl_batch.errors import InputError
from qvl_batch.media.queries import Labels, Queries, read_labels, read_queries
from qvl_batch.ranking import LABEL_KEYS, RankingMetrics, metrics, overlap_at_k
from qvl_batch.storage import Storage
from qvl_batch.tables.lists import read_lance

# What the metrics of a ranking look at.
_LEAST_DEPTH = 10


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two collections; ``metrics`` is None without labels."""

    collection: str
    recipe_id: str
    num_rows: int
    bytes_per_row: int
    metrics: RankingMetrics | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` found. ``overlap`` is the mean share of the first ``top_k`` rows in common."""

    first: Side
    second: Side
    top_k: int
    overlap: float
    num_queries: int

    def to_json(self) -> str:
        values: dict[str, Any] = {
            "top_k": self.top_k,
            "overlap": self.overlap,
            "num_queries": self.num_queries,
            "collections": [_plain(side) for side in (self.first, self.second)],
        }
        return json.dumps(values, indent=2)

    def table(self) -> Table:
        """Return both sides beside each other, for a `rich` console."""
        title = (
            f"{self.num_queries:,} queries; the first {self.top_k} rows of both have "
            f"{self.overlap:.1%} in common"
        )
        table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        for side in (self.first, self.second):
            table.add_column(Text(printable(side.collection)), justify="right")
        sides = [_plain(self.first), _plain(self.second)]
        for name in sides[0]:
            if name != "collection":
                table.add_row(name.replace("_", " "), *(_shown(side.get(name)) for side in sides))
        return table


def compare(
    root: Root,
    first: str,
    second: str,
    queries: Queries,
    labels: Labels | None = None,
    *,
    top_k: int = 10,
) -> Comparison:
    """Ask two collections the same and compare the answers.

    A row is the same in both where the unit and the segment are: collections whose videos are cut
    otherwise overlap less than they agree.

    Args:
        root: Holds both.
        first: A collection or an alias.
        second: Another.
        queries: What is asked; each collection embeds it with its own model.
        labels: What is relevant, for nDCG@10, MRR@10 and recall.
        top_k: How many rows of each are compared.

    Raises:
        InputError: If there is no query, or a collection can not be asked.
        UnitError: If a query's medium can not be used.
    """
    if not queries.rows.num_rows:
        raise InputError(f"{queries.path} holds no query.", "Give at least one.")
    if top_k < 1:
        raise InputError(f"top_k is {top_k}.", "Give 1 or more.")
    sides, rankings = [], []
    for name in (first, second):
        collection = root.collection(name)
        ranking = _ranking(collection, queries, max(top_k, _LEAST_DEPTH))
        judged = None
        if labels is not None:
            ids = queries.rows["query_id"]
            judged = metrics(ranking, labels.rows, rank="rank", query_ids=ids)
        rankings.append(ranking)
        sides.append(_side(collection, judged))
    return Comparison(
        first=sides[0],
        second=sides[1],
        top_k=top_k,
        overlap=overlap_at_k(*rankings, top_k),
        num_queries=queries.rows.num_rows,
    )


def compare_lists(
    root: Root,
    first: str,
    second: str,
    queries: str,
    relevance: str | None = None,
    *,
    top_k: int = 10,
    storage: Storage | None = None,
) -> Comparison:
    """Do as `compare` with lists of queries and labels (JSONL, CSV, Parquet or a Lance table).

    Raises:
        ManifestError: If a list can not be read.
    """
    storage = storage or Storage.of()
    asked = read_queries(queries, storage, read_lance=read_lance)
    labels = None
    if relevance is not None:
        labels = read_labels(relevance, storage, queries=asked, read_lance=read_lance)
    return compare(root, first, second, asked, labels, top_k=top_k)


def query_form(row: Mapping[str, Any]) -> object:
    """Return what `Collection.search` takes of a row of `schema.QUERIES`."""
    asked = ("text", "image", "video", "instruction")
    return {name: row[name] for name in asked if row[name] is not None}


def _ranking(collection: Collection, queries: Queries, depth: int) -> pa.Table:
    """Return ``query_id, row_id, media_id, uri, rank`` of what a collection answers."""
    forms = [query_form(row) for row in queries.rows.to_pylist()]
    hits = collection.search_many(forms, depth, columns=["media_id"])
    ids = queries.rows["query_id"].combine_chunks().take(hits["query"].combine_chunks())
    return hits.append_column("query_id", ids).select(["query_id", *LABEL_KEYS, "rank"])


def _side(collection: Collection, judged: RankingMetrics | None) -> Side:
    recipe = collection.recipe
    sizes = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "binary": 1 / 8}
    num_bytes = sum(sizes[encoding] * recipe.dim for encoding in recipe.encodings)
    return Side(
        collection=collection.name,
        recipe_id=recipe.recipe_id,
        num_rows=collection.count,
        # The scale of an int8 vector is a float32.
        bytes_per_row=int(num_bytes) + 4 * ("int8" in recipe.encodings),
        metrics=judged,
    )


def _plain(side: Side) -> dict[str, Any]:
    values = {f.name: getattr(side, f.name) for f in dataclasses.fields(side)}
    judged = values.pop("metrics")
    return values if judged is None else values | judged.to_dict()


def _shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
