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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow.compute as pc

from qvl_batch.config import EmbedConfig
from qvl_batch.errors import QvlError
from qvl_batch.jobs.checkpoint import Model
from qvl_batch.jobs.cluster import Pools, choose_pools, connect
from qvl_batch.jobs.commit_loop import Counts
from qvl_batch.jobs.control import ControlAttempts, Load, MayStart
from qvl_batch.jobs.driver import EXIT_OF_SIGNAL, Run, Work
from qvl_batch.jobs.embed_job import EmbedJob, prepare
from qvl_batch.jobs.graph import from_blocks, on_cpus, on_gpus
from qvl_batch.jobs.limits import decode_limits, fetch_limits
from qvl_batch.jobs.modes import publish_replaced
from qvl_batch.jobs.plan import cut_blocks, units_per_block
from qvl_batch.jobs.report import RunReport, write_certificate, write_report
from qvl_batch.jobs.stages import DecodeMedia, DecodingWorker, EmbedMedia, WriteRows
from qvl_batch.tables import catalog
from qvl_batch.tables.layout import partition_json


def run_embed(
    config: EmbedConfig,
    *,
    model: Model | None = None,
    retry_failed: bool = False,
    steal: bool = False,
    echo: Callable[[str], None] = print,
) -> RunReport:
    """Embed what is left of a manifest and return the report.

    Args:
        config: The job.
        model: Another model than the configured checkpoint (a small real one in tests).
        retry_failed: Try again also what failed for good.
        steal: Take partitions over from a run that still seems to be alive.
        echo: Takes lines for a person.

    Raises:
        InputError: Before anything starts.
        RunFailedError: If the run could not go on; what was committed stays.
        LeaseHeldError: If another run writes the same partition.
    """
    started_s = time.monotonic()
    with contextlib.ExitStack() as held:
        job = prepare(config, held, model=model, retry_failed=retry_failed, steal=steal)
        return _run(job, started_s, echo)


def _run(job: EmbedJob, started_s: float, echo: Callable[[str], None]) -> RunReport:
    plan = job.plan
    echo(
        f"{plan.num_units:,} units in {len(plan.partitions)} partition(s): {plan.num_done:,} done "
        f"before, {plan.num_failed_before:,} failed before, {plan.todo.num_rows:,} to do"
        + (f", {plan.num_held_back:,} held back by the limit" if plan.num_held_back else "")
        + (f"; {plan.num_duplicates:,} equal rows collapsed" if plan.num_duplicates else "")
    )
    counts, stopped_by = Counts(), None
    known_files: dict[str, list[Mapping[str, Any]]] = {}
    job.remove_left_over()
    if plan.todo.num_rows:
        pools = choose_pools(job.config.pools, connect(job.config.pools.address))
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
    if job.staged is not None and stopped_by is None:
        known_files = publish_replaced(job.target, sorted(plan.partitions))
        echo(f"published the new content of {len(known_files)} partition(s)")
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
    tables = pc.unique(plan.todo["_table"]).to_pylist()
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
        schemas={name: job.schemas[name] for name in tables},
        planned_versions=plan.planned_versions,
        commits=job.commits(),
        make_ready=lambda: job.make_ready(tables),
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
        attempts=ControlAttempts(control),
        max_deaths=job.config.limits.max_worker_deaths,
    )
    rows = from_blocks(cut_blocks(job.plan.todo, per_block))
    rows = on_cpus(rows, DecodingWorker, decode, pools)
    load = Load(job.model, job.recipe, "load_engine", control)
    deaths = ControlAttempts(control), job.config.limits.max_worker_deaths
    rows = on_gpus(rows, EmbedMedia, (load, *deaths), pools)
    return rows.iter_internal_ref_bundles()
