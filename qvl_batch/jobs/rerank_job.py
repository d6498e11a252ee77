"""A rerank run with everything decided before Ray starts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch import schema
from qvl_batch.config import DEFAULT_QUERY_INSTRUCTION, ModelSection
from qvl_batch.errors import ConfigError, ModelError, RecipeMismatchError, StorageError
from qvl_batch.jobs import modes
from qvl_batch.jobs.checkpoint import Model, QwenCheckpoint, QwenReranker, RerankModel
from qvl_batch.jobs.identify import tables_of
from qvl_batch.jobs.leasing import new_run_id, take_leases
from qvl_batch.jobs.rerank_plan import QueryPlan, Retries, Target, plan_queries, with_digests
from qvl_batch.jobs.retrieve_stages import FirstStage
from qvl_batch.media.queries import Labels, read_candidates, read_labels, read_queries
from qvl_batch.recipe import Recipe, RerankRecipe, differences
from qvl_batch.rerank_config import RerankConfig
from qvl_batch.storage import Storage
from qvl_batch.tables.aliases import resolve
from qvl_batch.tables.filters import filter_of
from qvl_batch.tables.layout import (
    COLLECTION_METADATA,
    KIND_METADATA,
    PARTITION_METADATA,
    VECTORS_KIND,
    check_collection_name,
)
from qvl_batch.tables.lease import Leases
from qvl_batch.tables.ledger import table_kind, table_recipe
from qvl_batch.tables.lists import read_lance
from qvl_batch.tables.open import OpenTables
from qvl_batch.tables.rewrite import fence
from qvl_batch.tables.scores import CANDIDATES_KIND, SCORES_KIND, candidates_collection
from qvl_batch.tables.search import SHORTLIST
from qvl_batch.tables.store import TableStore

RECIPE, FIRST_RECIPE, SEARCH = "qvl.recipe", "qvl.first_recipe", "qvl.search"


@dataclass(frozen=True, kw_only=True)
class First:
    """The first stage: the collection searched and what searches it (None: nothing does)."""

    recipe: Recipe
    query_recipe: Recipe
    model: Model | None
    stage: FirstStage
    stated: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RerankJob:
    """A rerank run with everything decided: nothing is left to be wrong but the world.

    ``to_fence`` has the tables that were not there when their lease was taken over from a dead run.
    """

    config: RerankConfig
    run_id: str
    storage: Storage
    target: Target
    first: First
    model: RerankModel
    recipe: RerankRecipe
    queries: pa.Table
    query_columns: list[pa.Field]
    labels: Labels | None
    retries: Retries
    plan: QueryPlan
    candidates_schemas: dict[str, pa.Schema]
    scores_schemas: dict[str, pa.Schema]
    leases: Leases
    to_fence: Sequence[str]

    def commits(self, planned_versions: Mapping[str, int]) -> modes.Appending:
        """Return where rows go that were planned with these versions of the tables."""
        return modes.Appending(
            modes.Target(
                store=self.target.store,
                run_id=self.run_id,
                planned_versions=planned_versions,
                still_held=self.leases.check,
            )
        )

    def fence_created(self, tables: Sequence[str]) -> None:
        """Fence those of the tables that a dead run might still create rows in."""
        for name in tables:
            if name in self.to_fence:
                fence(self.target.store, name, run_id=self.run_id)


def prepare(
    config: RerankConfig,
    held: contextlib.ExitStack,
    *,
    model: RerankModel | None = None,
    first_model: Model | None = None,
    retry_failed: bool = False,
    steal: bool = False,
) -> RerankJob:
    """Check everything that can be checked before Ray starts, take the leases, plan the first half.

    Args:
        config: The job.
        held: Gets the leases: closing it releases them.
        model: Another reranker than the configured checkpoint.
        first_model: Another embedding model than the tables' own.
        retry_failed: Plan again also what failed for good.
        steal: Take leases over from whoever holds them.

    Raises:
        InputError: If anything in the configuration, the queries, the models, the storage or the
            existing tables does not go together.
        LeaseHeldError: If another live run works on one of the partitions.
    """
    storage = config.storage.to_storage()
    collection = check_collection_name(config.output.collection)
    check_collection_name(candidates_collection(collection))
    listed = read_queries(
        config.input.queries,
        storage,
        partition_by=config.output.partition_by,
        read_lance=read_lance,
    )
    given = labels = None
    if config.input.candidates is not None:
        given = read_candidates(
            config.input.candidates, storage, queries=listed, read_lance=read_lance
        ).rows
    if config.input.relevance is not None:
        labels = read_labels(config.input.relevance, storage, queries=listed, read_lance=read_lance)
    limit = config.input.limit
    rows = listed.rows.slice(0, limit) if limit is not None else listed.rows
    if labels is not None:
        _refuse_labels_of_nothing(labels, rows, config.input.relevant_from)
    codes, tables, partitions = tables_of(listed.path, rows, listed.partition_by, collection)
    names = pa.array(tables, pa.string()).take(pa.array(codes))
    queries = with_digests(rows, names)
    first = _first_stage(config, storage, first_model, searches=given is None)
    reranker = model or QwenReranker.of(config.model, storage, config.pools.rerank.batch_tokens)
    reranker.check()
    recipe = config.build_recipe(
        reranker.digest(),
        config.model.instruction or reranker.default_instruction(),
        first.recipe.segmentation,
    )
    store = TableStore(config.output.root or config.search.root, storage)
    store.check_writable()
    _refuse_other_collection(store, collection, recipe, first)
    target = Target(store=store, collection=collection, partitions=partitions)
    run_id = new_run_id()
    leases, to_fence = take_leases(
        store,
        [*partitions, *map(target.candidates, partitions)],
        run_id,
        held,
        ttl_s=config.commit.lease_ttl_s,
        steal=steal,
    )
    retries = Retries(retry_failed=retry_failed, max_attempts=config.limits.max_attempts)
    plan = plan_queries(target, queries, given, retries)
    columns = [listed.rows.schema.field(key) for key in listed.partition_by]
    stated = {
        RECIPE: recipe.to_json(),
        FIRST_RECIPE: first.recipe.to_json(),
        SEARCH: json.dumps(first.stated, ensure_ascii=False),
    } | reranker.stated()
    return RerankJob(
        config=config,
        run_id=run_id,
        storage=storage,
        target=target,
        first=first,
        model=reranker,
        recipe=recipe,
        queries=queries,
        query_columns=columns,
        labels=labels,
        retries=retries,
        plan=plan,
        candidates_schemas={
            target.candidates(name): schema.candidates(
                columns, stated | _names(CANDIDATES_KIND, target, name)
            )
            for name in partitions
        },
        scores_schemas={
            name: schema.scores(columns, stated | _names(SCORES_KIND, target, name))
            for name in partitions
        },
        leases=leases,
        to_fence=to_fence,
    )


def _names(kind: str, target: Target, scores_table: str) -> dict[str, str]:
    own = target.collection
    return {
        KIND_METADATA: kind,
        COLLECTION_METADATA: candidates_collection(own) if kind == CANDIDATES_KIND else own,
        PARTITION_METADATA: target.json(scores_table),
    }


def _refuse_labels_of_nothing(labels: Labels, queries: pa.Table, relevant_from: float) -> None:
    """Refuse labels that would judge no query: told now, not after the last score.

    Raises:
        ConfigError: If no query has a label of `relevant_from` or more.
    """
    relevant = labels.rows.filter(pc.greater_equal(labels.rows["relevance"], relevant_from))
    known = pc.is_in(relevant["query_id"], value_set=queries["query_id"].combine_chunks())
    if not pc.any(known).as_py():
        raise ConfigError(
            f"{labels.path} has no label of {relevant_from:g} or more for any of the "
            f"{queries.num_rows:,} queries.",
            "Compare the query_ids, or lower input.relevant_from.",
        )


def _first_stage(
    config: RerankConfig, storage: Storage, model: Model | None, *, searches: bool
) -> First:
    """Return what is searched; its model must be the one that made the tables.

    Raises:
        StorageError: If there is no such collection.
        ModelError: If the model is another.
        ConfigError: If a filter is refused.
    """
    search = config.search
    store = TableStore(search.root, storage)
    opening = OpenTables(store)
    collection = resolve(store, search.collection)
    tables = opening.of(collection)
    some = next(iter(tables.values()), None)
    if some is None or table_kind(some) != VECTORS_KIND:
        there = ", ".join(opening.collections())
        raise StorageError(
            f"{store.root} holds no collection {search.collection!r}.",
            f"There are: {there}." if there else "It holds none.",
        )
    recipe = table_recipe(some)
    if recipe is None:
        raise StorageError(f"{some.uri} states no recipe.", "Search tables that embed made.")
    metadata = {k.decode(): v.decode() for k, v in (some.schema.metadata or {}).items()}
    instruction = search.query_instruction or metadata.get("qvl.query_instruction")
    instruction = instruction or DEFAULT_QUERY_INSTRUCTION
    shortlist = max(SHORTLIST, 2 * search.top_k)
    stated: dict[str, Any] = {"collection": collection, "given": not searches}
    if searches:
        stated |= {
            "top_k": search.top_k,
            "shortlist": shortlist,
            "rescore": search.rescore,
            "where": list(search.where),
            "query_instruction": instruction,
        }
        if search.where:
            filter_of(list(search.where), some.schema)
        model = model or _own_model(config, metadata, storage)
        digest = model.digest()
        if digest != recipe.model_digest:
            raise ModelError(
                f"The tables of {collection} were made by the model "
                f"{recipe.model_digest[:16]}, search.model has {digest[:16]}.",
                "Give the model that made them as search.model and search.revision.",
            )
    stage = FirstStage(
        root=store.root,
        storage=storage,
        versions={name: dataset.version for name, dataset in tables.items()},
        top_k=search.top_k,
        shortlist=shortlist,
        rescore=search.rescore,
        where=tuple(search.where),
        nprobes=opening.nprobes(tables),
    )
    return First(
        recipe=recipe,
        query_recipe=dataclasses.replace(recipe, encodings=("float32",), instruction=instruction),
        model=model if searches else None,
        stage=stage,
        stated=stated,
    )


def _own_model(config: RerankConfig, metadata: Mapping[str, str], storage: Storage) -> Model:
    path = config.search.model or metadata.get("qvl.model")
    if not path:
        raise ConfigError("The tables do not state their model.", "Give it as search.model.")
    revision = config.search.revision
    if revision is None and config.search.model is None:
        revision = metadata.get("qvl.revision") or None
    dtype = metadata.get("qvl.dtype", "auto")
    section = ModelSection.model_validate({"path": path, "revision": revision, "dtype": dtype})
    return QwenCheckpoint.of(section, storage, config.pools.rerank.batch_tokens)


def _refuse_other_collection(
    store: TableStore, collection: str, recipe: RerankRecipe, first: First
) -> None:
    """Refuse a scores collection of another reranker or first stage, or one that holds vectors.

    Raises:
        RecipeMismatchError: Naming the fields that differ.
        ConfigError: If the collection's name is taken by vectors.
    """
    names = (collection, candidates_collection(collection))
    ours = {
        "reranker": json.loads(recipe.to_json()),
        "first stage": json.loads(first.recipe.to_json()),
        "search": dict(first.stated),
    }
    for name in store.names():
        if not any(name == own or name.startswith(f"{own}__") for own in names):
            continue
        dataset = store.open(name)
        if dataset is None:
            continue
        if table_kind(dataset) == VECTORS_KIND:
            raise ConfigError(
                f"The collection {collection} in {store.root} holds vectors.",
                "Choose another output.collection.",
            )
        metadata = {k.decode(): v.decode() for k, v in (dataset.schema.metadata or {}).items()}
        theirs = {
            "reranker": json.loads(metadata[RECIPE]),
            "first stage": json.loads(metadata[FIRST_RECIPE]),
            "search": json.loads(metadata[SEARCH]),
        }
        found = differences(ours, theirs)
        if found:
            listed = "; ".join(
                f"{key} is {other!r} there, {mine!r} here" for key, mine, other in found
            )
            raise RecipeMismatchError(
                f"Table {store.uri(name)} was made by another recipe: {listed}.",
                "Set it to what it is there, or write to a new output.collection.",
            )
        return
