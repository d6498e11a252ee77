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
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qvl_batch.errors import ConfigError, ManifestError, StorageError
from qvl_batch.media.kinds import Kinds
from qvl_batch.media.left_out import LeftOut, LeftOutLog
from qvl_batch.media.listing import list_source
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
from qvl_batch.schema import MANIFEST, RESERVED
from qvl_batch.storage import Storage, is_local, local_path, scheme_of

__all__ = ["ManifestReport", "PartitionRule", "build_manifest", "parse_partition_rule"]

ALWAYS = ("uri", "kind", "etag", "size_bytes", "mtime")
NO_MATCH = "path does not match the partition pattern"
PARTITION_BY = b"qvl.partition_by"


@dataclass(frozen=True, kw_only=True)
class ManifestReport:
    """What a manifest holds and what was left out of it.

    ``left_out`` counts by reason, ``left_out_examples`` has the first 20 (uri, reason) and
    ``left_out_file`` all of them as JSON lines (None if there are none). ``not_found`` counts rows
    of a list whose object is not there or may not be read: they stay, with a null etag, so that the
    job reports them as failures. ``null_partitions`` counts rows per key that have no value.
    """

    out: str
    rows: int
    by_kind: dict[str, int]
    left_out: dict[str, int]
    left_out_examples: tuple[tuple[str, str], ...]
    left_out_file: str | None
    not_found: int
    partition_keys: tuple[str, ...]
    null_partitions: dict[str, int]


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
        parts = _Parts(spool, source, rule, left_out)
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


class _Parts:
    """The part files of one manifest and what is known of their columns so far."""

    def __init__(
        self, folder: Path, source: str, rule: PartitionRule, left_out: LeftOutLog
    ) -> None:
        self._folder, self._source, self._rule, self._left_out = folder, source, rule, left_out
        self._paths: list[Path] = []
        self._rows = 0
        self._own: set[str] = set(ALWAYS)
        self._keys: dict[str, None] = dict.fromkeys(rule.keys)
        self._further: dict[str, pa.DataType] = {}
        self._by_kind: Counter[str] = Counter()
        self._values: Counter[str] = Counter()

    def add(self, batch: ListBatch) -> None:
        """Write one batch of completed rows to a part file, without those that are left out."""
        kept, rows, values = [], [], []
        for at, (row, place) in enumerate(zip(batch.rows, batch.places, strict=True)):
            reason = row.pop("left_out", None)
            partition = self._rule.from_place(row.get("uri"), row.get("mtime"))
            if reason is None and partition is None:
                reason = NO_MATCH
            if reason is not None:
                self._left_out.add(LeftOut(row.get("uri") or place, reason))
                continue
            kept.append(at)
            rows.append(row)
            values.append(partition)
        further = batch.further
        if len(kept) < further.num_rows:
            further = further.take(pa.array(kept, pa.int64())) if further.num_columns else further
        columns = {
            field.name: pa.array([row.get(field.name) for row in rows], field.type)
            for field in MANIFEST
            if field.name in ALWAYS or any(field.name in row for row in rows)
        }
        self._own.update(columns)
        for key in dict.fromkeys(key for partition in values for key in partition):
            columns[key] = pa.array([partition.get(key) for partition in values], pa.string())
            self._keys[key] = None
        self._take_partition_columns(further, columns)
        for name in further.column_names:
            if name not in self._rule.columns:
                self._further[name] = self._promoted(name, further[name].type)
                columns.setdefault(name, further[name])
        self._refuse_collisions()
        if not rows:
            return
        self._rows += len(rows)
        self._by_kind.update(row["kind"] for row in rows)
        for key in self._keys.keys() & columns.keys():
            self._values[key] += len(rows) - columns[key].null_count
        self._paths.append(self._folder / f"part-{len(self._paths):06d}.parquet")
        pq.write_table(pa.table(columns), self._paths[-1])

    def _take_partition_columns(self, further: pa.Table, columns: dict[str, Any]) -> None:
        if self._rule.how != "column":
            return
        for key in self._rule.columns:
            if key in further.column_names:
                try:
                    columns[key] = pc.cast(further[key], pa.string())
                except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                    raise ManifestError(
                        f"{self._source}: the column {key!r} of type {further[key].type} has no "
                        "text form to partition by.",
                        "Use a column of strings, numbers or dates.",
                    ) from None
            elif not self._source.lower().endswith((".jsonl", ".ndjson")):
                # A key of a JSON list may come later.
                self._refuse_absent(key, further.column_names)

    def _refuse_absent(self, key: str, names: Iterable[str]) -> None:
        raise ManifestError(
            f"{self._source} has no column {key!r} to partition by.",
            f"Its further columns are: {', '.join(names) or 'none'}.",
        )

    def _refuse_collisions(self) -> None:
        for key in self._keys:
            if key in RESERVED:
                raise ManifestError(
                    f"{self._source} has folders named {key}=..., and {key!r} is a column of the "
                    "tables.",
                    "Use --partition-by none, or a regex that names the value otherwise.",
                )
            if key in self._further:
                raise ManifestError(
                    f"{self._source} has a column {key!r}, and so would be the partition's.",
                    f"Use --partition-by column:{key}, or rename the column.",
                )

    def _promoted(self, name: str, new: pa.DataType) -> pa.DataType:
        old = self._further.get(name, pa.null())
        pair = [pa.schema([(name, old)]), pa.schema([(name, new)])]
        try:
            return pa.unify_schemas(pair, promote_options="permissive").field(name).type
        except (pa.ArrowTypeError, pa.ArrowInvalid):
            raise ManifestError(
                f"{self._source}: the column {name!r} is {old} in some rows and {new} in others.",
                "Give every row the same type.",
            ) from None

    def join(self, path: Path, out: str, not_found: int) -> ManifestReport:
        """Write all parts to one Parquet file under one schema, and report."""
        if not self._rows:
            left_out = self._left_out.summary()
            raise ManifestError(
                f"Nothing to embed was found in {self._source}"
                + (f"; left out: {left_out}." if left_out else "."),
                "Check the path, or look at the extensions and first bytes of the files.",
            )
        if self._rule.how == "column":
            for key in self._rule.columns:
                if not self._values[key]:
                    self._refuse_absent(key, self._further)
        schema = self._schema()
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for part in self._paths:
                table = pq.read_table(part)
                columns = [
                    table[field.name].cast(field.type)
                    if field.name in table.column_names
                    else pa.nulls(table.num_rows, field.type)
                    for field in schema
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                part.unlink()
        counts = self._left_out.counts
        return ManifestReport(
            out=out,
            rows=self._rows,
            by_kind=dict(sorted(self._by_kind.items())),
            left_out=dict(counts.most_common()),
            left_out_examples=tuple(self._left_out.examples),
            left_out_file=f"{out}.left_out.jsonl" if counts else None,
            not_found=not_found,
            partition_keys=tuple(self._keys),
            null_partitions={
                key: self._rows - self._values[key]
                for key in self._keys
                if self._values[key] < self._rows
            },
        )

    def _schema(self) -> pa.Schema:
        fields = [field for field in MANIFEST if field.name in self._own]
        fields += [pa.field(key, pa.string()) for key in self._keys]
        for name, kind in self._further.items():
            # A column of nulls alone has no type that every reader knows.
            fields.append(pa.field(name, pa.string() if pa.types.is_null(kind) else kind))
        return pa.schema(fields, metadata={PARTITION_BY: json.dumps(list(self._keys)).encode()})


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
