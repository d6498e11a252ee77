"""Approximate indexes of a table's vectors: built, extended, measured, and only then published.

A table with ``vector_bits`` gets a Hamming IVF_FLAT index, one with a float ``vector`` alone an
IVF_RQ index of one bit a dimension. Search uses an index only if the catalog publishes it, and the
catalog publishes it only with a recall that was measured on the table's own rows.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

import lance

from qvl_batch import crash
from qvl_batch.errors import ConfigError, RunFailedError
from qvl_batch.tables import catalog
from qvl_batch.tables.recall import Recall, measure
from qvl_batch.tables.search import SHORTLIST
from qvl_batch.tables.store import TableStore, storage_error

# Without an index a query of 20,000 rows x 1,024 bits costs 3.2 CPU-ms, with one 1.4; of 100,000
# rows 12.6 and 2.3 (measured). Below, reading the shortlist costs more than the scan.
MIN_ROWS = 20_000
# Lists of that many rows: at 100,000 rows 4,096 cost 3.3 CPU-ms a query and 0.4 CPU-s to build,
# 1,024 cost 2.4 and 1.9, sqrt(rows) 2.3 and 7.6, all with 5 probes and recall 1.0 (measured).
ROWS_A_LIST = 2048
# Rows a list that centroids are trained on. Lance's own 256 cost 2.5 times the whole build at the
# same recall (100,000 rows, 48 to 488 lists, measured).
SAMPLE_RATE = 64
# A quarter of the lists read is a quarter of the scan: beyond it an index is not worth its name.
# 16 lists are 32,768 rows at most, which cost little whatever their share.
MAX_PROBED_SHARE = 0.25
MIN_ALLOWED_NPROBES = 16
# Deltas keep the lists of the rows that were there first; new kinds of media need new ones.
MAX_DELTA_SHARE = 0.3
MAX_SEGMENTS = 8

# Statistics without the centroids: megabytes, and a warning on every call.
os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")


@dataclass(frozen=True, kw_only=True)
class IndexRules:
    """When an index is built, extended and published.

    Args:
        recall: Least share of the exhaustive search's top 10 that an index must find.
        min_rows: Smaller tables get no index.
        max_nprobes: Most lists that a query may read; None: a quarter of them, at least 16.
        num_queries: Queries of a measurement.
    """

    recall: float = 0.99
    min_rows: int = MIN_ROWS
    max_nprobes: int | None = None
    num_queries: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise ConfigError(f"The recall is {self.recall}.", "Give one above 0, at most 1.")
        if self.max_nprobes is not None and self.max_nprobes < 1:
            raise ConfigError(f"max_nprobes is {self.max_nprobes}.", "Give 1 or more.")
        if self.min_rows < 2 or self.num_queries < 1:
            raise ConfigError(
                f"min_rows is {self.min_rows}, num_queries {self.num_queries}.",
                "Give at least 2 rows and 1 query.",
            )

    def allowed_nprobes(self, num_lists: int) -> int:
        if self.max_nprobes is not None:
            return min(self.max_nprobes, num_lists)
        return min(num_lists, max(MIN_ALLOWED_NPROBES, int(num_lists * MAX_PROBED_SHARE)))


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What a table's index covers; no segments if there is none."""

    num_rows: int
    segments: tuple[int, ...] = ()

    @property
    def num_indexed(self) -> int:
        return sum(self.segments)

    @property
    def delta_share(self) -> float:
        """Share of the rows that are not in the largest segment."""
        return 1 - max(self.segments, default=0) / self.num_rows if self.num_rows else 0.0


# What is to be done with a table's index.
NOTHING, TOO_SMALL, NO_INDEX = (
    "nothing to do",
    "too small for an index",
    "no index for its encodings",
)
BUILD, EXTEND, MEASURE = "built", "extended", "measured"


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """What became of one table's index.

    Args:
        action: One of the words above.
        num_indexed: Rows that the table's index covers; 0 if it has none.
        size_bytes: Of the index.
        nprobes, recall: As measured; None where nothing was measured or is published.
        ladder: Recall at each number of probes that was tried.
        published: Whether search uses the index from now on.
        refused: Whether an index was built and dropped again for its recall.
    """

    table: str
    action: str
    num_rows: int
    num_indexed: int = 0
    size_bytes: int = 0
    nprobes: int | None = None
    recall: float | None = None
    ladder: tuple[Recall, ...] = ()
    published: bool = False
    refused: bool = False
    seconds: float = 0.0
    state: dict[str, Any] | None = field(default=None, repr=False)


def indexed_column(dataset: lance.LanceDataset) -> str | None:
    """Return the vector column that gets an index; None if no encoding of the table can have one.

    With bits and floats the bits: the first stage of a search reads nothing else.
    """
    names = dataset.schema.names
    return next((name for name in ("vector_bits", "vector") if name in names), None)


def index_name(column: str) -> str:
    return f"{column}_idx"


def num_lists(num_rows: int) -> int:
    """Return the number of IVF lists for a table of this many rows."""
    return max(2, min(num_rows // ROWS_A_LIST, round(num_rows**0.5)))


def coverage(dataset: lance.LanceDataset, name: str) -> Coverage:
    """Return which share of a table the index of this name covers."""
    rows = {f.fragment_id: f.metadata.num_rows for f in dataset.get_fragments()}
    segments = [
        sum(rows.get(fragment, 0) for fragment in segment.fragment_ids)
        for index in dataset.describe_indices()
        if index.name == name
        for segment in index.segments
    ]
    return Coverage(num_rows=sum(rows.values()), segments=tuple(segments))


def decide(covered: Coverage, published: dict[str, Any] | None, rules: IndexRules) -> str:
    """Return what is to be done with a table that can have an index."""
    if covered.num_rows < rules.min_rows and not covered.segments:
        return TOO_SMALL
    whole = covered.num_indexed >= covered.num_rows
    if not covered.segments or covered.delta_share > MAX_DELTA_SHARE:
        return BUILD
    if not whole:
        return EXTEND if len(covered.segments) < MAX_SEGMENTS else BUILD
    if (
        published is None
        or published["num_rows"] != covered.num_indexed
        or published["recall"] < rules.recall
        or (published["column"] == "vector_bits" and published["shortlist"] != SHORTLIST)
        or (rules.max_nprobes is not None and published["nprobes"] > rules.max_nprobes)
    ):
        return MEASURE
    return NOTHING


def plan_table(store: TableStore, table: str, rules: IndexRules) -> Indexed:
    """Return what `refresh_index` would do with a table, having done nothing.

    Raises:
        StorageError: If there is no such table, or it can not be read.
    """
    dataset = store.open_existing(table)
    column = indexed_column(dataset)
    if column is None:
        return Indexed(table=table, action=NO_INDEX, num_rows=dataset.count_rows())
    covered = coverage(dataset, index_name(column))
    row = catalog.row_of(store, table, ["index"])
    state = row["index"] if row else None
    if state is not None and state["name"] != index_name(column):
        state = None
    return _outcome(table, decide(covered, state, rules), covered, state)


def refresh_index(store: TableStore, table: str, rules: IndexRules | None = None) -> Indexed:
    """Bring a table's index to its present rows, and measure what it finds.

    Nothing is written to the catalog: `publish` does that with what this returns. Doing it again
    after a kill at any point is harmless: an index that stands and is not published is measured,
    files of one that was not committed are for `gc`.

    Raises:
        RunFailedError: If other maintenance changed the table's index meanwhile.
        StorageError: If the table can not be read or written.
    """
    rules = rules or IndexRules()
    started_s = time.monotonic()
    planned = plan_table(store, table, rules)
    if planned.action not in (BUILD, EXTEND, MEASURE):
        return planned
    try:
        found = _work(store, table, planned.action, rules)
    except (ValueError, OSError, RuntimeError) as error:
        if "conflict" in str(error).lower():
            raise RunFailedError(
                f"table {table}: other maintenance changed its index; run this again"
            ) from error
        raise storage_error(store.uri(table), error) from error
    return Indexed(**(vars(found) | {"seconds": time.monotonic() - started_s}))


def publish(store: TableStore, done: Indexed) -> None:
    """Write to the catalog what search may use of a table from now on: its index, or none.

    Raises:
        RunFailedError: If the catalog went on to newer versions of the table every time.
        StorageError: If the catalog can not be written.
    """
    for _ in range(3):
        crash.reached("index-publish")
        catalog.refresh(store, [done.table], {}, run_id=None, indexes={done.table: done.state})
        row = catalog.row_of(store, done.table, ["index"])
        if row is not None and row["index"] == done.state:
            return
    raise RunFailedError(f"table {done.table}: the catalog changes all the time; run this again")


def _work(store: TableStore, table: str, action: str, rules: IndexRules) -> Indexed:
    dataset = store.open_existing(table)
    column = indexed_column(dataset)
    assert column is not None
    name = index_name(column)
    for attempt in (action, BUILD):
        crash.reached("index-build")
        _make(dataset, column, name, attempt)
        crash.reached("index-build")
        dataset = store.open_existing(table)
        covered = coverage(dataset, name)
        lists = dataset.stats.index_stats(name)["segments"][0]["num_partitions"]
        ladder = measure(
            dataset,
            table,
            column,
            allowed_nprobes=rules.allowed_nprobes(lists),
            target=rules.recall,
            shortlist=SHORTLIST,
            num_queries=rules.num_queries,
        )
        best = ladder[-1]
        if best.recall >= rules.recall:
            state = {
                "column": column,
                "name": name,
                "version": dataset.version,
                "num_rows": covered.num_indexed,
                "nprobes": best.nprobes,
                "shortlist": best.shortlist,
                "recall": best.recall,
                "recall_k": best.k,
                "num_queries": best.num_queries,
            }
            size_bytes = _size_bytes(dataset, name)
            return _outcome(table, attempt, covered, state, ladder=ladder, size_bytes=size_bytes)
        if attempt == BUILD:
            break
    dataset.drop_index(name)
    left = Coverage(num_rows=covered.num_rows)
    return _outcome(table, BUILD, left, None, ladder=ladder, refused=True)


def _make(dataset: lance.LanceDataset, column: str, name: str, action: str) -> None:
    if action == BUILD:
        kind: dict[str, Any] = {
            "index_type": "IVF_FLAT",
            "metric": "hamming",
            "sample_rate": SAMPLE_RATE,
        }
        if column == "vector":
            kind = {"index_type": "IVF_RQ", "metric": "dot", "num_bits": 1}
        lists = num_lists(dataset.count_rows())
        dataset.create_index(column, name=name, num_partitions=lists, replace=True, **kind)
    elif action == EXTEND:
        dataset.optimize.optimize_indices(num_indices_to_merge=0, index_names=[name])


def _outcome(
    table: str, action: str, covered: Coverage, state: dict[str, Any] | None, **more: Any
) -> Indexed:
    return Indexed(
        table=table,
        action=action,
        num_rows=covered.num_rows,
        num_indexed=covered.num_indexed,
        nprobes=state["nprobes"] if state else None,
        recall=state["recall"] if state else None,
        published=state is not None,
        state=state,
        **more,
    )


def _size_bytes(dataset: lance.LanceDataset, name: str) -> int:
    sizes = [i.total_size_bytes for i in dataset.describe_indices() if i.name == name]
    return sum(size or 0 for size in sizes)
