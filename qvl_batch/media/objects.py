"""One object or file: what it is called, how large it is, its first bytes; and what went wrong."""

from __future__ import annotations

import errno
import os
import stat as modes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from qvl_batch.errors import StorageError
from qvl_batch.media.fetch import local_etag
from qvl_batch.media.sniff import HEAD_BYTES
from qvl_batch.storage import Storage, is_local, scheme_of

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# The first request of a session fails fast: a wrong endpoint is told within seconds, where the
# client's own defaults (5 attempts of 5 s to connect and 15 s to read) would take a minute or more.
CONNECT_TIMEOUT_S = 4
READ_TIMEOUT_S = 5
_QUICK = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "read_timeout": READ_TIMEOUT_S,
    "retries": {"total_max_attempts": 2},
}

_BODY_ATTEMPTS = 3

Problem = Literal["bucket", "denied", "credentials", "region", "unreachable", "missing", "other"]

_PROBLEM_OF_CODE: dict[str, Problem] = {
    "NoSuchBucket": "bucket",
    "InvalidBucketName": "bucket",
    "NoSuchKey": "missing",
    "404": "missing",
    "AccessDenied": "denied",
    "AllAccessDisabled": "denied",
    "403": "denied",
    "InvalidAccessKeyId": "credentials",
    "SignatureDoesNotMatch": "credentials",
    "ExpiredToken": "credentials",
    "InvalidToken": "credentials",
    "TokenRefreshRequired": "credentials",
    "RequestTimeTooSkewed": "credentials",
    "PermanentRedirect": "region",
    "AuthorizationHeaderMalformed": "region",
    "IllegalLocationConstraintException": "region",
    "301": "region",
}


@dataclass(frozen=True, slots=True)
class MediaObject:
    """One file or object as its store lists it.

    ``uri`` is an absolute path for a local file (no ``file://``) and the key verbatim behind
    ``s3://bucket/`` for an object: never percent-encoded, whatever characters it holds. ``etag``
    has no quotes; a local file's is ``size-mtime_ns``.
    """

    uri: str
    size_bytes: int
    etag: str | None
    mtime: datetime | None


def local_object(path: str, stat: os.stat_result) -> MediaObject:
    mtime = _EPOCH + timedelta(microseconds=stat.st_mtime_ns // 1000)
    return MediaObject(path, stat.st_size, local_etag(stat), mtime)


def listed_object(uri: str, info: dict[str, Any]) -> MediaObject:
    """Make an object from an entry of a listing or a HEAD answer, of whichever store."""
    size = info.get("Size", info.get("ContentLength", info.get("size")))
    etag = info.get("ETag") or info.get("etag")
    mtime = info.get("LastModified") or info.get("mtime") or info.get("last_modified")
    if isinstance(mtime, str):
        mtime = datetime.fromisoformat(mtime)
    if isinstance(mtime, datetime) and mtime.tzinfo is None:
        mtime = mtime.replace(tzinfo=UTC)
    return MediaObject(uri, int(size or 0), etag.strip('"') if etag else None, mtime)


def split_bucket(uri: str) -> tuple[str, str]:
    """Return (bucket, key) of ``s3://bucket/key``; the key is taken verbatim."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    if not bucket:
        raise StorageError(f"{uri!r} names no bucket.", "Write it as s3://bucket/prefix.")
    return bucket, key


def check_scheme(uri: str) -> None:
    """Refuse web addresses by name; other unknown schemes are refused by `Storage.filesystem`.

    Raises:
        StorageError: If the uri begins with ``http://`` or ``https://``.
    """
    if scheme_of(uri) in ("http", "https"):
        raise StorageError(
            f"{uri} is a web address; media are read from local paths and object stores only.",
            "Copy the media to a bucket or a folder first; an S3 server's address is given by "
            "--endpoint-url.",
        )


def _answer(error: BaseException) -> dict[str, str]:
    """Return the ``Code`` and ``Message`` with which an S3 server refused; empty if it did not."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    found = response.get("Error", {}) if isinstance(response, dict) else {}
    return {name: str(found[name]) for name in ("Code", "Message") if found.get(name)}


def problem_of(error: BaseException) -> Problem:
    """Return what kind of thing went wrong in a request to a store."""
    found = _PROBLEM_OF_CODE.get(_answer(error).get("Code", ""))
    if found:
        return found
    # By name, since these classes live in packages that only some stores bring along.
    name = type(error).__name__
    if "Credentials" in name or name in ("ProfileNotFound", "TokenRetrievalError", "RefreshError"):
        return "credentials"
    if "Connect" in name or "Timeout" in name or name in ("SSLError", "ProxyConnectionError"):
        return "unreachable"
    if name == "ParamValidationError":
        return "bucket"
    if isinstance(error, FileNotFoundError):
        return "missing"
    return "denied" if isinstance(error, PermissionError) else "other"


def storage_error(uri: str, error: BaseException, storage: Storage) -> StorageError:
    """Return one line on what does not work, and what to do about it."""
    if is_local(uri):
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, PermissionError):
            return StorageError(f"{uri} may not be read or written.", "Change its permissions.")
        if getattr(error, "errno", None) == errno.ENOSPC:
            return StorageError(f"No space is left for {uri}.", "Free some, or write elsewhere.")
        return StorageError(f"{uri}: {reason}.", "Check the path.")
    bucket, _ = split_bucket(uri)
    place = storage.endpoint_url or f"the {scheme_of(uri)} store"
    # Some servers send a code and no message.
    detail = ": ".join(_answer(error).values()) or str(error)
    detail = " ".join(detail.split())[:300]
    match problem_of(error):
        case "bucket":
            return StorageError(
                f"There is no bucket {bucket!r} at {place}.",
                "Check its name, and --endpoint-url if it is not Amazon's.",
            )
        case "missing":
            return StorageError(f"{uri} is not there.", "Check bucket, prefix and endpoint.")
        case "credentials":
            return StorageError(
                f"{place} does not accept the credentials, or there are none: {detail}",
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role "
                "that may list and read the bucket.",
            )
        case "denied":
            return StorageError(
                f"{place} refuses access to {uri}: {detail}",
                f"Use credentials that may list and read the bucket {bucket!r}.",
            )
        case "region":
            return StorageError(
                f"The bucket {bucket!r} lies in another region: {detail}",
                "Give its region with --region.",
            )
        case "unreachable":
            return StorageError(
                f"{place} can not be reached: {detail}",
                "Check --endpoint-url, --region and the network.",
            )
        case _:
            return StorageError(
                f"Reading {uri} failed: {type(error).__name__}: {detail}", "Try again."
            )


def store_failures() -> tuple[type[Exception], ...]:
    """Return what a request to a store may raise; botocore's errors only where it is installed."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return (OSError,)
    return (OSError, BotoCoreError, ClientError)


@contextmanager
def explained(uri: str, storage: Storage) -> Iterator[None]:
    """Turn whatever a store raises inside the block into a `StorageError` about ``uri``."""
    try:
        yield
    except store_failures() as error:
        raise storage_error(uri, error, storage) from error


def first_page(uri: str, storage: Storage, prefix: str = "") -> list[dict[str, Any]]:
    """Return at most one entry of an S3 listing, or fail within seconds.

    Raises:
        StorageError: If the endpoint, the credentials or the bucket do not work.
    """
    bucket, _ = split_bucket(uri)
    with explained(uri, storage):
        filesystem = storage.filesystem(uri, config_kwargs=_QUICK)
        # s3fs repeats a time-out five times of its own accord.
        filesystem.retries = 1
        page = filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
    return page.get("Contents", [])


class Objects:
    """Sizes, etags and first bytes of single objects; one instance serves many threads."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._filesystems: dict[str, Any] = {}
        self._dead: dict[str, StorageError | None] = {}
        self._lock = threading.Lock()

    def stat(self, uri: str) -> MediaObject | None:
        """Return the object as it is now; None if it is not there or may not be looked at.

        Raises:
            StorageError: If the store can not be reached or refuses the credentials.
        """
        try:
            if is_local(uri):
                stat = os.stat(uri)
                return local_object(uri, stat) if modes.S_ISREG(stat.st_mode) else None
            filesystem = self._filesystem(uri)
            if scheme_of(uri) == "s3":
                bucket, key = split_bucket(uri)
                info = filesystem.call_s3("head_object", Bucket=bucket, Key=key)
            else:
                info = filesystem.info(uri)
            return listed_object(uri, info)
        except ValueError:
            # A path with a NUL byte.
            return None
        except store_failures() as error:
            if problem_of(error) in ("missing", "denied", "bucket"):
                return None
            raise storage_error(uri, error, self._storage) from error

    def head(self, uri: str, offset: int = 0, length: int = HEAD_BYTES) -> bytes | None:
        """Return the bytes ``[offset, offset + length)``, fewer at the end; None if unreadable.

        Raises:
            StorageError: If the store can not be reached or refuses the credentials.
        """
        try:
            if is_local(uri):
                # Opening a pipe would wait for a writer.
                if not os.path.isfile(uri):
                    return None
                with open(uri, "rb") as file:
                    file.seek(offset)
                    return file.read(length)
            filesystem = self._filesystem(uri)
            if scheme_of(uri) == "s3":
                return _s3_range(filesystem, uri, offset, length)
            return filesystem.cat_file(uri, start=offset, end=offset + length)
        except store_failures() as error:
            if getattr(error, "errno", None) == errno.EINVAL:
                # A range behind the end.
                return b""
            if is_local(uri) or problem_of(error) in ("missing", "denied", "bucket"):
                return None
            raise storage_error(uri, error, self._storage) from error

    def _filesystem(self, uri: str) -> Any:
        scheme, place = scheme_of(uri), f"{scheme_of(uri)}://{split_bucket(uri)[0]}"
        with self._lock:
            if place not in self._dead:
                self._dead[place] = self._why_dead(uri) if scheme == "s3" else None
            # Told to every thread at once: 32 of them would wait one after the other, else.
            dead = self._dead[place]
            if dead is not None:
                raise dead
            if scheme not in self._filesystems:
                self._filesystems[scheme] = self._storage.filesystem(uri)
            return self._filesystems[scheme]

    def _why_dead(self, uri: str) -> StorageError | None:
        """Return what is wrong with an endpoint or key; a missing bucket is one row's affair."""
        try:
            first_page(uri, self._storage)
        except StorageError as error:
            cause = error.__cause__
            if cause is None or problem_of(cause) not in ("missing", "denied", "bucket"):
                return error
        return None


def _s3_range(filesystem: Any, uri: str, offset: int, length: int) -> bytes:
    """Read a range by bucket and key, since s3fs takes ``?versionId=`` in a path for a version."""
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError
    from fsspec.asyn import sync

    bucket, key = split_bucket(uri)
    byte_range = f"bytes={offset}-{offset + length - 1}"
    for attempt in range(_BODY_ATTEMPTS):
        answer = filesystem.call_s3("get_object", Bucket=bucket, Key=key, Range=byte_range)
        try:
            return sync(filesystem.loop, answer["Body"].read)
        except (ClientError, BotoCoreError) as error:
            # s3fs repeats requests, but not the reading of their bodies.
            if attempt + 1 == _BODY_ATTEMPTS:
                raise ConnectionError(f"the body broke off: {error}") from error
    raise AssertionError("not reached")
