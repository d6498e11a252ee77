"""One GET of one object, streamed, with the identity that its own response states.

S3 is read through the client that s3fs holds, since fsspec's own calls do not show the etag of what
they read. Other stores are read between two looks at their metadata.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import fsspec

_CHUNK_BYTES = 1 << 20
_RETRYABLE_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_RETRYABLE_CODES = frozenset(
    {"SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable", "ThrottlingException"}
)


class TransientReadError(Exception):
    """The read failed in a way that may pass; the text holds no secret."""


class ObjectChangedError(Exception):
    """The object is another one than at the start of the read."""


@dataclass(frozen=True, slots=True)
class ObjectRead:
    """What to read of an object.

    Args:
        offset: First byte.
        length: Number of bytes, or None for all from `offset` on.
        admit: Called with (etag without quotes, size of the whole object, size of the body) before
            any of the body is taken; raises to refuse it.
    """

    offset: int
    length: int | None
    admit: Callable[[str | None, int | None, int], None]

    @property
    def is_whole(self) -> bool:
        return self.offset == 0 and self.length is None


def etag_of(info: Mapping[str, Any]) -> str | None:
    """Return the etag in a response or an fsspec ``info`` of any store, without quotes."""
    etag = info.get("ETag") or info.get("etag")
    return str(etag).strip('"') if etag else None


def read_object(
    filesystem: fsspec.AbstractFileSystem,
    uri: str,
    wanted: ObjectRead,
    write: Callable[[bytes], None],
    timeout_s: float,
) -> None:
    """Read an object and hand it on in chunks.

    Raises:
        FileNotFoundError: No such object or bucket.
        PermissionError: Credentials are missing, wrong, or do not suffice.
        ObjectChangedError: The object changed between two requests.
        TransientReadError: Worth another try.
    """
    if "s3" in _protocols(filesystem):
        _read_s3(filesystem, uri, wanted, write, timeout_s)
    else:
        _read_other(filesystem, uri, wanted, write)


def _protocols(filesystem: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _read_s3(
    filesystem: Any,
    uri: str,
    wanted: ObjectRead,
    write: Callable[[bytes], None],
    timeout_s: float,
) -> None:
    from aiohttp import ClientError as HttpError
    from botocore import exceptions as boto

    job = asyncio.run_coroutine_threadsafe(_get_s3(filesystem, uri, wanted, write), filesystem.loop)
    try:
        job.result(timeout_s)
    except (TimeoutError, concurrent.futures.TimeoutError):
        job.cancel()
        raise TransientReadError(f"no end of the read within {timeout_s:g} s") from None
    except boto.ClientError as error:
        raise _classified(error.response) from None
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.TokenRetrievalError) as e:
        raise PermissionError(str(e)) from None
    except boto.ParamValidationError:
        raise FileNotFoundError(uri) from None
    except (FileNotFoundError, PermissionError):
        raise
    except (boto.BotoCoreError, HttpError, OSError) as error:
        raise TransientReadError(f"{type(error).__name__}: {error}") from None


async def _get_s3(
    filesystem: Any,
    uri: str,
    wanted: ObjectRead,
    write: Callable[[bytes], None],
) -> None:
    # The key is taken as it stands, as it was listed: no escapes, no query.
    bucket, _, key = uri.partition("://")[2].partition("/")
    if not key:
        raise FileNotFoundError(uri)
    await filesystem.set_session()
    client = await filesystem.get_s3(bucket)
    options = {}
    if not wanted.is_whole:
        last = "" if wanted.length is None else wanted.offset + wanted.length - 1
        options["Range"] = f"bytes={wanted.offset}-{last}"
    response = await client.get_object(Bucket=bucket, Key=key, **options)
    async with response["Body"] as body:
        announced = response["ContentLength"]
        whole = announced if wanted.is_whole else None
        wanted.admit(etag_of(response), whole, announced)
        received = 0
        while chunk := await body.read(_CHUNK_BYTES):
            received += len(chunk)
            write(chunk)
    if received != announced:
        raise TransientReadError(f"{received} of {announced} bytes came")


def _classified(response: Mapping[str, Any]) -> Exception:
    """Return the exception for an S3 error response."""
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in ("NoSuchKey", "NoSuchBucket", "NoSuchVersion") or status == 404:
        return FileNotFoundError(code)
    if code == "InvalidRange" or status == 416:
        return ObjectChangedError("the object ends before the listed byte range")
    if status == 412:
        return ObjectChangedError("the etag is not the listed one")
    if code in _RETRYABLE_CODES or status in _RETRYABLE_STATUS:
        return TransientReadError(f"{code or 'HTTP'} (HTTP status {status})")
    # 301 and 400 (wrong region, malformed request) stay as they are, too: no try helps.
    return PermissionError(f"{code or 'HTTP'} (HTTP status {status})")


def _read_other(
    filesystem: fsspec.AbstractFileSystem,
    uri: str,
    wanted: ObjectRead,
    write: Callable[[bytes], None],
) -> None:
    try:
        filesystem.invalidate_cache(filesystem._parent(uri))
        before = filesystem.info(uri)
        size = int(before["size"] or 0)
        length = max(0, size - wanted.offset) if wanted.length is None else wanted.length
        wanted.admit(etag_of(before), size, length)
        position, end = wanted.offset, min(size, wanted.offset + length)
        while position < end:
            step = min(16 * _CHUNK_BYTES, end - position)
            chunk = filesystem.cat_file(uri, start=position, end=position + step)
            if len(chunk) != step:
                raise TransientReadError(f"{len(chunk)} of {step} bytes came")
            write(chunk)
            position += step
        filesystem.invalidate_cache(filesystem._parent(uri))
        if etag_of(filesystem.info(uri)) != etag_of(before):
            raise ObjectChangedError("changed while it was read")
    except (FileNotFoundError, PermissionError):
        raise
    except (TimeoutError, OSError) as error:
        raise TransientReadError(f"{type(error).__name__}: {error}") from None
