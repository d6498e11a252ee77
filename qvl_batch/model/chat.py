"""The pieces of a prompt in the official order: words, special tokens, and pads of pictures.

ChatML as Qwen3-VL's template renders it, with the wording of the official embedder and reranker.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qvl_batch.budget import FACTOR_PX
from qvl_batch.units import EmbedInput, PartPlan, Vision

RERANK_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
)
DEFAULT_RERANK_INSTRUCTION = (
    "Given a search query, retrieve relevant candidates that answer the query."
)
USER_TURN = "user\n"
EMPTY_USER_TURN = "NULL"


@dataclass(frozen=True, slots=True)
class VisionShape:
    """What a prompt must know of an image or a video: tokens per temporal group, and times.

    ``rows`` and ``columns`` count language-model tokens (32 x 32 px). ``seconds`` has one time per
    group of a video and is empty for an image.
    """

    rows: int
    columns: int
    seconds: tuple[float, ...] = ()

    @property
    def groups(self) -> int:
        return len(self.seconds) or 1


def shape_of(part: Vision | PartPlan) -> VisionShape:
    """Return the prompt's view of decoded frames or of a plan."""
    if isinstance(part, PartPlan):
        height, width = part.height_px, part.width_px
    else:
        _, height, width, _ = part.pixels.shape
        if part.grid[0] != max(1, len(part.seconds)):
            raise ValueError(f"{part.grid[0]} pairs of frames, {len(part.seconds)} times")
    return VisionShape(height // FACTOR_PX, width // FACTOR_PX, part.seconds)


# A piece of a prompt: ordinary text, a special token by name, or the pads of a temporal group.
Piece = str | tuple[str] | tuple[str, int, int]


def vision_pieces(shapes: Sequence[VisionShape], pad: str, nested: bool) -> Iterable[Piece]:
    """Yield the markers, times and pads of images or videos.

    Un-nested is what the weights were released with (transformers 4.57: each group replaces the
    template's own marker pair); nested is what transformers 5.10 and later make of the same
    template (the outer pair stays).
    """
    for shape in shapes:
        outer = nested and bool(shape.seconds)
        if outer:
            yield ("<|vision_start|>",)
        for second in shape.seconds or (None,):
            if second is not None:
                yield f"<{second:.1f} seconds>"
            yield ("<|vision_start|>",)
            yield (pad, shape.rows, shape.columns)
            yield ("<|vision_end|>",)
        if outer:
            yield ("<|vision_end|>",)


def embed_instruction(instruction: str | None, default: str) -> str:
    """Return the system turn: stripped, with a final dot unless it ends in punctuation.

    Source: ``_format_messages`` of the official embedder. A blank instruction means the default,
    which is taken as it is.
    """
    stripped = (instruction or "").strip()
    if not stripped:
        return default
    return stripped if unicodedata.category(stripped[-1]).startswith("P") else stripped + "."


def content_pieces(
    texts: Sequence[str],
    images: Sequence[VisionShape],
    videos: Sequence[VisionShape],
    nested: bool,
) -> Iterable[Piece]:
    """Yield a turn's parts: all videos, all images, all texts; ``NULL`` if there is nothing."""
    yield from vision_pieces(videos, "<|video_pad|>", nested)
    yield from vision_pieces(images, "<|image_pad|>", nested)
    yield from texts
    if not (texts or images or videos):
        yield EMPTY_USER_TURN


def embed_pieces(
    system: str,
    texts: Sequence[str],
    images: Sequence[VisionShape],
    videos: Sequence[VisionShape],
    nested: bool,
) -> Iterable[Piece]:
    """Yield an embedding prompt; the tokenizer appends ``<|endoftext|>``."""
    yield ("<|im_start|>",)
    yield f"system\n{system}"
    yield ("<|im_end|>",)
    yield "\n"
    yield ("<|im_start|>",)
    yield USER_TURN
    yield from content_pieces(texts, images, videos, nested)
    yield ("<|im_end|>",)
    yield "\n"
    yield ("<|im_start|>",)
    yield "assistant\n"


def pair_pieces(
    instruction: str, query: EmbedInput, document: EmbedInput, nested: bool
) -> Iterable[Piece]:
    """Yield a reranking prompt."""

    def side(unit: EmbedInput) -> Iterable[Piece]:
        images, videos = [*map(shape_of, unit.images)], [*map(shape_of, unit.videos)]
        return content_pieces(unit.texts, images, videos, nested)

    yield ("<|im_start|>",)
    yield f"system\n{RERANK_SYSTEM}"
    yield ("<|im_end|>",)
    yield "\n"
    yield ("<|im_start|>",)
    yield f"user\n<Instruct>: {instruction}<Query>:"
    yield from side(query)
    yield "\n<Document>:"
    yield from side(document)
    yield ("<|im_end|>",)
    yield "\n"
    yield ("<|im_start|>",)
    yield "assistant\n"


def split_plans(plans: Sequence[PartPlan]) -> tuple[list[VisionShape], list[VisionShape]]:
    """Return the shapes of videos and of images."""
    shapes = [shape_of(plan) for plan in plans]
    return [shape for shape in shapes if shape.seconds], [s for s in shapes if not s.seconds]


def merged(pieces: Iterable[Piece]) -> Iterable[Piece]:
    """Join neighbouring texts: a tokenizer sees everything between two special tokens at once."""
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        if text:
            yield text
            text = ""
        yield piece
    if text:
        yield text
