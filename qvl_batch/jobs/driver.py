"""The driver of a run: takes blocks from the graph, has them written, commits, stops in order."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qvl_batch.config import CommitSection, LimitsSection
from qvl_batch.errors import InvariantBrokenError, RunFailedError
from qvl_batch.jobs.commit_loop import CommitLoop, Tables
from qvl_batch.jobs.control import RunControl, cause_of
from qvl_batch.jobs.modes import Appending, Target
from qvl_batch.jobs.progress import Progress
from qvl_batch.jobs.stages import Written
from qvl_batch.tables.store import TableStore

EXIT_OF_SIGNAL = {signal.SIGINT: 130, signal.SIGTERM: 143}

_NOTHING_YET = object()


class WriteStage(Protocol):
    """Writes a group of blocks without the excluded ordinals, and commits nothing."""

    def __call__(self, blocks: Sequence[pa.Table], exclude: frozenset[int]) -> Written: ...


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one run of a graph is given; jobs differ in nothing else.

    Args:
        run_id: Of the job's run; stated in every commit.
        markers: Begins the commits' markers: must differ from any other work that writes.
        num_ordinals: What the graph delivers, in any grouping, has the ordinals from 0 to this.
        total: What progress counts towards.
        unit: What is counted, in the plural.
        graph: Gives the stream of references to blocks, for the control actor.
        write: Writes blocks as files.
        schemas: Of the tables that are written to.
        planned_versions: Their versions when the work was planned; a table that is not named here
            is created before the first write.
        name: Names the ordinal for a person.
        commits: Where what is written goes: see `jobs.modes`; None: it is added to the tables.
        make_ready: Called once, when the tables are there and before the first write.
    """

    run_id: str
    markers: str
    num_ordinals: int
    total: int
    unit: str
    store: TableStore
    graph: Callable[[Any], Iterator[Any]]
    write: WriteStage
    schemas: Mapping[str, pa.Schema]
    planned_versions: Mapping[str, int]
    name: Callable[[int], str]
    commit: CommitSection
    limits: LimitsSection
    write_tasks: int
    commits: Tables | None = None
    make_ready: Callable[[], None] = lambda: None

    def create_tables(self) -> None:
        """Create the tables that get their first rows: workers only write files."""
        names = [name for name in self.schemas if name not in self.planned_versions]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda name: self.store.create(name, self.schemas[name]), names))
        self.make_ready()


class _RayWrites:
    """`commit_loop.Writes` through Ray tasks."""

    def __init__(self, stage: WriteStage, before_first: Callable[[], None]) -> None:
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


def _write_group(stage: WriteStage, exclude: frozenset[int], *blocks: pa.Table) -> Written:
    return stage(blocks, exclude)


def _target(work: Work) -> Target:
    return Target(store=work.store, run_id=work.run_id, planned_versions=work.planned_versions)


class Run:
    """One run of a graph: feeds the commit loop, shows progress, stops in good order."""

    def __init__(self, work: Work, echo: Callable[[str], None]) -> None:
        self._work = work
        # Beside the driver: the death of another node must not take it along.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._control = RunControl.options(scheduling_strategy=here).remote()
        self._signal: signal.Signals | None = None
        self._blocks: queue.Queue[Any] = queue.Queue(maxsize=64)
        self.loop = CommitLoop(
            num_units=work.num_ordinals,
            # Not earlier: a model that does not load must leave no empty tables behind.
            writes=_RayWrites(work.write, before_first=work.create_tables),
            tables=work.commits or Appending(_target(work)),
            run_id=work.markers,
            interval_s=work.commit.interval_s,
            fragment_bytes=work.commit.fragment_bytes,
            max_writes=work.write_tasks,
            max_failure_rate=work.limits.max_failure_rate,
            failure_rate_after_units=work.limits.failure_rate_after_units,
        )
        self._progress = Progress(total=work.total, unit=work.unit, echo=echo)
        self._echo = echo

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
                        first = self._work.name(int(missing[0]))
                        raise InvariantBrokenError(
                            f"{missing.size} came back neither done nor failed (the first: "
                            f"{first}). Run the job again: they are still to do."
                        )
        except RayError as error:
            raise cause_of(error) from error
        finally:
            # Blocks that are not begun yet come back at once, so that the workers end.
            with contextlib.suppress(RayError):
                ray.get(self._control.stop.remote(), timeout=10)
        return self._signal

    def _feed(self) -> None:
        try:
            # Asking for the stream waits for its first block: not on the main thread, which must
            # see signals.
            for bundle in self._work.graph(self._control):
                for entry in bundle.blocks:
                    self._blocks.put((entry.ref, entry.metadata.size_bytes or 0))
            self._blocks.put(None)
        except BaseException as error:  # handed to the main thread, which raises it
            self._blocks.put(error)

    def _consume(self) -> bool:
        """Feed the loop until the last block; return False if a signal ended it earlier."""
        begun: list[int] | None = None
        stop_at_s = 0.0
        moved_s = time.monotonic()
        while True:
            item = self._next_block()
            if item is None:
                return True
            if isinstance(item, BaseException):
                raise ray.get(self._control.error.remote()) or cause_of(item) from item
            if item is not _NOTHING_YET:
                self.loop.add(*item)
                moved_s = time.monotonic()
            elif time.monotonic() - moved_s > self._work.limits.no_progress_s:
                self.loop.finish()
                raise RunFailedError(
                    f"Nothing came for {self._work.limits.no_progress_s:g} s "
                    "(limits.no_progress_s). What is done is committed; look at the cluster's "
                    "nodes and logs, then run this again."
                )
            self.loop.poll()
            self._progress.update(self.loop.counts)
            if self._signal is None:
                continue
            if begun is None:
                grace_s = self._work.limits.stop_grace_s
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
