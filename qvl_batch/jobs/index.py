"""The index job: every table's index built, extended, measured and published, or refused.

    tables -> plan (driver) -> refresh_index (one task a table) -> publish (driver) -> report

A table is the unit of work. Building within one table by fragments would share out the assignment
of rows to lists only, 20 % of building 100,000 rows (measured); the rest is the training of
centroids, which Lance does in one process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray

from qvl_batch.errors import QvlError
from qvl_batch.jobs.chosen import exit_code_of, vector_tables
from qvl_batch.jobs.cluster import Node, connect
from qvl_batch.jobs.control import cause_of
from qvl_batch.storage import Storage
from qvl_batch.tables.index import (
    BUILD,
    EXTEND,
    MEASURE,
    TOO_SMALL,
    Indexed,
    IndexRules,
    plan_table,
    publish,
    refresh_index,
)
from qvl_batch.tables.store import TableStore

# Starting Ray takes longer than indexing less than this in one process.
RAY_FROM_ROWS = 500_000
# More threads than that did not make one table faster.
_MOST_CPUS_A_TABLE = 8
_PLANNED_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What became of each table, by name; ``errors`` names those that could not be worked on."""

    tables: tuple[Indexed, ...]
    errors: Mapping[str, QvlError]
    recall: float
    seconds: float

    @property
    def exit_code(self) -> int:
        """1 if an index was refused or a table failed."""
        refused = any(done.refused for done in self.tables)
        return 1 if refused else exit_code_of(self.errors.values())

    def to_json(self) -> str:
        tables = [dataclasses.asdict(done) for done in self.tables]
        for table in tables:
            del table["state"]
        errors = {name: str(error) for name, error in self.errors.items()}
        values = {"ok": not self.exit_code, "recall_target": self.recall, "seconds": self.seconds}
        return json.dumps(values | {"tables": tables, "errors": errors}, indent=2)

    def __str__(self) -> str:
        published = sum(done.published for done in self.tables)
        small = sum(done.action == TOO_SMALL for done in self.tables)
        refused = sum(done.refused for done in self.tables)
        parts = [f"{published} of {len(self.tables)} table(s) have a published index"]
        if small:
            parts.append(f"{small} too small for one")
        if refused:
            parts.append(f"{refused} refused for recall below {self.recall:g}")
        if self.errors:
            parts.append(f"{len(self.errors)} failed")
        return f"{', '.join(parts)}; {self.seconds:.1f} s"


def line_of(done: Indexed, target: float) -> str:
    """Return one line about a table for a person."""
    if done.refused:
        best = max(done.ladder, key=lambda rung: rung.recall)
        return (
            f"{done.table}: {done.num_rows:,} rows, NOT published: recall@{best.k} "
            f"{best.recall:.4f} with {best.nprobes} probes, the most allowed; {target:g} is asked; "
            f"dropped; {done.seconds:.1f} s"
        )
    if not done.published:
        return f"{done.table}: {done.num_rows:,} rows, {done.action}"
    line = (
        f"{done.table}: {done.num_rows:,} rows, {done.num_indexed:,} indexed, "
        f"nprobes {done.nprobes}, recall@10 {done.recall:.4f}, {done.action}"
    )
    return f"{line}, {done.seconds:.1f} s" if done.seconds else line


def run_index(
    root: str,
    storage: Storage,
    *,
    collection: str | None = None,
    where: Sequence[str] = (),
    rules: IndexRules | None = None,
    local: bool = False,
    address: str | None = None,
    ray_from_rows: int = RAY_FROM_ROWS,
    echo: Callable[[str], None] = print,
) -> IndexReport:
    """Bring the indexes of these tables to their present rows; publish what passes.

    No lease is taken: an index changes no rows, and runs may append while one is built.

    Args:
        where: Filters over partition values; see `chosen.vector_tables`.
        local: Work in this process alone, without Ray.
        address: Of a Ray cluster; None: RAY_ADDRESS, or a local one.
        ray_from_rows: With several tables of so many rows together Ray is used.
        echo: Takes lines for a person.

    Raises:
        InputError: If the root, the collection or a filter is wrong.
    """
    started_s = time.monotonic()
    rules = rules or IndexRules()
    store = TableStore(root, storage)
    names = vector_tables(store, collection, where)
    with ThreadPoolExecutor(_PLANNED_AT_ONCE) as pool:
        plans = list(pool.map(lambda name: plan_table(store, name, rules), names))
    todo = [plan for plan in plans if plan.action in (BUILD, EXTEND, MEASURE)]
    # The largest first: the last task to end should be a short one.
    todo.sort(key=lambda plan: -plan.num_rows)
    finished = {plan.table: plan for plan in plans if plan not in todo}
    errors: dict[str, QvlError] = {}
    for plan in finished.values():
        echo(line_of(plan, rules.recall))
    if local or not pays(todo, ray_from_rows):
        results = _here(store, todo, rules)
    else:
        results = _on_ray(store, todo, rules, connect(address))
    for table, result in results:
        try:
            if isinstance(result, QvlError):
                raise result
            publish(store, result)
            finished[table] = result
            echo(line_of(result, rules.recall))
        except QvlError as error:
            errors[table] = error
            echo(f"{table}: {error}")
    return IndexReport(
        tables=tuple(finished[name] for name in sorted(finished)),
        errors=errors,
        recall=rules.recall,
        seconds=time.monotonic() - started_s,
    )


def pays(todo: Sequence[Indexed], from_rows: int = RAY_FROM_ROWS) -> bool:
    """Return whether Ray's start and its processes are worth it."""
    return len(todo) > 1 and sum(plan.num_rows for plan in todo) >= from_rows


def cpus_a_table(nodes: Sequence[Node], num_tables: int) -> int:
    """Return how many CPUs each table's task gets: all of the cluster, shared out, on one node."""
    share = int(sum(node.cpus for node in nodes) / max(1, num_tables))
    largest = int(max((node.cpus for node in nodes), default=1))
    return max(1, min(share, largest, _MOST_CPUS_A_TABLE))


def _here(
    store: TableStore, todo: Sequence[Indexed], rules: IndexRules
) -> Iterator[tuple[str, Indexed | QvlError]]:
    for plan in todo:
        yield plan.table, _attempt(store, plan.table, rules)


def _attempt(store: TableStore, table: str, rules: IndexRules) -> Indexed | QvlError:
    try:
        return refresh_index(store, table, rules)
    except QvlError as error:
        return error


def _on_ray(
    store: TableStore, todo: Sequence[Indexed], rules: IndexRules, nodes: Sequence[Node]
) -> Iterator[tuple[str, Indexed | QvlError]]:
    cpus = cpus_a_table(nodes, len(todo))
    # A task that is repeated finds what its first attempt left: `refresh_index` looks first.
    work = ray.remote(num_cpus=cpus, max_retries=2)(_with_threads)
    pending = {work.remote(cpus, store, plan.table, rules): plan.table for plan in todo}
    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        table = pending.pop(done)
        try:
            yield table, ray.get(done)
        except ray.exceptions.RayError as error:
            cause = cause_of(error)
            if not isinstance(cause, QvlError):
                raise cause from error
            yield table, cause


def _with_threads(
    cpus: int, store: TableStore, table: str, rules: IndexRules
) -> Indexed | QvlError:
    # Read when Lance starts its threads, at its first call in this process.
    os.environ.setdefault("LANCE_CPU_THREADS", str(cpus))
    return _attempt(store, table, rules)
