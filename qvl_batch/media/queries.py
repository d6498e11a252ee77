"""Read what a reranking is asked: queries, the candidates of each, and labels of relevance.

All three are lists in any of the forms of `qvl_batch.media.columns`, local or in an object store.
Columns that are not named here are left aside. Ids are data: whatever characters they hold, they
are kept as they are, and never become a part of a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.errors import ManifestError
from qvl_batch.media.columns import Columns, ReadLance, is_text, read_columns
from qvl_batch.ranking import LABEL_KEYS
from qvl_batch.schema import QUERIES, scores
from qvl_batch.storage import Storage
from qvl_batch.units import query_id

_ASKED = ("text", "image", "video")
# Names that the scores tables use themselves.
_RESERVED = frozenset((*scores([], {}).names, *QUERIES.names))
# 2^relevance is a gain; above this it is no grade.
_MAX_RELEVANCE = 30
_RANKS = ("rank_before", "rank")
_SCORES = ("first_score", "score")


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Distinct queries: `schema.QUERIES`, then the partition columns, in the order of the list."""

    path: str
    rows: pa.Table
    partition_by: tuple[str, ...]
    num_duplicates: int


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Labels as `ranking.metrics` takes them: ``query_id``, ``key``, ``relevance`` float64."""

    path: str
    rows: pa.Table
    key: str
    num_duplicates: int


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Pairs to score: string ``query_id``, ``row_id``, ``table`` (null: unknown), float32
    ``first_score`` (null: unknown), int32 ``rank_before`` (from 1); by query, then by rank."""

    path: str
    rows: pa.Table
    num_duplicates: int


def read_queries(
    path: str,
    storage: Storage,
    *,
    partition_by: Sequence[str] = (),
    read_lance: ReadLance | None = None,
) -> Queries:
    """Read queries: at least one of ``text``, ``image`` and ``video`` each.

    ``image`` and ``video`` are addresses; relative ones begin at the folder that holds the list.
    A query without ``query_id`` is named by the hash of what it asks. Rows that are equal in all of
    `schema.QUERIES` and the partition columns are one query.

    Args:
        path: The list.
        storage: How to reach it.
        partition_by: Further columns to keep: text, whole numbers, booleans, dates or times.
        read_lance: What reads a ``.lance`` path, as ``tables.lists.read_lance`` does.

    Raises:
        ManifestError: If a query asks nothing, two rows of one query_id differ, a column or a value
            is not allowed, or the list can not be read.
        StorageError: If the place can not be reached.
    """
    wanted = dict.fromkeys([*QUERIES.names, *partition_by])
    listed = read_columns(path, storage, [*wanted], what="queries", read_lance=read_lance)
    return check_queries(listed, partition_by)


def check_queries(listed: Columns, partition_by: Sequence[str] = ()) -> Queries:
    """Check queries that are already read; see `read_queries`."""
    if not set(_ASKED) & set(listed.table.column_names):
        raise ManifestError(
            f"{listed.path} has no column text, image or video.", "Give what each query asks."
        )
    columns = {
        "query_id": listed.texts("query_id", numbers=True),
        "text": listed.texts("text"),
        "image": listed.addresses("image"),
        "video": listed.addresses("video"),
        "instruction": listed.texts("instruction"),
    }
    asked = [pc.is_valid(columns[name]) for name in _ASKED]
    nothing = pc.invert(pc.or_(pc.or_(asked[0], asked[1]), asked[2]))
    listed.refuse(nothing, "has no text, image or video", "Give at least one of them.")
    names = [columns[name].to_pylist() for name in QUERIES.names]
    ids = [
        given if given is not None else query_id(*rest) for given, *rest in zip(*names, strict=True)
    ]
    columns["query_id"] = pa.array(ids, pa.string())
    further = {key: _partition_column(listed, key) for key in partition_by}
    keys = {"query_id": columns.pop("query_id")}
    kept = listed.duplicates(keys, {**columns, **further})
    schema = pa.schema([*QUERIES, *(pa.field(key, further[key].type) for key in further)])
    rows = pa.table({**keys, **columns, **further}, schema=schema)
    distinct = rows if kept is None else rows.take(kept)
    return Queries(
        path=listed.path,
        rows=distinct,
        partition_by=tuple(partition_by),
        num_duplicates=rows.num_rows - distinct.num_rows,
    )


def _partition_column(listed: Columns, key: str) -> pa.Array:
    """Return a partition column; its values are named by `jobs.manifest.partition_value`."""
    if key in _RESERVED or key.startswith("_"):
        raise ManifestError(
            f"{listed.path}: scores can not be partitioned by {key!r}, "
            "a name that their tables use themselves.",
            "Rename the column.",
        )
    if key not in listed.table.column_names:
        raise ManifestError(
            f"{listed.path} has no column {key!r} to partition by.",
            "Add it, or correct output.partition_by.",
        )
    column = listed.table[key].combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_null(column.type) or is_text(column.type):
        return column.cast(pa.string())
    kind = column.type
    allowed = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_date, pa.types.is_timestamp)
    if not any(test(kind) for test in allowed):
        listed.refuse(
            pc.is_valid(column),
            f" ({kind})",
            "Partition columns hold text, whole numbers, booleans, dates or times.",
            of=key,
        )
    return column


def read_labels(
    path: str,
    storage: Storage,
    *,
    queries: Queries | None = None,
    read_lance: ReadLance | None = None,
) -> Labels:
    """Read labels: ``query_id``, ``relevance`` and one of ``row_id``, ``media_id`` and ``uri``.

    The first of the three that is there counts. Relative uris begin at the folder that holds the
    list. Equal rows are one label.

    Args:
        path: The list.
        storage: How to reach it.
        queries: If given, at least one of them must have a label above 0.
        read_lance: As for `read_queries`.

    Raises:
        ManifestError: If a column or a value is missing or of the wrong type, a relevance is above
            30, a document of a query has two labels, or no query has one above 0.
        StorageError: If the place can not be reached.
    """
    wanted = ["query_id", "relevance", *LABEL_KEYS]
    listed = read_columns(path, storage, wanted, what="labels", read_lance=read_lance)
    key = next((name for name in LABEL_KEYS if name in listed.table.column_names), None)
    if key is None:
        raise ManifestError(
            f"{path} has no column row_id, media_id or uri.", "Say what each label speaks of."
        )
    ids = {
        "query_id": listed.texts("query_id", numbers=True),
        key: listed.addresses(key) if key == "uri" else listed.texts(key),
    }
    for name, column in ids.items():
        listed.refuse(pc.is_null(column), f"has no {name}", "Give it.")
    relevance = listed.numbers("relevance")
    if relevance is None:
        raise ManifestError(f"{path} has no column relevance.", "Give 0, 1, 2, 3, …")
    high = pc.greater(relevance, _MAX_RELEVANCE)
    listed.refuse(high, "", "Grade documents with 0, 1, 2, 3, …", of="relevance")
    kept = listed.duplicates(ids, {"relevance": relevance})
    rows = pa.table({**ids, "relevance": relevance})
    distinct = rows if kept is None else rows.take(kept)
    if queries is not None:
        labelled = distinct.filter(pc.greater(distinct["relevance"], 0))["query_id"]
        if not pc.any(pc.is_in(labelled, value_set=queries.rows["query_id"])).as_py():
            raise ManifestError(
                f"{path} has no label above 0 for any of the queries in {queries.path}.",
                "Compare their query_ids.",
            )
    num_duplicates = rows.num_rows - distinct.num_rows
    return Labels(path=path, rows=distinct, key=key, num_duplicates=num_duplicates)


def read_candidates(
    path: str,
    storage: Storage,
    *,
    queries: Queries | None = None,
    read_lance: ReadLance | None = None,
) -> Candidates:
    """Read candidates: ``query_id`` and ``row_id``, and if there: ``table``, a score and a rank.

    A score is ``first_score`` or ``score``, a rank ``rank_before`` or ``rank``. Candidates of a
    query are numbered anew from 1: by rank where there is one, else by falling score, else in the
    order of the list. Equal rows are one candidate.

    Args:
        path: The list.
        storage: How to reach it.
        queries: If given, every candidate must be of one of them.
        read_lance: As for `read_queries`.

    Raises:
        ManifestError: If a column or a value is missing or of the wrong type, two rows of one pair
            differ, or a query is unknown.
        StorageError: If the place can not be reached.
    """
    wanted = ["query_id", "row_id", "table", *_RANKS, *_SCORES]
    listed = read_columns(path, storage, wanted, what="candidates", read_lance=read_lance)
    ids = {"query_id": listed.texts("query_id", numbers=True), "row_id": listed.texts("row_id")}
    for name, column in ids.items():
        listed.refuse(pc.is_null(column), f"has no {name}", "Give it.")
    if queries is not None:
        known = pc.is_in(ids["query_id"], value_set=queries.rows["query_id"])
        problem = f", which {queries.path} does not list"
        remedy = "Add the query, or drop its candidates."
        listed.refuse(pc.invert(known), problem, remedy, of="query_id")
    score, rank = (_first_numbers(listed, names) for names in (_SCORES, _RANKS))
    values = {"table": listed.texts("table")}
    given = {"score": score, "rank": rank}
    values |= {name: column for name, column in given.items() if column is not None}
    kept = listed.duplicates(ids, values)
    order = _order(ids["query_id"], score, rank)
    if kept is not None:
        order = order[np.isin(order, kept.to_numpy())]
    query = ids["query_id"].take(pa.array(order))
    firsts = score if score is not None else pa.nulls(len(ids["row_id"]), pa.float64())
    rows = pa.table(
        {
            "query_id": query,
            "row_id": ids["row_id"].take(pa.array(order)),
            "table": values["table"].take(pa.array(order)),
            "first_score": firsts.take(pa.array(order)).cast(pa.float32(), safe=False),
            "rank_before": pa.array(_counted(query), pa.int32()),
        }
    )
    return Candidates(path=path, rows=rows, num_duplicates=listed.table.num_rows - rows.num_rows)


def _first_numbers(listed: Columns, names: Sequence[str]) -> pa.Array | None:
    name = next((name for name in names if name in listed.table.column_names), None)
    return None if name is None else listed.numbers(name)


def _order(query: pa.Array, score: pa.Array | None, rank: pa.Array | None) -> np.ndarray:
    """Return the rows by query in their order of appearance, then best first."""
    number = query.dictionary_encode().indices.to_numpy()
    if rank is not None:
        return np.lexsort((rank.to_numpy(), number))
    if score is not None:
        return np.lexsort((-score.to_numpy(), number))
    return np.argsort(number, kind="stable")


def _counted(query: pa.Array) -> np.ndarray:
    """Count from 1 within each run of equal values."""
    number = query.dictionary_encode().indices.to_numpy()
    index = np.arange(len(number))
    begins = np.flatnonzero(np.r_[True, number[1:] != number[:-1]])
    return index - np.repeat(begins, np.diff(np.r_[begins, len(number)])) + 1
