"""Proves from manifest and tables alone that every unit is done or failed, and none twice."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.errors import ManifestError, StorageError
from qvl_batch.jobs.identify import Units, identify
from qvl_batch.jobs.integrity import look_at_files
from qvl_batch.jobs.manifest import read_manifest
from qvl_batch.storage import Storage
from qvl_batch.tables.check import LOST, Problem, check_table
from qvl_batch.tables.check_scores import check_scores
from qvl_batch.tables.integrity import Integrity
from qvl_batch.tables.layout import VECTORS_KIND, Partition, partition_json, table_name
from qvl_batch.tables.ledger import (
    Failures,
    done_units,
    table_collection,
    table_kind,
    table_partition,
)
from qvl_batch.tables.scores import (
    CANDIDATES_KIND,
    candidates_collection,
    column_values,
    scores_collection,
)
from qvl_batch.tables.store import TableStore

LISTED_PROBLEMS = 50


@dataclass(frozen=True, kw_only=True)
class ScoresCounts:
    """What a scores collection holds; the failed are pairs without a score."""

    collection: str
    num_queries: int
    num_candidates: int
    num_scored: int
    num_failed: int

    def __str__(self) -> str:
        return (
            f"scores {self.collection}: {self.num_queries:,} queries, {self.num_candidates:,} "
            f"candidates, {self.num_scored:,} scored, {self.num_failed:,} failed"
        )


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
    scores: tuple[ScoresCounts, ...] = ()
    files: tuple[Integrity, ...] = ()

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        return json.dumps(values | {"ok": not self.problems}, indent=2, default=str)

    def __str__(self) -> str:
        lines = []
        if self.num_tables or not self.scores:
            head = (
                f"collection {self.collection}: {self.num_tables} table(s), {self.num_rows:,} "
                f"rows, {self.num_done:,} units done, {self.num_failed:,} failed"
            )
            if self.num_units:
                head += f", {self.num_units:,} in the manifest"
            if self.num_unlisted:
                head += f"; {self.num_unlisted:,} done units are not in the manifest (no error)"
            lines.append(head)
        lines += map(str, self.scores)
        lines += map(str, self.files)
        if not self.problems:
            what = "unit and pair" if self.scores else "unit"
            return "\n".join([*lines, f"verified: every {what} is there once"])
        lines.append(f"{len(self.problems)} problem(s):")
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
    deep: bool = False,
) -> VerifyReport:
    """Check a collection, against its manifest if one is given, and the scores that lie with it.

    Args:
        root: LanceDB directory.
        storage: How to reach it.
        manifest: The manifest that was embedded; without it the tables are checked in themselves.
        collection: Needed only where the root holds several of vectors; may be one of scores,
            which then is all that is checked.
        partition_by: As the run had it; None takes the tables' own partition keys.
        deep: Read every data file of every table under the root, too, and compare it with its hash.

    Raises:
        InputError: If there is nothing to verify, or the choice is not clear.
    """
    store = TableStore(root, storage)
    tables, scores = _tables_of(store)
    if not tables and not scores:
        raise StorageError(f"{root} holds no tables.", "Give the output.root of an embed run.")
    if collection is None:
        if len(tables) > 1:
            raise StorageError(
                f"{root} holds the collections {', '.join(sorted(tables))}.",
                "Choose one with --collection.",
            )
        collection = next(iter(tables or scores))
    elif collection in scores:
        scores = {collection: scores[collection]}
    if collection not in tables and collection not in scores:
        raise StorageError(
            f"{root} holds no collection {collection!r}.",
            f"There are: {', '.join(sorted([*tables, *scores]))}.",
        )
    names = tables.get(collection, [])
    units = None
    if manifest is not None and names:
        if partition_by is None:
            partition_by = _partition_keys(store, names)
        units = identify(read_manifest(manifest, storage, partition_by), collection)
    report = _verify_collection(store, collection, names, units)
    for name, partitions in sorted(scores.items()):
        counts, problems = _verify_scores(store, name, partitions)
        report = dataclasses.replace(
            report,
            scores=(*report.scores, counts),
            problems=(*report.problems, *problems),
        )
    if deep:
        files = look_at_files(store)
        found = [problem for one in files for problem in one.problems]
        # Missing data files are told already where the table was read.
        new = [problem for problem in found if problem not in report.problems]
        report = dataclasses.replace(report, files=files, problems=(*report.problems, *new))
    return report


def _tables_of(store: TableStore) -> tuple[dict[str, list[str]], dict[str, list[Partition]]]:
    """Return the tables of each collection of vectors, and the partitions of each of scores."""
    by_collection: dict[str, list[str]] = {}
    scores: dict[str, list[Partition]] = {}
    for name in store.names():
        if name.startswith("_"):
            continue
        dataset = store.open(name)
        if dataset is None or not table_collection(dataset):
            continue
        collection = table_collection(dataset)
        kind = table_kind(dataset)
        if kind == VECTORS_KIND:
            by_collection.setdefault(collection, []).append(name)
        else:
            # Either table may be the only one: a run was killed, or somebody removed the other.
            if kind == CANDIDATES_KIND:
                collection = scores_collection(collection)
            partitions = scores.setdefault(collection, [])
            if table_partition(dataset) not in partitions:
                partitions.append(table_partition(dataset))
    return by_collection, scores


def _verify_scores(
    store: TableStore, collection: str, partitions: list[Partition]
) -> tuple[ScoresCounts, list[Problem]]:
    problems: list[Problem] = []
    num_queries = num_candidates = num_scored = num_failed = 0
    failures = Failures(store, collection)
    for partition in partitions:
        name = table_name(collection, partition)
        scores = store.open(name)
        candidates = store.open(table_name(candidates_collection(collection), partition))
        if candidates is None:
            problems.append(Problem(LOST, name, None, None, "its table of candidates is gone"))
            continue
        scored = column_values(scores, "pair_id")
        failed = failures.of(partition_json(partition), scored)["unit_id"].combine_chunks()
        pairs = column_values(candidates, "pair_id")
        num_queries += len(column_values(candidates, "query_id"))
        num_candidates += candidates.count_rows()
        num_scored += len(scored)
        num_failed += pc.sum(pc.is_in(pairs, value_set=failed)).as_py() or 0
        problems += check_scores(candidates, scores, failed)
    counts = ScoresCounts(
        collection=collection,
        num_queries=num_queries,
        num_candidates=num_candidates,
        num_scored=num_scored,
        num_failed=num_failed,
    )
    return counts, problems


def _partition_keys(store: TableStore, names: list[str]) -> list[str]:
    dataset = store.open(names[0])
    if dataset is None:
        raise ManifestError(f"The table {names[0]} is gone.", "Run verify again.")
    return [key for key, _ in table_partition(dataset)]


def _verify_collection(
    store: TableStore, collection: str, names: list[str], units: Units | None
) -> VerifyReport:
    findings: list[Problem] = []
    num_rows = num_done = num_failed = 0
    listed = units.partitions if units is not None else {}
    failures = Failures(store, collection)
    for name in sorted({*names, *listed}):
        dataset = store.open(name)
        partition = listed.get(name)
        if partition is None and dataset is not None:
            partition = table_partition(dataset)
        if partition is None:
            continue
        done = None if dataset is None else done_units(dataset)
        failed = failures.of(partition_json(partition), done)["unit_id"].combine_chunks()
        expected = None
        if units is not None:
            expected = units.ids_of(name)
            num_failed += pc.sum(pc.is_in(expected, value_set=failed)).as_py() or 0
        else:
            num_failed += len(failed)
        if dataset is not None:
            findings += check_table(dataset, expected, failed)
            num_rows += dataset.count_rows()
            num_done += len(done)
        elif expected is not None:
            lost = expected.filter(pc.invert(pc.is_in(expected, value_set=failed)))
            findings += [
                Problem(LOST, name, unit.as_py(), None, "neither done nor failed; no such table")
                for unit in lost
            ]
    problems = [problem for problem in findings if problem.is_error]
    return VerifyReport(
        collection=collection,
        num_tables=len(names),
        num_rows=num_rows,
        num_units=len(units) if units is not None else 0,
        num_done=num_done,
        num_failed=num_failed,
        num_unlisted=len(findings) - len(problems),
        problems=tuple(_with_uris(problems, units)),
    )


def _with_uris(problems: list[Problem], units: Units | None) -> list[Problem]:
    """Name the media of units that no table can name: those that are not there."""
    nameless = [p.unit_id for p in problems if p.uri is None and p.unit_id is not None]
    if not nameless or units is None:
        return problems
    wanted = pc.is_in(units.ids, value_set=pa.array(nameless, pa.string()))
    found = np.flatnonzero(wanted.to_numpy(zero_copy_only=False))
    hits = units.take(found).select(["unit_id", "uri", "text"]).to_pylist()
    names = {hit["unit_id"]: hit["uri"] or hit["text"] for hit in hits}
    return [
        dataclasses.replace(p, uri=names.get(p.unit_id)) if p.uri is None else p for p in problems
    ]
