"""Every error that this package raises on purpose.

Three families, by what happens next:

* `InputError`: the caller can mend it; the command ends with exit code 2 before or without work.
* `RunFailedError`: the run ends with exit code 1; what is committed stays.
* `UnitError`: one unit fails; it becomes a row of the failures table and the run goes on.

Constructors take facts and pass all of them to ``super().__init__``, so that an error survives
pickling between Ray workers.
"""

from __future__ import annotations


class QvlError(Exception):
    """Base of all errors of this package; `exit_code` is what a command ends with."""

    exit_code = 1


class InputError(QvlError):
    """Something the caller gave is wrong: says what, and what to do about it.

    Args:
        problem: One sentence with the name and the value at fault.
        remedy: One sentence that says how to go on.
    """

    exit_code = 2

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return f"{self.problem} {self.remedy}".strip()


class ConfigError(InputError):
    """A configuration key, type or combination is refused."""


class ManifestError(InputError):
    """A manifest or its source can not be used."""


class ModelError(InputError):
    """A checkpoint can not be loaded, or is not what it must be."""


class StorageError(InputError):
    """A path, bucket or credential does not work."""


class RecipeMismatchError(InputError):
    """A collection was made by another recipe."""


class UnschedulableError(InputError):
    """The cluster can not hold the configured pools."""


class LeaseHeldError(QvlError):
    """Another live run works on the same partition.

    Args:
        table: The partition's table.
        run_id: Of the run that holds it.
        holder: What is known of that run: host, process, since when.
    """

    exit_code = 3

    def __init__(self, table: str, run_id: str, holder: str = "") -> None:
        super().__init__(table, run_id, holder)
        self.table, self.run_id, self.holder = table, run_id, holder

    def __str__(self) -> str:
        known = f", {self.holder}" if self.holder else ""
        return (
            f"Table {self.table} is being written by another run ({self.run_id}{known}). "
            "Wait for it or stop it, then run this again: nothing committed is lost. "
            "A run that was killed is taken over once its lease has expired; --steal does it now."
        )


class LeaseLostError(LeaseHeldError):
    """This run was taken for dead and another took over: it must not commit any more."""

    def __str__(self) -> str:
        return (
            f"This run has lost its lease on table {self.table}: {self.holder}. What it had "
            "committed stays; run this again for the rest."
        )


class RunFailedError(QvlError):
    """The run can not go on. What was committed stays; run it again to continue."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TooManyFailuresError(RunFailedError):
    """The share of failed units passed the configured limit."""


class InvariantBrokenError(RunFailedError):
    """Something that must never happen did: units lost, doubled, or files missing."""


class UnitError(QvlError):
    """One unit can not be embedded; its class name is the `error_type` of the failure row.

    Args:
        uri: The unit's address.
        reason: One sentence with the facts (sizes, limits, what was found).
    """

    stage = "decode"
    retryable = False

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(uri, reason)
        self.uri, self.reason = uri, reason

    def __str__(self) -> str:
        return f"{self.uri}: {self.reason}"


class FetchError(UnitError):
    """Reading failed in a way that may pass (network, throttling, time-out)."""

    stage = "fetch"
    retryable = True


class MissingMediaError(UnitError):
    """The object or file is not there."""

    stage = "fetch"


class AccessDeniedError(UnitError):
    """The object or file may not be read."""

    stage = "fetch"


class ChangedMediaError(UnitError):
    """The object is not the one that the manifest lists (etag or size differs)."""

    stage = "fetch"


class EmptyMediaError(UnitError):
    """Zero bytes, or a text without a character."""

    stage = "fetch"


class KindMismatchError(UnitError):
    """The bytes are of another kind than the manifest says."""


class CorruptMediaError(UnitError):
    """The bytes are of the right kind but can not be decoded."""


class LimitExceededError(UnitError):
    """A size, page, pixel or token limit is passed."""


class DecoderKilledError(UnitError):
    """The decoding process passed its time or memory limit, or died."""


class BadVectorError(UnitError):
    """The vector has a norm near 0, a NaN or an Inf."""

    stage = "embed"


class NoCandidatesError(UnitError):
    """No row passes the filters of the search: the query has nothing to be ranked."""

    stage = "search"


class MissingRowError(UnitError):
    """A given candidate is not in the tables."""

    stage = "search"


class EmbedFailedError(UnitError):
    """The model can not take this unit (out of memory alone, prompt not allowed)."""

    stage = "embed"
