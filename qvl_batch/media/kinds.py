"""Complete manifest rows: what kind a medium is, and the etag, size and time it has now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Any

from qvl_batch.media.objects import Objects
from qvl_batch.media.sniff import HEAD_BYTES, kind_of_extension, sniff
from qvl_batch.storage import is_local
from qvl_batch.units import Kind

# Requests in flight at once; each waits for the network, so far more than cores.
THREADS = 32
# A pool keeps a future for everything handed to it.
_WINDOW = 2_000

UNKNOWN = "unknown format, by its first bytes and its name"
EMPTY = "empty, and its name tells no kind"
UNREADABLE = "not there or not readable, and its name tells no kind"


def decide_kind(uri: str, head: bytes | None) -> Kind | None:
    """Return the kind of a medium from its first bytes (None: not read) and its name.

    The bytes win, but for two cases where a known extension wins, so that the job fails the unit
    with its reason instead of hiding it: bytes of no known format, and text under the name of
    another kind (an error page saved as a JPEG, a playlist named .mp4).
    """
    named = kind_of_extension(uri)
    found = sniff(head) if head else None
    if found is None or (found.kind == "text" and named is not None):
        return named
    return found.kind


class Kinds:
    """Fills in what rows lack, with many requests to object stores at once.

    Args:
        objects: Where sizes and first bytes come from.
        sniff: Look into every object, also where the extension tells a kind.
    """

    def __init__(self, objects: Objects, *, sniff: bool) -> None:
        self._objects, self._sniff = objects, sniff
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="manifest")
        self.not_found = 0

    def __enter__(self) -> Kinds:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    def complete(self, rows: list[dict[str, Any]]) -> None:
        """Set ``kind``, ``etag``, ``size_bytes`` and ``mtime`` where a row lacks them.

        A row that can not be a unit gets its reason under ``left_out`` instead. An object that is
        not there keeps a null etag.
        """
        lacking = [
            row
            for row in rows
            if row.get("uri") and not ("etag" in row and "size_bytes" in row and "mtime" in row)
        ]
        self._each(self._add_state, lacking)
        self.not_found += sum("absent" in row for row in lacking)
        unknown = [row for row in rows if row.get("kind") is None]
        self._each(self._read_kind, [row for row in unknown if not self._name_kind(row)])
        for row in lacking:
            if row.pop("absent", False) and "left_out" in row:
                self.not_found -= 1

    def _each(self, do: Callable[[dict[str, Any]], None], rows: Iterable[dict[str, Any]]) -> None:
        remote = []
        for row in rows:
            if is_local(row["uri"]):
                do(row)
            else:
                remote.append(row)
        waiting: Iterator[dict[str, Any]] = iter(remote)
        while window := list(islice(waiting, _WINDOW)):
            for _ in self._threads.map(do, window):
                pass

    def _add_state(self, row: dict[str, Any]) -> None:
        now = self._objects.stat(row["uri"])
        if now is None:
            row["absent"] = True
            return
        for name in ("etag", "size_bytes", "mtime"):
            if row.get(name) is None:
                row[name] = getattr(now, name)

    def _name_kind(self, row: dict[str, Any]) -> bool:
        """Decide by the name where nothing can or need be read; return whether that was done."""
        uri, named = row["uri"], kind_of_extension(row["uri"])
        is_part = "byte_offset" in row or "byte_length" in row
        if "absent" in row:
            _decide(row, named, UNREADABLE)
        elif row.get("size_bytes") == 0:
            _decide(row, named, EMPTY)
        elif named is None or is_part or self._sniff or is_local(uri):
            return False
        else:
            row["kind"] = named
        return True

    def _read_kind(self, row: dict[str, Any]) -> None:
        length = min(HEAD_BYTES, row.get("byte_length", HEAD_BYTES))
        head = self._objects.head(row["uri"], row.get("byte_offset", 0), length)
        kind = decide_kind(row["uri"], head)
        _decide(row, kind, UNREADABLE if head is None else UNKNOWN)


def _decide(row: dict[str, Any], kind: Kind | None, reason: str) -> None:
    if kind is None:
        row["left_out"] = reason
    else:
        row["kind"] = kind
