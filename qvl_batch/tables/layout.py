"""Where tables lie and what they are called: pure functions of collection and partition."""

from __future__ import annotations

import hashlib
import json
import re

from qvl_batch.errors import ConfigError
from qvl_batch.storage import join

# (key, value) pairs in the order of output.partition_by.
Partition = tuple[tuple[str, str | None], ...]

FAILURES_TABLE = "_qvl_failures"
CATALOG_TABLE = "_qvl_catalog"

# Schema metadata of a partition's table, beside the recipe's.
COLLECTION_METADATA = "qvl.collection"
PARTITION_METADATA = "qvl.partition"
# What a table's rows are: ``vectors`` where it is not stated, ``scores`` or ``candidates``.
KIND_METADATA = "qvl.kind"
VECTORS_KIND = "vectors"

MAX_NAME_LENGTH = 200
_MAX_PLAIN_LENGTH = 64
_SLUG_LENGTH = 40

_COLLECTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(_[A-Za-z0-9.-]+)*")
# No '-' in a key: the first '-' of a part ends its key.
_PLAIN_KEY = re.compile(r"[A-Za-z0-9]+(_[A-Za-z0-9]+)*")
_PLAIN_VALUE = re.compile(r"[A-Za-z0-9-][A-Za-z0-9.-]*")
_LOOKS_SLUGGED = re.compile(r".*-[0-9a-f]{8}")


def check_collection_name(name: str) -> str:
    """Return the name if a table can be called that.

    Raises:
        ConfigError: If it holds anything but letters, digits, ``_ . -``, holds ``__``, starts with
            ``_ . -``, ends with ``_``, or has more than 64 characters.
    """
    if not _COLLECTION.fullmatch(name) or len(name) > _MAX_PLAIN_LENGTH:
        raise ConfigError(
            f"output.collection is {name!r}.",
            f"Allowed: up to {_MAX_PLAIN_LENGTH} letters, digits, '-', '.' and single '_', "
            "starting with a letter or a digit.",
        )
    return name


def partition_json(partition: Partition) -> str:
    """Return the partition as a JSON object, its keys in partition_by order."""
    values = dict(partition)
    if len(values) != len(partition):
        raise ConfigError(
            f"output.partition_by names a key twice: {[key for key, _ in partition]}.",
            "Name each column once.",
        )
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def partition_from_json(text: str) -> Partition:
    """Return the partition that `partition_json` wrote."""
    return tuple(json.loads(text).items())


def table_name(collection: str, partition: Partition) -> str:
    """Return the table's name: ``media__dt-2026-01-02``, or the collection if unpartitioned.

    Different partitions get different names: parts are joined by ``__``, which none of them holds
    or touches; a part's key ends at its first ``-``; a value that is not plain text, or that could
    be taken for a slug, becomes slug + ``-`` + 8 hex of its hash. At most 200 characters of
    ``[A-Za-z0-9_.-]``.

    Raises:
        ConfigError: If the collection can not be a table's name.
    """
    check_collection_name(collection)
    parts = [f"{_key_text(key)}-{_value_text(value)}" for key, value in partition]
    name = "__".join([collection, *parts])
    if len(name) <= MAX_NAME_LENGTH:
        return name
    # No key is empty, so nothing else has a part that starts with '-'.
    tail = f"__-{_digest([collection, *map(list, partition)], 8)}"
    return name[: MAX_NAME_LENGTH - len(tail)].rstrip("_") + tail


def table_uri(root: str, name: str) -> str:
    return join(root, f"{name}.lance")


def _key_text(key: str) -> str:
    if _PLAIN_KEY.fullmatch(key) and len(key) <= _MAX_PLAIN_LENGTH:
        return key
    slug = re.sub(r"[^A-Za-z0-9]+", "_", key)[:_SLUG_LENGTH].strip("_") or "key"
    return f"{slug}.{_digest(key, 4)}"


def _value_text(value: str | None) -> str:
    if (
        value is not None
        and _PLAIN_VALUE.fullmatch(value)
        and len(value) <= _MAX_PLAIN_LENGTH
        and not _LOOKS_SLUGGED.fullmatch(value)
    ):
        return value
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", value or "")[:_SLUG_LENGTH].strip("-.")
    return f"{slug or ('null' if value is None else 'value')}-{_digest(value, 4)}"


def _digest(value: object, size_bytes: int) -> str:
    # JSON keeps None and "null" apart, and stands lone surrogates.
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=size_bytes).hexdigest()
