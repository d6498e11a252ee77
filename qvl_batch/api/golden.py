"""Folders of golden outputs of the official classes: what was fed, what came out.

The format is described in the README of such a folder: ``golden.json`` with one entry per case,
``golden.npz`` with arrays named ``<case>/<what>``, and the media they were made from. Any field may
be missing; what is there is compared.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qvl_batch.errors import InputError

# By which the official class tells a list of frames from a list of videos.
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tiff", ".svg")
_LONE_NULL = "<|im_start|>user\nNULL<|im_end|>"
_NESTED = re.compile(r"<\|vision_start\|><\d+\.\d seconds>")


@dataclass(frozen=True, slots=True)
class GoldenUnit:
    """One unit as it was fed; paths as written. A frame list is a tuple inside ``videos``.

    ``fps`` and ``max_frames`` hold for video files; None or 0 means the default.
    """

    texts: tuple[str, ...]
    images: tuple[str, ...]
    videos: tuple[str | tuple[str, ...], ...]
    instruction: str | None
    fps: float | None
    max_frames: int | None


@dataclass(frozen=True)
class GoldenCase:
    """One case: its entry of golden.json and its arrays."""

    name: str
    entry: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]]

    @property
    def is_rerank(self) -> bool:
        """Whether it is about query-document pairs."""
        fed = self.entry.get("input")
        return isinstance(fed, dict) and bool({"query", "documents"} & fed.keys())

    def units(self) -> list[GoldenUnit]:
        """Return the units of an embedding case."""
        fed = self.entry.get("input", [])
        return [_unit(item) for item in (fed if isinstance(fed, list) else [fed])]

    def pair_units(self) -> tuple[GoldenUnit, list[GoldenUnit], str | None]:
        """Return query, documents and instruction of a reranking case.

        Frame rate and number hold for the whole request: the official class ignores those of a
        document.
        """
        fed = self.entry["input"]
        shared = {key: fed.get(key) for key in ("fps", "max_frames")}
        documents = fed.get("documents") or []
        return (
            _unit((fed.get("query") or {}) | shared),
            [_unit(item | shared) for item in documents],
            fed.get("instruction"),
        )

    def official_failure(self) -> str:
        """Return how the official code failed on an embedding case, or an empty string."""
        if self.entry.get("error"):
            return str(self.entry["error"]).strip().splitlines()[-1][:200]
        fed = self.entry.get("input", [])
        n_in = self.entry.get("n_in", len(fed) if isinstance(fed, list) else 1)
        n_out = self.entry.get("n_out")
        if n_out is None:
            vectors = self.arrays.get("embedding")
            n_out = n_in if vectors is None else len(vectors)
        if n_out < n_in:
            return f"{n_in} units in, {n_out} vector(s) out"
        if any(map(is_lone_null, _decoded(self.entry))):
            return "the batch was replaced by a lone NULL prompt"
        return ""

    def official_pair_failure(self, index: int, num_scores: int) -> str:
        """Return how the official code failed on one pair, or an empty string."""
        if self.entry.get("error"):
            return str(self.entry["error"]).strip().splitlines()[-1][:200]
        if index >= num_scores:
            return f"{num_scores} score(s) out"
        pairs = self.entry.get("docs") or []
        if index < len(pairs) and any(map(is_lone_null, _decoded(pairs[index]))):
            return "the pair was replaced by a lone NULL prompt"
        return ""


def is_lone_null(prompt: str) -> bool:
    """Whether a prompt is the official class's stand-in for a failed batch: no system turn."""
    return prompt.startswith(_LONE_NULL)


def _decoded(entry: dict[str, Any]) -> Iterator[str]:
    stated = entry.get("decoded") or entry.get("decoded_head") or []
    if isinstance(stated, dict):
        stated = stated.get("head", [])
    yield from [stated] if isinstance(stated, str) else [text for text in stated if text]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        words = (value["repeat"].format(i=i) for i in range(value["count"]))
        return value.get("joined_by", " ").join(words)
    return str(value)


def _is_image_path(value: Any) -> bool:
    return isinstance(value, str) and value.lower().endswith(_IMAGE_SUFFIXES)


def _videos(value: Any) -> tuple[str | tuple[str, ...], ...]:
    """A list that begins with an image path is one list of frames; any other, several videos."""
    listed = _as_list(value)
    if isinstance(value, list) and listed and _is_image_path(listed[0]):
        return (tuple(listed),)
    return tuple(tuple(item) if isinstance(item, list) else item for item in listed)


def _unit(item: dict[str, Any]) -> GoldenUnit:
    return GoldenUnit(
        texts=tuple(_text(text) for text in _as_list(item.get("text")) if text is not None),
        images=tuple(str(path) for path in _as_list(item.get("image"))),
        videos=_videos(item.get("video")),
        instruction=item.get("instruction"),
        fps=item.get("fps"),
        max_frames=item.get("max_frames"),
    )


def read_golden(folder: Path) -> tuple[dict[str, Any], list[GoldenCase]]:
    """Return what golden.json says of itself, and its cases in order.

    Raises:
        InputError: If the folder, golden.json or its cases are missing or unreadable.
    """
    path = folder / "golden.json"
    if not path.is_file():
        raise InputError(
            f"There is no golden.json in {folder}.", "Give a folder of golden outputs."
        )
    arrays: dict[str, dict[str, npt.NDArray[Any]]] = {}
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        cases = stated["cases"]
        if (folder / "golden.npz").is_file():
            with np.load(folder / "golden.npz", allow_pickle=False) as stored:
                for key in stored.files:
                    # A case's name may itself hold a slash; the longest that fits owns the array.
                    owner = max(
                        (name for name in cases if key.startswith(name + "/")), key=len, default=""
                    )
                    arrays.setdefault(owner, {})[key[len(owner) + 1 :]] = stored[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder} can not be read as golden outputs: {type(error).__name__}: {error}.",
            "Check golden.json and golden.npz.",
        ) from None
    about = {key: value for key, value in stated.items() if key != "cases"}
    return about, [GoldenCase(name, entry, arrays.get(name, {})) for name, entry in cases.items()]


def uses_nested_layout(cases: list[GoldenCase]) -> bool:
    """Whether the goldens were made by a transformers that nests the vision tokens of videos."""
    prompts = [
        prompt
        for case in cases
        for entry in [case.entry, *(case.entry.get("docs") or [])]
        for prompt in _decoded(entry)
    ]
    return any(_NESTED.search(prompt) for prompt in prompts)


def has_palette_transparency(data: bytes) -> bool:
    """Whether an image file is of palette kind with a transparent colour.

    transformers 4.57 shows such a picture as it is, 5.x on white: the files of one golden folder
    can only be one of both.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        at = 8
        while at + 8 <= len(data):
            length, kind = struct.unpack_from(">I4s", data, at)
            if kind == b"tRNS":
                return True
            if kind == b"IDAT":
                return False
            at += 12 + length
        return False
    if data[:6] in (b"GIF87a", b"GIF89a"):
        # Graphic control extension: introducer, label, size 4, then the flags.
        at = data.find(b"\x21\xf9\x04")
        return at >= 0 and at + 3 < len(data) and bool(data[at + 3] & 1)
    return False
