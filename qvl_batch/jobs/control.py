"""What the driver and its workers tell each other beside the blocks: stop, begun, broken."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from qvl_batch.errors import QvlError, RunFailedError
from qvl_batch.jobs.checkpoint import Model, RerankModel
from qvl_batch.recipe import Recipe, RerankRecipe


@ray.remote(num_cpus=0)
class RunControl:
    """Knows which blocks were begun, and refuses new ones once the run is stopping."""

    def __init__(self) -> None:
        self._stopping = False
        self._begun: set[int] = set()
        self._error: QvlError | None = None
        self._open: collections.Counter[tuple[str, int, bool]] = collections.Counter()

    def begin(self, stage: str, ordinal: int, alone: bool) -> int:
        """See `deaths.Attempts`."""
        before = self._open[stage, ordinal, alone]
        self._open[stage, ordinal, alone] += 1
        return before

    def end(self, stage: str, ordinal: int, alone: bool) -> None:
        """See `deaths.Attempts`."""
        self._open.pop((stage, ordinal, alone), None)

    def report(self, error: QvlError) -> None:
        """Keep what a worker can not go on with: Ray Data passes on its text alone."""
        self._error = self._error or error

    def error(self) -> QvlError | None:
        return self._error

    def may_start(self, ordinal: int) -> bool:
        if self._stopping:
            return False
        self._begun.add(ordinal)
        return True

    def stop(self) -> list[int]:
        """Refuse from now on; return the first ordinals of the blocks that were begun."""
        self._stopping = True
        return sorted(self._begun)


@dataclass(frozen=True)
class MayStart:
    control: Any

    def __call__(self, ordinal: int) -> bool:
        return ray.get(self.control.may_start.remote(ordinal))


@dataclass(frozen=True)
class ControlAttempts:
    """`deaths.Attempts` kept by the control actor."""

    control: Any

    def begin(self, stage: str, ordinal: int, alone: bool) -> int:
        return ray.get(self.control.begin.remote(stage, ordinal, alone))

    def end(self, stage: str, ordinal: int, alone: bool) -> None:
        ray.get(self.control.end.remote(stage, ordinal, alone))


@dataclass(frozen=True)
class Load:
    """A loader that pickles: a method of the model with its recipe."""

    model: Model | RerankModel
    recipe: Recipe | RerankRecipe
    method: str
    control: Any

    def __call__(self) -> Any:
        try:
            return getattr(self.model, self.method)(self.recipe)
        except QvlError as error:
            ray.get(self.control.report.remote(error))
            raise


def cause_of(error: BaseException) -> BaseException:
    """Return our own error behind Ray's wrapping, or a run failure with the worker's trace."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, QvlError) and not isinstance(seen, RayTaskError):
            return seen
        if isinstance(seen, KeyboardInterrupt):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    return RunFailedError(
        f"A worker or its node failed: {error}. What is done is committed; run this again."
    )
