"""First stage of a search: the nearest rows of one table for many queries, in one scan of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.tables.table_rows import OFFSET, TableRows

# Rows of a block whose distances to all queries are counted while its bits are in the CPU's cache:
# 8,192 x 128 bytes = 1 MiB at 1,024 dimensions. 2,048 to 8,192 measured alike, 16,384 worse.
_BLOCK_ROWS = 8192
# BLAS is three times as fast as the sum that ties need; but it wants its error bounded, which costs
# as much as a query.
_QUERIES_FOR_BLAS = 4


@dataclass(frozen=True)
class Near:
    """Candidates of one table: one entry a (query, row) pair, sorted by query.

    ``query`` int32 is a position among the queries, ``key`` orders a query's rows (smaller is
    nearer): Hamming distance, or score with its sign turned. ``offset`` int64 is the row's
    position in this version of the table.
    """

    query: npt.NDArray[np.int32]
    key: npt.NDArray[np.generic]
    offset: npt.NDArray[np.int64]


def nearest_bits(
    table: TableRows,
    bits: npt.NDArray[np.uint8],
    k: int,
    where: pc.Expression | None,
) -> Near:
    """Return the exact k nearest rows of each query by Hamming distance, from one scan.

    NumPy counts the bits: at 1M x 1,024 bits Lance's own scan takes 38 CPU-ms a query in a call of
    16 queries and 82 alone; this takes 60 for the scan and 16 a query.

    Args:
        bits: Packed signs of the queries, uint8 ``(q, dim / 8)``.

    Returns:
        Keys are distances, uint16. Every row that ties with the k-th is there too, so that the
        caller can break ties by row_id; of many ties those of the smallest row_ids.
    """
    best = [_Best(k, np.uint16, table) for _ in bits]
    words = _words(bits)
    for offsets, batch in table.batches(["vector_bits"], where):
        packed = _words(_values(batch["vector_bits"]))
        for start in range(0, len(packed), _BLOCK_ROWS):
            rows = np.ascontiguousarray(packed[start : start + _BLOCK_ROWS].T)
            here = offsets[start : start + _BLOCK_ROWS]
            differing, counts = np.empty_like(rows), np.empty(rows.shape, np.uint8)
            for query, chosen in zip(words, best, strict=True):
                np.bitwise_xor(rows, query[:, None], out=differing)
                np.bitwise_count(differing, out=counts)
                chosen.add(counts.sum(axis=0, dtype=np.uint16), here)
    return _joined(best)


def nearest_bits_indexed(
    dataset: lance.LanceDataset,
    bits: npt.NDArray[np.uint8],
    k: int,
    where: pc.Expression | None,
    nprobes: int,
) -> Near:
    """Return the k nearest rows by Hamming distance that the table's index finds.

    Rows that are not indexed yet are found too. Same arguments and result as `nearest_bits`, but
    of the rows that tie with the k-th a few may be missing.
    """
    return _indexed(dataset, "vector_bits", "hamming", bits, k, where, nprobes, np.uint16)


def _indexed(
    dataset: lance.LanceDataset,
    column: str,
    metric: str,
    queries: npt.NDArray[np.generic],
    k: int,
    where: pc.Expression | None,
    nprobes: int,
    key_type: type[np.generic],
) -> Near:
    # A manifest may have a column of this name; Lance then refuses several queries in one call.
    together = "query_index" not in dataset.schema.names
    parts = [queries] if together else np.split(queries, len(queries))
    found = []
    for first, part in enumerate(parts):
        rows = dataset.to_table(
            columns=[OFFSET, "_distance"],
            filter=where,
            prefilter=True,
            nearest={
                "column": column,
                "q": part if together else part[0],
                # Lance takes any of the rows that tie at the end of its list: a few more, so that
                # the cut falls among rows that are all here.
                "k": k + k // 4 + 8,
                "metric": metric,
                "nprobes": nprobes,
            },
        )
        number = rows["query_index"].to_numpy() if together else np.full(rows.num_rows, first)
        distance = rows["_distance"].to_numpy().astype(key_type)
        found.append((number, distance, rows[OFFSET].to_numpy()))
    query, key, offset = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((offset, key, query))
    return Near(query[order].astype(np.int32), key[order], offset[order].astype(np.int64))


def nearest_vectors(
    table: TableRows,
    queries: npt.NDArray[np.float32],
    k: int,
    where: pc.Expression | None,
) -> Near:
    """Return the exact k nearest rows of each query by dot product, from one scan.

    Args:
        queries: float32 ``(q, dim)``.

    Returns:
        Keys are scores with their sign turned, float32; ties as in `nearest_bits`.
    """
    best = [_Best(k, np.float32, table) for _ in queries]
    for offsets, batch in table.batches(vector_columns(table.dataset), where):
        for start in range(0, batch.num_rows, _BLOCK_ROWS):
            block = Vectors.of(batch.slice(start, _BLOCK_ROWS)).as_float32()
            here = offsets[start : start + _BLOCK_ROWS]
            if len(queries) < _QUERIES_FOR_BLAS:
                for query, chosen in zip(queries, best, strict=True):
                    chosen.add(-block.scores(query), here)
                continue
            rough, error = block.rough_scores(queries)
            for number, chosen in enumerate(best):
                least = chosen.least_score(rough[:, number], error[number])
                rows = np.flatnonzero(rough[:, number] >= least)
                chosen.add(-block.take(rows).scores(queries[number]), here[rows])
    return _joined(best)


def nearest_vectors_indexed(
    dataset: lance.LanceDataset,
    queries: npt.NDArray[np.float32],
    k: int,
    where: pc.Expression | None,
    nprobes: int,
) -> Near:
    """Return k rows a query that the table's index of its float vectors holds for the nearest.

    Keys are of this table alone, float32: distances of vectors that an index has quantised.
    """
    return _indexed(dataset, "vector", "dot", queries, k, where, nprobes, np.float32)


def vector_columns(dataset: lance.LanceDataset) -> list[str]:
    """Return the columns that a row is scored by."""
    if "vector" in dataset.schema.names:
        return ["vector"]
    return ["vector_int8", "vector_scale"]


@dataclass(frozen=True)
class Vectors:
    """Rows as they are scored: ``values`` (n, dim), and a ``scale`` (n,) if they are int8."""

    values: npt.NDArray[np.generic]
    scale: npt.NDArray[np.float32] | None

    @classmethod
    def of(cls, rows: pa.RecordBatch | pa.Table) -> Vectors:
        if "vector" in rows.schema.names:
            return cls(_values(rows["vector"]), None)
        return cls(_values(rows["vector_int8"]), rows["vector_scale"].to_numpy())

    def take(self, rows: npt.NDArray[np.intp]) -> Vectors:
        return Vectors(self.values[rows], None if self.scale is None else self.scale[rows])

    def as_float32(self) -> Vectors:
        return Vectors(self.values.astype(np.float32, copy=False), self.scale)

    def scores(self, query: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the dot product of each row with the query, float32 (n,)."""
        # Not BLAS: its rounding depends on a row's place in the block, so equal rows would not tie.
        products = np.einsum("ij,j->i", self.values.astype(np.float32, copy=False), query)
        return products if self.scale is None else products * self.scale

    def rough_scores(
        self, queries: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return scores (n, q) by BLAS, and for each query how far they are from `scores` at most.

        A sum of d products in any order is within ``d * 2^-24 * |x| * |q|`` of the true one: twice
        that between two orders, and as much again for the rounding of scale and norms.
        """
        rough = self.values @ queries.T
        norms = np.sqrt(np.einsum("ij,ij->i", self.values, self.values))
        if self.scale is not None:
            rough *= self.scale[:, None]
            norms *= self.scale
        error = 4 * queries.shape[1] * 2.0**-24 * norms.max() * np.linalg.norm(queries, axis=1)
        return rough, error


class _Best:
    """The k smallest keys seen, with every tie of the k-th."""

    def __init__(self, k: int, key_type: type[np.generic], table: TableRows) -> None:
        self._k, self._table = k, table
        self._keys = [np.empty(0, key_type)]
        self._offsets = [np.empty(0, np.int64)]
        self._count = 0
        self._cut: np.generic | None = None
        # Sorting out costs as much as some thousand comparisons, so not for each block.
        self._limit = 4 * k + 1024

    def add(self, keys: npt.NDArray[np.generic], offsets: npt.NDArray[np.int64]) -> None:
        """Take note of a block of rows."""
        near = np.arange(len(keys)) if self._cut is None else np.flatnonzero(keys <= self._cut)
        if not len(near):
            return
        self._keys.append(keys[near])
        self._offsets.append(offsets[near])
        self._count += len(near)
        if self._count > self._limit:
            self._keep()

    def least_score(self, rough: npt.NDArray[np.float32], error: float) -> float:
        """Return the least rough score of a row that may have to be added."""
        least = -math.inf if self._cut is None else -float(self._cut)
        if len(rough) > self._k:
            least = max(least, float(np.partition(rough, -self._k)[-self._k]) - error)
        return least - error

    def sorted(self) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.int64]]:
        """Return keys and offsets, nearest first."""
        self._keep()
        order = np.lexsort((self._offsets[0], self._keys[0]))
        return self._keys[0][order], self._offsets[0][order]

    def _keep(self) -> None:
        keys, offsets = np.concatenate(self._keys), np.concatenate(self._offsets)
        if len(keys) > self._k:
            self._cut = np.partition(keys, self._k - 1)[self._k - 1]
            near = keys <= self._cut
            keys, offsets = keys[near], offsets[near]
        if len(keys) > self._limit:
            keys, offsets = self._smallest_row_ids(keys, offsets)
        self._keys, self._offsets, self._count = [keys], [offsets], len(keys)

    def _smallest_row_ids(
        self, keys: npt.NDArray[np.generic], offsets: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.int64]]:
        """Cut a crowd of ties (thousands of copies of one picture) to k rows."""
        tied = np.flatnonzero(keys == self._cut)
        row_ids = self._table.take(offsets[tied], ["row_id"])["row_id"]
        first = pc.sort_indices(row_ids)[: self._k - (len(keys) - len(tied))].to_numpy()
        kept = np.concatenate([np.flatnonzero(keys < self._cut), tied[first]])
        return keys[kept], offsets[kept]


def _joined(best: list[_Best]) -> Near:
    sorted_ = [one.sorted() for one in best]
    sizes = [len(keys) for keys, _ in sorted_]
    return Near(
        np.repeat(np.arange(len(best), dtype=np.int32), sizes),
        np.concatenate([keys for keys, _ in sorted_]),
        np.concatenate([offsets for _, offsets in sorted_]),
    )


def _values(column: pa.FixedSizeListArray | pa.ChunkedArray) -> npt.NDArray[np.generic]:
    """Return a column of vectors as an array (n, dim)."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), column.type.list_size)


def _words(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.unsignedinteger]:
    """Return the same bits in as few integers a row as their number allows."""
    packed = np.ascontiguousarray(packed)
    for word in (np.uint64, np.uint32, np.uint16):
        if packed.shape[1] % np.dtype(word).itemsize == 0:
            return packed.view(word)
    return packed
