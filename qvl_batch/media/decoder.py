"""Decoding in one spawned, reused process that can be killed by time and by memory.

A file may hang a decoder, make it take all memory, crash it, or take it over. All of that happens
in a child process without secrets; here it becomes an error of that one unit, and the next unit
gets a fresh child.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qvl_batch import errors
from qvl_batch.errors import CorruptMediaError, DecoderKilledError, KindMismatchError, UnitError
from qvl_batch.media.process import (
    START_TIMEOUT_S,
    ChildOverError,
    ChildProcess,
    DecoderBugError,
    GarbledAnswerError,
)
from qvl_batch.media.sniff import HEAD_BYTES, sniff
from qvl_batch.media.source import Source
from qvl_batch.media.text import decode_text
from qvl_batch.media.wire import header_from_json, plan_to_json
from qvl_batch.units import Header, Kind, PartPlan

MIB = 1 << 20
GIB = 1 << 30
_MEDIUM_ERRORS: Mapping[str, type[UnitError]] = {
    error.__name__: error
    for error in (errors.CorruptMediaError, errors.LimitExceededError, errors.ChangedMediaError)
}


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """Bounds of one unit.

    Args:
        timeout_s: Wall time in the decoder, summed over its calls.
        memory_bytes: Resident memory of the child, its Python and libraries included (about 50 MB,
            with torch for the resizing of video frames about 300 MB).
        max_image_px: Pixels of an image, a video frame or a rendered page, before the resize.
        max_text_bytes: Size of a text file.
    """

    timeout_s: float = 120.0
    memory_bytes: int = 2 * GIB
    max_image_px: int = 178_956_970
    max_text_bytes: int = MIB

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")


class Decoder:
    """Opens and decodes one medium after the other.

    The limits hold for each unit; a limit passed, or a death, costs the unit a `DecoderKilledError`
    and nobody else anything. Not for use by several threads at once.

    Args:
        limits: Bounds of one unit.
        resize: ``package.module:function`` mapping (uint8 RGB frame, height_px, width_px) to the
            resized frame; imported by the child on the first video.
    """

    def __init__(self, limits: DecodeLimits, resize: str) -> None:
        self._limits, self._resize = limits, resize
        self._child: ChildProcess | None = None
        self._prepared = False
        self._source: Source | None = None
        self._kind: str | None = None
        self._uri = ""
        self._left_s = 0.0

    @property
    def child_pid(self) -> int | None:
        """Process id of the child; None while there is none."""
        return self._child.pid if self._child is not None else None

    def open(self, source: Source, kind: Kind, *, dpi: int = 144) -> Header:
        """Look at a medium and return its header; nothing is decoded but a first frame.

        Args:
            source: Must stay open until the last `decode`.
            kind: What the manifest says; ``mixed`` means an image or a video.
            dpi: Resolution of a document's pages.

        Raises:
            KindMismatchError: If the first bytes are of another kind.
            CorruptMediaError, LimitExceededError: If it can not be opened, or is too large.
            DecoderKilledError: If the child passed a limit or died.
        """
        self._source, self._kind, self._uri = None, None, source.uri
        self._left_s = self._limits.timeout_s
        found = sniff(source.head(HEAD_BYTES))
        allowed = ("image", "video") if kind == "mixed" else (kind,)
        if found is not None and found.kind not in allowed:
            raise KindMismatchError(
                source.uri, f"the manifest says {kind}, the bytes are {found.kind} ({found.format})"
            )
        if kind == "text":
            self._source, self._kind = source, "text"
            return Header(kind="text")
        if found is None:
            wanted = " or ".join(allowed)
            raise CorruptMediaError(source.uri, f"the first bytes are of no {wanted} format known")
        child = self._running_child(found.kind)
        request = {
            "op": "open",
            "kind": found.kind,
            "dpi": dpi,
            "max_image_px": self._limits.max_image_px,
            "resize": self._resize,
            "path": os.path.abspath(source.path) if source.path is not None else None,
        }
        with self._accounted(child):
            child.send(request, source.data or b"")
            answer, _ = child.receive_header()
            self._expect(answer, "header")
            try:
                header = header_from_json(answer["header"])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise GarbledAnswerError(f"header: {error}") from None
            if header.kind != found.kind:
                raise GarbledAnswerError(f"kind {header.kind}")
        self._source, self._kind = source, header.kind
        return header

    def decode(self, plans: Sequence[PartPlan]) -> list[npt.NDArray[np.uint8]]:
        """Decode parts of what was opened last.

        Returns:
            Per plan, uint8 RGB of shape ``(frames, height_px, width_px, 3)``.

        Raises:
            CorruptMediaError, LimitExceededError: If the medium is at fault.
            ChangedMediaError: If a local file changed while it was read.
            DecoderKilledError: If the child passed a limit or died.
        """
        if self._source is None or self._kind == "text" or self._child is None:
            raise ValueError("decode needs an opened image, document or video")
        parts = [
            np.empty((plan.num_frames, plan.height_px, plan.width_px, 3), np.uint8)
            for plan in plans
        ]
        missing = {(i, j) for i, plan in enumerate(plans) for j in range(plan.num_frames)}
        child = self._child
        with self._accounted(child):
            child.send({"op": "decode", "plans": [plan_to_json(plan) for plan in plans]})
            while True:
                answer, payload_bytes = child.receive_header()
                if answer.get("type") != "frame":
                    break
                place = answer.get("part"), answer.get("position")
                if not all(isinstance(n, int) for n in place) or place not in missing:
                    raise GarbledAnswerError(f"frame {place} was not asked for")
                missing.discard(place)
                frame = parts[place[0]][place[1]]
                if payload_bytes != frame.nbytes:
                    raise GarbledAnswerError(f"{payload_bytes} bytes for a frame of {frame.nbytes}")
                child.receive_into(memoryview(frame).cast("B"))
            self._expect(answer, "done")
            if missing:
                raise GarbledAnswerError(f"{len(missing)} frames did not come")
        self._source.check_unchanged()
        return parts

    def text(self) -> str:
        """Return the text of what was opened last.

        Raises:
            CorruptMediaError, LimitExceededError, EmptyMediaError: See `decode_text`.
        """
        if self._source is None or self._kind != "text":
            raise ValueError("text needs an opened text")
        most = self._limits.max_text_bytes
        data = self._source.head(most + 1)
        if self._source.size_bytes > most:
            raise errors.LimitExceededError(
                self._uri, f"{self._source.size_bytes} bytes of text, the limit is {most}"
            )
        text = decode_text(data, uri=self._uri, max_bytes=most)
        self._source.check_unchanged()
        return text

    def close(self) -> None:
        """End the child. The decoder may be used again; it then starts another."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _running_child(self, kind: str) -> ChildProcess:
        """Return a child that runs and has imported what the kind needs.

        Starting is our own time: it does not count against the unit.
        """
        if self._child is not None and not self._child.is_alive():
            # It died between two units, for no fault of this one.
            self.close()
        if self._child is None:
            self._child = ChildProcess(self._limits.memory_bytes)
            self._prepared = False
        if kind == "video" and not self._prepared:
            with self._accounted(self._child, START_TIMEOUT_S):
                self._child.send({"op": "prepare", "resize": self._resize})
                self._expect(self._child.receive_header()[0], "done")
            self._prepared = True
        return self._child

    @contextlib.contextmanager
    def _accounted(self, child: ChildProcess, limit_s: float | None = None) -> Iterator[None]:
        """Run an exchange with the child within the time that is left.

        Whatever ends it early leaves the pipes half read: the child goes, unless it was the child
        that named an error.
        """
        started = time.monotonic()
        left_s = self._left_s if limit_s is None else limit_s
        child.deadline, child.limit_s = started + left_s, limit_s or self._limits.timeout_s
        try:
            yield
        except UnitError:
            raise
        except BaseException as error:
            self.close()
            self._source = None
            if isinstance(error, ChildOverError):
                raise DecoderKilledError(self._uri, str(error)) from None
            if isinstance(error, GarbledAnswerError):
                reason = f"the decoder gave a bad answer: {error}"
                raise DecoderKilledError(self._uri, reason) from None
            raise
        finally:
            if limit_s is None:
                self._left_s -= time.monotonic() - started

    def _expect(self, answer: Mapping[str, Any], wanted: str) -> None:
        kind = answer.get("type")
        if kind == wanted:
            return
        if kind == "bug":
            raise DecoderBugError(f"decoding {self._uri}:\n{_printable(answer.get('traceback'))}")
        error = _MEDIUM_ERRORS.get(str(answer.get("name")))
        if kind != "error" or error is None:
            raise GarbledAnswerError(f"{kind!r} instead of {wanted!r}")
        raise error(self._uri, _printable(answer.get("reason")))


def _printable(text: object) -> str:
    """Return a message of the child without control characters, cut to a sensible length."""
    return "".join(c for c in str(text)[:4000] if c.isprintable() or c == "\n")
