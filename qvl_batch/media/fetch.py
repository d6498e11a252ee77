"""Bytes of a unit, and proof that they are those which the manifest lists.

One GET per object. What is checked is what was read: the etag of the very response, or `fstat` of
the very file, so nothing can change between the check and the read. Retries are bounded; every way
to fail has its own `UnitError`.
"""

from __future__ import annotations

import concurrent.futures
import errno
import itertools
import os
import random
import re
import stat
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qvl_batch.errors import (
    AccessDeniedError,
    ChangedMediaError,
    EmptyMediaError,
    FetchError,
    LimitExceededError,
    MissingMediaError,
    UnitError,
)
from qvl_batch.media.object_store import (
    ObjectChangedError,
    ObjectRead,
    TransientReadError,
    read_object,
)
from qvl_batch.media.source import Source, Spool, local_etag
from qvl_batch.storage import OBJECT_SCHEMES, is_local, local_path, scheme_of

if TYPE_CHECKING:
    from qvl_batch.storage import Storage

__all__ = [
    "FetchLimits",
    "FetchRequest",
    "Fetcher",
    "Source",
    "local_etag",
    "printable_uri",
]

MIB = 1 << 20
GIB = 1 << 30
_CHUNK_BYTES = MIB
_BACKOFF_S = (0.5, 20.0)
_USER_INFORMATION = re.compile(r"://[^/?@]*@")
_SIGNATURE = re.compile(r"[?&][^=&]*(sig|token|key|credential|password)[^=&]*=", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """Bounds of one fetcher.

    Args:
        max_object_bytes: A larger object is a failure.
        max_memory_bytes: A larger object goes to a temporary file.
        max_ahead_bytes: What `fetch_all` may hold that nobody has taken yet.
        timeout_s: Wall time of one attempt.
        attempts: Tries per object on errors that may pass.
        threads: Objects read at the same time.
    """

    max_object_bytes: int = 4 * GIB
    max_memory_bytes: int = 64 * MIB
    max_ahead_bytes: int = 256 * MIB
    timeout_s: float = 120.0
    attempts: int = 4
    threads: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRequest:
    """What the manifest says of one object; None is not checked."""

    uri: str
    etag: str | None = None
    size_bytes: int | None = None
    byte_offset: int | None = None
    byte_length: int | None = None

    @property
    def is_whole(self) -> bool:
        return self.byte_offset is None and self.byte_length is None


def printable_uri(uri: str) -> str:
    """Return the uri without credentials: no user information, no signature in a query."""
    if is_local(uri):
        return uri
    uri = _USER_INFORMATION.sub("://", uri)
    return uri.partition("?")[0] if _SIGNATURE.search(uri) else uri


class Fetcher:
    """Reads the objects of a manifest.

    Args:
        storage: How object stores are reached.
        limits: Sizes, times and threads.
    """

    def __init__(self, storage: Storage, limits: FetchLimits | None = None) -> None:
        self._storage = storage
        self._limits = limits or FetchLimits()

    def fetch(
        self,
        uri: str,
        *,
        etag: str | None = None,
        size_bytes: int | None = None,
        byte_offset: int | None = None,
        byte_length: int | None = None,
    ) -> Source:
        """Read one object, or a range of it, and check that it is the listed one.

        ``size_bytes`` is that of the whole object. A byte range is read as it is, its etag being
        that of the whole object.

        Raises:
            MissingMediaError, AccessDeniedError, ChangedMediaError, EmptyMediaError,
            LimitExceededError: These stay.
            FetchError: May pass; raised after `FetchLimits.attempts` tries.
            StorageError: If the package for the uri's scheme is not installed.
        """
        request = FetchRequest(
            uri=uri,
            etag=etag,
            size_bytes=size_bytes,
            byte_offset=byte_offset,
            byte_length=byte_length,
        )
        return self._fetch(request, threading.Event())

    def fetch_all(self, requests: Iterable[FetchRequest]) -> Iterator[Source | UnitError]:
        """Yield one source or error per request, in order, reading ahead with threads.

        At most ``2 x threads`` objects and `max_ahead_bytes` (but always one object) are read or
        held ahead. The caller closes every source; those not taken are closed here. An early end
        does not wait for reads under way: they give up at their next try.
        """
        limits = self._limits
        stop = threading.Event()
        ahead: deque[tuple[concurrent.futures.Future[Source | UnitError], int]] = deque()
        ahead_bytes = 0
        pending = iter(requests)
        upcoming = next(pending, None)
        pool = concurrent.futures.ThreadPoolExecutor(limits.threads, thread_name_prefix="fetch")
        try:
            while ahead or upcoming is not None:
                while upcoming is not None and len(ahead) < 2 * limits.threads:
                    weight = self._weight(upcoming)
                    if ahead and ahead_bytes + weight > limits.max_ahead_bytes:
                        break
                    ahead.append((pool.submit(self._fetch_or_error, upcoming, stop), weight))
                    ahead_bytes += weight
                    upcoming = next(pending, None)
                future, weight = ahead.popleft()
                ahead_bytes -= weight
                yield future.result()
        finally:
            stop.set()
            for future, _ in ahead:
                future.add_done_callback(_close_result)
            pool.shutdown(wait=False, cancel_futures=True)

    def _fetch_or_error(self, request: FetchRequest, stop: threading.Event) -> Source | UnitError:
        try:
            return self._fetch(request, stop)
        except UnitError as error:
            return error

    def _fetch(self, request: FetchRequest, stop: threading.Event) -> Source:
        shown = printable_uri(request.uri)
        self._check_request(request, shown)
        read = self._read_local if is_local(request.uri) else self._read_remote
        for attempt in itertools.count(1):
            try:
                return read(request, shown)
            except TransientReadError as error:
                if attempt == self._limits.attempts or stop.is_set():
                    raise FetchError(shown, f"{error} ({attempt} attempts)") from None
            first_s, most_s = _BACKOFF_S
            # Full jitter: workers that were throttled together must not come back together.
            stop.wait(random.uniform(0, min(most_s, first_s * 2**attempt)))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _weight(self, request: FetchRequest) -> int:
        size = request.byte_length or request.size_bytes
        if size is None:
            return self._limits.max_memory_bytes
        return min(size, self._limits.max_ahead_bytes)

    def _check_request(self, request: FetchRequest, shown: str) -> None:
        scheme = scheme_of(request.uri)
        if scheme != "file" and scheme not in OBJECT_SCHEMES:
            # Never opened: a manifest could otherwise make workers call any internal address.
            raise AccessDeniedError(
                shown, f"{scheme}:// is not read: use a local path or an object store"
            )
        offset, length = request.byte_offset, request.byte_length
        if (offset is not None and offset < 0) or (length is not None and length < 0):
            raise LimitExceededError(shown, f"byte range {offset}+{length} is negative")
        if length == 0:
            raise EmptyMediaError(shown, "the byte range has 0 bytes")
        self._check_size(shown, (request.size_bytes if request.is_whole else length) or 0)

    def _check_size(self, shown: str, size_bytes: int) -> None:
        if size_bytes > self._limits.max_object_bytes:
            raise LimitExceededError(
                shown, f"{size_bytes} bytes, the limit is {self._limits.max_object_bytes}"
            )

    def _check_identity(
        self, request: FetchRequest, shown: str, etag: str | None, object_bytes: int | None
    ) -> None:
        listed = request.etag.strip('"') if request.etag else None
        if listed and etag and etag != listed:
            raise ChangedMediaError(shown, f"etag is {etag}, the manifest lists {listed}")
        known = None not in (request.size_bytes, object_bytes)
        if known and request.is_whole and request.size_bytes != object_bytes:
            raise ChangedMediaError(
                shown, f"{object_bytes} bytes, the manifest lists {request.size_bytes}"
            )

    def _spool(self, shown: str) -> Spool:
        return Spool(
            shown,
            max_memory_bytes=self._limits.max_memory_bytes,
            max_object_bytes=self._limits.max_object_bytes,
        )

    def _read_remote(self, request: FetchRequest, shown: str) -> Source:
        def admit(etag: str | None, object_bytes: int | None, body_bytes: int) -> None:
            self._check_identity(request, shown, etag, object_bytes)
            self._check_size(shown, body_bytes)

        filesystem = self._storage.filesystem(request.uri)
        reader = ObjectRead(
            offset=request.byte_offset or 0, length=request.byte_length, admit=admit
        )
        with self._spool(shown) as spool:
            try:
                read_object(filesystem, request.uri, reader, spool.write, self._limits.timeout_s)
            except FileNotFoundError:
                raise MissingMediaError(shown, "no such object or bucket") from None
            except PermissionError as error:
                raise AccessDeniedError(shown, f"access denied: {error}") from None
            except ObjectChangedError as error:
                raise ChangedMediaError(shown, str(error)) from None
            return spool.source(request.byte_length)

    def _read_local(self, request: FetchRequest, shown: str) -> Source:
        path = local_path(request.uri)
        try:
            descriptor = _open_regular(path, shown)
        except (FileNotFoundError, NotADirectoryError):
            raise MissingMediaError(shown, "no such file") from None
        except PermissionError:
            raise AccessDeniedError(shown, "the file may not be read") from None
        except ValueError:
            raise MissingMediaError(shown, "no path may hold a NUL character") from None
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                raise MissingMediaError(shown, f"no such file: {error.strerror}") from None
            raise TransientReadError(f"{type(error).__name__}: {error}") from None
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            etag = local_etag(status)
            self._check_identity(request, shown, etag, status.st_size)
            if request.is_whole:
                self._check_size(shown, status.st_size)
            if request.is_whole and status.st_size > self._limits.max_memory_bytes:
                return Source(shown, status.st_size, path=path, live_etag=etag)
            with self._spool(shown) as spool:
                try:
                    file.seek(request.byte_offset or 0)
                    left = status.st_size if request.byte_length is None else request.byte_length
                    while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
                        spool.write(chunk)
                        left -= len(chunk)
                except OSError as error:
                    raise TransientReadError(f"{type(error).__name__}: {error}") from None
                now = local_etag(os.fstat(descriptor))
                if now != etag:
                    raise ChangedMediaError(shown, f"changed while it was read ({etag}, now {now})")
                return spool.source(request.byte_length)


def _open_regular(path: str, shown: str) -> int:
    """Open a regular file; anything else is refused without waiting for it.

    O_NONBLOCK keeps the open of a FIFO, put there after the first look, from hanging.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise AccessDeniedError(shown, "not a regular file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AccessDeniedError(shown, "not a regular file")
    return descriptor


def _close_result(future: concurrent.futures.Future[Source | UnitError]) -> None:
    if not future.cancelled() and future.exception() is None:
        result = future.result()
        if isinstance(result, Source):
            result.close()
