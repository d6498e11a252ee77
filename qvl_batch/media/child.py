"""The decoding process: ``python -m qvl_batch.media.child PARENT_PID``.

Reads requests from standard input and answers on what was standard output:

* ``open`` {kind, path?, dpi, max_image_px, resize} + bytes  ->  ``header``
* ``decode`` {plans}  ->  ``frame`` {part, position} + uint8 RGB, …, then ``done``
* ``prepare`` {resize}  ->  ``done``; loads the frame resizing, which may import much

An error is answered as ``error`` {name, reason} for a fault of the medium, as ``bug`` {traceback}
for one of ours. It ends with its parent, and holds nothing that a hostile file could be after.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

from qvl_batch.errors import ChangedMediaError, UnitError
from qvl_batch.media.wire import header_to_json, pack, plan_from_json, read_message
from qvl_batch.units import Header

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4


class Medium(Protocol):
    """An opened image, document or video."""

    header: Header

    def decode(self, plans: list[Any]) -> Any:
        """Yield (part, position, frame)."""

    def close(self) -> None: ...


def load_resize(path: str) -> Callable[..., Any]:
    """Return the function at ``package.module:name``."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def open_medium(kind: str, file: BinaryIO, request: dict[str, Any]) -> Medium:
    """Open a file as an image, a document or a video; decoders are imported on first use."""
    max_image_px = request["max_image_px"]
    if kind == "image":
        from qvl_batch.media.image import ImageMedium

        return ImageMedium(file, uri="", max_image_px=max_image_px)
    if kind == "document":
        from qvl_batch.media.document import DocumentMedium

        return DocumentMedium(file, uri="", dpi=request["dpi"], max_image_px=max_image_px)
    from qvl_batch.media.video import VideoMedium

    resize = load_resize(request["resize"])
    return VideoMedium(file, uri="", max_image_px=max_image_px, resize=resize)


class Child:
    """Answers requests until its input ends."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO) -> None:
        self._requests, self._answers = requests, answers
        self._medium: Medium | None = None
        self._file: BinaryIO | None = None

    def serve(self) -> None:
        self._answer({"type": "ready"})
        while (message := read_message(self._requests)) is not None:
            request, payload = message
            try:
                getattr(self, f"_do_{request['op']}")(request, payload)
            except UnitError as error:
                self._answer(
                    {"type": "error", "name": type(error).__name__, "reason": error.reason[:1000]}
                )
            except MemoryError:
                self._answer(
                    {
                        "type": "error",
                        "name": "LimitExceededError",
                        "reason": "the decoder ran out of memory",
                    }
                )
            except BrokenPipeError:
                return
            except Exception:
                # Everything else is our fault; the parent raises it with this text.
                self._answer({"type": "bug", "traceback": traceback.format_exc()[-4000:]})

    def _do_prepare(self, request: dict[str, Any], _: bytes) -> None:
        load_resize(request["resize"])
        self._answer({"type": "done"})

    def _do_open(self, request: dict[str, Any], payload: bytes) -> None:
        self._close()
        path = request.get("path")
        try:
            self._file = open(path, "rb") if path else io.BytesIO(payload)  # noqa: SIM115
        except OSError as error:
            raise ChangedMediaError("", f"can not be read any more: {error.strerror}") from None
        self._medium = open_medium(request["kind"], self._file, request)
        self._answer({"type": "header", "header": header_to_json(self._medium.header)})

    def _do_decode(self, request: dict[str, Any], _: bytes) -> None:
        plans = [plan_from_json(values) for values in request["plans"]]
        for part, position, frame in self._medium.decode(plans):
            plan = plans[part]
            if frame.shape != (plan.height_px, plan.width_px, 3) or frame.dtype != "uint8":
                raise AssertionError(f"a frame of {frame.dtype} {frame.shape} for {plan}")
            raw = memoryview(frame if frame.flags.c_contiguous else frame.copy()).cast("B")
            self._answer({"type": "frame", "part": part, "position": position}, raw)
        self._answer({"type": "done"})

    def _answer(self, header: dict[str, Any], payload: memoryview | None = None) -> None:
        self._answers.write(pack(header, len(payload) if payload is not None else 0))
        if payload is not None:
            self._answers.write(payload)
        self._answers.flush()

    def _close(self) -> None:
        if self._medium is not None:
            self._medium.close()
        if self._file is not None:
            self._file.close()
        self._medium = self._file = None


def _die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGKILL when the parent is gone; no core dump, no tracing."""
    with contextlib.suppress(OSError, AttributeError):
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.getppid() != parent_pid:
        # It ended before the request to the kernel.
        os._exit(0)


def main() -> None:
    # The first process to be killed when memory is short, before the actor that holds it.
    # (Comes first: a process that may not be dumped does not own its /proc files any more.)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    _die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb", buffering=1 << 20)
    # Libraries that print must reach neither the answers nor the terminal.
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    child = Child(io.BufferedReader(requests, 1 << 20), answers)
    os.dup2(nowhere, 2)
    child.serve()


if __name__ == "__main__":
    main()
