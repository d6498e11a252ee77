"""What crosses from one room to the next: headers, plans, decoded parts, model inputs, vectors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from qvl_batch.errors import UnitError

Kind = Literal["text", "image", "document", "video", "mixed"]
KINDS: tuple[str, ...] = ("text", "image", "document", "video", "mixed")


# Made once: `json.dumps` makes one a call, which is most of the time that an id takes.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _hash(parts: list[object]) -> str:
    return hashlib.blake2b(_encode(parts).encode(), digest_size=16).hexdigest()


def media_id(
    uri: str | None,
    *,
    text: str | None = None,
    byte_offset: int | None = None,
    byte_length: int | None = None,
) -> str:
    """Return the blake2b-128 hex of what a medium is: its place and its caption.

    An inline text without a uri is identified by ``text:`` + its sha256. The id survives a
    changed file, since the etag is not part of it.
    """
    digest = hashlib.sha256(text.encode()).hexdigest() if text is not None else None
    if not uri:
        return _hash([f"text:{digest}", None, None, None])
    return _hash([uri, byte_offset, byte_length, digest])


def unit_id(media: str, etag: str | None) -> str:
    """Return the blake2b-128 hex of (media_id, etag): what becomes done or failed as a whole."""
    return _hash([media, etag or ""])


def row_id(unit: str, segment: int) -> str:
    """Return ``{unit_id}:{segment}``, the key of one vector."""
    return f"{unit}:{segment}"


def query_id(
    text: str | None, image: str | None, video: str | None, instruction: str | None
) -> str:
    """Return the blake2b-128 hex of what a query is: for queries that bring no id of their own."""
    return _hash(["query", text, image, video, instruction])


def pair_id(query: str, row: str) -> str:
    """Return the blake2b-128 hex of (query_id, row_id), the key of one score."""
    return _hash(["pair", query, row])


@dataclass(frozen=True, slots=True)
class Header:
    """What a medium says of itself before anything is decoded.

    Sizes are as stored, before any resize: EXIF orientation is ignored and a video's rotation is
    applied, as the official decoders do. ``num_frames`` counts a video's frames in presentation
    order and ``fps`` is its average rate; ``page_sizes_px`` holds a document's (width, height) per
    page at the recipe's resolution.
    """

    kind: Kind
    width_px: int = 0
    height_px: int = 0
    num_frames: int = 1
    fps: float = 0.0
    duration_s: float = 0.0
    page_sizes_px: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class PartPlan:
    """One row to be made: which frames, at what final size.

    ``frame_indices`` are a video's frames in presentation order, ``(0,)`` for an image, ``(page,)``
    for a document's page. ``seconds`` has one time per temporal group (a pair of frames) of a
    video, relative to the start of the segment. The grid in 16-px patches is
    ``(groups, height_px / 16, width_px / 16)``.
    """

    segment: int
    frame_indices: tuple[int, ...]
    width_px: int
    height_px: int
    page: int | None = None
    start_s: float | None = None
    end_s: float | None = None
    seconds: tuple[float, ...] = ()

    @property
    def num_frames(self) -> int:
        return len(self.frame_indices)

    @property
    def is_video(self) -> bool:
        return bool(self.seconds)


@dataclass(frozen=True, slots=True)
class Vision:
    """Frames at their final size, ready to be cut into patches.

    ``pixels`` is uint8 RGB of shape ``(frames, height_px, width_px, 3)`` with both sides multiples
    of 32; an image has one frame, a video an even number of frames and one time in ``seconds`` per
    pair.
    """

    pixels: npt.NDArray[np.uint8]
    seconds: tuple[float, ...] = ()

    @property
    def grid(self) -> tuple[int, int, int]:
        """(temporal groups, rows, columns) in 16-px patches."""
        frames, height, width, _ = self.pixels.shape
        return (max(1, frames // 2), height // 16, width // 16)


@dataclass(frozen=True, slots=True)
class EmbedInput:
    """One prompt: all videos, then all images, then all texts, in that order.

    ``instruction=None`` means the recipe's. With nothing at all the user turn is ``NULL``, as the
    official code has it; an empty string in ``texts`` is an empty user turn.
    """

    texts: tuple[str, ...] = ()
    images: tuple[Vision, ...] = ()
    videos: tuple[Vision, ...] = ()
    instruction: str | None = None
    uri: str = ""


@dataclass(frozen=True, slots=True)
class Embedded:
    """Encoded vectors of n inputs, in their order.

    ``columns`` maps a vector column of the table schema to an array with one entry per input:
    ``vector`` float32/float16 ``(n, dim)``, ``vector_int8`` int8 ``(n, dim)`` with
    ``vector_scale`` float32 ``(n,)``, ``vector_bits`` uint8 ``(n, dim / 8)``. The entries of an
    input in ``failures`` mean nothing.
    """

    columns: Mapping[str, npt.NDArray[np.generic]]
    num_tokens: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]
    failures: Mapping[int, UnitError] = field(default_factory=dict)


class Engine(Protocol):
    """Anything that turns prompts into encoded vectors."""

    def embed(self, inputs: list[EmbedInput]) -> Embedded:
        """Embed every input on its own terms: no input may change another's vector."""
        ...
