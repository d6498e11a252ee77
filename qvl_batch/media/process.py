"""The decoding child as its parent sees it: two pipes, and a watch over its time and memory."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from typing import Any, BinaryIO

from qvl_batch.media.wire import MAX_HEADER_BYTES, PREFIX, pack

MIB = 1 << 20
START_TIMEOUT_S = 120.0
_TICK_S = 0.05
_WRITE_BYTES = 1 << 20
# What the child needs to find Python and its packages; nothing else of ours is its business.
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV")


class DecoderBugError(RuntimeError):
    """The child failed in a way that is no fault of the medium: the run must end."""


class ChildOverError(Exception):
    """The child is past a limit, or dead."""


class GarbledAnswerError(Exception):
    """The child's answer makes no sense."""


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kill a child and close its pipes, in the process that started it."""
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


class ChildProcess:
    """A running child and its two pipes, watched while anyone waits for it."""

    def __init__(self, memory_bytes: int) -> None:
        self.deadline = time.monotonic() + START_TIMEOUT_S
        self.limit_s = START_TIMEOUT_S
        self._memory_bytes = memory_bytes
        self._next_look = 0.0
        with tempfile.TemporaryFile() as complaints:
            self._process = (
                _spawner(os.getpid())
                .submit(
                    subprocess.Popen,
                    [sys.executable, "-m", "qvl_batch.media.child", str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=complaints,
                    bufsize=0,
                    env=_environment(),
                    close_fds=True,
                )
                .result()
            )
            # Also when nobody closes it: with the last reference, or with the interpreter.
            self._end = weakref.finalize(self, _end, self._process, os.getpid())
            self._requests, self._answers = self._process.stdin, self._process.stdout
            os.set_blocking(self._requests.fileno(), False)
            os.set_blocking(self._answers.fileno(), False)
            try:
                answer, _ = self.receive_header()
            except (ChildOverError, GarbledAnswerError) as error:
                self.kill()
                raise DecoderBugError(f"no start: {error}\n{_tail(complaints)}") from None
            if answer != {"type": "ready"}:
                self.kill()
                raise DecoderBugError(f"no start: {answer}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._end()

    def send(self, header: Mapping[str, Any], payload: bytes = b"") -> None:
        for data in (pack(header, len(payload)), payload):
            view = memoryview(data)
            while view:
                self._wait(self._requests, select.POLLOUT)
                with contextlib.suppress(BlockingIOError):
                    try:
                        view = view[os.write(self._requests.fileno(), view[:_WRITE_BYTES]) :]
                    except BrokenPipeError:
                        raise ChildOverError(self._death()) from None

    def receive_header(self) -> tuple[dict[str, Any], int]:
        """Return a message's header and how many raw bytes follow it.

        Only a frame may have any.
        """
        prefix = bytearray(PREFIX.size)
        self.receive_into(memoryview(prefix))
        header_bytes, payload_bytes = PREFIX.unpack(prefix)
        if header_bytes > MAX_HEADER_BYTES:
            raise GarbledAnswerError(f"a header of {header_bytes} bytes")
        encoded = bytearray(header_bytes)
        self.receive_into(memoryview(encoded))
        try:
            header = json.loads(encoded)
        except (ValueError, RecursionError) as error:
            raise GarbledAnswerError(f"not JSON: {error}") from None
        if not isinstance(header, dict) or (payload_bytes and header.get("type") != "frame"):
            raise GarbledAnswerError("not a message")
        return header, payload_bytes

    def receive_into(self, view: memoryview) -> None:
        while view:
            self._wait(self._answers, select.POLLIN)
            try:
                count = os.readv(self._answers.fileno(), [view])
            except BlockingIOError:
                continue
            if not count:
                raise ChildOverError(self._death())
            view = view[count:]

    def _wait(self, pipe: BinaryIO, event: int) -> None:
        """Return when the pipe can be used; look at the child every tick, busy or not."""
        poll = select.poll()
        poll.register(pipe.fileno(), event)
        while True:
            if time.monotonic() >= self._next_look:
                self._look()
            if poll.poll(_TICK_S * 1000):
                return

    def _look(self) -> None:
        now = time.monotonic()
        self._next_look = now + _TICK_S
        if now > self.deadline:
            raise ChildOverError(f"passed the time limit of {self.limit_s:g} s")
        resident = resident_bytes(self.pid)
        if resident > self._memory_bytes:
            raise ChildOverError(
                f"took {resident / MIB:.0f} MiB of memory, the limit is "
                f"{self._memory_bytes / MIB:.0f} MiB"
            )

    def _death(self) -> str:
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the decoder closed its pipe"
        if status < 0:
            known = {number.value: number.name for number in signal.Signals}
            return f"the decoder died of {known.get(-status, f'signal {-status}')}"
        return f"the decoder ended by itself with status {status}"


def resident_bytes(pid: int) -> int:
    """Return a process's resident memory; 0 once it has ended, or where /proc does not say."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


@functools.cache
def _spawner(pid: int) -> concurrent.futures.Executor:
    """Return a thread of this process that lives as long as the process does.

    The kernel ends a child when the *thread* that started it ends: started from the caller's own,
    it would not survive a thread pool. The key is the process, since threads do not survive a fork.
    """
    del pid
    return concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="decoder-parent")


def _environment() -> dict[str, str]:
    """Return the child's environment: where code lies, one thread, and no secret."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    # Ray and notebooks put packages on sys.path without naming them in PYTHONPATH.
    places = [os.path.abspath(entry) for entry in sys.path]
    return kept | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(places)),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _tail(file: BinaryIO) -> str:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - 2000))
    return file.read().decode(errors="replace")
