"""Proves from manifest and tables alone that every unit is done or failed, and none twice."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.errors import ManifestError, StorageError
from qvl_batch.jobs.plan import Units, identify, read_manifest
from qvl_batch.storage import Storage
from qvl_batch.tables.check import Problem, check_table
from qvl_batch.tables.layout import partition_json
from qvl_batch.tables.ledger import failed_units, table_partition
from qvl_batch.tables.store import TableStore

LISTED_PROBLEMS = 50


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify` found; `problems` is empty when every invariant holds."""

    collection: str
    num_tables: int
    num_rows: int
    num_units: int
    num_done: int
    num_failed: int
    num_unlisted: int
    problems: tuple[Problem, ...]

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        return json.dumps(values | {"ok": not self.problems}, indent=2, default=str)

    def __str__(self) -> str:
        head = (
            f"collection {self.collection}: {self.num_tables} table(s), {self.num_rows:,} rows, "
            f"{self.num_done:,} units done, {self.num_failed:,} failed"
        )
        if self.num_units:
            head += f", {self.num_units:,} in the manifest"
        if self.num_unlisted:
            head += f"; {self.num_unlisted:,} done units are not in the manifest (no error)"
        if not self.problems:
            return f"{head}\nverified: every unit is there once"
        lines = [head, f"{len(self.problems)} problem(s):"]
        lines += [f"  {problem}" for problem in self.problems[:LISTED_PROBLEMS]]
        if len(self.problems) > LISTED_PROBLEMS:
            lines.append(f"  … and {len(self.problems) - LISTED_PROBLEMS} more (--json lists all)")
        return "\n".join(lines)


def verify(
    root: str,
    storage: Storage,
    *,
    manifest: str | None = None,
    collection: str | None = None,
    partition_by: list[str] | None = None,
) -> VerifyReport:
    """Check a collection, against its manifest if one is given.

    Args:
        root: LanceDB directory.
        storage: How to reach it.
        manifest: The manifest that was embedded; without it the tables are checked in themselves.
        collection: Needed only where the root holds several.
        partition_by: As the run had it; None takes the tables' own partition keys.

    Raises:
        InputError: If there is nothing to verify, or the choice is not clear.
    """
    store = TableStore(root, storage)
    tables = _tables_of(store)
    if not tables:
        raise StorageError(f"{root} holds no tables.", "Give the output.root of an embed run.")
    if collection is None:
        if len(tables) > 1:
            raise StorageError(
                f"{root} holds the collections {', '.join(sorted(tables))}.",
                "Choose one with --collection.",
            )
        collection = next(iter(tables))
    if collection not in tables:
        raise StorageError(
            f"{root} holds no collection {collection!r}.",
            f"There are: {', '.join(sorted(tables))}.",
        )
    names = tables[collection]
    units = None
    if manifest is not None:
        if partition_by is None:
            partition_by = _partition_keys(store, names)
        units = identify(read_manifest(manifest, storage, partition_by), collection)
    return _verify_collection(store, collection, names, units)


def _tables_of(store: TableStore) -> dict[str, list[str]]:
    by_collection: dict[str, list[str]] = {}
    for name in store.names():
        if name.startswith("_"):
            continue
        dataset = store.open(name)
        stated = (dataset.schema.metadata or {}).get(b"qvl.collection") if dataset else None
        if stated is not None:
            by_collection.setdefault(stated.decode(), []).append(name)
    return by_collection


def _partition_keys(store: TableStore, names: list[str]) -> list[str]:
    dataset = store.open(names[0])
    if dataset is None:
        raise ManifestError(f"The table {names[0]} is gone.", "Run verify again.")
    return [key for key, _ in table_partition(dataset)]


def _verify_collection(
    store: TableStore, collection: str, names: list[str], units: Units | None
) -> VerifyReport:
    problems: list[Problem] = []
    num_rows = num_done = num_failed = num_unlisted = 0
    listed = units.partitions if units is not None else {}
    for name in sorted({*names, *listed}):
        dataset = store.open(name)
        if name in listed:
            partition = listed[name]
        elif dataset is not None:
            partition = table_partition(dataset)
        failed = failed_units(store, collection, partition_json(partition))["unit_id"]
        failed = failed.combine_chunks()
        expected, uris = None, {}
        if units is not None:
            mine = units.rows.filter(pc.equal(units.rows["_table"], name))
            expected = mine["unit_id"].combine_chunks()
            uris = mine
        if dataset is None:
            lost = expected.filter(pc.invert(pc.is_in(expected, value_set=failed)))
            num_failed += len(expected) - len(lost)
            problems += [
                Problem("missing", name, unit.as_py(), None, "neither done nor failed")
                for unit in lost
            ]
        else:
            found = check_table(dataset, expected, failed)
            problems += found.problems
            num_rows += found.num_rows
            num_done += found.num_units
            num_failed += found.num_failed
            num_unlisted += found.num_unlisted if units is not None else 0
        problems = _with_uris(problems, uris)
    return VerifyReport(
        collection=collection,
        num_tables=len(names),
        num_rows=num_rows,
        num_units=units.rows.num_rows if units is not None else 0,
        num_done=num_done,
        num_failed=num_failed,
        num_unlisted=num_unlisted,
        problems=tuple(problems),
    )


def _with_uris(problems: list[Problem], units: pa.Table | dict[str, str]) -> list[Problem]:
    nameless = [p.unit_id for p in problems if p.uri is None and p.unit_id is not None]
    if not nameless or not isinstance(units, pa.Table):
        return problems
    hits = units.filter(pc.is_in(units["unit_id"], value_set=pa.array(nameless, pa.string())))
    names = {
        unit: uri or text
        for unit, uri, text in zip(
            hits["unit_id"].to_pylist(),
            hits["uri"].to_pylist(),
            hits["text"].to_pylist(),
            strict=True,
        )
    }
    return [
        dataclasses.replace(p, uri=names.get(p.unit_id)) if p.uri is None else p for p in problems
    ]
