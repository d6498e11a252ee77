"""List the media of a folder, a bucket prefix or a glob, one at a time.

Nothing is collected: memory holds one page of 1,000 keys (S3), the names of the folders on the way
down (local), or one folder (gs://, az://). What is not a medium comes out too, with its reason.

``s3://bucket/photos`` is the folder ``photos/`` (and the object ``photos``, if there is one). A
glob knows ``*`` and ``?`` (not across ``/``), ``[a-z]``, and ``**`` (across ``/``); a path that
exists under its literal name is no glob.
"""

from __future__ import annotations

import os
import re
import stat as modes
from collections.abc import Iterator
from typing import Any

from qvl_batch.errors import StorageError
from qvl_batch.media.left_out import LeftOut
from qvl_batch.media.objects import (
    MediaObject,
    check_scheme,
    explained,
    first_page,
    listed_object,
    local_object,
    split_bucket,
    storage_error,
)
from qvl_batch.media.sniff import kind_of_extension
from qvl_batch.storage import Storage, is_local, local_path, scheme_of

HIDDEN = "hidden (its name, or a folder's, begins with a dot)"
MARKER = "marker file or folder (begins with an underscore, or stands for a folder)"
LINK_CYCLE = "symbolic link to a folder that it lies in"
BROKEN_LINK = "symbolic link to nothing"
NOT_A_FILE = "not a regular file (device, pipe or socket)"
UNREADABLE_FOLDER = "folder that may not be read"
BAD_NAME = "name is not valid UTF-8"

_MAGIC = re.compile(r"[*?\[]")


def list_source(source: str, *, storage: Storage) -> Iterator[MediaObject | LeftOut]:
    """Yield everything that lies under a local folder or file, a bucket prefix, or a glob.

    Local names come sorted within their folder, S3 keys in the store's order.

    Raises:
        StorageError: If the source is not there, may not be read, or can not be reached. One line
            with a remedy; an unreachable endpoint is told within seconds.
    """
    check_scheme(source)
    if is_local(source):
        return _list_local(local_path(source), storage)
    if scheme_of(source) == "s3":
        return _list_s3(source, storage)
    return _list_walked(source, storage)


def is_glob(path: str) -> bool:
    return _MAGIC.search(path) is not None


def fixed_part(pattern: str) -> str:
    """Return what stands before the first wildcard."""
    return _MAGIC.split(pattern, maxsplit=1)[0]


def glob_regex(pattern: str) -> re.Pattern[str]:
    """Translate a glob to a regular expression for `fullmatch`."""
    out, at = [], 0
    while at < len(pattern):
        if pattern.startswith("**/", at) and (at == 0 or pattern[at - 1] == "/"):
            out.append("(?:.*/)?")
            at += 3
        elif pattern.startswith("**", at):
            out.append(".*")
            at += 2
        elif pattern[at] == "*":
            out.append("[^/]*")
            at += 1
        elif pattern[at] == "?":
            out.append("[^/]")
            at += 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            inside = pattern[at + 1 : end].replace("\\", "\\\\").replace("[", "\\[")
            inside = f"^/{inside[1:]}" if inside.startswith("!") else inside.replace("^", "\\^")
            out.append(f"[{inside}]")
            at = end + 1
        else:
            out.append(re.escape(pattern[at]))
            at += 1
    try:
        return re.compile("".join(out), re.DOTALL)
    except re.error as error:
        raise StorageError(
            f"The glob {pattern!r} can not be read: {error}.", "Check its square brackets."
        ) from None


def _name_reason(parts: list[str]) -> str | None:
    """Return why a name below the source's root is left out, or None.

    An underscore alone leaves nothing out: cameras write ``_DSC0001.JPG``.
    """
    if any(part.startswith(".") for part in parts):
        return HIDDEN
    name = parts[-1] if parts else ""
    if not name or name.endswith("_$folder$"):
        return MARKER
    if name.startswith("_") and kind_of_extension(name) is None:
        return MARKER
    return None


# --- local -----------------------------------------------------------------------------------


def _list_local(path: str, storage: Storage) -> Iterator[MediaObject | LeftOut]:
    # Not Path.resolve: the uri keeps the names that the user sees, symbolic links included.
    path = os.path.abspath(path)
    if os.path.lexists(path) or not is_glob(path):
        return _list_local_tree(path, None, storage)
    root = os.path.dirname(fixed_part(path))
    depth = None if "**" in path else path.count("/") - root.rstrip("/").count("/")
    return _matching(_list_local_tree(root, depth, storage), glob_regex(path))


def _matching(
    found: Iterator[MediaObject | LeftOut], pattern: re.Pattern[str]
) -> Iterator[MediaObject | LeftOut]:
    for item in found:
        # What a closed folder holds is not known, so it may be what the glob asks for.
        closed = isinstance(item, LeftOut) and item.reason in (UNREADABLE_FOLDER, LINK_CYCLE)
        if closed or pattern.fullmatch(item.uri):
            yield item


def _list_local_tree(
    root: str, depth: int | None, storage: Storage
) -> Iterator[MediaObject | LeftOut]:
    try:
        stat = os.stat(root)
        if not modes.S_ISDIR(stat.st_mode):
            yield _local_entry(root, stat)
            return
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        raise StorageError(
            f"There is no file or folder {root}.", "Check the path (and quote a glob)."
        ) from None
    except (OSError, ValueError) as error:
        raise storage_error(root, error, storage) from error
    yield from _list_folder(root, names, depth, ((stat.st_dev, stat.st_ino),))


def _list_folder(
    folder: str, names: list[str], depth: int | None, above: tuple[tuple[int, int], ...]
) -> Iterator[MediaObject | LeftOut]:
    for name in names:
        path = os.path.join(folder, name)
        try:
            path.encode()
        except UnicodeEncodeError:
            yield LeftOut(os.fsencode(path).decode(errors="backslashreplace"), BAD_NAME)
            continue
        try:
            stat = os.stat(path)
        except OSError:
            # ELOOP (a link to itself) and names deleted since belong here as well.
            yield LeftOut(path, BROKEN_LINK)
            continue
        if not modes.S_ISDIR(stat.st_mode):
            reason = _name_reason([name])
            yield LeftOut(path, reason) if reason else _local_entry(path, stat)
            continue
        identity = (stat.st_dev, stat.st_ino)
        if name.startswith("."):
            yield LeftOut(f"{path}/", HIDDEN)
        elif identity in above:
            yield LeftOut(f"{path}/", LINK_CYCLE)
        elif depth is None or depth > 1:
            try:
                inner = sorted(os.listdir(path))
            except OSError:
                yield LeftOut(f"{path}/", UNREADABLE_FOLDER)
                continue
            deeper = None if depth is None else depth - 1
            yield from _list_folder(path, inner, deeper, (*above, identity))


def _local_entry(path: str, stat: os.stat_result) -> MediaObject | LeftOut:
    if not modes.S_ISREG(stat.st_mode):
        return LeftOut(path, NOT_A_FILE)
    return local_object(path, stat)


# --- object stores ---------------------------------------------------------------------------


def _list_s3(source: str, storage: Storage) -> Iterator[MediaObject | LeftOut]:
    bucket, key = split_bucket(source)
    if is_glob(bucket):
        raise StorageError(f"{source!r} has a wildcard in the bucket.", "Name one bucket.")
    start = f"s3://{bucket}/"
    found = first_page(source, storage, key)
    if is_glob(key) and not found:
        prefix = fixed_part(key)
        below = len(prefix.rpartition("/")[0])
        listed = _s3_entries(start, _s3_pages(source, storage, prefix), below)
        yield from _matching(listed, glob_regex(start + key))
        return
    if key and not key.endswith("/"):
        # The keys that begin with a name come sorted: its own object is the first of them.
        if found and found[0]["Key"] == key:
            yield listed_object(source, found[0])
        key += "/"
    yield from _s3_entries(start, _s3_pages(source, storage, key), len(key))


def _s3_pages(source: str, storage: Storage, prefix: str) -> Iterator[list[dict[str, Any]]]:
    """Yield the listing page by page through s3fs' own client, which keeps none of them."""
    bucket, _ = split_bucket(source)
    filesystem = storage.filesystem(source)
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
    while True:
        with explained(source, storage):
            page = filesystem.call_s3("list_objects_v2", **request)
        yield page.get("Contents", [])
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _s3_entries(
    start: str, pages: Iterator[list[dict[str, Any]]], below: int
) -> Iterator[MediaObject | LeftOut]:
    for page in pages:
        for entry in page:
            key = entry["Key"]
            uri = start + key
            reason = _name_reason(key[below:].lstrip("/").split("/"))
            yield LeftOut(uri, reason) if reason else listed_object(uri, entry)


def _list_walked(source: str, storage: Storage) -> Iterator[MediaObject | LeftOut]:
    filesystem = storage.filesystem(source)
    scheme = source.partition("://")[0]
    with explained(source, storage):
        literal = not is_glob(source) or filesystem.exists(source)
    root = source if literal else fixed_part(source).rpartition("/")[0]
    found = walk_objects(filesystem, scheme, root, storage)
    yield from found if literal else _matching(found, glob_regex(source))


def walk_objects(
    filesystem: Any,
    scheme: str,
    root: str,
    storage: Storage,
) -> Iterator[MediaObject | LeftOut]:
    """Yield what lies under a root of any fsspec file system, one folder in memory at a time."""
    with explained(root, storage):
        info = filesystem.info(root)
    if info["type"] != "directory":
        yield listed_object(root, info)
        return
    top = info["name"].rstrip("/")
    folders = filesystem.walk(root, detail=True, on_error="raise")
    while True:
        with explained(root, storage):
            step = next(folders, None)
        if step is None:
            return
        folder, _, files = step
        for _, entry in sorted(files.items()):
            name = entry["name"]
            uri = f"{scheme}://{name.lstrip('/')}"
            parts = name[len(top) :].lstrip("/").split("/")
            reason = _name_reason(parts)
            yield LeftOut(uri, reason) if reason else listed_object(uri, entry)
        # fsspec keeps every folder that it has listed, else.
        filesystem.invalidate_cache(folder)
