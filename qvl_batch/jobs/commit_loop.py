"""Groups embedded blocks, has them written, and commits what is written, on time.

The driver is the only one that commits. Nothing here knows how blocks come about: `start_write`
starts a write and gives a handle, `poll` says which handles are done.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qvl_batch import crash
from qvl_batch.errors import InvariantBrokenError, TooManyFailuresError
from qvl_batch.jobs.stages import Written

COMMIT_AFTER_FRAGMENTS = 100


class Writes(Protocol):
    """Starts writes elsewhere and tells when they are done."""

    def start(self, blocks: Sequence[Any], exclude: frozenset[int]) -> object:
        """Start writing blocks without the excluded ordinals; return a handle."""
        ...

    def finished(self, handles: Sequence[object], timeout_s: float) -> Mapping[object, Written]:
        """Return the results of those handles that are done within the time."""
        ...


class Tables(Protocol):
    """Where commits go."""

    def append(
        self,
        table: str,
        fragments: Sequence[Mapping[str, Any]],
        marker: str,
        ordinals: npt.NDArray[np.int64],
    ) -> None:
        """Commit fragments; ``ordinals`` are what they are about."""
        ...

    def append_failures(self, rows: pa.Table, marker: str) -> None: ...


@dataclass(kw_only=True)
class Counts:
    """Units and rows that a run has committed, and what is on the way."""

    embedded: int = 0
    failed: int = 0
    rows: int = 0
    tokens: int = 0
    commits: int = 0
    not_started: int = 0
    failures_by_reason: dict[str, int] = field(default_factory=dict)
    work: collections.Counter[str] = field(default_factory=collections.Counter)


@dataclass(frozen=True, kw_only=True)
class _Group:
    handle: object
    blocks: Sequence[Any]


class CommitLoop:
    """Takes blocks as they come; writes by size or age; commits by the clock.

    Args:
        num_units: Units of the run: their ordinals are 0 … num_units - 1.
        writes: Starts writes.
        tables: Takes commits.
        run_id: Part of every marker.
        interval_s: Oldest age of uncommitted work.
        fragment_bytes: Size at which a group is written early.
        max_writes: Writes at a time.
        max_failure_rate: Share of failed units at which the run ends.
        failure_rate_after_units: Units to finish before the share counts.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        num_units: int,
        writes: Writes,
        tables: Tables,
        run_id: str,
        interval_s: float,
        fragment_bytes: int,
        max_writes: int,
        max_failure_rate: float,
        failure_rate_after_units: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._writes, self._tables, self._run_id = writes, tables, run_id
        self._interval_s, self._fragment_bytes = interval_s, fragment_bytes
        self._max_writes = max_writes
        self._max_failure_rate = max_failure_rate
        self._failure_rate_after_units = failure_rate_after_units
        self._clock = clock
        self._received = np.zeros(num_units, np.bool_)
        self._group: list[Any] = []
        self._group_bytes = 0
        self._writing: dict[object, _Group] = {}
        self._fragments: dict[str, list[Mapping[str, Any]]] = {}
        self._ordinals: dict[str, list[npt.NDArray[np.int64]]] = {}
        self._failures: list[pa.Table] = []
        self._uncommitted = Counts()
        self._last_commit_s = clock()
        self._markers = 0
        # What must be written before the commit that is due; None: no commit is due.
        self._awaited: set[object] | None = None
        self.counts = Counts()
        self.known_files: dict[str, list[Mapping[str, Any]]] = {}

    @property
    def received(self) -> npt.NDArray[np.bool_]:
        """One flag a unit: its block was delivered and written."""
        return self._received

    @property
    def is_full(self) -> bool:
        """True while no further write can be started: blocks should wait where they are."""
        return len(self._writing) >= self._max_writes and self._group_bytes >= self._fragment_bytes

    def add(self, block: object, size_bytes: int) -> None:
        """Take one embedded block (or a reference to it)."""
        self._group.append(block)
        self._group_bytes += size_bytes
        if self._group_bytes >= self._fragment_bytes and len(self._writing) < self._max_writes:
            self._start_write()

    def poll(self, timeout_s: float = 0.0) -> None:
        """Collect finished writes and commit if it is time.

        Raises:
            TooManyFailuresError: After committing, if the failure rate is passed.
        """
        for handle, written in self._writes.finished(list(self._writing), timeout_s).items():
            group = self._writing.pop(handle)
            if self._awaited is not None:
                self._awaited.discard(handle)
            self._receive(group, written)
        if self._awaited is None and self._is_due():
            self._start_write()
            self._awaited = set(self._writing)
        if self._awaited is not None and not self._awaited:
            self._commit()
        if self._fails_too_often():
            self.finish()

    def flush(self) -> None:
        """Have everything written that was added, without waiting for it."""
        self._start_write()

    def finish(self, timeout_s: float = 600.0) -> None:
        """Write and commit everything that was added.

        Raises:
            InvariantBrokenError: If a write does not end within the time.
            TooManyFailuresError: If the failure rate is passed; everything is committed then.
        """
        self._start_write()
        deadline_s = self._clock() + timeout_s
        while self._writing:
            if self._clock() > deadline_s:
                raise InvariantBrokenError(f"A write did not end within {timeout_s:g} s.")
            for handle, written in self._writes.finished(list(self._writing), 1.0).items():
                self._receive(self._writing.pop(handle), written)
        self._commit()
        if self._fails_too_often():
            failed, finished = self._finished()
            reasons = ", ".join(
                f"{n} {reason}" for reason, n in sorted(self.counts.failures_by_reason.items())
            )
            raise TooManyFailuresError(
                f"{failed} of {finished} units failed ({reasons}); limits.max_failure_rate is "
                f"{self._max_failure_rate:g}. What is done is committed: see the table "
                "_qvl_failures, mend the cause or raise the limit, and run again."
            )

    def missing(self) -> npt.NDArray[np.int64]:
        """Return the ordinals that were never delivered."""
        return np.flatnonzero(~self._received)

    def _is_due(self) -> bool:
        waiting = self._group or self._writing or self._fragments or self._failures
        fragments = sum(len(group) for group in self._fragments.values())
        late = self._clock() - self._last_commit_s >= self._interval_s
        return bool(waiting) and (late or fragments >= COMMIT_AFTER_FRAGMENTS)

    def _start_write(self, exclude: frozenset[int] = frozenset()) -> None:
        if not self._group:
            return
        blocks, self._group, self._group_bytes = self._group, [], 0
        handle = self._writes.start(blocks, exclude)
        self._writing[handle] = _Group(handle=handle, blocks=blocks)

    def _receive(self, group: _Group, written: Written) -> None:
        repeated = written.ordinals[self._received[written.ordinals]]
        if repeated.size:
            # A block came twice. Its fragments stay invisible; what is new is written again.
            exclude = frozenset(int(i) for i in repeated)
            if repeated.size < written.ordinals.size:
                handle = self._writes.start(group.blocks, exclude)
                self._writing[handle] = _Group(handle=handle, blocks=group.blocks)
                if self._awaited is not None:
                    self._awaited.add(handle)
            return
        if np.unique(written.ordinals).size != written.ordinals.size:
            raise InvariantBrokenError("A block was delivered twice within one group.")
        self._received[written.ordinals] = True
        for table, fragments in written.fragments.items():
            self._fragments.setdefault(table, []).extend(fragments)
            self._ordinals.setdefault(table, []).append(written.done.get(table, written.ordinals))
        if written.failures.num_rows:
            self._failures.append(written.failures)
        self._uncommitted.embedded += written.num_units
        self._uncommitted.failed += written.failures.num_rows
        self._uncommitted.rows += written.num_rows
        self._uncommitted.tokens += written.num_tokens
        self._uncommitted.work.update(written.work)
        self.counts.not_started += written.not_started.size

    def _marker(self) -> str:
        self._markers += 1
        return f"{self._run_id}/{self._markers}"

    def _commit(self) -> None:
        # Rows first: a unit that is in a table is done whatever the failures say.
        for table, fragments in sorted(self._fragments.items()):
            ordinals = np.concatenate(self._ordinals[table])
            self._tables.append(table, fragments, self._marker(), ordinals)
            crash.reached("between-partitions")
            files = [file for fragment in fragments for file in fragment["files"]]
            self.known_files.setdefault(table, []).extend(files)
        if self._failures:
            crash.reached("before-failures")
            rows = pa.concat_tables(self._failures)
            self._tables.append_failures(rows, self._marker())
            for reason in rows["error_type"].to_pylist():
                by_reason = self.counts.failures_by_reason
                by_reason[reason] = by_reason.get(reason, 0) + 1
        if self._fragments or self._failures:
            self.counts.commits += 1
        done, self._uncommitted = self._uncommitted, Counts()
        self.counts.embedded += done.embedded
        self.counts.failed += done.failed
        self.counts.rows += done.rows
        self.counts.tokens += done.tokens
        self.counts.work.update(done.work)
        self._fragments, self._ordinals, self._failures = {}, {}, []
        self._awaited = None
        self._last_commit_s = self._clock()

    def _finished(self) -> tuple[int, int]:
        """Return how many units failed, and how many failed or were embedded."""
        failed = self.counts.failed + self._uncommitted.failed
        return failed, failed + self.counts.embedded + self._uncommitted.embedded

    def _fails_too_often(self) -> bool:
        failed, finished = self._finished()
        enough = finished >= self._failure_rate_after_units
        return enough and failed / finished > self._max_failure_rate
