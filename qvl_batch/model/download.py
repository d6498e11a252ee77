"""Checkpoints from the hub and from object stores, without pickles and code."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qvl_batch.errors import ModelError
from qvl_batch.storage import Storage

# What a checkpoint needs; never pickles or code.
WANTED_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja")


def fetch_from_hub(name: str, revision: str | None) -> Path:
    """Return the hub's local copy of a model, downloading what is not there yet.

    Raises:
        ModelError: If there is no such model or revision, or the hub can not be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(WANTED_FILES)))
    except GatedRepoError:
        raise ModelError(
            f"The hub model {name} is gated.", "Accept its terms and log in: hf auth login."
        ) from None
    except RevisionNotFoundError:
        raise ModelError(
            f"The hub model {name} has no revision {revision!r}.",
            "Check the commit, tag or branch.",
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            f"There is no folder {name} and no hub model of that name (or it is private).",
            "Check the name; for a private one log in: hf auth login.",
        ) from None
    # The hub error's bases are OSError and whatever this version's HTTP client raises.
    except (LocalEntryNotFoundError, *HfHubHTTPError.__bases__) as error:
        raise ModelError(
            f"There is no folder {name}, and the hub can not be reached for a model of that name "
            f"({type(error).__name__}).",
            "Download the checkpoint where there is a network and give its folder, or set HF_HOME "
            "to a cache that holds it.",
        ) from None


def fetch_folder(url: str, storage: Storage, cache_dir: str | None) -> Path:
    """Copy an object-store folder into the cache, once, whoever asks at the same time.

    The cache entry is named by the folder's url and its files' names, sizes and etags, so a
    changed checkpoint is fetched anew. It appears by a rename of a complete copy.

    Raises:
        ModelError: If it can not be listed, holds no checkpoint, or can not be copied.
        StorageError: If the scheme or its package is unknown.
    """
    filesystem = storage.filesystem(url)
    root = url.split("://", 1)[1].rstrip("/")
    try:
        found = filesystem.find(root, maxdepth=1, detail=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{url} can not be listed: {type(error).__name__}: {error}.",
            "Check the address, the endpoint and the credentials.",
        ) from None
    # botocore's missing-credentials error is no OSError; it belongs to a package that is only
    # there with s3fs, so it is known by name.
    except Exception as error:
        if "Credentials" not in type(error).__name__:
            raise
        raise ModelError(
            f"{url} can not be listed: {error}.", "Provide credentials by the standard chain."
        ) from None
    files = {
        path.rsplit("/", 1)[-1]: (path, info)
        for path, info in sorted(found.items())
        if any(fnmatch.fnmatch(path.rsplit("/", 1)[-1], wanted) for wanted in WANTED_FILES)
    }
    if not files:
        held = ", ".join(sorted(path.rsplit("/", 1)[-1] for path in found)[:3])
        raise ModelError(
            f"There is no model folder {url}" + (f": it holds only {held}." if held else "."),
            "Give the folder that holds config.json and *.safetensors.",
        )
    stated = [url.rstrip("/")]
    for name, (_, info) in files.items():
        version = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("mtime")
        stated.append(f"{name}\0{info.get('size')}\0{version}")
    key = hashlib.sha256("\n".join(stated).encode()).hexdigest()[:32]
    cache = Path(cache_dir or "~/.cache/qvl-batch/models").expanduser()
    folder = cache / key
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _file_lock(cache / f"{key}.lock"):
            if not folder.is_dir():
                _copy_whole(filesystem, files, cache, folder)
    except OSError as error:
        raise ModelError(
            f"{url} can not be copied to {cache}: {error}.",
            "Check the network, the room on that disk and its permissions.",
        ) from None
    return folder


def _copy_whole(filesystem: Any, files: dict[str, tuple[str, Any]], cache: Path, to: Path) -> None:
    # A copy that was killed leaves its temporary folder; nobody else can hold the lock now.
    for left in cache.glob(f".{to.name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=cache))
    try:
        for name, (path, info) in files.items():
            filesystem.get_file(path, str(temporary / name))
            got, size = (temporary / name).stat().st_size, info.get("size")
            if size is not None and got != size:
                raise OSError(f"{name} has {got} bytes instead of {size}")
        temporary.rename(to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that the system drops when the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
