"""Processes that cost a fork instead of an interpreter and all imports.

A server process (multiprocessing's) imports everything, calls nothing, and forks a child a run.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from qvl_batch.errors import QvlError

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.faults.preloaded"])
# pyarrow's allocator starts one as it is imported, and knows how to fork.
_HARMLESS_THREADS = {"jemalloc_bg_thd"}


@dataclass(frozen=True)
class Started:
    """A run in a process of its own."""

    process: BaseProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, timeout_s: float = 180) -> int:
        """Return the exit code, -9 after SIGKILL."""
        self.process.join(timeout_s)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"no end within {timeout_s} s:\n{self.output()}")
        return code

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def start(command: str, *arguments: Any, log: Path, **environment: str) -> Started:
    """Start a function of `tests.faults.commands` in a process of its own.

    Args:
        arguments: Of the function; must be picklable.
        log: Gets what it prints.
        environment: Added to this process's.
    """
    process = _CONTEXT.Process(
        target=_child, args=(command, arguments, os.environ | environment, str(log)), daemon=True
    )
    process.start()
    return Started(process, log)


def check_parent() -> None:
    """Make sure that this process was forked before a thread of Lance was there.

    Raises:
        RuntimeError: Naming the threads of its parent.
    """
    tasks = Path(f"/proc/{os.getppid()}/task")
    names = [(task / "comm").read_text().strip() for task in tasks.iterdir()]
    more = [name for name in names if name not in _HARMLESS_THREADS]
    if len(more) != 1:
        raise RuntimeError(f"the fork server has the threads {names}")


def _child(
    command: str, arguments: tuple[Any, ...], environment: Mapping[str, str], log: str
) -> None:
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    check_parent()
    if "tests.faults.commands" not in sys.modules:
        raise RuntimeError("the fork server has not imported what it should have")
    os.environ.clear()
    os.environ.update(environment)
    from tests.faults import commands

    try:
        getattr(commands, command)(*arguments)
    except QvlError as error:
        print(f"error: {error}", flush=True)
        sys.exit(error.exit_code)
