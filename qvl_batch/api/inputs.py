"""What people hand in: strings, paths, pictures, and dictionaries like the official ones.

=====================  ==========================================================================
item                   becomes
=====================  ==========================================================================
``str``                a text; never a path or an address
``pathlib.Path``       an image or a video, told by its first bytes
``bytes``              the same
Pillow image           an image
uint8 array            an image ``(height, width, 3)``, or frames ``(frames, height, width, 3)``
mapping                any of the keys below
`Item`                 itself
=====================  ==========================================================================

Keys of a mapping: ``text`` and ``image`` are one value or a list of values, an image being a path,
an object-store address, bytes, a Pillow image or an array. ``video`` is a path, an address, bytes,
frames, or a list of those: a list whose members are pictures or paths of pictures is one list of
frames, any other list is several videos. ``document`` is a path, an address or bytes of a PDF whose
``page`` (from 0) is embedded. ``instruction``, ``fps`` and ``max_frames`` hold for the item. With
``{}`` the prompt is the official one for nothing, ``NULL``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from qvl_batch.errors import InputError
from qvl_batch.media.held import is_picture
from qvl_batch.units import Kind

KEYS = ("document", "fps", "image", "instruction", "max_frames", "page", "text", "video")
# By which the official class tells a list of frames from a list of videos, and a few more.
_PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tiff", ".tif", ".avif", ".svg"),
)
_FORMS = "An item is a str, a pathlib.Path, bytes, a Pillow image, a uint8 array or a mapping."


@dataclass(frozen=True, slots=True)
class Medium:
    """One image, video, page or list of frames, not opened yet.

    ``value`` is a uri, bytes, a picture, or a tuple of those for a list of frames; ``kind`` is
    ``mixed`` where the first bytes tell an image from a video. ``name`` stands for it in messages.
    A medium that a table names also has what the table says of it: the ``etag`` it must still
    have, the range of bytes where it lies, and which ``segment`` of ``segment_s`` seconds of a
    video is meant (None: all of it).
    """

    kind: Kind
    value: Any
    name: str
    page: int | None = None
    etag: str | None = None
    byte_offset: int | None = None
    byte_length: int | None = None
    segment: int | None = None
    segment_s: float | None = None

    @property
    def is_frame_list(self) -> bool:
        return isinstance(self.value, tuple)

    @property
    def listed(self) -> dict[str, Any]:
        """What `Fetcher.fetch` is told of it beside its address."""
        names = ("etag", "byte_offset", "byte_length")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt to be. ``instruction=None`` means the default one."""

    texts: tuple[str, ...] = ()
    media: tuple[Medium, ...] = ()
    instruction: str | None = None
    fps: float | None = None
    max_frames: int | None = None


def parse_item(value: object) -> Item:
    """Return the item of one of the forms above; nothing is opened.

    Raises:
        InputError: If it is of no such form, saying what is wrong and what would be right.
    """
    if isinstance(value, Item):
        return value
    if isinstance(value, str):
        return Item(texts=(value,))
    if isinstance(value, Mapping):
        return _parse_mapping(value)
    if isinstance(value, np.ndarray) and value.ndim == 4:
        return Item(media=(_frames(value, "frames"),))
    if is_picture(value):
        return Item(media=(Medium("image", value, "image"),))
    if isinstance(value, PurePath | bytes | bytearray | memoryview):
        return Item(media=(_file("mixed", value, "bytes"),))
    raise InputError(f"{_described(value)} is no item.", _FORMS)


def _parse_mapping(values: Mapping[str, Any]) -> Item:
    unknown = sorted(str(key) for key in values if key not in KEYS)
    if unknown:
        raise InputError(f"Unknown key {unknown[0]!r} in an item.", f"Known: {', '.join(KEYS)}.")
    texts = _listed(values.get("text"))
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"text is {_described(text)}.", "Give a str or a list of them.")
    page = values.get("page")
    if page is not None and (not isinstance(page, int) or page < 0):
        raise InputError(f"page is {page!r}.", "Give a whole number from 0.")
    media = _videos(values.get("video"))
    media += [_image(image, i) for i, image in enumerate(_listed(values.get("image")))]
    if (document := values.get("document")) is not None:
        media.append(_file("document", document, "document", page))
    if not texts and not media and isinstance(values.get("video"), list | tuple):
        # An empty list of frames leaves an empty user turn, where nothing at all would be NULL.
        texts = [""]
    fps, max_frames = values.get("fps"), values.get("max_frames")
    if fps is not None and not (isinstance(fps, int | float) and 0 < fps < float("inf")):
        raise InputError(f"fps is {fps!r}.", "Give a number above 0.")
    if max_frames is not None and not (isinstance(max_frames, int) and max_frames >= 2):
        raise InputError(f"max_frames is {max_frames!r}.", "Give a whole number of 2 or more.")
    instruction = values.get("instruction")
    if instruction is not None and not isinstance(instruction, str):
        raise InputError(f"instruction is {_described(instruction)}.", "Give a str.")
    return Item(tuple(texts), tuple(media), instruction, fps, max_frames)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _image(value: Any, number: int) -> Medium:
    if is_picture(value):
        return Medium("image", value, f"image {number}")
    return _file("image", value, f"image {number}")


def _videos(value: Any) -> list[Medium]:
    if isinstance(value, list | tuple):
        if not value:
            return []
        if _is_frame(value[0]):
            return [_frames(value, "video 0")]
        return [_video(video, i) for i, video in enumerate(value)]
    return [] if value is None else [_video(value, 0)]


def _video(value: Any, number: int) -> Medium:
    is_array = isinstance(value, np.ndarray) and value.ndim == 4
    if is_array or isinstance(value, list | tuple):
        return _frames(value, f"video {number}")
    return _file("video", value, f"video {number}")


def _is_frame(value: Any) -> bool:
    if is_picture(value):
        return True
    return isinstance(value, str | PurePath) and str(value).lower().endswith(_PICTURE_SUFFIXES)


def _frames(values: Any, name: str) -> Medium:
    frames = []
    for i, value in enumerate(values):
        if is_picture(value):
            frames.append(value)
        elif isinstance(value, str | PurePath | bytes | bytearray | memoryview):
            frames.append(_file("image", value, name).value)
        else:
            raise InputError(
                f"Frame {i} of {name} is {_described(value)}.",
                "A frame is a path, an address, bytes, a Pillow image or a uint8 array.",
            )
    if not frames:
        raise InputError(f"{name} has no frame.", "Give at least one.")
    return Medium("video", tuple(frames), name)


def _file(kind: Kind, value: Any, name: str, page: int | None = None) -> Medium:
    if isinstance(value, bytes | bytearray | memoryview):
        return Medium(kind, bytes(value), name, page)
    if isinstance(value, str | PurePath):
        return Medium(kind, str(value), str(value), page)
    raise InputError(
        f"{kind} is {_described(value)}.", "Give a path, an object-store address or bytes."
    )


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {value.shape}"
    return f"a {type(value).__name__}"
