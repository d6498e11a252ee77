"""Small objects that are created once or not at all, and the clock of the store they lie in.

A lease stands on create-only writes: ``If-None-Match: *`` on object stores, ``O_EXCL`` on disk.
Some stores accept the header and let two writers win (OpenStack Swift's S3 layer does, measured:
20 acknowledged rows of 1140 lost), so a store is tried before it is trusted.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from qvl_batch.errors import StorageError
from qvl_batch.storage import Storage, is_local, join

if TYPE_CHECKING:
    import fsspec

# 8 rounds of 16 writers: Swift let two win in 29 of 40 such rounds, so it passes with
# probability (11/40) ** 8, about 3e-5.
_RACE_ROUNDS = 8
_RACERS = 16
# A race is some 250 requests; a store that passed one is believed for that long.
_BELIEVED_FOR = timedelta(days=7)
_PASSED = "exclusive"
_ATTEMPTS = 5
# What a store says when somebody else's conditional write is under way, or it is overloaded.
_PASSING = ("ConditionalRequestConflict", "SlowDown", "503", "500", "reset", "closed", "timed out")


class Place:
    """A folder of small objects under a root.

    Args:
        root: Local folder or object-store address.
        storage: How it is reached.
    """

    def __init__(self, root: str, storage: Storage) -> None:
        self.root, self.endpoint_url = root, storage.endpoint_url or ""
        # Leases are read as they are now, never as a cached listing has them.
        self._fs: fsspec.AbstractFileSystem = storage.filesystem(root, use_listings_cache=False)
        self._is_local = is_local(root)

    def create(self, name: str, content: dict[str, Any]) -> bool:
        """Write an object that must not exist; return whether it is this call's.

        A write whose answer is lost counts as this call's if the object holds this content:
        make it unique.

        Raises:
            OSError: If the store fails for longer than the retries last.
        """
        data = json.dumps(content).encode()
        for attempt in range(_ATTEMPTS):
            try:
                self._create(self._path(name), data)
                return True
            except FileExistsError:
                return self.read(name) == content
            except OSError as error:
                # s3fs keeps the server's message alone, and some servers have none.
                said = f"{error} {error.__cause__}"
                if "PreconditionFailed" in said or "412" in said:
                    return self.read(name) == content
                if attempt == _ATTEMPTS - 1 or not any(word in said for word in _PASSING):
                    raise
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("unreachable")

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write an object over what is there."""
        data = json.dumps(content).encode()
        path = self._path(name)
        if not self._is_local:
            self._fs.pipe_file(path, data)
            return
        # Renamed into place: a reader sees the old content or the new one.
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}"
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)

    def read(self, name: str) -> dict[str, Any] | None:
        """Return an object's content; None if it is not there."""
        try:
            return json.loads(self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        """Return the names of all objects under a folder, relative to the root of this place."""
        base = self._path("")
        try:
            found = self._fs.find(self._path(folder))
        except FileNotFoundError:
            return []
        return [path[len(base) :].lstrip("/") for path in found]

    def mtime(self, name: str) -> datetime | None:
        """Return when an object was last written, by the store's clock; None if it is not there."""
        try:
            info = self._fs.info(self._path(name))
        except FileNotFoundError:
            return None
        found = info.get("LastModified") or info.get("mtime") or info.get("last_modified")
        if isinstance(found, int | float):
            return datetime.fromtimestamp(found, UTC)
        if isinstance(found, str):
            found = datetime.fromisoformat(found)
        return found if found.tzinfo else found.replace(tzinfo=UTC)

    def now(self) -> datetime:
        """Return the present time by the store's clock: that of an object written just now."""
        name = f"clock/{uuid.uuid4().hex}"
        self.write(name, {})
        try:
            found = self.mtime(name)
        finally:
            self.remove(name)
        if found is None:
            raise OSError(f"{self.root}: an object is gone as soon as it is written")
        return found

    def remove(self, name: str) -> None:
        """Remove an object if that is possible: a run needs no right to delete."""
        with contextlib.suppress(OSError):
            self._fs.rm_file(self._path(name))

    def _create(self, path: str, data: bytes) -> None:
        if self._is_local:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            # Linked into place whole: nobody reads a half-written object.
            temporary = f"{path}.{uuid.uuid4().hex}"
            with open(temporary, "xb") as file:
                file.write(data)
            try:
                os.link(temporary, path)
            finally:
                os.unlink(temporary)
            return
        self._fs.pipe_file(path, data, mode="create")

    def _path(self, name: str) -> str:
        return self._fs._strip_protocol(join(self.root, name) if name else self.root)


def ensure_exclusive(place: Place) -> None:
    """Do as `check_exclusive`, unless this very store passed lately.

    Raises:
        StorageError: As `check_exclusive`, or if the store fails.
    """
    try:
        passed_at = place.mtime(_PASSED)
        is_known = passed_at is not None and place.read(_PASSED) == _store_of(place)
        if is_known and place.now() - passed_at < _BELIEVED_FOR:
            return
        check_exclusive(place)
        note_exclusive(place)
    except OSError as error:
        raise StorageError(f"{place.root}: {error}", "Check the store.") from error


def note_exclusive(place: Place) -> None:
    """Write down that the store of this root passed `check_exclusive`."""
    place.write(_PASSED, _store_of(place))


def _store_of(place: Place) -> dict[str, str]:
    # A root that was copied to another store brings the note along.
    return {"root": place.root, "endpoint_url": place.endpoint_url}


def check_exclusive(place: Place) -> None:
    """Race writers for the same new object, and refuse a store that lets two of them win.

    Raises:
        StorageError: With how many won, or why the store does not take conditional writes.
    """
    with ThreadPoolExecutor(_RACERS) as pool:
        for _ in range(_RACE_ROUNDS):
            name = f"race/{uuid.uuid4().hex}"
            try:
                racers = [pool.submit(place.create, name, {"racer": i}) for i in range(_RACERS)]
                won = [racer.result() for racer in racers]
            except (OSError, NotImplementedError) as error:
                raise StorageError(
                    f"{place.root}: the store does not take conditional writes ({error}).",
                    "Choose a store that supports If-None-Match on PUT.",
                ) from error
            finally:
                place.remove(name)
            if sum(won) != 1:
                raise StorageError(
                    f"{place.root}: of {_RACERS} writers that each wanted to create the same "
                    f"object, the store told {sum(won)} that they did. Two runs at once would "
                    "lose rows there.",
                    "Choose another store: this one can not be written to safely.",
                )
