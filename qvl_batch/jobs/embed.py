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
import queue
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayTaskError

from qvl_batch import schema
from qvl_batch.api.certificate import Certificate
from qvl_batch.api.parity import check_stack
from qvl_batch.config import EmbedConfig, LimitsSection
from qvl_batch.errors import (
    InvariantBrokenError,
    QvlError,
    RunFailedError,
)
from qvl_batch.jobs.checkpoint import Model, QwenCheckpoint
from qvl_batch.jobs.cluster import Pools, choose_pools, connect
from qvl_batch.jobs.commit_loop import CommitLoop, Counts
from qvl_batch.jobs.plan import (
    Plan,
    cut_blocks,
    identify,
    plan_units,
    read_manifest,
    units_per_block,
)
from qvl_batch.jobs.progress import Progress
from qvl_batch.jobs.report import RunReport, write_certificate, write_report
from qvl_batch.jobs.stages import DecodeMedia, DecodingWorker, EmbedMedia, WriteRows, Written
from qvl_batch.media.decoder import DecodeLimits
from qvl_batch.media.fetch import FetchLimits
from qvl_batch.recipe import Recipe
from qvl_batch.storage import Storage
from qvl_batch.tables import catalog
from qvl_batch.tables.commit import append, append_failures
from qvl_batch.tables.layout import check_collection_name, partition_json
from qvl_batch.tables.ledger import check_recipe as check_table_recipe
from qvl_batch.tables.store import TableStore

EXIT_OF_SIGNAL = {signal.SIGINT: 130, signal.SIGTERM: 143}


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
    stated = model.stated() | ({"qvl.certificate": certificate.sha256} if certificate else {})
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
    """Refuse a collection that was made by another recipe, in any of its tables.

    Raises:
        RecipeMismatchError: Naming the fields that differ.
    """
    for name in store.names():
        if name == collection or name.startswith(f"{collection}__"):
            dataset = store.open(name)
            if dataset is not None:
                check_table_recipe(dataset, recipe)


def create_tables(job: EmbedJob) -> None:
    """Create the tables of partitions that get their first units: workers only write files."""
    names = [
        name
        for name in pc.unique(job.plan.todo["_table"]).to_pylist()
        if name not in job.plan.planned_versions
    ]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: job.store.create(name, job.schemas[name]), names))


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
        run = _Run(job, pools, echo)
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


@ray.remote(num_cpus=0)
class RunControl:
    """Knows which blocks were begun, and refuses new ones once the run is stopping."""

    def __init__(self) -> None:
        self._stopping = False
        self._begun: set[int] = set()
        self._error: QvlError | None = None

    def report(self, error: QvlError) -> None:
        """Keep what a worker can not go on with: Ray Data passes on its text alone."""
        self._error = self._error or error

    def error(self) -> QvlError | None:
        return self._error

    def may_start(self, ordinal: int) -> bool:
        if self._stopping:
            return False
        self._begun.add(ordinal)
        return True

    def stop(self) -> list[int]:
        """Refuse from now on; return the first ordinals of the blocks that were begun."""
        self._stopping = True
        return sorted(self._begun)


@dataclass(frozen=True)
class _MayStart:
    control: Any

    def __call__(self, ordinal: int) -> bool:
        return ray.get(self.control.may_start.remote(ordinal))


@dataclass(frozen=True)
class _Load:
    """A loader that pickles: a method of the model with its recipe."""

    model: Model
    recipe: Recipe
    method: str
    control: Any

    def __call__(self) -> Any:
        try:
            return getattr(self.model, self.method)(self.recipe)
        except QvlError as error:
            ray.get(self.control.report.remote(error))
            raise


def embed_graph(job: EmbedJob, pools: Pools, control: Any) -> Iterator[Any]:
    """Return the stream of references to embedded blocks: the Ray Data graph of the job."""
    context = DataContext.get_current()
    # One block in, one block out: a replayed task skips by index what it delivered before.
    context.target_max_block_size = None
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    per_block = units_per_block(
        job.recipe, job.config.pools.block_bytes, job.config.pools.units_per_block
    )
    decode = DecodeMedia(
        storage=job.storage,
        recipe=job.recipe,
        fetch_limits=fetch_limits(job.config.limits),
        decode_limits=decode_limits(job.config.limits),
        resize=job.model.resize,
        load_counter=_Load(job.model, job.recipe, "load_counter", control),
        may_start=_MayStart(control),
    )
    rows = ray.data.from_arrow(cut_blocks(job.plan.todo, per_block))
    rows = rows.map_batches(
        DecodingWorker,
        fn_constructor_args=(decode,),
        batch_size=None,
        batch_format="pyarrow",
        udf_modifying_row_count=False,
        compute=ActorPoolStrategy(size=pools.decode_actors, max_tasks_in_flight_per_actor=2),
        num_cpus=pools.decode_cpus,
    )
    # The public map_batches wants a number of rows a batch where there are GPUs; ours are whole
    # blocks, whose number of units depends on their kind.
    rows = rows.map_batches_internal(
        EmbedMedia,
        fn_constructor_args=(_Load(job.model, job.recipe, "load_engine", control),),
        batch_size=None,
        batch_format="pyarrow",
        udf_modifying_row_count=False,
        compute=ActorPoolStrategy(size=pools.embed_actors, max_tasks_in_flight_per_actor=2),
        num_cpus=pools.embed_cpus,
        num_gpus=pools.embed_gpus or None,
    )
    return rows.iter_internal_ref_bundles()


def fetch_limits(limits: LimitsSection) -> FetchLimits:
    return FetchLimits(max_object_bytes=limits.max_object_bytes, timeout_s=limits.fetch_timeout_s)


def decode_limits(limits: LimitsSection) -> DecodeLimits:
    return DecodeLimits(
        timeout_s=limits.decode_timeout_s,
        memory_bytes=limits.decode_memory_bytes,
        max_image_px=limits.max_image_px,
        max_text_bytes=limits.max_text_bytes,
    )


class _RayWrites:
    """`commit_loop.Writes` through Ray tasks."""

    def __init__(self, stage: WriteRows, before_first: Callable[[], None]) -> None:
        self._stage = ray.put(stage)
        self._before_first: Callable[[], None] | None = before_first
        self._write = ray.remote(num_cpus=0, max_retries=3)(_write_group)

    def start(self, blocks: Sequence[Any], exclude: frozenset[int]) -> object:
        if self._before_first is not None:
            self._before_first()
            self._before_first = None
        return self._write.remote(self._stage, exclude, *blocks)

    def finished(self, handles: Sequence[Any], timeout_s: float) -> dict[object, Written]:
        if not handles:
            time.sleep(min(timeout_s, 0.05))
            return {}
        done, _ = ray.wait(list(handles), num_returns=len(handles), timeout=timeout_s)
        return {handle: ray.get(handle) for handle in done}


def _write_group(stage: WriteRows, exclude: frozenset[int], *blocks: pa.Table) -> Written:
    return stage(blocks, exclude)


class _Commits:
    """`commit_loop.Tables` through the tables room."""

    def __init__(self, job: EmbedJob) -> None:
        self._job = job

    def append(self, table: str, fragments: Sequence[Mapping[str, Any]], marker: str) -> None:
        append(
            self._job.store,
            table,
            fragments,
            marker=marker,
            run_id=self._job.run_id,
            # A table that the plan did not find begins with version 1, which is empty.
            planned_version=self._job.plan.planned_versions.get(table, 1),
        )

    def append_failures(self, rows: pa.Table, marker: str) -> None:
        append_failures(self._job.store, rows, marker=marker, run_id=self._job.run_id)


class _Run:
    """One run of the graph: feeds the commit loop, shows progress, stops in good order."""

    def __init__(self, job: EmbedJob, pools: Pools, echo: Callable[[str], None]) -> None:
        self._job = job
        self._control = RunControl.remote()
        self._signal: signal.Signals | None = None
        self._blocks: queue.Queue[Any] = queue.Queue(maxsize=64)
        config = job.config
        self.loop = CommitLoop(
            num_units=job.plan.todo.num_rows,
            writes=_RayWrites(
                WriteRows(
                    root=job.store.root,
                    storage=job.storage,
                    collection=config.output.collection,
                    schemas=job.schemas,
                    partitions={
                        name: partition_json(partition)
                        for name, partition in job.plan.partitions.items()
                    },
                    run_id=job.run_id,
                ),
                # Not earlier: a model that does not load must leave no empty tables behind.
                before_first=lambda: create_tables(job),
            ),
            tables=_Commits(job),
            run_id=job.run_id,
            interval_s=config.commit.interval_s,
            fragment_bytes=config.commit.fragment_bytes,
            max_writes=pools.write_tasks,
            max_failure_rate=config.limits.max_failure_rate,
            failure_rate_after_units=config.limits.failure_rate_after_units,
        )
        self._progress = Progress(total=job.plan.todo.num_rows, echo=echo)
        self._echo = echo
        self._pools = pools

    def drive(self) -> signal.Signals | None:
        """Run to the end, or to a signal; return the signal that stopped the run."""
        feeder = threading.Thread(target=self._feed, name="embedded-blocks", daemon=True)
        try:
            with self._signals(), self._progress:
                feeder.start()
                if self._consume():
                    self.loop.finish()
                    self._progress.update(self.loop.counts)
                    missing = self.loop.missing()
                    if missing.size:
                        uri = self._job.plan.todo["uri"][int(missing[0])].as_py()
                        raise InvariantBrokenError(
                            f"{missing.size} units came back neither done nor failed (the first: "
                            f"{uri}). Run the job again: they are still to do."
                        )
        except RayTaskError as error:
            raise _cause_of(error) from error
        finally:
            # Blocks that are not begun yet come back at once, so that the workers end.
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._control.stop.remote(), timeout=10)
        return self._signal

    def _feed(self) -> None:
        try:
            # Asking for the stream waits for its first block: not on the main thread, which must
            # see signals.
            for bundle in embed_graph(self._job, self._pools, self._control):
                for entry in bundle.blocks:
                    self._blocks.put((entry.ref, entry.metadata.size_bytes or 0))
            self._blocks.put(None)
        except BaseException as error:  # handed to the main thread, which raises it
            self._blocks.put(error)

    def _consume(self) -> bool:
        """Feed the loop until the last block; return False if a signal ended it earlier."""
        begun: list[int] | None = None
        stop_at_s = 0.0
        while True:
            item = self._next_block()
            if item is None:
                return True
            if isinstance(item, BaseException):
                raise ray.get(self._control.error.remote()) or _cause_of(item) from item
            if item is not _NOTHING_YET:
                self.loop.add(*item)
            self.loop.poll()
            self._progress.update(self.loop.counts)
            if self._signal is None:
                continue
            if begun is None:
                grace_s = self._job.config.limits.stop_grace_s
                self._echo(
                    f"{self._signal.name}: stopping; blocks in flight have {grace_s:g} s to end"
                )
                begun = ray.get(self._control.stop.remote())
                stop_at_s = time.monotonic() + grace_s
            self.loop.flush()
            if self.loop.received[begun].all() or time.monotonic() > stop_at_s:
                self.loop.finish(timeout_s=30)
                self._progress.update(self.loop.counts)
                return False

    def _next_block(self) -> Any:
        if self.loop.is_full:
            # The queue fills, the feeder waits, and Ray holds the graph back.
            time.sleep(0.05)
            return _NOTHING_YET
        try:
            return self._blocks.get(timeout=0.2)
        except queue.Empty:
            return _NOTHING_YET

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM for the time of the run; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _: object) -> None:
            if self._signal is not None:
                raise KeyboardInterrupt
            self._signal = signal.Signals(number)

        before = {number: signal.signal(number, note) for number in EXIT_OF_SIGNAL}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


_NOTHING_YET = object()


def _cause_of(error: BaseException) -> BaseException:
    """Return our own error behind Ray's wrapping, or a run failure with the worker's trace."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, QvlError) and not isinstance(seen, RayTaskError):
            return seen
        if isinstance(seen, KeyboardInterrupt):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return RunFailedError(f"A worker failed: {error}")
