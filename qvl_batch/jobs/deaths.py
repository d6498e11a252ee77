"""Blocks on which a worker died are gone through unit by unit, until the one at fault is known.

A worker says what it begins before it begins it, to an actor that outlives it. What was begun and
not ended when the same block comes again is where a worker died.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import pyarrow as pa

Failure = dict[str, Any]


class Attempts(Protocol):
    """Counts what was begun and not ended; outlives the workers."""

    def begin(self, stage: str, ordinal: int, alone: bool) -> int:
        """Return how often this was begun before without an end, and note that it is again."""
        ...

    def end(self, stage: str, ordinal: int, alone: bool) -> None:
        """Note that it ended, whatever its result."""
        ...


class NoAttempts:
    """For stages outside a run: nothing is counted."""

    def begin(self, stage: str, ordinal: int, alone: bool) -> int:
        return 0

    def end(self, stage: str, ordinal: int, alone: bool) -> None:
        return


def run_carefully(
    block: pa.Table,
    stage: str,
    run: Callable[[pa.Table], pa.Table],
    failed: Callable[[pa.Table, Failure], pa.Table],
    attempts: Attempts,
    max_deaths: int,
) -> pa.Table:
    """Run a stage on a block, or on its units one by one if a worker has died on it before.

    Args:
        block: Units with their ``_ordinal``.
        stage: ``decode``, ``embed`` or ``rerank``.
        run: The stage: a table of units in, one of as many out.
        failed: Makes what ``run`` returns of one unit from the unit and a `schema.FAILURE` value.
        attempts: See `Attempts`.
        max_deaths: Deaths, that of the whole block among them, after which a unit fails.
    """
    if not block.num_rows:
        return run(block)
    first = block["_ordinal"][0].as_py()
    if attempts.begin(stage, first, False) == 0:
        result = run(block)
        attempts.end(stage, first, False)
        return result
    results = []
    for position, ordinal in enumerate(block["_ordinal"].to_pylist()):
        unit = block.slice(position, 1)
        deaths = 1 + attempts.begin(stage, ordinal, True)
        if deaths >= max_deaths:
            results.append(failed(unit, _killed(stage, deaths)))
        else:
            results.append(run(unit))
            attempts.end(stage, ordinal, True)
    attempts.end(stage, first, False)
    return pa.concat_tables(results)


def _killed(stage: str, deaths: int) -> Failure:
    return {
        "stage": stage,
        "error_type": "WorkerKilledError",
        "message": f"{deaths} workers died while they had this unit at hand (out of memory, or a "
        "crash in native code)",
        "retryable": False,
    }
