"""How good a ranking is, given what is relevant; and how alike two rankings are.

One call judges all queries at once: a million pairs take about a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.errors import ConfigError

# What a label may speak of: one row, or a medium with all its rows. The first that is there counts.
LABEL_KEYS = ("row_id", "media_id", "uri")
CUTOFF = 10
_STEPS = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))


@dataclass(frozen=True, kw_only=True)
class RankingMetrics:
    """Means over the judged queries, each in 0..1.

    ``num_unjudged`` queries have no relevant document among their labels and are left out.
    ``num_unranked`` rows have no rank and stand behind all that have one.
    """

    ndcg_at_10: float
    mrr_at_10: float
    recall_at_k: Mapping[int, float]
    num_queries: int
    num_unjudged: int
    num_unranked: int

    @property
    def recall_at_1(self) -> float:
        return self.recall_at_k[1]

    @property
    def recall_at_10(self) -> float:
        return self.recall_at_k[CUTOFF]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for a report in JSON: ``recall_at_1`` and so on by name."""
        recalls = {f"recall_at_{k}": recall for k, recall in self.recall_at_k.items()}
        counts = ("num_queries", "num_unjudged", "num_unranked")
        return {
            "ndcg_at_10": self.ndcg_at_10,
            "mrr_at_10": self.mrr_at_10,
            **recalls,
            **{name: getattr(self, name) for name in counts},
        }


def metrics(
    ranked: pa.Table,
    relevance: pa.Table,
    *,
    rank: str,
    relevant_from: float = 1.0,
    query_ids: pa.Array | pa.ChunkedArray | None = None,
) -> RankingMetrics:
    """Judge a ranking by labels.

    nDCG@10 has the gains ``2^relevance - 1`` of Burges et al., "Learning to Rank using Gradient
    Descent" (ICML 2005), and the discount ``1 / log2(position + 1)``; the ideal ranking is made of
    all labels of the query, found or not. MRR@10 is 1 / position of the first relevant document
    among the first ten, else 0. Recall@k is the share of the query's relevant documents among the
    first k; k are 1, 2, 5, 10, 20, 50, … up to the longest ranking, and that length.

    A document without a label is not relevant. Where labels speak of media (``media_id``, ``uri``)
    a medium stands where its first row stands, and what follows closes up. Equal ranks are ordered
    by their ids.

    Args:
        ranked: ``query_id``, a column of `LABEL_KEYS`, and ``rank``.
        relevance: ``query_id``, ``relevance`` (a number, 30 at most; below 0 counts as 0) and one
            of `LABEL_KEYS`, each document of a query once.
        rank: The column that ranks: from 1 within a query; nulls stand behind all others.
        relevant_from: The least label, above 0, that is relevant to MRR and recall; nDCG takes all.
        query_ids: The queries asked. One that found nothing scores 0. None: those of ``ranked``.

    Raises:
        ConfigError: If a column is missing, a label is doubled or no number, or no query is judged.
    """
    if not relevant_from > 0:
        raise ConfigError(f"relevant_from is {relevant_from}.", "Give a label above 0.")
    key = next((name for name in LABEL_KEYS if name in relevance.column_names), None)
    if key is None:
        raise ConfigError("The labels have none of row_id, media_id and uri.", "Add one.")
    _require(ranked, ("query_id", key, rank), "The ranking")
    _require(relevance, ("query_id", "relevance"), "The table of labels")
    asked = pc.unique(_strings(ranked["query_id"] if query_ids is None else query_ids))
    labels = _labels(relevance, key, asked)
    relevant = labels.relevance >= relevant_from
    num_relevant = np.bincount(labels.query[relevant], minlength=len(asked))
    judged = num_relevant > 0
    if not judged.any():
        raise ConfigError(
            f"None of {len(asked)} queries has a document labelled {relevant_from:g} or more.",
            "Compare the query_ids of queries and labels.",
        )
    found = _found(ranked, key, rank, asked, labels)
    gain_found, ideal = _dcg(found, len(asked)), _dcg(labels.ideal(), len(asked))
    ndcg = gain_found[judged] / ideal[judged]
    hit = found.relevance >= relevant_from
    query, position = found.query[hit], found.position[hit]
    depth = int(found.position.max(initial=0))
    recalls = {}
    for k in sorted({1, CUTOFF, *(step for step in _STEPS if step < depth), depth} - {0}):
        hits = np.bincount(query[position <= k], minlength=len(asked))
        recalls[k] = float(np.mean(hits[judged] / num_relevant[judged]))
    reciprocal = np.zeros(len(asked))
    near = position <= CUTOFF
    np.maximum.at(reciprocal, query[near], 1 / position[near])
    return RankingMetrics(
        ndcg_at_10=float(ndcg.mean()),
        mrr_at_10=float(reciprocal[judged].mean()),
        recall_at_k=recalls,
        num_queries=int(judged.sum()),
        num_unjudged=int(len(asked) - judged.sum()),
        num_unranked=found.num_unranked,
    )


def overlap_at_k(
    a: pa.Table,
    b: pa.Table,
    k: int,
    *,
    rank: str = "rank",
    query: str = "query_id",
    key: str = "row_id",
) -> float:
    """Return the share of their first ``k`` that two rankings have in common, mean over queries.

    Of a query with fewer than ``k`` in both the longer list is the measure, so that equal lists
    overlap by 1; a query that only one of them knows overlaps by 0. Null ranks are left out.

    Args:
        a: ``query``, ``key`` and ``rank`` (from 1), each key of a query once.
        b: As ``a``; the two may be given in either order.

    Raises:
        ConfigError: If a column is missing, ``k`` is below 1, or both are empty.
    """
    if k < 1:
        raise ConfigError(f"k is {k}.", "Give 1 or more.")
    tops = []
    for table, name in ((a, "The first ranking"), (b, "The second ranking")):
        _require(table, (query, key, rank), name)
        near = pc.fill_null(pc.less_equal(table[rank], k), False)
        tops.append(table.select([query, key]).filter(near))
    both = pa.concat_tables(tops).group_by([query, key]).aggregate([([], "count_all")])
    if not both.num_rows:
        raise ConfigError("Both rankings are empty.", "Search for something that is there.")
    shared = both.filter(pc.greater(both["count_all"], 1))
    queries = pc.unique(both[query])
    counts = [
        np.bincount(pc.index_in(table[query], value_set=queries).to_numpy(), minlength=len(queries))
        for table in (shared, *tops)
    ]
    return float(np.mean(counts[0] / np.maximum(counts[1], counts[2])))


@dataclass(frozen=True)
class _Documents:
    """Documents of queries: int64 ``query`` and ``position`` (from 1), float64 ``relevance``."""

    query: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    relevance: npt.NDArray[np.float64]
    num_unranked: int = 0


@dataclass(frozen=True)
class _Labels:
    """Labels of the queries asked; ``document`` counts the distinct ``names``."""

    names: pa.Array
    query: npt.NDArray[np.int64]
    document: npt.NDArray[np.int64]
    relevance: npt.NDArray[np.float64]

    def ideal(self) -> _Documents:
        """Return the labels as the best ranking has them."""
        order = np.lexsort((-self.relevance, self.query))
        query = self.query[order]
        return _Documents(query, _positions(query), self.relevance[order])


def _require(table: pa.Table, names: tuple[str, ...], what: str) -> None:
    for name in names:
        if name not in table.column_names:
            raise ConfigError(
                f"{what} has no column {name!r}.",
                f"Its columns are: {', '.join(table.column_names) or 'none'}.",
            )


def _strings(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    # Large: the ids of a hundred million rows pass the 2 GiB that one string array may hold.
    return whole.cast(pa.large_string())


def _labels(relevance: pa.Table, key: str, asked: pa.Array) -> _Labels:
    try:
        values = relevance["relevance"].cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        values = np.array([np.nan])
    # 2^relevance must stay a number to count with.
    if not (values <= 30).all():
        raise ConfigError(
            "A label is null, no number, or above 30.", "Grade documents with 0, 1, 2, 3, …"
        )
    query = pc.index_in(_strings(relevance["query_id"]), value_set=asked)
    known = pc.is_valid(query).to_numpy(zero_copy_only=False)
    encoded = pc.dictionary_encode(_strings(relevance[key]).filter(pa.array(known)))
    labels = _Labels(
        names=encoded.dictionary,
        query=query.drop_null().to_numpy().astype(np.int64),
        document=encoded.indices.to_numpy().astype(np.int64),
        relevance=np.maximum(values[known], 0.0),
    )
    pairs = labels.query * len(labels.names) + labels.document
    if len(np.unique(pairs)) < len(pairs):
        raise ConfigError("A document of a query has two labels.", "Keep one of them.")
    return labels


def _found(ranked: pa.Table, key: str, rank: str, asked: pa.Array, labels: _Labels) -> _Documents:
    """Return the ranked documents of the queries asked, each once, with their labels."""
    query = pc.index_in(_strings(ranked["query_id"]), value_set=asked)
    known = pc.is_valid(query)
    query = query.drop_null().to_numpy().astype(np.int64)
    encoded = pc.dictionary_encode(_strings(ranked[key]).filter(known))
    document = encoded.indices.to_numpy().astype(np.int64)
    ranks = _whole_numbers(ranked[rank], rank).filter(known)
    unranked = ranks.null_count
    place = pc.fill_null(ranks, np.iinfo(np.int64).max).to_numpy()
    order = np.lexsort((document, place, query))
    if _has_ties(query[order], place[order]):
        by_name = np.empty(len(encoded.dictionary), np.int64)
        by_name[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(by_name))
        order = np.lexsort((by_name[document], place, query))
    query, document = query[order], document[order]
    pairs = query * max(1, len(encoded.dictionary)) + document
    _, firsts = np.unique(pairs, return_index=True)
    if len(firsts) < len(pairs):
        firsts.sort()
        query, document = query[firsts], document[firsts]
    named = pc.index_in(encoded.dictionary, value_set=labels.names)
    label = pc.fill_null(named, -1).to_numpy().astype(np.int64)[document]
    return _Documents(query, _positions(query), _relevance(query, label, labels), unranked)


def _whole_numbers(column: pa.ChunkedArray, name: str) -> pa.Array:
    if not (pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise ConfigError(
            f"The column {name!r} has the type {column.type}.", "Ranks are whole numbers from 1."
        )
    return column.combine_chunks().cast(pa.int64())


def _has_ties(query: npt.NDArray[np.int64], place: npt.NDArray[np.int64]) -> bool:
    return bool(((query[1:] == query[:-1]) & (place[1:] == place[:-1])).any())


def _relevance(
    query: npt.NDArray[np.int64], label: npt.NDArray[np.int64], labels: _Labels
) -> npt.NDArray[np.float64]:
    """Return the label of each document, 0 where there is none (``label`` is -1, or of others)."""
    size = len(labels.names)
    known = labels.query * size + labels.document
    order = np.argsort(known)
    wanted = query * size + label
    place = np.searchsorted(known[order], wanted)
    place = np.minimum(place, len(known) - 1)
    hit = (label >= 0) & (known[order][place] == wanted)
    return np.where(hit, labels.relevance[order][place], 0.0)


def _positions(query: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Count from 1 within each run of equal values."""
    index = np.arange(len(query))
    begins = np.flatnonzero(np.r_[True, query[1:] != query[:-1]]) if len(query) else index
    lengths = np.diff(np.r_[begins, len(query)])
    return index - np.repeat(begins, lengths) + 1


def _dcg(documents: _Documents, num_queries: int) -> npt.NDArray[np.float64]:
    near = documents.position <= CUTOFF
    gains = np.exp2(documents.relevance[near]) - 1
    discounted = gains / np.log2(documents.position[near] + 1)
    return np.bincount(documents.query[near], weights=discounted, minlength=num_queries)
