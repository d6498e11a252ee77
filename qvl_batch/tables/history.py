"""What the versions of a table say of their commits: who made them, under which marker."""

from __future__ import annotations

from dataclasses import dataclass

import lance

MARKER = "qvl.marker"
RUN_ID = "qvl.run_id"

# Operations after which the rows that a run planned with may be others. Not a Delete: a person may
# remove rows by hand while a run works, and none of them comes back.
CONTENT_OPERATIONS = ("Append", "Overwrite", "Restore", "Update")


@dataclass(frozen=True)
class Stamp:
    """What one version of a table says of its commit."""

    version: int
    operation: str
    marker: str | None
    run_id: str | None


class History:
    """The stamps of a table's versions from some version on, each read once.

    A committed version never changes. What is asked at every commit is looked up, not searched: the
    thousandth commit of a run costs here what the first did. Not for two threads at once.
    """

    def __init__(self) -> None:
        # All versions from the first to the last are read; cleaned ones have left nothing here.
        self._first, self._last = 1, 0
        self._markers: dict[str, list[int]] = {}
        self._writers: dict[str | None, int] = {}

    def read(self, dataset: lance.LanceDataset, since: int) -> None:
        """Read the versions in ``(since, dataset's]`` that are not known yet."""
        latest = dataset.version
        if self._last < self._first:
            self._first, self._last = since + 1, since
        unknown = (*range(since + 1, self._first), *range(self._last + 1, latest + 1))
        # One after the other: a dataset handle can not be used by two threads ("Already borrowed").
        # All before any is noted: if the store fails in between, none is noted twice.
        for stamp in [_read_stamp(dataset, version) for version in unknown]:
            if stamp is not None:
                self._note(stamp)
        self._first, self._last = min(self._first, since + 1), max(self._last, latest)

    def find(self, marker: str, since: int) -> list[int]:
        """Return the versions after ``since`` that state a marker."""
        return [version for version in self._markers.get(marker, ()) if version > since]

    def markers(self) -> list[str]:
        """Return all markers that are known."""
        return list(self._markers)

    def other_writers(self, run_id: str, since: int) -> list[str | None]:
        """Return the runs but this one that changed rows after ``since``."""
        return [run for run, last in self._writers.items() if run != run_id and last > since]

    def _note(self, stamp: Stamp) -> None:
        if stamp.marker is not None:
            self._markers.setdefault(stamp.marker, []).append(stamp.version)
        if stamp.operation in CONTENT_OPERATIONS:
            self._writers[stamp.run_id] = max(self._writers.get(stamp.run_id, 0), stamp.version)


def _read_stamp(dataset: lance.LanceDataset, version: int) -> Stamp | None:
    """Return what a version states; None if cleaning has removed it."""
    try:
        transaction = dataset.read_transaction(version)
    except OSError as error:
        if "was not found" in str(error):
            return None
        raise
    except TypeError as error:
        # pylance 14.0.2 can not show the Rewrite of a compaction that carried an index over.
        if "RewrittenIndex" in str(error):
            return Stamp(version, "Rewrite", None, None)
        raise
    if transaction is None:
        return Stamp(version, "", None, None)
    properties = transaction.transaction_properties or {}
    operation = type(transaction.operation).__name__
    return Stamp(version, operation, properties.get(MARKER), properties.get(RUN_ID))
