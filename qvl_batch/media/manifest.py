"""Make the manifest: a Parquet table of what is to be embedded, from a place or from a list.

Hive keys, the columns of a JSON list and which optional columns are used are known for certain only
at the end. So every batch goes to a part file of its own with the columns that it has, and when the
source is exhausted the parts are joined under one schema: nothing that appears late is lost, and
memory holds one batch. Parts lie in a hidden folder beside a local OUT (a kill may leave it behind;
it can be deleted), or in the temporary folder for an OUT in a bucket. OUT appears whole or not at
all.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qvl_batch.errors import ConfigError, ManifestError, StorageError
from qvl_batch.media.kinds import Kinds
from qvl_batch.media.left_out import LeftOutLog
from qvl_batch.media.listing import list_source
from qvl_batch.media.manifest_parts import ManifestParts, ManifestReport
from qvl_batch.media.objects import (
    MediaObject,
    Objects,
    check_scheme,
    explained,
    first_page,
    split_bucket,
)
from qvl_batch.media.partition_rule import PartitionRule, parse_partition_rule
from qvl_batch.media.source_list import ListBatch, is_list, no_columns, read_list
from qvl_batch.storage import Storage, is_local, local_path, scheme_of

__all__ = ["ManifestReport", "PartitionRule", "build_manifest", "parse_partition_rule"]


def build_manifest(
    source: str,
    out: str,
    *,
    storage: Storage,
    sniff: bool = False,
    partition_from: PartitionRule | None = None,
    batch_rows: int = 50_000,
) -> ManifestReport:
    """Write the manifest of a source to a Parquet file, local or in a bucket.

    Args:
        source: A folder, a file, ``s3://bucket/prefix``, a glob, or a ``.jsonl``, ``.ndjson``,
            ``.csv`` or ``.parquet`` list with a ``uri`` and/or ``text`` column.
        out: Where the manifest goes; an older one there is replaced. ``OUT.left_out.jsonl`` beside
            it names all that was left out.
        storage: How object stores are reached, for source, media and out.
        sniff: Read the first bytes of every object, not only of those with an unknown extension.
            Local files are always looked into.
        partition_from: Where partition values come from. None takes ``key=value`` folders where
            there are any; a file without a key that others have gets null.
        batch_rows: Rows held in memory, and rows of a row group.

    Returns:
        The report; the file's schema is `schema.MANIFEST`'s columns that are used, the partition
        columns as strings, and the list's further columns. Its metadata ``qvl.partition_by`` is
        the JSON list of the partition columns.

    Raises:
        ManifestError: If the list is malformed (with its line), nothing is found, or a partition
            column collides with another one.
        StorageError: If source or out can not be reached, read or written.
    """
    if batch_rows < 1:
        raise ConfigError(f"batch_rows is {batch_rows}.", "Allowed: 1 or more.")
    check_scheme(source)
    check_scheme(out)
    if source == out:
        raise ManifestError(f"{out} is both the source and the manifest.", "Name another file.")
    rule = partition_from or PartitionRule(how="hive")
    from_list = is_list(source) and not os.path.isdir(local_path(source))
    if rule.how == "column" and not from_list:
        raise ManifestError(
            f"{source} is no list, so it has no column {rule.columns[0]!r} to partition by.",
            "Give a .jsonl, .csv or .parquet list, or partition by hive, mtime or regex.",
        )
    with (
        _spool_folder(out, storage) as spool,
        explained(out, storage),
        LeftOutLog(spool / "left_out.jsonl") as left_out,
    ):
        if from_list:
            candidates = read_list(source, storage=storage, batch_rows=batch_rows)
        else:
            found = left_out.keep_others(list_source(source, storage=storage))
            candidates = _as_batches(found, batch_rows)
        parts = ManifestParts(spool, source, rule, left_out)
        with Kinds(Objects(storage), sniff=sniff) as kinds:
            for batch in candidates:
                kinds.complete(batch.rows)
                parts.add(batch)
        report = parts.join(spool / "manifest.parquet", out, kinds.not_found)
        if partition_from == PartitionRule(how="hive") and not report.partition_keys:
            raise ManifestError(
                f"{source} has no key=value folder to partition by.",
                "Use another --partition-by, or none.",
            )
        left_out.close()
        _publish(spool, out, storage, bool(left_out.counts))
        return report


def _as_batches(found: Iterator[MediaObject], batch_rows: int) -> Iterator[ListBatch]:
    while objects := list(itertools.islice(found, batch_rows)):
        rows = [
            {name: getattr(item, name) for name in ("uri", "etag", "size_bytes", "mtime")}
            for item in objects
        ]
        yield ListBatch(rows, [row["uri"] for row in rows], no_columns(len(rows)))


@contextmanager
def _spool_folder(out: str, storage: Storage) -> Iterator[Path]:
    """Give a folder for the parts; a place where OUT could not be written is refused here."""
    if not is_local(out):
        if scheme_of(out) == "s3":
            first_page(out, storage, split_bucket(out)[1])
        with tempfile.TemporaryDirectory(prefix="qvl-manifest-") as folder:
            yield Path(folder)
        return
    path = Path(os.path.abspath(local_path(out)))
    if path.is_dir():
        raise StorageError(f"{path} is a folder.", "Name a file for the manifest.")
    if not path.parent.is_dir():
        raise StorageError(f"There is no folder {path.parent} for the manifest.", "Make it first.")
    with explained(out, storage):
        # The name begins with a dot, so that a source around it does not list it.
        spool = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    with spool as folder:
        yield Path(folder)


def _publish(spool: Path, out: str, storage: Storage, any_left_out: bool) -> None:
    """Put the list of what was left out and then the manifest in their places."""
    left_out = f"{out}.left_out.jsonl"
    if is_local(out):
        path, left_out_path = local_path(out), local_path(left_out)
        if any_left_out:
            os.replace(spool / "left_out.jsonl", left_out_path)
        else:
            # An older run's list would contradict this manifest.
            Path(left_out_path).unlink(missing_ok=True)
        with open(spool / "manifest.parquet", "rb+") as file:
            os.fsync(file.fileno())
        os.replace(spool / "manifest.parquet", path)
        return
    filesystem = storage.filesystem(out)
    if any_left_out:
        filesystem.put_file(str(spool / "left_out.jsonl"), left_out)
    elif filesystem.exists(left_out):
        filesystem.rm_file(left_out)
    # An object becomes visible when its upload is complete.
    filesystem.put_file(str(spool / "manifest.parquet"), out)
