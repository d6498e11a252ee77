"""What is left to do: the manifest minus what the tables hold, in blocks of units.

Everything here runs on the driver. Deciding is pure (Arrow in, Arrow out); only `plan_units`
touches storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch import budget, schema
from qvl_batch.jobs.identify import Units
from qvl_batch.recipe import Recipe
from qvl_batch.tables.layout import Partition, partition_json
from qvl_batch.tables.ledger import Failures, done_units
from qvl_batch.tables.staging import Staged
from qvl_batch.tables.store import TableStore
from qvl_batch.units import KINDS

# What one output block holds at the most, by kind, however small its units are: a block is also
# the grain of progress and of what a kill loses.
MAX_UNITS_PER_BLOCK = {"text": 256, "image": 64, "document": 16, "video": 16, "mixed": 16}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run has to do, and what it may skip.

    `todo` is in block order; its `_ordinal` counts from 0. `planned_versions` holds the version of
    each partition table that existed when it was read.
    """

    todo: pa.Table
    partitions: Mapping[str, Partition]
    planned_versions: Mapping[str, int]
    extra_fields: tuple[pa.Field, ...]
    num_manifest_rows: int
    num_duplicates: int
    num_units: int
    num_done: int
    num_failed_before: int
    num_held_back: int


def units_per_block(recipe: Recipe, block_bytes: int, fixed: int | None) -> dict[str, int]:
    """Return how many units of each kind one block holds.

    ``fixed`` wins; else as many as stay under ``block_bytes`` if each decodes to its upper bound.
    """
    if fixed is not None:
        return dict.fromkeys(KINDS, fixed)
    return {
        kind: max(1, min(most, block_bytes // budget.largest_part_bytes(recipe, kind)))
        for kind, most in MAX_UNITS_PER_BLOCK.items()
    }


def cut_blocks(todo: pa.Table, per_block: Mapping[str, int]) -> list[pa.Table]:
    """Cut ordered units into blocks by unit count alone.

    A unit weighs 1 / per_block[kind]; a block is full at weight 1. So a block's bounds depend on
    the kinds and the order of the units, never on time, memory or results.
    """
    if todo.num_rows == 0:
        return []
    weights = np.array([1.0 / per_block[kind] for kind in todo["kind"].to_pylist()])
    blocks, start, filled = [], 0, 0.0
    for i, weight in enumerate(weights):
        # A thousandth of slack: 64 x 1/64 must fill one block whatever the rounding.
        if i > start and filled + weight > 1.001:
            blocks.append(todo.slice(start, i - start))
            start, filled = i, 0.0
        filled += weight
    blocks.append(todo.slice(start))
    return blocks


def split_failed(
    failed: pa.Table, *, retry_failed: bool, max_attempts: int
) -> tuple[pa.Array, pa.Table]:
    """Split a partition's failed units into those to skip and those to try again.

    Returns:
        The unit_ids to skip, and a table ``unit_id, attempt`` of those to retry.
    """
    tried_out = pc.greater_equal(failed["attempt"], max_attempts)
    final = pc.or_(pc.invert(failed["retryable"]), tried_out)
    if retry_failed:
        final = pc.and_(final, False)
    skip = failed.filter(final)["unit_id"].combine_chunks()
    return skip, failed.filter(pc.invert(final)).select(["unit_id", "attempt"])


def plan_units(
    units: Units,
    store: TableStore,
    collection: str,
    *,
    extra_fields: tuple[pa.Field, ...],
    num_manifest_rows: int,
    retry_failed: bool,
    max_attempts: int,
    limit: int | None,
    staged: Mapping[str, Staged] | None = None,
    on_table: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Subtract what the tables hold, order the rest and number it.

    With ``staged`` (one a table) it is what open replaces have finished that is subtracted, and
    whatever the tables hold is made anew.

    The order is partition, kind, size: few partitions are open at once, and a batch holds units of
    like cost.
    """
    left: list[npt.NDArray[np.int64]] = []
    attempts: list[pa.Array] = []
    versions: dict[str, int] = {}
    num_done = num_failed = 0
    failures = Failures(store, collection)
    for name, partition in sorted(units.partitions.items()):
        on_table(name)
        mine = units.of_table(name)
        ids = units.ids_of(name)
        dataset = store.open(name)
        done = None
        if dataset is not None:
            versions[name] = dataset.version
        if staged is not None:
            done = staged[name].units
        elif dataset is not None:
            done = done_units(dataset)
        if done is not None:
            is_done = pc.is_in(ids, value_set=done)
            num_done += pc.sum(is_done).as_py() or 0
            keep = pc.invert(is_done)
            mine, ids = mine[keep.to_numpy(zero_copy_only=False)], ids.filter(keep)
        failed = failures.of(partition_json(partition), done)
        if staged is not None:
            # What failed before the replace began counts no more than what was done then.
            failed = failed.filter(pc.is_in(failed["unit_id"], value_set=staged[name].failed))
        skip, retry = split_failed(failed, retry_failed=retry_failed, max_attempts=max_attempts)
        skipped = pc.is_in(ids, value_set=skip)
        num_failed += pc.sum(skipped).as_py() or 0
        keep = pc.invert(skipped)
        left.append(mine[keep.to_numpy(zero_copy_only=False)])
        place = pc.index_in(ids.filter(keep), value_set=retry["unit_id"].combine_chunks())
        tried = pc.fill_null(retry["attempt"].combine_chunks().take(place), 0)
        attempts.append(tried.cast(pa.int32()))
    todo = units.take(np.concatenate(left)).append_column("_attempt", pa.chunked_array(attempts))
    todo = todo.sort_by(
        [("_table", "ascending"), ("kind", "ascending"), ("size_bytes", "ascending")]
    )
    taken = todo.slice(0, limit) if limit is not None else todo
    ordinals = pa.array(np.arange(taken.num_rows, dtype=np.int64))
    numbered = taken.append_column("_ordinal", ordinals)
    names = [*schema.PLANNED.names, *(field.name for field in extra_fields)]
    target = pa.schema([*schema.PLANNED, *extra_fields])
    return Plan(
        todo=numbered.select(names).cast(target).combine_chunks(),
        partitions=units.partitions,
        planned_versions=versions,
        extra_fields=extra_fields,
        num_manifest_rows=num_manifest_rows,
        num_duplicates=units.num_duplicates,
        num_units=len(units),
        num_done=num_done,
        num_failed_before=num_failed,
        num_held_back=todo.num_rows - taken.num_rows,
    )
