"""The rerank job: queries and tables in, committed scores and ranks out.

    queries -> plan -> DecodeQueries -> EmbedQueries (GPU actors) -> SearchTables
            -> WriteCandidates (tasks) -> commit loop: all candidates of a query in one commit
    candidates -> plan, by medium -> DecodeDocuments (CPU actors) -> RerankPairs (GPU actors)
            -> WriteScores (tasks) -> commit loop -> ranks, one commit a partition -> report

The tables are the ledger of both halves: a query with candidates is not searched again, a pair with
a score is not scored again. Ranks follow from the scores, so they are set whenever they are not
what they should be.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterable

import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.api.parity import check_stack
from qvl_batch.jobs.checkpoint import Model, QwenReranker, RerankModel
from qvl_batch.jobs.cluster import Pools, choose_pools, connect
from qvl_batch.jobs.driver import EXIT_OF_SIGNAL, Run, Work
from qvl_batch.jobs.report import write_certificate
from qvl_batch.jobs.rerank_blocks import cut_waves
from qvl_batch.jobs.rerank_graph import open_queries, pairs_graph, retrieval_graph
from qvl_batch.jobs.rerank_job import RerankJob, prepare
from qvl_batch.jobs.rerank_plan import PairPlan, QueryPlan, incomplete, plan_pairs
from qvl_batch.jobs.rerank_report import RerankReport, Tally, write_rerank_report
from qvl_batch.jobs.rerank_stages import WriteScores
from qvl_batch.jobs.retrieve_stages import WriteCandidates
from qvl_batch.rerank_config import RerankConfig
from qvl_batch.tables.scores import RANKED, column_values, ranks_to_set, set_ranks


def run_rerank(
    config: RerankConfig,
    *,
    model: RerankModel | None = None,
    first_model: Model | None = None,
    retry_failed: bool = False,
    steal: bool = False,
    echo: Callable[[str], None] = print,
) -> RerankReport:
    """Find candidates for the queries that have none, score what is not scored, set the ranks.

    Args:
        config: The job.
        model: Another reranker than the configured checkpoint (a small real one in tests).
        first_model: Another embedding model than the tables' own.
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
        job = prepare(
            config,
            held,
            model=model,
            first_model=first_model,
            retry_failed=retry_failed,
            steal=steal,
        )
        return _drive(job, started_s, echo)


def _drive(job: RerankJob, started_s: float, echo: Callable[[str], None]) -> RerankReport:
    plan = job.plan
    echo(
        f"{plan.num_queries:,} queries in {len(job.target.partitions)} partition(s): "
        f"{plan.num_found_before:,} have candidates, {plan.num_failed_before:,} failed before, "
        f"{plan.todo.num_rows:,} to search"
    )
    tally = Tally()
    stopped_by = _run(job, tally, echo)
    _set_ranks(job, tally)
    report = RerankReport.of(
        job,
        tally,
        duration_s=time.monotonic() - started_s,
        exit_code=EXIT_OF_SIGNAL[stopped_by] if stopped_by is not None else 0,
    )
    if not tally.started:
        echo("Nothing to do: every query has candidates, every pair a score or a failure.")
    else:
        write_rerank_report(report, job.target.store.root, job.storage)
    echo(str(report))
    return report


class _Start:
    """Starts Ray for the first work that there is, once this installation has proved itself."""

    def __init__(self, job: RerankJob, tally: Tally, echo: Callable[[str], None]) -> None:
        self._job, self._tally, self._echo = job, tally, echo
        self._pools: Pools | None = None

    def __call__(self) -> Pools:
        if self._pools is None:
            job = self._job
            # It is about the path of Qwen3-VL checkpoints: another model has another path.
            certificate = check_stack() if isinstance(job.model, QwenReranker) else None
            self._pools = choose_pools(job.config.pools, connect(job.config.pools.address))
            self._echo(f"run {job.run_id}: {self._pools}")
            self._tally.started = True
            if certificate is not None:
                write_certificate(certificate, job.run_id, job.target.store.root, job.storage)
        return self._pools


def _run(job: RerankJob, tally: Tally, echo: Callable[[str], None]) -> signal.Signals | None:
    """Run both halves; return the signal that stopped them, if one did."""
    started = _Start(job, tally, echo)
    if job.plan.todo.num_rows:
        run = Run(retrieval_work(job, job.plan, started()), echo)
        try:
            stopped_by = run.drive()
        finally:
            tally.searched(run.loop.counts)
        if stopped_by is not None:
            return stopped_by
    waves = cut_waves(job.queries, job.recipe, job.config.pools.queries_per_wave)
    for number, wave in enumerate(waves):
        plan = plan_pairs(job.target, wave, job.query_columns, job.retries)
        tally.planned(plan)
        if not plan.num_todo:
            continue
        echo(
            f"wave {number + 1} of {len(waves)}: {plan.num_todo:,} pairs of "
            f"{plan.media.num_rows:,} media to score"
        )
        run = Run(pairs_work(job, plan, wave, number, started(), tally), echo)
        try:
            stopped_by = run.drive()
        finally:
            tally.scored(run.loop.counts)
        if stopped_by is not None:
            return stopped_by
    return None


def retrieval_work(job: RerankJob, plan: QueryPlan, pools: Pools) -> Work:
    """Return the first half as the driver is to run it: its units are queries."""
    target = job.target
    partitions = {target.candidates(name): target.json(name) for name in target.partitions}
    schemas = _written(job.candidates_schemas, plan.todo["_table"])
    return Work(
        run_id=job.run_id,
        markers=f"{job.run_id}/candidates",
        num_ordinals=plan.todo.num_rows,
        total=plan.todo.num_rows,
        unit="queries",
        store=target.store,
        graph=functools.partial(retrieval_graph, job, plan, pools),
        write=WriteCandidates(
            root=target.store.root,
            storage=job.storage,
            collection=target.collection,
            schemas=job.candidates_schemas,
            partitions=partitions,
            run_id=job.run_id,
        ),
        schemas=schemas,
        planned_versions=plan.planned_versions,
        commits=job.commits(plan.planned_versions),
        make_ready=lambda: job.fence_created(list(schemas)),
        name=lambda ordinal: f"query {plan.todo['query_id'][ordinal].as_py()!r:.100}",
        commit=job.config.commit,
        limits=job.config.limits,
        write_tasks=pools.write_tasks,
    )


def pairs_work(
    job: RerankJob, plan: PairPlan, wave: pa.Table, number: int, pools: Pools, tally: Tally
) -> Work:
    """Return a wave of the second half as the driver is to run it: its units are media."""
    import ray

    target = job.target
    tables = pc.list_flatten(plan.media["_pairs"]).combine_chunks().field("_table")
    asked = pc.list_flatten(plan.media["_pairs"]).combine_chunks().field("query_id")
    queries = wave.filter(pc.is_in(wave["query_id"], value_set=pc.unique(asked)))
    book = open_queries(job, queries, pools)
    tally.query_media_decoded += book.num_parts
    reference = ray.put(book)
    schemas = _written(job.scores_schemas, tables)
    return Work(
        run_id=job.run_id,
        markers=f"{job.run_id}/scores-{number}",
        num_ordinals=plan.media.num_rows,
        total=plan.num_todo,
        unit="pairs",
        store=target.store,
        graph=functools.partial(pairs_graph, job, plan, reference, pools),
        write=WriteScores(
            root=target.store.root,
            storage=job.storage,
            collection=target.collection,
            schemas=job.scores_schemas,
            partitions={name: target.json(name) for name in target.partitions},
            run_id=job.run_id,
        ),
        schemas=schemas,
        planned_versions=plan.planned_versions,
        commits=job.commits(plan.planned_versions),
        make_ready=lambda: job.fence_created(list(schemas)),
        name=lambda ordinal: str(plan.media["uri"][ordinal].as_py()),
        commit=job.config.commit,
        limits=job.config.limits,
        write_tasks=pools.write_tasks,
    )


def _written(schemas: dict[str, pa.Schema], tables: Iterable[object]) -> dict[str, pa.Schema]:
    return {name: schemas[name] for name in pc.unique(tables).to_pylist()}


def _set_ranks(job: RerankJob, tally: Tally) -> None:
    """Set the ranks of all queries whose candidates are all scored or failed."""
    target = job.target
    for name in target.partitions:
        dataset = target.store.open(name)
        if dataset is None:
            continue

        def ranks(latest: object, name: str = name) -> pa.Table:
            waiting = incomplete(target, name, column_values(latest, "pair_id"))
            return ranks_to_set(latest.to_table(columns=RANKED), waiting)

        job.leases.check()
        tally.ranks_set += set_ranks(
            target.store,
            name,
            ranks,
            marker=f"{job.run_id}/ranks",
            run_id=job.run_id,
            planned_version=dataset.version,
        )
