"""The part files of a manifest that is being made, and how they become one file.

Every batch has the columns that it happens to have; the schema is known when the last one is in.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qvl_batch.errors import ManifestError
from qvl_batch.media.left_out import LeftOut, LeftOutLog
from qvl_batch.media.partition_rule import PartitionRule
from qvl_batch.media.source_list import ListBatch
from qvl_batch.schema import MANIFEST, RESERVED

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

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.by_kind.items()))
        lines = [f"{self.out}: {self.rows:,} units ({kinds})"]
        if self.partition_keys:
            lines.append(f"partitioned by {', '.join(self.partition_keys)}")
        for key, count in self.null_partitions.items():
            lines.append(f"{count:,} units have no {key}")
        if self.not_found:
            lines.append(f"{self.not_found:,} are not there now: the job will list them as failed")
        for reason, count in sorted(self.left_out.items()):
            lines.append(f"left out, {reason}: {count:,}")
        lines += [f"  {uri}: {reason}" for uri, reason in self.left_out_examples]
        if self.left_out_file:
            lines.append(f"all that is left out: {self.left_out_file}")
        return "\n".join(lines)


class ManifestParts:
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
        with self._storable():
            pq.write_table(pa.table(columns), self._paths[-1])

    @contextmanager
    def _storable(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            detail = " ".join(str(error).split())[:200]
            raise ManifestError(
                f"{self._source}: a further column does not fit into one Parquet type: {detail}.",
                "Give it one plain type in all rows, or drop it.",
            ) from None

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
        with self._storable(), pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for part in self._paths:
                # Not read_table: it would make columns of key=value folders in the part's path.
                table = pq.ParquetFile(part).read()
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
