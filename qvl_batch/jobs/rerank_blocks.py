"""Queries and pairs cut into blocks and waves: pure functions of what is planned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch import budget
from qvl_batch.recipe import Recipe, RerankRecipe

QUERIES_A_BLOCK = 256
BLOCK_BYTES = 128 * 2**20
# A medium that meets very many queries fills a block alone: blocks are the grain of commits.
PAIRS_A_BLOCK = 4096
# Decoded query media that a wave may hold in the object store.
WAVE_BYTES = 2 * 2**30

_MEDIUM = ("uri", "etag", "byte_offset", "byte_length", "kind")
# Of each kind of a query's media.
_QUERY_MEDIA = ("image", "video")


def query_bytes(query: Mapping[str, object], recipe: Recipe | RerankRecipe) -> int:
    """Return an upper bound of the bytes that a query's media decode to."""
    return sum(
        budget.largest_part_bytes(recipe, kind) for kind in _QUERY_MEDIA if query[kind] is not None
    )


def cut_queries(todo: pa.Table, recipe: Recipe | RerankRecipe) -> list[pa.Table]:
    """Cut queries into blocks by their number and by what their media may decode to."""
    weights = [
        max(1 / QUERIES_A_BLOCK, query_bytes(query, recipe) / BLOCK_BYTES)
        for query in todo.select(list(_QUERY_MEDIA)).to_pylist()
    ]
    return [todo.slice(first, last - first) for first, last in _cuts(weights)]


def cut_waves(queries: pa.Table, recipe: RerankRecipe, queries_per_wave: int) -> list[pa.Table]:
    """Cut queries into those whose pairs are scored together."""
    weights = [
        max(1 / queries_per_wave, query_bytes(query, recipe) / WAVE_BYTES)
        for query in queries.select(list(_QUERY_MEDIA)).to_pylist()
    ]
    return [queries.slice(first, last - first) for first, last in _cuts(weights)]


def _cuts(weights: list[float]) -> Iterator[tuple[int, int]]:
    """Yield [first, last) of blocks: full at weight 1, one item at least."""
    start, filled = 0, 0.0
    for i, weight in enumerate(weights):
        # A thousandth of slack: 64 x 1/64 must fill one block whatever the rounding.
        if i > start and filled + weight > 1.001:
            yield start, i
            start, filled = i, 0.0
        filled += weight
    if weights:
        yield start, len(weights)


def group_by_medium(pairs: pa.Table, queries: pa.Array) -> pa.Table:
    """Return one row a medium with all its pairs; a text, which needs no fetch, stands for itself.

    Media come in the order of the first query that meets them, so that a block holds many pairs of
    few queries: those share what stands before the document.

    Args:
        pairs: Of `schema.found_pair`'s fields.
        queries: query_ids in their order.
    """
    kind = pa.struct(list(pairs.schema))
    is_text = pc.equal(pairs["kind"], "text")
    numbers = [pairs[name].cast(pa.string()) for name in ("byte_offset", "byte_length")]
    place = pc.binary_join_element_wise(
        pairs["uri"],
        *numbers,
        pairs["etag"],
        pairs["kind"],
        "\x00",
        null_handling="replace",
        null_replacement="",
    )
    medium = pc.if_else(is_text, pairs["unit_id"], place).combine_chunks().dictionary_encode()
    codes = medium.indices.to_numpy()
    position = pc.index_in(pairs["query_id"], value_set=queries).to_numpy()
    first = np.full(len(medium.dictionary), np.iinfo(np.int64).max)
    np.minimum.at(first, codes, position)
    rank = pairs["rank_before"].to_numpy()
    order = np.lexsort((rank, position, codes, first[codes]))
    ordered = pairs.take(pa.array(order)).combine_chunks()
    codes = codes[order]
    begins = (
        np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]]) if len(codes) else np.array([], int)
    )
    offsets = pa.array(np.r_[begins, len(codes)], pa.int32())
    structs = pa.StructArray.from_arrays(
        [_one_array(ordered[field.name]) for field in kind], fields=list(kind)
    )
    heads = ordered.take(pa.array(begins, pa.int64())).select(list(_MEDIUM))
    return heads.append_column("_pairs", pa.ListArray.from_arrays(offsets, structs)).add_column(
        0, "_ordinal", pa.array(np.arange(len(begins), dtype=np.int64))
    )


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def cut_media(media: pa.Table, recipe: RerankRecipe, media_per_block: int) -> list[pa.Table]:
    """Cut media into blocks by what the plan says of them alone: their number, bytes and pairs."""
    lists = media["_pairs"].combine_chunks()
    segments = pc.list_flatten(lists).field("segment").to_pylist()
    sizes, weights, start = pc.list_value_length(lists).to_pylist(), [], 0
    for kind, size in zip(media["kind"].to_pylist(), sizes, strict=True):
        num_parts = len(set(segments[start : start + size]))
        start += size
        part = "image" if kind == "document" else kind
        num_bytes = num_parts * budget.largest_part_bytes(recipe, part)
        weights.append(max(1 / media_per_block, num_bytes / BLOCK_BYTES, size / PAIRS_A_BLOCK))
    return [media.slice(first, last - first) for first, last in _cuts(weights)]
