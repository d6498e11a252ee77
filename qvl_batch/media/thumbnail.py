"""Small pictures of what a row was made from, fetched and decoded afresh.

The objects are checked against the etag that the table holds, and decoded in the killable child:
this process only compresses pixels that the child has already made small.
"""

from __future__ import annotations

import io
import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from qvl_batch.errors import (
    EmptyMediaError,
    FetchError,
    KindMismatchError,
    LimitExceededError,
    MissingMediaError,
    StorageError,
    UnitError,
)
from qvl_batch.media.decoder import GIB, MIB, DecodeLimits, Decoder
from qvl_batch.media.fetch import Fetcher, FetchLimits, FetchRequest, printable_uri
from qvl_batch.media.held import read_picture
from qvl_batch.media.source import Source
from qvl_batch.storage import OBJECT_SCHEMES, Storage, scheme_of
from qvl_batch.units import Header, Kind, PartPlan

# A page is looked at, not read by a model: 96 dpi are more than a thumbnail shows of A4.
_DPI = 96
_JPEG_QUALITY = 85
# Somebody waits for the page: one object in trouble must not hold it up for minutes.
FETCH_LIMITS = FetchLimits(
    max_object_bytes=GIB,
    max_memory_bytes=32 * MIB,
    max_ahead_bytes=128 * MIB,
    timeout_s=60.0,
    attempts=2,
    threads=8,
)
DECODE_LIMITS = DecodeLimits(timeout_s=30.0)
# The model's own resize needs torch in the child: 300 MB and seconds for a picture to look at.
RESIZE = "qvl_batch.media.image:resize_bicubic"


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaPart:
    """Which part of which medium, in the words of a table's row.

    ``page`` counts from 0; ``start_s`` and ``end_s`` bound a segment of a video; ``etag=None`` is
    not checked.
    """

    uri: str
    kind: Kind
    etag: str | None = None
    byte_offset: int | None = None
    byte_length: int | None = None
    page: int | None = None
    start_s: float | None = None
    end_s: float | None = None

    @property
    def request(self) -> FetchRequest:
        return FetchRequest(
            uri=self.uri,
            etag=self.etag,
            byte_offset=self.byte_offset,
            byte_length=self.byte_length,
        )


@dataclass(frozen=True, slots=True)
class Picture:
    """A JPEG; ``time_s`` is a video frame's, from the start of the video."""

    jpeg: bytes
    width_px: int
    height_px: int
    time_s: float | None = None


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """One picture, or several frames of a video in their order; ``header`` is of the medium."""

    pictures: tuple[Picture, ...]
    header: Header

    @property
    def num_bytes(self) -> int:
        return sum(len(picture.jpeg) for picture in self.pictures)


class Thumbnailer:
    """Makes thumbnails; reads ahead with threads, decodes one medium after the other.

    Pictures are as the models see them: EXIF orientation ignored, transparency on white. Not for
    use by several threads at once.

    Args:
        storage: How object stores are reached.
        fetch_limits: Sizes, times and threads of reading.
        decode_limits: Time and memory of decoding one medium.
        max_side_px: Longest side of a picture; smaller media are not enlarged.
        max_frames: Frames of a video.
        max_cached_bytes: JPEG bytes kept for parts that are asked for again; those without an etag
            are always read again.
        resize: Import path of the resize of video frames, called in the decoding process.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        fetch_limits: FetchLimits = FETCH_LIMITS,
        decode_limits: DecodeLimits = DECODE_LIMITS,
        max_side_px: int = 480,
        max_frames: int = 4,
        max_cached_bytes: int = 64 * MIB,
        resize: str = RESIZE,
    ) -> None:
        for name, value in (("max_side_px", max_side_px), ("max_frames", max_frames)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self._storage = storage
        self._fetcher = Fetcher(storage, fetch_limits)
        self._decoder = Decoder(decode_limits, resize)
        self._max_side_px, self._max_frames = max_side_px, max_frames
        self._cache = _Cache(max_cached_bytes)

    def thumbnail(self, part: MediaPart) -> Thumbnail | UnitError:
        """Return one thumbnail, or why there is none."""
        return self.thumbnails([part])[0]

    def thumbnails(self, parts: Sequence[MediaPart]) -> list[Thumbnail | UnitError]:
        """Return a thumbnail, or why there is none, for every part, in their order.

        An object is fetched and opened once, however many of its parts are asked for.
        """
        found: dict[MediaPart, Thumbnail | UnitError] = {}
        # By kind too: a row that calls the object something else must not decide for the others.
        objects: dict[tuple[FetchRequest, Kind], list[MediaPart]] = defaultdict(list)
        for part in dict.fromkeys(parts):
            known = self._cache.get(part) or self._refused(part)
            if known is not None:
                found[part] = known
            else:
                objects[part.request, part.kind].append(part)
        sources = self._fetcher.fetch_all(request for request, _ in objects)
        for source, wanted in zip(sources, objects.values(), strict=True):
            if isinstance(source, UnitError):
                made: dict[MediaPart, Thumbnail | UnitError] = dict.fromkeys(wanted, source)
            else:
                with source:
                    made = dict(self._decode_all(source, wanted))
            for part, outcome in made.items():
                if part.etag is not None:
                    self._cache.put(part, outcome)
            found |= made
        return [found[part] for part in parts]

    def picture(self, value: object, name: str = "picture") -> Thumbnail | UnitError:
        """Return the thumbnail of a query's own picture or video.

        Args:
            value: A path or address, bytes, a Pillow image or a uint8 array.
            name: Stands for it in messages.
        """
        if isinstance(value, bytes):
            part = MediaPart(uri=name, kind="mixed")
            if not value:
                return EmptyMediaError(name, "0 bytes")
            with Source(name, len(value), data=value) as source:
                return dict(self._decode_all(source, [part]))[part]
        if isinstance(value, np.ndarray | Image.Image):
            try:
                rgb = read_picture(value, uri=name)
            except UnitError as error:
                return error
            rgb.thumbnail((self._max_side_px, self._max_side_px))
            header = Header(kind="image", width_px=rgb.width, height_px=rgb.height)
            return Thumbnail((_compressed(np.asarray(rgb)),), header)
        return self.thumbnail(MediaPart(uri=str(value), kind="mixed"))

    def close(self) -> None:
        """End the decoding child. The thumbnailer may be used again; it then starts another."""
        self._decoder.close()

    def __enter__(self) -> Thumbnailer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refused(self, part: MediaPart) -> UnitError | None:
        """Return why nothing can be fetched at all."""
        if part.kind == "text":
            return KindMismatchError(printable_uri(part.uri), "a text has no picture")
        if not part.uri:
            return MissingMediaError("", "the row names no address")
        if scheme_of(part.uri) in OBJECT_SCHEMES:
            try:
                self._storage.filesystem(part.uri)
            except StorageError as error:
                # One row of a store whose package is not installed must not cost the others.
                return FetchError(printable_uri(part.uri), str(error))
        return None

    def _decode_all(
        self, source: Source, parts: Sequence[MediaPart]
    ) -> Iterator[tuple[MediaPart, Thumbnail | UnitError]]:
        """Yield every part of one object; what ends the child ends all that are left."""
        try:
            header = self._decoder.open(source, parts[0].kind, dpi=_DPI)
        except UnitError as error:
            yield from ((part, error) for part in parts)
            return
        dead: UnitError | None = None
        for part in parts:
            try:
                # One by one: a broken page must not cost the other pages.
                yield part, dead or self._decode(header, part, source.uri)
            except UnitError as error:
                dead = None if self._decoder.child_pid is not None else error
                yield part, error

    def _decode(self, header: Header, part: MediaPart, uri: str) -> Thumbnail:
        size_px, indices = (header.width_px, header.height_px), (0,)
        if header.kind == "document":
            page, pages = part.page or 0, len(header.page_sizes_px)
            if not 0 <= page < pages:
                raise LimitExceededError(uri, f"there is no page {page}: it has {pages}")
            size_px, indices = header.page_sizes_px[page], (page,)
        elif header.kind == "video":
            indices = frames_between(header, part.start_s, part.end_s, self._max_frames)
        width_px, height_px = fit(*size_px, self._max_side_px)
        plan = PartPlan(segment=0, frame_indices=indices, width_px=width_px, height_px=height_px)
        times: tuple[float | None, ...] = (None,) * len(indices)
        if header.kind == "video" and _has_rate(header):
            times = tuple(index / header.fps for index in indices)
        (frames,) = self._decoder.decode([plan])
        return Thumbnail(tuple(map(_compressed, frames, times)), header)


def fit(width_px: int, height_px: int, max_side_px: int) -> tuple[int, int]:
    """Return (width, height) within the side, in proportion, no larger than given, 1 or more."""
    scale = min(1.0, max_side_px / max(width_px, height_px, 1))
    return max(1, round(width_px * scale)), max(1, round(height_px * scale))


def frames_between(
    header: Header, start_s: float | None, end_s: float | None, max_frames: int
) -> tuple[int, ...]:
    """Return the frames to show of a segment: the middle of each of ``max_frames`` equal spans.

    Not the first and the last frame, which are often black. A segment that lies outside of the
    video, or has no length, shows the nearest frame.

    Returns:
        Rising indices in ``[0, header.num_frames)``, at least one.
    """
    first, last = 0, header.num_frames
    if _has_rate(header):
        first = round((start_s or 0.0) * header.fps)
        last = header.num_frames if end_s is None else round(end_s * header.fps)
    first = min(max(first, 0), header.num_frames - 1)
    last = min(max(last, first + 1), header.num_frames)
    count = min(max_frames, last - first)
    return tuple(first + int((i + 0.5) * (last - first) / count) for i in range(count))


def _has_rate(header: Header) -> bool:
    return math.isfinite(header.fps) and header.fps > 0


class _Cache:
    """The thumbnails used last, up to so many bytes; an error weighs as much as a small one."""

    _ERROR_BYTES = 1024

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._kept: OrderedDict[MediaPart, Thumbnail | UnitError] = OrderedDict()

    def get(self, part: MediaPart) -> Thumbnail | UnitError | None:
        if part in self._kept:
            self._kept.move_to_end(part)
        return self._kept.get(part)

    def put(self, part: MediaPart, made: Thumbnail | UnitError) -> None:
        if isinstance(made, UnitError) and made.retryable:
            return
        self._kept[part] = made
        self._num_bytes += self._weight(made)
        while self._num_bytes > self._max_bytes and self._kept:
            self._num_bytes -= self._weight(self._kept.popitem(last=False)[1])

    def _weight(self, made: Thumbnail | UnitError) -> int:
        return made.num_bytes if isinstance(made, Thumbnail) else self._ERROR_BYTES


def _compressed(pixels: npt.NDArray[np.uint8], time_s: float | None = None) -> Picture:
    """Return uint8 RGB ``(height, width, 3)`` as a JPEG without any metadata."""
    file = io.BytesIO()
    # Colour at full resolution: halved, the red of a drawing or of a chart frays.
    Image.fromarray(pixels).save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0, optimize=True)
    height_px, width_px, _ = pixels.shape
    return Picture(file.getvalue(), width_px, height_px, time_s)
