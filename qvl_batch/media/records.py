"""Rows of a list as it is written: JSON lines or CSV, each with its place; and what it names."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import IO, Any

from qvl_batch.errors import ManifestError
from qvl_batch.storage import OBJECT_SCHEMES, Storage, is_local, local_path, scheme_of

MAX_LINE_BYTES = 16 * 2**20
# s3fs reads ahead by 50 MB, else.
READ_BLOCK_BYTES = 4 * 2**20


def opened(source: str, storage: Storage) -> AbstractContextManager[IO[bytes]]:
    """Open a file or object for reading from its begin to its end."""
    if is_local(source):
        return open(local_path(source), "rb")
    remote = storage.filesystem(source).open(source, "rb", block_size=READ_BLOCK_BYTES)
    # fsspec's readline takes no limit.
    return io.BufferedReader(remote, READ_BLOCK_BYTES // 4)


def json_records(source: str, file: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, object) of each line that is not blank.

    Raises:
        ManifestError: If a line is longer than 16 MiB or no JSON object.
    """
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        place = f"line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise refused(source, place, "is longer than 16 MiB", "Write one object a line.")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            shown = line[:60].decode(errors="replace").strip()
            problem = f"is not JSON ({error}): {shown}"
            raise refused(source, place, problem, "Write one object a line.") from None
        if not isinstance(record, dict):
            raise refused(source, place, f"is not an object: {record!r:.60}", "Write {...}.")
        yield place, record


def csv_records(source: str, file: IO[bytes]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, fields by column) of each row; the first row names the columns.

    Raises:
        ManifestError: If it is no CSV in UTF-8, names a column twice, or a row is of another
            length than the first.
    """
    # The module's limit of 128 KiB a field is shorter than a text may be.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
    header: list[str] | None = None
    try:
        for record in reader:
            place = f"line {reader.line_num}"
            if not record:
                continue
            if header is None:
                header = [name.strip() for name in record]
                if len(set(header)) < len(header):
                    raise refused(source, place, "names a column twice", "Name each once.")
                continue
            if len(record) != len(header):
                problem = f"has {len(record)} fields, the header has {len(header)}"
                raise refused(source, place, problem, "Quote fields that hold a comma.")
            yield place, dict(zip(header, record, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        place = f"line {reader.line_num + 1}"
        raise refused(source, place, f"is not CSV ({error})", "Save it as UTF-8 CSV.") from None


def refused(source: str, place: str, problem: str, remedy: str) -> ManifestError:
    """Return the error of one row."""
    return ManifestError(f"{source}, {place}, {problem}.", remedy)


def absolute_from(source: str) -> Callable[[str], str]:
    """Return what makes an address of a list absolute; it raises ValueError for one of no use.

    Relative addresses begin at the folder that the list lies in.
    """
    local = is_local(source)
    here = os.path.dirname(os.path.abspath(local_path(source))) if local else ""
    scheme, _, rest = source.partition("://")
    bucket, _, key = rest.partition("/")
    above = posixpath.dirname(key)

    def absolute(uri: str) -> str:
        found = scheme_of(uri)
        if found != "file":
            if found not in OBJECT_SCHEMES:
                raise ValueError(f"whose scheme {found}:// is none of local paths, s3, gs, az")
            if not uri.partition("://")[2].partition("/")[2]:
                raise ValueError("which names no object")
            return uri
        if uri.startswith("file://") or uri.startswith("/"):
            return os.path.abspath(local_path(uri))
        if local:
            return os.path.abspath(os.path.join(here, uri))
        if {".", ".."} & set(uri.split("/")):
            joined = posixpath.normpath(posixpath.join("/", above, uri))
            return f"{scheme}://{bucket}{joined}"
        return "/".join([f"{scheme}://{bucket}", *filter(None, [above]), uri])

    return absolute
