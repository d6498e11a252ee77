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

    def _read(self, where: pc.Expression | None) -> pa.Table:
        if self._held is None:
            columns = [*sorted(self._columns), OFFSET]
            rows = self.dataset.to_table(columns=columns, filter=where)
            self._held = rows.sort_by(OFFSET).combine_chunks()
        return self._held
