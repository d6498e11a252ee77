"""One live line in a terminal, one line a minute in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from qvl_batch.jobs.commit_loop import Counts

LOG_EVERY_S = 60.0
REDRAW_EVERY_S = 0.5


class Progress:
    """Shows committed units, failures, rate and time left."""

    def __init__(self, *, total: int, echo: Callable[[str], None], unit: str = "units") -> None:
        self._total, self._unit, self._echo = total, unit, echo
        self._live = sys.stderr.isatty()
        self._started_s = self._shown_s = time.monotonic()
        self._width = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live and self._width:
            print(file=sys.stderr)

    def update(self, counts: Counts) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s < (REDRAW_EVERY_S if self._live else LOG_EVERY_S):
            return
        self._shown_s = now_s
        line = self.line(counts, now_s - self._started_s)
        if self._live:
            print("\r" + line.ljust(self._width), end="", file=sys.stderr, flush=True)
            self._width = len(line)
        else:
            self._echo(line)

    def line(self, counts: Counts, elapsed_s: float) -> str:
        """Return the line for these counts."""
        ended = counts.embedded + counts.failed
        rate = ended / elapsed_s if elapsed_s else 0.0
        left = f"{(self._total - ended) / rate:,.0f} s left" if rate else "starting"
        return (
            f"{ended:,} of {self._total:,} {self._unit} committed ({counts.failed:,} failed), "
            f"{counts.rows:,} rows, {rate:,.1f} {self._unit}/s, {left}"
        )
