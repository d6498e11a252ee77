"""Where the rows of a run go: added, put in the place of older ones, or held back until the end.

Each mode is a `commit_loop.Tables`. All of them ask the lease before every commit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.tables import staging
from qvl_batch.tables.commit import append, append_failures, find_commit
from qvl_batch.tables.layout import FAILURES_TABLE
from qvl_batch.tables.rewrite import publish, replace_units
from qvl_batch.tables.store import TableStore

Fragments = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What every commit of a run needs to know.

    Args:
        run_id: Of the run that commits.
        planned_versions: The tables' versions when the run was planned; one that is not named was
            created by the run and begins with version 1, which is empty.
        still_held: Raises if the run has lost its lease.
    """

    store: TableStore
    run_id: str
    planned_versions: Mapping[str, int]
    still_held: Callable[[], None] = lambda: None

    def planned_version(self, table: str) -> int:
        return self.planned_versions.get(table, 1)


class Appending:
    """Rows are added; nothing is taken away."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._failures_since: int | None = None

    def append(
        self, table: str, fragments: Fragments, marker: str, ordinals: npt.NDArray[np.int64]
    ) -> None:
        target = self._target
        target.still_held()
        append(
            target.store,
            table,
            fragments,
            marker=marker,
            run_id=target.run_id,
            planned_version=target.planned_version(table),
        )

    def append_failures(self, rows: pa.Table, marker: str) -> None:
        target = self._target
        target.still_held()
        if self._failures_since is None:
            # No marker of this run stands before its first failure: thousands of versions of
            # other runs need not be read.
            present = target.store.open(FAILURES_TABLE)
            self._failures_since = present.version if present is not None else 0
        append_failures(
            target.store,
            rows,
            marker=marker,
            run_id=target.run_id,
            planned_version=self._failures_since,
        )


class Upserting(Appending):
    """The rows of a medium's new state take the place of its old ones, in one commit.

    Args:
        target: See `Target`.
        replaced: Per table, by ordinal of the new unit, the unit_ids whose rows go.
    """

    def __init__(self, target: Target, replaced: Mapping[str, Mapping[int, Sequence[str]]]) -> None:
        super().__init__(target)
        self._replaced = replaced

    def append(
        self, table: str, fragments: Fragments, marker: str, ordinals: npt.NDArray[np.int64]
    ) -> None:
        old = self._replaced.get(table, {})
        gone = [unit for ordinal in ordinals.tolist() for unit in old.get(ordinal, ())]
        if not gone:
            super().append(table, fragments, marker, ordinals)
            return
        target = self._target
        target.still_held()
        replace_units(
            target.store,
            table,
            fragments,
            gone,
            marker=marker,
            run_id=target.run_id,
            planned_version=target.planned_version(table),
        )


class Replacing(Appending):
    """Rows are held back until a partition is complete; then they are its whole content.

    Args:
        target: See `Target`.
        unit_ids: By ordinal.
        tables: By partition as the failures state it.
        versions: Of each table's staging table, when this run read or began it.
    """

    def __init__(
        self,
        target: Target,
        unit_ids: pa.Array,
        tables: Mapping[str, str],
        versions: Mapping[str, int],
    ) -> None:
        super().__init__(target)
        self._unit_ids, self._tables, self._versions = unit_ids, tables, versions

    def append(
        self, table: str, fragments: Fragments, marker: str, ordinals: npt.NDArray[np.int64]
    ) -> None:
        units = self._unit_ids.take(pa.array(ordinals)).to_pylist()
        self._record(table, fragments, units, [], marker)

    def append_failures(self, rows: pa.Table, marker: str) -> None:
        super().append_failures(rows, marker)
        # After the failures themselves: a unit that is noted here is not tried again.
        for partition in pc.unique(rows["partition"]).to_pylist():
            failed = rows.filter(pc.equal(rows["partition"], partition))["unit_id"].to_pylist()
            table = self._tables[partition]
            self._record(table, [], [], failed, f"{marker}/{table}")

    def _record(
        self,
        table: str,
        fragments: Fragments,
        units: Sequence[str],
        failed: Sequence[str],
        marker: str,
    ) -> None:
        target = self._target
        target.still_held()
        staging.record(
            target.store,
            table,
            fragments,
            units,
            failed,
            marker=marker,
            run_id=target.run_id,
            since=self._versions[table],
        )


def publish_replaced(target: Target, tables: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    """Give these tables their new content, each in one commit; return their data files.

    May be done again: what is published already is not published twice.
    """
    files: dict[str, list[Mapping[str, Any]]] = {}
    for table in tables:
        staged = staging.read(target.store, table)
        if staged is None:
            continue
        target.still_held()
        marker = f"{staged.session}/publish/{table}"
        # It stands already if a run was killed between this commit and the next.
        if find_commit(target.store, table, marker, staged.base_version) is None:
            publish(
                target.store,
                table,
                staged.fragments,
                marker=marker,
                run_id=target.run_id,
                planned_version=target.planned_version(table),
            )
        staging.close(
            target.store, table, staged.session, run_id=target.run_id, since=staged.version
        )
        files[table] = [file for fragment in staged.fragments for file in fragment["files"]]
    return files
