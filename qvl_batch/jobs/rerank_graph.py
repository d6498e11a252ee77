"""The Ray Data graphs of the rerank job: candidates, queries' media, scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from qvl_batch.jobs.cluster import Pools
from qvl_batch.jobs.control import ControlAttempts, Load, MayStart, cause_of
from qvl_batch.jobs.graph import beside, from_blocks, on_cpus, on_gpus
from qvl_batch.jobs.limits import decode_limits, fetch_limits
from qvl_batch.jobs.media_reader import ReadMedia
from qvl_batch.jobs.parts import iter_parts
from qvl_batch.jobs.rerank_blocks import cut_media, cut_queries
from qvl_batch.jobs.rerank_plan import PairPlan, QueryPlan
from qvl_batch.jobs.rerank_stages import DecodeDocuments, DocumentDecoder, RerankPairs
from qvl_batch.jobs.retrieve_stages import (
    DecodeQueries,
    EmbedQueries,
    LookUpRows,
    QueryDecoder,
    SearchTables,
    query_input,
)
from qvl_batch.recipe import Recipe, RerankRecipe, Segmentation
from qvl_batch.units import EmbedInput, Vision

if TYPE_CHECKING:
    from qvl_batch.jobs.rerank_job import RerankJob


def retrieval_graph(job: RerankJob, plan: QueryPlan, pools: Pools, control: Any) -> Iterator[Any]:
    """Return the stream of references to blocks of queries with their candidates."""
    first = job.first
    if first.model is None:
        rows = from_blocks(cut_queries(plan.todo, job.recipe))
        return beside(rows, LookUpRows, first.stage, pools).iter_internal_ref_bundles()
    recipe = first.query_recipe
    counter = Load(first.model, recipe, "load_counter", control)
    decode = DecodeQueries(
        media=_of_queries(job, recipe, first.model.resize, counter), may_start=MayStart(control)
    )
    rows = from_blocks(cut_queries(plan.todo, recipe))
    rows = on_cpus(rows, QueryDecoder, decode, pools)
    rows = on_gpus(rows, EmbedQueries, (Load(first.model, recipe, "load_engine", control),), pools)
    rows = beside(rows, SearchTables, first.stage, pools)
    return rows.iter_internal_ref_bundles()


def pairs_graph(
    job: RerankJob, plan: PairPlan, book: Any, pools: Pools, control: Any
) -> Iterator[Any]:
    """Return the stream of references to blocks of media with the scores of their pairs."""
    deaths = ControlAttempts(control), job.config.limits.max_worker_deaths
    decode = DecodeDocuments(
        media=_reading(job, job.recipe, job.model.resize, None),
        may_start=MayStart(control),
        attempts=deaths[0],
        max_deaths=deaths[1],
    )
    load = Load(job.model, job.recipe, "load_engine", control)
    rows = from_blocks(cut_media(plan.media, job.recipe, job.config.pools.media_per_block))
    rows = on_cpus(rows, DocumentDecoder, decode, pools)
    rows = on_gpus(rows, RerankPairs, (load, OpenBook(book), *deaths), pools)
    return rows.iter_internal_ref_bundles()


def _of_queries(
    job: RerankJob, recipe: Recipe | RerankRecipe, resize: str, counter: Load | None
) -> ReadMedia:
    # A query's video is one prompt, whatever the segments of those that are searched.
    whole = dataclasses.replace(recipe, segmentation=Segmentation())
    return _reading(job, whole, resize, counter)


def _reading(
    job: RerankJob, recipe: Recipe | RerankRecipe, resize: str, counter: Load | None
) -> ReadMedia:
    return ReadMedia(
        storage=job.storage,
        recipe=recipe,
        fetch_limits=fetch_limits(job.config.limits),
        decode_limits=decode_limits(job.config.limits),
        resize=resize,
        load_counter=counter,
    )


@dataclass
class QueryBook:
    """What the queries of a wave ask: texts at hand, decoded media in the object store.

    Args:
        asked: A query's text, image, video and instruction by query_id.
        places: Block and row that hold a query's decoded media.
        num_parts: Images and videos decoded.
    """

    asked: Mapping[str, Mapping[str, Any]]
    places: Mapping[str, tuple[Any, int]]
    num_parts: int = 0
    _blocks: dict[Any, list[tuple[list[Vision], Any]]] = field(default_factory=dict)

    def __call__(self, query_id: str) -> EmbedInput | Mapping[str, Any]:
        query = self.asked[query_id]
        if query_id not in self.places:
            return query_input(query, ())
        block, row = self.places[query_id]
        visions, failure = self._rows(block)[row]
        if failure is not None:
            uri = query["video"] or query["image"]
            return failure | {"message": f"the query's medium {uri}: {failure['message']}"}
        return query_input(query, visions)

    def _rows(self, reference: Any) -> list[tuple[list[Vision], Any]]:
        if reference not in self._blocks:
            block = ray.get(reference)
            parts = [[vision for _, vision in one] for one in iter_parts(block["_parts"])]
            failures = block["_failure"].to_pylist()
            self._blocks[reference] = list(zip(parts, failures, strict=True))
        return self._blocks[reference]


@dataclass(frozen=True)
class OpenBook:
    """Gets a wave's queries once an actor."""

    reference: Any

    def __call__(self) -> QueryBook:
        return ray.get(self.reference)


def open_queries(job: RerankJob, queries: pa.Table, pools: Pools) -> QueryBook:
    """Decode the media of a wave's queries, each once, into the object store.

    Raises:
        QvlError: If a worker can not go on.
    """
    columns = ["query_id", "text", "image", "video", "instruction"]
    asked = {query.pop("query_id"): query for query in queries.select(columns).to_pylist()}
    with_media = queries.filter(
        pc.or_(pc.is_valid(queries["image"]), pc.is_valid(queries["video"]))
    )
    if not with_media.num_rows:
        return QueryBook(asked, {})
    ordinals = pa.array(range(with_media.num_rows), pa.int64())
    rows = from_blocks(cut_queries(with_media.append_column("_ordinal", ordinals), job.recipe))
    stage = DecodeQueries(media=_of_queries(job, job.recipe, job.model.resize, None))
    places: dict[str, tuple[Any, int]] = {}
    num_parts = 0
    try:
        for bundle in on_cpus(rows, QueryDecoder, stage, pools).iter_internal_ref_bundles():
            for entry in bundle.blocks:
                ids, count = ray.get(_held.remote(entry.ref))
                places |= {query: (entry.ref, row) for row, query in enumerate(ids)}
                num_parts += count
    except ray.exceptions.RayError as error:
        raise cause_of(error) from error
    return QueryBook(asked, places, num_parts)


@ray.remote(num_cpus=0)
def _held(block: pa.Table) -> tuple[list[str], int]:
    """Return a block's query_ids and how many parts it holds; the pixels stay where they are."""
    return block["query_id"].to_pylist(), len(pc.list_flatten(block["_parts"]))
