"""How much of an exhaustive search an index finds, measured on a table's own rows."""

from __future__ import annotations

from dataclasses import dataclass

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qvl_batch.tables.search import search

RECALL_K = 10
# Noise of 0.75 of a vector's length leaves a cosine of 0.8 to the row that a query was made from:
# near enough to have neighbours, far enough to fall between the lists.
_NOISE = 0.75
# Equal rows may come in any order.
_SAME_SCORE = 1e-6
_ROWS_OF_SPREAD = 2048


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Share of the exhaustive search's top ``k`` that was found with these settings."""

    nprobes: int
    shortlist: int
    recall: float
    k: int
    num_queries: int


def measure(
    dataset: lance.LanceDataset,
    table: str,
    column: str,
    *,
    allowed_nprobes: int,
    target: float,
    shortlist: int,
    num_queries: int,
) -> tuple[Recall, ...]:
    """Return the recall at 1, 2, 4, … probes, up to the first that reaches the target.

    Queries are rows of the table with noise; the row itself does not count as a find. What an
    index of ``vector_bits`` finds is compared after rescoring, as `search` does it, with the same
    search without the index. For an index of ``vector`` the shortlist is what Lance refines; it
    is a quarter of ``shortlist``, then all of it, then four times that, where all allowed probes
    do not suffice.

    Args:
        column: ``vector_bits`` or ``vector``.
        allowed_nprobes: Most probes that are tried.

    Returns:
        At least one entry; the last one is below the target if none reaches it.
    """
    queries, own = sample_queries(dataset, num_queries)
    k = RECALL_K
    tables = {table: dataset}
    exact = search(tables, queries, k + 1, shortlist=max(shortlist, k + 1))
    by_bits = column == "vector_bits"
    shortlists = [shortlist] if by_bits else [shortlist // 4, shortlist, 4 * shortlist]
    ladder = []
    for length in shortlists:
        for nprobes in probes_up_to(allowed_nprobes):
            if by_bits:
                found = search(tables, queries, k + 1, shortlist=length, nprobes={table: nprobes})
            else:
                found = _nearest_floats(dataset, queries, k + 1, length, nprobes)
            share = recall_at_k(exact, found, own, k)
            ladder.append(
                Recall(
                    nprobes=nprobes, shortlist=length, recall=share, k=k, num_queries=len(queries)
                )
            )
            if share >= target:
                return tuple(ladder)
    return tuple(ladder)


def probes_up_to(allowed: int) -> list[int]:
    """Return 1, 2, 4, … and the most that is allowed."""
    return sorted({*(2**i for i in range(allowed.bit_length()) if 2**i <= allowed), allowed})


def recall_at_k(exact: pa.Table, found: pa.Table, own: list[str], k: int) -> float:
    """Return the mean share of each query's exact top k that was found.

    A row that scores as well as the last of the exact top k counts as one of them.

    Args:
        exact, found: Columns ``query``, ``row_id``, ``score``, best first within a query.
        own: The row that each query was made from; it is left out.
    """
    truth, got = _by_query(exact, own, k), _by_query(found, own, k)
    shares = []
    for wanted, rows in zip(truth, got, strict=True):
        if not wanted:
            continue
        ids, last = {row_id for row_id, _ in wanted}, wanted[-1][1]
        hits = sum(row_id in ids or score >= last - _SAME_SCORE for row_id, score in rows)
        shares.append(min(hits, len(wanted)) / len(wanted))
    return float(np.mean(shares)) if shares else 1.0


def _by_query(found: pa.Table, own: list[str], k: int) -> list[list[tuple[str, float]]]:
    lists: list[list[tuple[str, float]]] = [[] for _ in own]
    columns = (found[name].to_pylist() for name in ("query", "row_id", "score"))
    for query, row_id, score in zip(*columns, strict=True):
        if row_id != own[query] and len(lists[query]) < k:
            lists[query].append((row_id, score))
    return lists


def sample_queries(
    dataset: lance.LanceDataset, num_queries: int
) -> tuple[npt.NDArray[np.float32], list[str]]:
    """Return queries made from a table's own rows, and those rows' ids.

    Returns:
        float32 ``(q, dim)`` of unit norm, the same for the same version: rows chosen at random,
        with Gaussian noise spread over the dimensions as the rows themselves are.
    """
    rng = np.random.default_rng(dataset.version)
    num_rows = dataset.count_rows()
    chosen = np.sort(rng.choice(num_rows, min(num_rows, _ROWS_OF_SPREAD), replace=False))
    names = [n for n in dataset.schema.names if n.startswith("vector")]
    rows = dataset.take(chosen, columns=["row_id", *names])
    vectors = _floats(rows)
    picked = rng.permutation(len(vectors))[:num_queries]
    noise = rng.normal(size=(len(picked), vectors.shape[1])) * vectors.std(axis=0)
    base = vectors[picked]
    queries = base + _NOISE * noise * (_norms(base) / np.maximum(_norms(noise), 1e-12))
    queries = (queries / np.maximum(_norms(queries), 1e-12)).astype(np.float32)
    return queries, rows["row_id"].take(pa.array(picked)).to_pylist()


def _floats(rows: pa.Table) -> npt.NDArray[np.float32]:
    """Return the best vectors that these rows hold, float32 ``(rows, dim)``."""
    names = rows.schema.names
    name = next(n for n in ("vector", "vector_int8", "vector_bits") if n in names)
    column = rows[name].combine_chunks()
    values = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
    if name == "vector_bits":
        return np.unpackbits(values, axis=1).astype(np.float32) * 2 - 1
    if name == "vector_int8":
        return values.astype(np.float32) * rows["vector_scale"].to_numpy()[:, None]
    return values.astype(np.float32)


def _norms(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    return np.linalg.norm(vectors, axis=1, keepdims=True)


def _nearest_floats(
    dataset: lance.LanceDataset,
    queries: npt.NDArray[np.float32],
    k: int,
    shortlist: int,
    nprobes: int,
) -> pa.Table:
    found = []
    for number, query in enumerate(queries):
        rows = dataset.to_table(
            columns=["row_id", "_distance"],
            nearest={
                "column": "vector",
                "q": query,
                "k": k,
                "metric": "dot",
                "nprobes": nprobes,
                "refine_factor": -(-shortlist // k),
            },
        )
        score = 1 - rows["_distance"].to_numpy()
        numbers = np.full(len(score), number, np.int32)
        found.append(pa.table({"query": numbers, "row_id": rows["row_id"], "score": score}))
    return pa.concat_tables(found)
