"""The recipe: everything that changes a vector, hashed; stated in every table."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from qvl_batch.errors import ConfigError

# Raised only when a golden output changes.
PREPROCESSING_VERSION = 1

DEFAULT_INSTRUCTION = "Represent the user's input."
ENCODINGS = ("float32", "float16", "int8", "binary")
TOKEN_LAYOUTS = ("unnested", "nested")


def _require(ok: bool, key: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"recipe.{key} is {value!r}.", f"Allowed: {allowed}.")


@dataclass(frozen=True, kw_only=True)
class ImageBudget:
    """Pixels of an image after the resize; the defaults are the official class's."""

    min_px: int = 4096
    max_px: int = 1_843_200

    def __post_init__(self) -> None:
        _require(self.min_px >= 1024, "image.min_px", self.min_px, "1024 (one token) or more")
        _require(
            self.min_px <= self.max_px, "image.max_px", self.max_px, f"min_px {self.min_px} or more"
        )


@dataclass(frozen=True, kw_only=True)
class VideoBudget:
    """Frames of a video and their pixels; defaults are those of the official video-file path.

    ``min_px`` and ``max_px`` hold for one frame, ``total_px`` for all frames of a video.
    """

    fps: float = 1.0
    max_frames: int = 64
    min_px: int = 131_072
    max_px: int = 786_432
    total_px: int = 117_964_800

    def __post_init__(self) -> None:
        _require(self.fps > 0, "video.fps", self.fps, "a number above 0")
        _require(self.max_frames >= 2, "video.max_frames", self.max_frames, "2 or more")
        _require(self.min_px >= 1024, "video.min_px", self.min_px, "1024 (one token) or more")
        _require(
            self.min_px <= self.max_px, "video.max_px", self.max_px, f"min_px {self.min_px} or more"
        )
        _require(self.total_px >= self.min_px, "video.total_px", self.total_px, "min_px or more")


@dataclass(frozen=True, kw_only=True)
class DocumentBudget:
    """A document is one image a page, rendered at ``dpi`` and resized like an image."""

    dpi: int = 144
    max_pages: int = 100
    min_px: int = 4096
    max_px: int = 1_843_200

    def __post_init__(self) -> None:
        _require(18 <= self.dpi <= 600, "document.dpi", self.dpi, "18 to 600")
        _require(self.max_pages >= 1, "document.max_pages", self.max_pages, "1 or more")
        _require(self.min_px >= 1024, "document.min_px", self.min_px, "1024 (one token) or more")
        _require(self.min_px <= self.max_px, "document.max_px", self.max_px, "min_px or more")


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """``video_s``: length of a video's segments, one row each; None: one row a video."""

    video_s: float | None = None

    def __post_init__(self) -> None:
        _require(
            self.video_s is None or self.video_s >= 1,
            "segmentation.video_s",
            self.video_s,
            "null, or 1 second or more",
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that changes a vector. Two equal recipes give equal vectors."""

    model_digest: str
    dim: int
    encodings: tuple[str, ...] = ("binary", "int8")
    instruction: str = DEFAULT_INSTRUCTION
    max_tokens: int = 8192
    token_layout: str = "unnested"
    image: ImageBudget = ImageBudget()
    video: VideoBudget = VideoBudget()
    document: DocumentBudget = DocumentBudget()
    segmentation: Segmentation = Segmentation()
    int8_scale: str = "row-absmax"
    preprocessing_version: int = PREPROCESSING_VERSION

    def __post_init__(self) -> None:
        _require(self.dim >= 8, "dim", self.dim, "8 or more")
        _require(
            bool(self.encodings) and set(self.encodings) <= set(ENCODINGS),
            "encodings",
            list(self.encodings),
            f"one or more of {', '.join(ENCODINGS)}",
        )
        _require(
            len(set(self.encodings)) == len(self.encodings),
            "encodings",
            list(self.encodings),
            "each encoding once",
        )
        _require(
            not {"float32", "float16"} <= set(self.encodings),
            "encodings",
            list(self.encodings),
            "float32 or float16, not both: they share the column `vector`",
        )
        _require(
            "binary" not in self.encodings or self.dim % 8 == 0,
            "dim",
            self.dim,
            "a multiple of 8 with the binary encoding",
        )
        _require(64 <= self.max_tokens <= 32_768, "max_tokens", self.max_tokens, "64 to 32768")
        _require(
            self.token_layout in TOKEN_LAYOUTS,
            "token_layout",
            self.token_layout,
            " or ".join(TOKEN_LAYOUTS),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, encodings sorted: the hashed form."""
        values = dataclasses.asdict(self)
        values["encodings"] = sorted(self.encodings)
        return values

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @property
    def recipe_id(self) -> str:
        """blake2b-128 hex of the canonical JSON."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        values = json.loads(text)
        return cls(
            **values
            | {
                "encodings": tuple(values["encodings"]),
                "image": ImageBudget(**values["image"]),
                "video": VideoBudget(**values["video"]),
                "document": DocumentBudget(**values["document"]),
                "segmentation": Segmentation(**values["segmentation"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class RerankRecipe:
    """Everything that changes a reranker's score of a pair."""

    model_digest: str
    instruction: str
    max_tokens: int = 10_240
    token_layout: str = "unnested"
    image: ImageBudget = ImageBudget()
    video: VideoBudget = VideoBudget()
    document: DocumentBudget = DocumentBudget()
    segmentation: Segmentation = Segmentation()
    preprocessing_version: int = PREPROCESSING_VERSION

    def __post_init__(self) -> None:
        _require(64 <= self.max_tokens <= 32_768, "max_tokens", self.max_tokens, "64 to 32768")
        _require(
            self.token_layout in TOKEN_LAYOUTS,
            "token_layout",
            self.token_layout,
            " or ".join(TOKEN_LAYOUTS),
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @property
    def recipe_id(self) -> str:
        """blake2b-128 hex of the canonical JSON."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, our value, their value) for every leaf that differs, sorted by key."""

    def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in values.items():
            if isinstance(value, dict):
                flat |= leaves(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value
        return flat

    mine, other = leaves(ours), leaves(theirs)
    return [
        (key, mine.get(key), other.get(key))
        for key in sorted(mine.keys() | other.keys())
        if mine.get(key) != other.get(key)
    ]
