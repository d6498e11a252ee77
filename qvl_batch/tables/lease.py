"""One live driver per partition table.

A lease is a numbered epoch object, ``_qvl_leases/tables/{table}/{epoch}``, made by a create-only
write: of all that want the next epoch one gets it. It names its run. Every run has one heartbeat
object, written over again and again, whatever number of tables it holds; a lease is as old as its
run's heartbeat, by the store's own clock. So a run of a thousand partitions renews with one
write. A run whose process has ended on this very machine is known to be dead at once.

Who takes over from a run that was not released fences it: a ``Restore`` of the present version
makes Lance refuse every Append that the old holder had prepared before, and the old holder finds
that foreign commit before it prepares another (`tables.commit`).
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from qvl_batch import crash
from qvl_batch.errors import LeaseHeldError, LeaseLostError
from qvl_batch.storage import join
from qvl_batch.tables.conditional import Place
from qvl_batch.tables.store import storage_error

LEASES_FOLDER = "_qvl_leases"
TTL_S = 60.0
# Three chances to renew before anybody may take over.
_RENEWALS_PER_TTL = 3


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a table, as its epoch object and its run's heartbeat say."""

    table: str
    epoch: int
    run_id: str
    host: str
    pid: int
    since: str
    age_s: float
    ttl_s: float
    is_released: bool
    is_dead: bool

    def is_live(self, ttl_s: float) -> bool:
        """Return whether it may still be at work, judged by the longer of two lifetimes."""
        silent = self.age_s > max(ttl_s, self.ttl_s)
        return not (self.is_released or self.is_dead or silent)

    def __str__(self) -> str:
        return (
            f"process {self.pid} on {self.host}, since {self.since}, "
            f"last seen {self.age_s:.0f} s ago"
        )


class Leases:
    """The leases of one run.

    Use as a context manager: leaving it releases what is held, however the run ended.

    Args:
        place: The folder ``_qvl_leases`` of a root; see `lease_place`.
        run_id: Unique for the run.
        ttl_s: A run that was not seen for so long is taken for dead. Runs of one root should
            agree; the longer one of two is what a run is judged by.
    """

    def __init__(self, place: Place, run_id: str, *, ttl_s: float = TTL_S) -> None:
        self._place, self.run_id, self._ttl_s = place, run_id, ttl_s
        self._epochs: dict[str, int] = {}
        self._lost: LeaseLostError | None = None
        self._seen_s = time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._since = ""

    def acquire(self, tables: Iterable[str], *, steal: bool = False) -> list[str]:
        """Take the leases of these tables, all or none.

        Returns:
            The tables that were taken from a run that had not released them: to be fenced before
            anything is read of them.

        Raises:
            LeaseHeldError: If another live run holds one of them, naming it.
            StorageError: If the store fails.
        """
        try:
            if self._thread is None:
                self._since = self._place.now().isoformat(timespec="seconds")
                self._seen_s = self._beat()
                self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
                self._thread.start()
            # All runs take them in the same order, so that two of them never hold a part each.
            names = sorted(set(tables))
            known, runs = _latest_epochs(self._place), _Runs(self._place)
            return [name for name in names if self._take(name, known.get(name, 0), runs, steal)]
        except OSError as error:
            self.release()
            raise storage_error(self._place.root, error) from error
        except LeaseHeldError:
            self.release()
            raise

    def check(self) -> None:
        """Refuse to go on if this run may have been taken for dead.

        Raises:
            LeaseLostError: If another run has taken over, or this one could not renew in time.
        """
        if self._lost is not None:
            raise self._lost
        silent_s = time.monotonic() - self._seen_s
        if self._epochs and silent_s > self._ttl_s:
            table = next(iter(self._epochs))
            raise LeaseLostError(
                table, self.run_id, f"it could not be renewed for {silent_s:.0f} s"
            )

    def confirm(self, table: str) -> None:
        """Ask the store whether this run still holds a table.

        Raises:
            LeaseLostError: If it does not.
        """
        self.check()
        latest = _latest_epochs(self._place, table).get(table, 0)
        if latest != self._epochs.get(table):
            self._lose(table, latest)

    def release(self) -> None:
        """Give up everything that is held; may be called again."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=30)
            self._thread = None
            try:
                self._beat(released=True)
            except OSError:
                # A full store takes no word, but a removal: who has no heartbeat is not at work.
                # Where that fails too, the lease expires by itself.
                self._place.remove(_heartbeat_name(self.run_id))
        self._epochs.clear()

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _take(self, table: str, epoch: int, runs: _Runs, steal: bool) -> bool:
        """Take one table; return whether its last holder must be fenced."""
        while True:
            holder = runs.holder(table, epoch) if epoch else None
            if holder is not None and holder.run_id == self.run_id:
                return False
            if holder is not None and holder.is_live(self._ttl_s) and not steal:
                raise LeaseHeldError(table, holder.run_id, str(holder))
            claim = {"run_id": self.run_id, **_who(), "since": self._since}
            crash.reached("lease-acquire")
            won = self._place.create(_epoch_name(table, epoch + 1), claim)
            latest = _latest_epochs(self._place, table).get(table, 0)
            # A higher one is there if this process was asleep since it looked, and the epoch that
            # it has just made had been pruned meanwhile.
            if won and latest == epoch + 1:
                self._epochs[table] = latest
                for old in range(max(1, epoch - 3), epoch):
                    self._place.remove(_epoch_name(table, old))
                return holder is not None and not holder.is_released
            epoch = max(latest, epoch + 1)

    def _renew(self) -> None:
        while not self._stop.wait(self._ttl_s / _RENEWALS_PER_TTL / 2):
            crash.reached("lease-renewal")
            began_s = time.monotonic()
            if began_s - self._seen_s < self._ttl_s / _RENEWALS_PER_TTL:
                continue
            try:
                beat_s = self._beat()
                latest = _latest_epochs(self._place)
                for table, epoch in list(self._epochs.items()):
                    if latest.get(table, 0) > epoch:
                        self._lose(table, latest[table])
                # Not before: a process that slept past its lifetime beats first when it wakes.
                self._seen_s = beat_s
            except LeaseLostError:
                return
            except OSError:
                # Tried again at the next turn; `check` notices if none succeeds in time.
                continue

    def _beat(self, released: bool = False) -> float:
        """Write the heartbeat; return from when on others count."""
        began_s = time.monotonic()
        self._place.write(
            _heartbeat_name(self.run_id), {"ttl_s": self._ttl_s, "released": released} | _who()
        )
        # From before the write: others count from when it reached the store.
        return began_s

    def _lose(self, table: str, latest: int) -> None:
        holder = _Runs(self._place).holder(table, latest) if latest else None
        taken = f"run {holder.run_id} has it ({holder})" if holder else "its object is gone"
        self._lost = LeaseLostError(table, self.run_id, taken)
        raise self._lost


def lease_place(root: str, storage: Any) -> Place:
    """Return the folder of a root in which leases lie."""
    return Place(join(root, LEASES_FOLDER), storage)


def holders(place: Place) -> list[Holder]:
    """Return who holds, or last held, each table, sorted by table."""
    runs = _Runs(place)
    found = [runs.holder(table, epoch) for table, epoch in sorted(_latest_epochs(place).items())]
    return [holder for holder in found if holder is not None]


def live_runs(place: Place, ttl_s: float = TTL_S) -> set[str]:
    """Return the runs that hold something and were seen lately."""
    return {holder.run_id for holder in holders(place) if holder.is_live(ttl_s)}


@dataclass(frozen=True, kw_only=True)
class _Beat:
    seen: datetime
    ttl_s: float
    is_released: bool


class _Runs:
    """Heartbeats, each read once: a run may hold thousands of tables."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._now: datetime | None = None
        self._beats: dict[str, _Beat | None] = {}

    def holder(self, table: str, epoch: int) -> Holder | None:
        """Return who made an epoch of a table; None if it is not there any more."""
        claim = self._place.read(_epoch_name(table, epoch))
        if claim is None:
            return None
        run_id = claim["run_id"]
        if run_id not in self._beats:
            # The clock before the heartbeat: a run is never taken for older than it is.
            self._now = self._place.now()
            self._beats[run_id] = self._beat(run_id)
        beat = self._beats[run_id]
        assert self._now is not None
        return Holder(
            table=table,
            epoch=epoch,
            run_id=run_id,
            host=claim["host"],
            pid=claim["pid"],
            since=claim["since"],
            age_s=(self._now - beat.seen).total_seconds() if beat else float("inf"),
            ttl_s=beat.ttl_s if beat else 0.0,
            is_released=bool(beat and beat.is_released),
            is_dead=_is_gone(claim),
        )

    def _beat(self, run_id: str) -> _Beat | None:
        name = _heartbeat_name(run_id)
        stated, seen = self._place.read(name), self._place.mtime(name)
        if stated is None or seen is None:
            return None
        return _Beat(seen=seen, ttl_s=stated["ttl_s"], is_released=stated["released"])


def _latest_epochs(place: Place, table: str = "") -> Mapping[str, int]:
    found: dict[str, int] = {}
    for name in place.names(f"tables/{table}" if table else "tables"):
        *_, owner, number = ("", *name.split("/"))
        # A folder that appears while it is listed may come as its own only member.
        if number.isdigit():
            found[owner] = max(found.get(owner, 0), int(number))
    return found


def _epoch_name(table: str, epoch: int) -> str:
    return f"tables/{table}/{epoch:08d}"


def _heartbeat_name(run_id: str) -> str:
    return f"runs/{run_id}"


def _who() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pids": _pid_namespace(),
        "started": psutil.Process().create_time(),
    }


def _pid_namespace() -> str:
    """Return what tells where a process id means this process; '' where that can not be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_gone(claim: Mapping[str, Any]) -> bool:
    """Return whether the process that made a claim ran here and does not any more."""
    if not claim.get("pids") or claim["pids"] != _pid_namespace():
        return False
    try:
        process = psutil.Process(claim["pid"])
        is_other = process.create_time() != claim["started"]
        # Killed, and nobody has asked for its exit code yet.
        return is_other or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
