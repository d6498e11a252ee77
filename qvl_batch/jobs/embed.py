"""The embed job: manifest in, committed Lance rows out.

    manifest -> plan -> DecodeMedia (CPU actors) -> EmbedMedia (GPU actors)
             -> WriteRows (tasks, immutable fragments) -> commit loop (driver) -> report

WriteRows is a task over groups of blocks rather than a third actor stage: a stage that buffers
across blocks would lose its buffer with its actor, and one that does not would write a fragment a
block. The driver groups the references of embedded blocks by size and age instead; a write is a
pure function of them and can be repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch import schema
from qvl_batch.api.certificate import Certificate
from qvl_batch.api.parity import check_stack
from qvl_batch.config import EmbedConfig
from qvl_batch.errors import (
    QvlError,
)
from qvl_batch.jobs.checkpoint import Model, QwenCheckpoint
from qvl_batch.jobs.cluster import Pools, choose_pools, connect
from qvl_batch.jobs.commit_loop import Counts
from qvl_batch.jobs.control import Load, MayStart
from qvl_batch.jobs.driver import EXIT_OF_SIGNAL, Run, Work
from qvl_batch.jobs.graph import from_blocks, on_cpus, on_gpus
from qvl_batch.jobs.identify import identify
from qvl_batch.jobs.limits import decode_limits, fetch_limits
from qvl_batch.jobs.manifest import read_manifest
from qvl_batch.jobs.plan import (
    Plan,
    cut_blocks,
    plan_units,
    units_per_block,
)
from qvl_batch.jobs.report import RunReport, write_certificate, write_report
from qvl_batch.jobs.stages import DecodeMedia, DecodingWorker, EmbedMedia, WriteRows
from qvl_batch.recipe import Recipe
from qvl_batch.storage import Storage
from qvl_batch.tables import catalog
from qvl_batch.tables.aliases import refuse_alias
from qvl_batch.tables.embedding_metadata import embedding_functions
from qvl_batch.tables.layout import check_collection_name, partition_json
from qvl_batch.tables.ledger import check_recipe as check_table_recipe
from qvl_batch.tables.store import TableStore


@dataclass(frozen=True, kw_only=True)
class EmbedJob:
    """An embed run with everything decided: nothing is left to be wrong but the world."""

    config: EmbedConfig
    run_id: str
    storage: Storage
    store: TableStore
    model: Model
    recipe: Recipe
    plan: Plan
    schemas: Mapping[str, pa.Schema]
    certificate: Certificate | None = None


def prepare(
    config: EmbedConfig, *, model: Model | None = None, retry_failed: bool = False
) -> EmbedJob:
    """Check everything that can be checked before Ray starts, and plan.

    Raises:
        InputError: If anything in the configuration, the manifest, the model, the storage or the
            existing tables does not go together, or if this installation gives other vectors than
            it should.
    """
    storage = config.storage.to_storage()
    collection = config.output.collection
    check_collection_name(collection)
    manifest = read_manifest(config.input.manifest, storage, config.output.partition_by)
    units = identify(manifest, collection)
    store = TableStore(config.output.root, storage)
    store.check_writable()
    refuse_alias(store, collection)
    model = model or QwenCheckpoint.of(config.model, storage, config.pools.embed.batch_tokens)
    recipe = config.build_recipe(model.digest(), model.dim())
    check_recipe(store, collection, recipe)
    plan = plan_units(
        units,
        store,
        collection,
        extra_fields=manifest.extra_fields,
        num_manifest_rows=manifest.rows.num_rows,
        retry_failed=retry_failed,
        max_attempts=config.limits.max_attempts,
        limit=config.input.limit,
    )
    certificate = certify(config, model) if plan.todo.num_rows else None
    stated = model.stated()
    stated |= embedding_functions(recipe, stated)
    if certificate:
        stated |= {"qvl.certificate": certificate.sha256}
    schemas = {
        name: schema.table_rows(
            recipe,
            [f for f in manifest.extra_fields if f.name not in schema.MANIFEST.names],
            {"qvl.collection": collection, "qvl.partition": partition_json(partition)} | stated,
        )
        for name, partition in plan.partitions.items()
    }
    for name in plan.planned_versions:
        # Also checks that the manifest's own columns are those of the earlier runs.
        store.create(name, schemas[name])
    return EmbedJob(
        config=config,
        run_id=f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}",
        storage=storage,
        store=store,
        model=model,
        recipe=recipe,
        plan=plan,
        schemas=schemas,
        certificate=certificate,
    )


def certify(config: EmbedConfig, model: Model) -> Certificate | None:
    """Return the certificate of this installation; None if it is not asked for.

    It is about the path of Qwen3-VL checkpoints: another model has another path.

    Raises:
        ModelError: If the installation is broken, naming what differs.
    """
    return check_stack() if config.model.check and isinstance(model, QwenCheckpoint) else None


def check_recipe(store: TableStore, collection: str, recipe: Recipe) -> None:
    """Refuse a collection that was made by another recipe.

    One table tells: none is added to a collection without this check. The tables that a run
    writes to are each compared again when their columns are.

    Raises:
        RecipeMismatchError: Naming the fields that differ.
    """
    for name in store.names():
        if name == collection or name.startswith(f"{collection}__"):
            dataset = store.open(name)
            if dataset is not None:
                check_table_recipe(dataset, recipe)
                return


def run_embed(
    config: EmbedConfig,
    *,
    model: Model | None = None,
    retry_failed: bool = False,
    echo: Callable[[str], None] = print,
) -> RunReport:
    """Embed what is left of a manifest and return the report.

    Args:
        config: The job.
        model: Another model than the configured checkpoint (a small real one in tests).
        retry_failed: Try again also what failed for good.
        echo: Takes lines for a person.

    Raises:
        InputError: Before anything starts.
        RunFailedError: If the run could not go on; what was committed stays.
        LeaseHeldError: If another run writes the same partition.
    """
    started_s = time.monotonic()
    job = prepare(config, model=model, retry_failed=retry_failed)
    plan = job.plan
    echo(
        f"{plan.num_units:,} units in {len(plan.partitions)} partition(s): {plan.num_done:,} done "
        f"before, {plan.num_failed_before:,} failed before, {plan.todo.num_rows:,} to do"
        + (f", {plan.num_held_back:,} held back by the limit" if plan.num_held_back else "")
        + (f"; {plan.num_duplicates:,} equal rows collapsed" if plan.num_duplicates else "")
    )
    counts, stopped_by = Counts(), None
    known_files: dict[str, list[Mapping[str, Any]]] = {}
    if plan.todo.num_rows:
        pools = choose_pools(config.pools, connect(config.pools.address))
        echo(f"run {job.run_id}: {pools}")
        if job.certificate is not None:
            # Before the first row: the tables state its hash, whatever becomes of the run.
            write_certificate(job.certificate, job.run_id, job.store.root, job.storage)
        run = Run(work_of(job, pools), echo)
        try:
            stopped_by = run.drive()
        except QvlError:
            # The catalog informs: what ended the run must not be hidden by its refresh.
            with contextlib.suppress(QvlError, OSError):
                _refresh_catalog(job, run.loop.known_files)
            raise
        counts, known_files = run.loop.counts, run.loop.known_files
    else:
        echo("Nothing to do: every unit is done or has failed for good.")
    _refresh_catalog(job, known_files)
    report = RunReport.of(job.run_id, plan, counts, job.recipe, time.monotonic() - started_s)
    report = dataclasses.replace(
        report, exit_code=EXIT_OF_SIGNAL[stopped_by] if stopped_by is not None else 0
    )
    if plan.todo.num_rows:
        write_report(report, job.store.root, job.storage)
    echo(str(report))
    return report


def _refresh_catalog(job: EmbedJob, known_files: Mapping[str, list[Mapping[str, Any]]]) -> None:
    names = [name for name in job.plan.partitions if job.store.open(name) is not None]
    catalog.refresh(job.store, names, known_files, run_id=job.run_id)


def work_of(job: EmbedJob, pools: Pools) -> Work:
    """Return what the driver is to run."""
    plan, config = job.plan, job.config
    return Work(
        run_id=job.run_id,
        markers=job.run_id,
        num_ordinals=plan.todo.num_rows,
        total=plan.todo.num_rows,
        unit="units",
        store=job.store,
        graph=functools.partial(embed_graph, job, pools),
        write=WriteRows(
            root=job.store.root,
            storage=job.storage,
            collection=config.output.collection,
            schemas=job.schemas,
            partitions={
                name: partition_json(partition) for name, partition in plan.partitions.items()
            },
            run_id=job.run_id,
        ),
        schemas={name: job.schemas[name] for name in pc.unique(plan.todo["_table"]).to_pylist()},
        planned_versions=plan.planned_versions,
        name=lambda ordinal: str(plan.todo["uri"][ordinal].as_py()),
        commit=config.commit,
        limits=config.limits,
        write_tasks=pools.write_tasks,
    )


def embed_graph(job: EmbedJob, pools: Pools, control: Any) -> Iterator[Any]:
    """Return the stream of references to embedded blocks: the Ray Data graph of the job."""
    per_block = units_per_block(
        job.recipe, job.config.pools.block_bytes, job.config.pools.units_per_block
    )
    decode = DecodeMedia(
        storage=job.storage,
        recipe=job.recipe,
        fetch_limits=fetch_limits(job.config.limits),
        decode_limits=decode_limits(job.config.limits),
        resize=job.model.resize,
        load_counter=Load(job.model, job.recipe, "load_counter", control),
        may_start=MayStart(control),
    )
    rows = from_blocks(cut_blocks(job.plan.todo, per_block))
    rows = on_cpus(rows, DecodingWorker, decode, pools)
    rows = on_gpus(rows, EmbedMedia, (Load(job.model, job.recipe, "load_engine", control),), pools)
    return rows.iter_internal_ref_bundles()
