"""Rows of one open table, by their position in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

OFFSET = "_rowoffset"
_SCAN_ROWS = 32_768
# A row taken costs about 9 CPU-us, a row of 1 KB scanned 0.5; on an object store the rows taken are
# requests.
_TAKEN_AS_ROWS_SCANNED = 16


class TableRows:
    """What one search reads of a table: a scan of some columns, then a few rows of others.

    Args:
        held: Columns that the scan reads at once and that stay in memory, so that their rows cost
            no further request: for tables so small that a few requests outweigh all their bytes.
    """

    def __init__(self, dataset: lance.LanceDataset, held: Sequence[str] = ()) -> None:
        self.dataset = dataset
        self._columns = frozenset(held)
        self._held: pa.Table | None = None

    def batches(
        self, columns: Sequence[str], where: pc.Expression | None
    ) -> Iterator[tuple[npt.NDArray[np.int64], pa.RecordBatch]]:
        """Yield the offsets of the rows that pass the filter, and their columns.

        The filter must be the same each time: held rows are those that passed the first.
        """
        if self._columns:
            batches = self._read(where).to_batches(max_chunksize=_SCAN_ROWS)
        else:
            batches = self.dataset.to_batches(
                columns=[*columns, OFFSET], filter=where, batch_size=_SCAN_ROWS
            )
        for batch in batches:
            if batch.num_rows:
                yield batch[OFFSET].to_numpy().astype(np.int64), batch.select(list(columns))

    def take(self, offsets: npt.NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Return the rows at these offsets, in this order; held ones must have passed."""
        if self._held is None or not self._columns.issuperset(columns):
            return self.dataset.take(offsets, columns=list(columns))
        places = np.searchsorted(self._held[OFFSET].to_numpy().astype(np.int64), offsets)
        return self._held.select(list(columns)).take(pa.array(places))

    def taken(
        self, offsets: npt.NDArray[np.int64], columns: Sequence[str], at_once: int
    ) -> Iterator[tuple[int, pa.Table]]:
        """Yield the rows at rising offsets in parts, each with the position of its first row.

        Args:
            at_once: Most rows of a part, unless the scan yields more.
        """
        dense = len(offsets) * _TAKEN_AS_ROWS_SCANNED >= self.dataset.count_rows()
        if self._held is not None or not dense:
            for start in range(0, len(offsets), at_once):
                yield start, self.take(offsets[start : start + at_once], columns)
            return
        for here, batch in TableRows(self.dataset).batches(columns, None):
            start, end = np.searchsorted(offsets, [here[0], here[-1] + 1])
            if end > start:
                places = np.searchsorted(here, offsets[start:end])
                yield int(start), pa.Table.from_batches([batch.take(pa.array(places))])

    def _read(self, where: pc.Expression | None) -> pa.Table:
        if self._held is None:
            columns = [*sorted(self._columns), OFFSET]
            rows = self.dataset.to_table(columns=columns, filter=where)
            self._held = rows.sort_by(OFFSET).combine_chunks()
        return self._held
