"""The bytes that a decoder opens: in memory, or in a file, which may be a temporary one."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from typing import BinaryIO

from qvl_batch.errors import ChangedMediaError, EmptyMediaError, LimitExceededError


class Source:
    """Bytes that a decoder opens: `data` in memory, or else the file at `path`.

    Close it (or leave its `with` block) to delete a temporary file.

    Args:
        uri: Where the bytes came from, for messages.
        size_bytes: How many there are.
        data: The bytes, or None if they lie at `path`.
        path: A local file.
        temporary: Whether `path` is deleted on close.
        live_etag: `local_etag` that a file which is not ours must still have after decoding.
    """

    def __init__(
        self,
        uri: str,
        size_bytes: int,
        *,
        data: bytes | None = None,
        path: str | None = None,
        temporary: bool = False,
        live_etag: str | None = None,
    ) -> None:
        if (data is None) == (path is None):
            raise ValueError("a source has either data or a path")
        self.uri, self.size_bytes = uri, size_bytes
        self.data, self.path = data, path
        self._temporary, self._live_etag = temporary, live_etag

    def open(self) -> BinaryIO:
        """Return a seekable binary file of the bytes; the caller closes it."""
        if self.data is not None:
            return io.BytesIO(self.data)
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise ChangedMediaError(self.uri, f"can not be read any more: {error}") from None

    def head(self, num_bytes: int) -> bytes:
        """Return the first bytes."""
        if self.data is not None:
            return self.data[:num_bytes]
        with self.open() as file:
            return file.read(num_bytes)

    def check_unchanged(self) -> None:
        """Raise `ChangedMediaError` if a local file was changed since it was fetched."""
        if self._live_etag is not None:
            try:
                now = local_etag(os.stat(self.path))
            except OSError as error:
                raise ChangedMediaError(self.uri, f"can not be read any more: {error}") from None
            if now != self._live_etag:
                raise ChangedMediaError(
                    self.uri, f"changed while it was read (etag {self._live_etag}, now {now})"
                )

    def close(self) -> None:
        """Release the memory and delete the temporary file. May be called again."""
        self.data = None if self.path is not None else b""
        if self._temporary:
            self._temporary = False
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def local_etag(status: os.stat_result) -> str:
    """Return ``{size}-{mtime_ns}``, the etag of a local file."""
    return f"{status.st_size}-{status.st_mtime_ns}"


class Spool:
    """Takes chunks into memory, and into a temporary file once they are too many.

    Leaving its `with` block without having taken its `source` deletes the file.
    """

    def __init__(self, uri: str, *, max_memory_bytes: int, max_object_bytes: int) -> None:
        self._uri = uri
        self._max_memory_bytes, self._max_object_bytes = max_memory_bytes, max_object_bytes
        self._memory = bytearray()
        self._file: BinaryIO | None = None
        self._size = 0
        self._kept = self._over = False

    def write(self, chunk: bytes) -> None:
        if self._over:
            # A read that was given up has one more chunk: it must not start another file.
            raise ValueError("the spool is closed")
        self._size += len(chunk)
        if self._size > self._max_object_bytes:
            raise LimitExceededError(
                self._uri, f"more than {self._max_object_bytes} bytes, which is the limit"
            )
        if self._file is None and self._size > self._max_memory_bytes:
            self._file = tempfile.NamedTemporaryFile(prefix="qvl-media-", delete=False)  # noqa: SIM115
            self._file.write(self._memory)
            self._memory = bytearray()
        if self._file is not None:
            self._file.write(chunk)
        else:
            self._memory += chunk

    def source(self, wanted_bytes: int | None) -> Source:
        """Return what was written; it is checked not to be empty nor shorter than wanted."""
        if wanted_bytes is not None and self._size < wanted_bytes:
            raise ChangedMediaError(
                self._uri, f"the byte range has {self._size} bytes, {wanted_bytes} were listed"
            )
        if not self._size:
            raise EmptyMediaError(self._uri, "0 bytes")
        if self._file is None:
            return Source(self._uri, self._size, data=bytes(self._memory))
        self._file.close()
        self._kept = True
        return Source(self._uri, self._size, path=self._file.name, temporary=True)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        if self._file is not None and not self._kept:
            self._file.close()
            os.unlink(self._file.name)
