"""What stands under a root, and what is wrong with it: counts, catalog, index, recipes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.schema import CATALOG
from qvl_batch.tables import aliases, catalog
from qvl_batch.tables.state import TableState, table_states
from qvl_batch.tables.store import TableStore

_PARTITION_COLUMNS = (
    *("collection", "partition", "table", "num_rows", "num_units", "num_failures"),
    *("version", "index", "index_state", "recipe_id", "run_id", "updated_at"),
)
COUNTS = pa.schema(
    [
        pa.field("collection", pa.string(), nullable=False),
        pa.field("num_tables", pa.int64(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("num_units", pa.int64(), nullable=False),
        pa.field("num_failures", pa.int64(), nullable=False),
        # Rows that the published indexes do not cover: they are found, but by a scan. Null where
        # no table has an index.
        pa.field("num_unindexed_rows", pa.int64()),
    ]
)
_REFRESH = "Run its embed job again: it refreshes the catalog."


@dataclass(frozen=True)
class HealthProblem:
    """One finding. ``place`` is a table, a collection or an alias."""

    kind: str
    place: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


@dataclass(frozen=True)
class Health:
    """The state of a root. ``counts`` has one row a collection, as `COUNTS`."""

    root: str
    counts: pa.Table
    problems: tuple[HealthProblem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [self.root]
        for row in self.counts.to_pylist():
            line = (
                f"  {row['collection']}: {row['num_rows']:,} rows of {row['num_units']:,} units in "
                f"{row['num_tables']} tables, {row['num_failures']:,} failures"
            )
            unindexed = row["num_unindexed_rows"]
            lines.append(line if unindexed is None else f"{line}, {unindexed:,} rows unindexed")
        if not self.counts.num_rows:
            lines.append("  no collections")
        lines += [f"  problem: {problem}" for problem in self.problems]
        return "\n".join(lines if self.problems else [*lines, "  no problems found"])

    __repr__ = __str__


def check_health(store: TableStore) -> Health:
    """Look at every table of vectors under a root.

    Raises:
        StorageError: If one can not be read.
    """
    states, gone = table_states(store)
    problems = [problem for state in states for problem in _table_problems(state)]
    problems += [
        HealthProblem("gone", name, f"is in the catalog, but there is no such table. {_REFRESH}")
        for name in gone
    ]
    by_collection = sorted(states, key=lambda state: (state.collection, state.table))
    counts = []
    for name, group in itertools.groupby(by_collection, key=lambda state: state.collection):
        tables = list(group)
        counts.append(_counts(name, tables))
        problems += _recipe_problems(name, tables)
    known = {row["collection"] for row in counts}
    problems += _alias_problems(aliases.read(store), known)
    return Health(store.root, pa.Table.from_pylist(counts, schema=COUNTS), tuple(problems))


def partition_table(store: TableStore, collection: str | None = None) -> pa.Table:
    """Return the catalog without its files; for one collection the partition keys as columns.

    Raises:
        StorageError: If it can not be read.
    """
    rows = catalog.read(store).select(_PARTITION_COLUMNS)
    if collection is None:
        return rows
    rows = rows.filter(pc.equal(rows["collection"], collection))
    values = [json.loads(text) for text in rows["partition"].to_pylist()]
    keys = dict.fromkeys(key for one in values for key in one if key not in CATALOG.names)
    for place, key in enumerate(keys):
        column = pa.array([one.get(key) for one in values], pa.string())
        rows = rows.add_column(place, key, column)
    return rows


def _table_problems(state: TableState) -> Iterator[HealthProblem]:
    if state.catalogued_version is None:
        yield HealthProblem("uncatalogued", state.table, f"is not in the catalog. {_REFRESH}")
    elif state.catalogued_version != state.version:
        yield HealthProblem(
            "catalog",
            state.table,
            f"the catalog describes version {state.catalogued_version}, the table has "
            f"{state.version}. {_REFRESH}",
        )
    if state.num_unindexed_rows:
        yield HealthProblem(
            "unindexed",
            state.table,
            f"{state.num_unindexed_rows:,} of {state.num_rows:,} rows are not in the index: "
            "searches scan them. Run qvl-batch index.",
        )
    if not state.recipe_id:
        yield HealthProblem(
            "recipe", state.table, "states no recipe: it can not be queried. Embed it again."
        )


def _recipe_problems(collection: str, tables: Sequence[TableState]) -> Iterator[HealthProblem]:
    by_recipe: dict[str, list[str]] = {}
    for state in tables:
        by_recipe.setdefault(state.recipe_id, []).append(state.table)
    if len(by_recipe) > 1:
        listed = "; ".join(
            f"{recipe or 'none'} in {names[0]}" for recipe, names in by_recipe.items()
        )
        yield HealthProblem(
            "recipe",
            collection,
            f"its tables were made by {len(by_recipe)} recipes ({listed}). Embed all of it by one.",
        )


def _alias_problems(named: dict[str, str], known: set[str]) -> Iterator[HealthProblem]:
    for alias, collection in named.items():
        if collection not in known:
            message = f"stands for {collection}, which is gone. Run qvl-batch alias."
            yield HealthProblem("alias", alias, message)
        if alias in known:
            message = f"is an alias of {collection} and a collection as well. Rename one of them."
            yield HealthProblem("alias", alias, message)


def _counts(collection: str, tables: Sequence[TableState]) -> dict[str, object]:
    unindexed = [t.num_unindexed_rows for t in tables if t.num_unindexed_rows is not None]
    return {
        "collection": collection,
        "num_tables": len(tables),
        "num_rows": sum(state.num_rows for state in tables),
        "num_units": sum(state.num_units for state in tables),
        "num_failures": sum(state.num_failures for state in tables),
        "num_unindexed_rows": sum(unindexed) if unindexed else None,
    }
