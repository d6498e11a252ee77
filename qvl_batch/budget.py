"""Which frames, at what size, for how many tokens: pure functions of a header.

Everything here is decided before anything is decoded. The rules are those of the official
embedder (Qwen3-VL-Embedding) with qwen-vl-utils 0.0.14, whose names are kept where there are any.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qvl_batch.errors import CorruptMediaError, LimitExceededError
from qvl_batch.recipe import DocumentBudget, ImageBudget, Recipe, RerankRecipe, VideoBudget
from qvl_batch.units import Header, PartPlan

PATCH_PX = 16
MERGE = 2
FACTOR_PX = PATCH_PX * MERGE
FRAME_FACTOR = 2
MIN_FRAMES = 4
MAX_RATIO = 200
# The documented budget of all frames of a video (10 x 768 x 32 x 32): used where the budget of the
# video-file path would pass the context, on which the official class raises.
DOCUMENTED_TOTAL_PX = 7_864_320


class SizeError(ValueError):
    """No size within the budget exists for these sides."""


def smart_resize(
    height_px: int, width_px: int, min_px: int, max_px: int, factor_px: int = FACTOR_PX
) -> tuple[int, int]:
    """Return the (height, width) to resize to: multiples of the factor within the pixel budget.

    Source: ``smart_resize`` of qwen-vl-utils 0.0.14, with Python's rounding half to even.

    Raises:
        SizeError: If one side is more than 200 times the other, or if not even one patch would be
            left of the shorter side.
    """
    if min(height_px, width_px) < 1:
        raise SizeError(f"size {width_px}x{height_px} has no pixel")
    if max(height_px, width_px) / min(height_px, width_px) > MAX_RATIO:
        raise SizeError(f"aspect ratio of {width_px}x{height_px} is above {MAX_RATIO}")
    height = max(factor_px, round(height_px / factor_px) * factor_px)
    width = max(factor_px, round(width_px / factor_px) * factor_px)
    if height * width > max_px:
        beta = math.sqrt((height_px * width_px) / max_px)
        height = math.floor(height_px / beta / factor_px) * factor_px
        width = math.floor(width_px / beta / factor_px) * factor_px
    elif height * width < min_px:
        beta = math.sqrt(min_px / (height_px * width_px))
        height = math.ceil(height_px * beta / factor_px) * factor_px
        width = math.ceil(width_px * beta / factor_px) * factor_px
    if min(height, width) < factor_px:
        raise SizeError(f"{width_px}x{height_px} within {max_px} px leaves no {factor_px}-px patch")
    return height, width


def choose_frames(
    num_frames: int, source_fps: float, fps: float, max_frames: int
) -> tuple[int, ...]:
    """Return the indices of the frames to embed, evenly spaced from first to last.

    Source: ``smart_nframes`` of qwen-vl-utils 0.0.14 (at least 4 frames, an even number, never
    more than there are), then ``torch.linspace(0, total - 1, n).round()``.

    Returns:
        Non-decreasing indices in ``[0, num_frames)``, an even number of them, at least 2.

    Raises:
        SizeError: If there are fewer than 2 frames, or no frame rate.
    """
    if num_frames < FRAME_FACTOR:
        raise SizeError(f"{num_frames} frame(s); a video needs at least {FRAME_FACTOR}")
    if not (math.isfinite(source_fps) and source_fps > 0):
        raise SizeError(f"average frame rate is {source_fps}")
    most = max_frames // FRAME_FACTOR * FRAME_FACTOR
    wanted = min(max(num_frames / source_fps * fps, MIN_FRAMES), most, num_frames)
    n = int(wanted) // FRAME_FACTOR * FRAME_FACTOR
    if n < FRAME_FACTOR:
        raise SizeError(f"at most {max_frames} frame(s); a video needs at least {FRAME_FACTOR}")
    return tuple(int(i) for i in _linspace(num_frames - 1, n).round())


def _linspace(last: int, n: int) -> npt.NDArray[np.float32]:
    """Return ``torch.linspace(0, last, n)`` to the bit.

    torch steps in float32, forwards to the middle and backwards from the end, with fused
    multiply-add. Float64 steps would choose other frames of some videos above 100,000 frames.
    """
    step = np.float64(np.float32(last) / np.float32(n - 1))
    forwards = step * np.arange(n // 2)
    # The product is exact in float64, so the difference is rounded once, as fused.
    backwards = np.float64(np.float32(last)) - step * np.arange(n - n // 2 - 1, -1, -1)
    return np.concatenate([forwards, backwards]).astype(np.float32)


def frame_size(
    num_frames: int, height_px: int, width_px: int, budget: VideoBudget, total_px: int
) -> tuple[int, int]:
    """Return the (height, width) of every frame of a video of ``num_frames`` chosen frames.

    Source: ``fetch_video`` of qwen-vl-utils 0.0.14: a frame gets ``total_px / frames * 2`` but at
    most ``max_px``, and never less than 1.05 x ``min_px``.
    """
    share = max(
        min(VideoBudget.max_px, total_px / num_frames * FRAME_FACTOR), int(budget.min_px * 1.05)
    )
    return smart_resize(height_px, width_px, budget.min_px, int(min(budget.max_px, share)))


def pair_seconds(frame_indices: tuple[int, ...], source_fps: float) -> tuple[float, ...]:
    """Return one time per pair of frames: the mean of its first and last index over the rate."""
    seconds = [i / source_fps for i in frame_indices]
    return tuple((a + b) / 2 for a, b in zip(seconds[::2], seconds[1::2], strict=True))


def vision_tokens(plan: PartPlan) -> int:
    """Return the language-model tokens of the part's pixels, without markers and times."""
    groups = len(plan.seconds) if plan.is_video else 1
    return groups * (plan.height_px // FACTOR_PX) * (plan.width_px // FACTOR_PX)


def largest_part_bytes(recipe: Recipe | RerankRecipe, kind: str) -> int:
    """Return an upper bound of the uint8 RGB bytes that one unit of this kind decodes to."""
    image = recipe.image.max_px * 3
    video = recipe.video.max_frames * recipe.video.max_px * 3
    return {
        "text": 4 * recipe.max_tokens,
        "image": image,
        "document": recipe.document.max_pages * recipe.document.max_px * 3,
        "video": video,
        "mixed": max(image, video),
    }[kind]


@dataclass(frozen=True, slots=True)
class Context:
    """How many tokens the prompt of a part takes, and how many there may be.

    ``count_tokens`` leaves out what may be cut: texts stand behind the part, and the official class
    cuts them (``PromptTokenizer.count_uncuttable``).
    """

    count_tokens: Callable[[PartPlan], int]
    max_tokens: int

    def excess(self, plan: PartPlan) -> int:
        """Return by how many tokens the plan passes the context; 0 or less if it fits."""
        return self.count_tokens(plan) - self.max_tokens


def plan_image(header: Header, budget: ImageBudget | DocumentBudget) -> PartPlan:
    """Return the one part of an image."""
    height, width = smart_resize(header.height_px, header.width_px, budget.min_px, budget.max_px)
    return PartPlan(segment=0, frame_indices=(0,), width_px=width, height_px=height)


def plan_document(header: Header, budget: DocumentBudget) -> list[PartPlan]:
    """Return one part a page, counted from 0."""
    plans = []
    for page, (width_px, height_px) in enumerate(header.page_sizes_px):
        height, width = smart_resize(height_px, width_px, budget.min_px, budget.max_px)
        plans.append(
            PartPlan(
                segment=page, frame_indices=(page,), width_px=width, height_px=height, page=page
            )
        )
    return plans


def split_video(header: Header, segment_s: float | None) -> list[tuple[int, int]]:
    """Return the [first, last) frame ranges of a video's segments.

    A last segment too short for a pair of frames joins the one before it.
    """
    if segment_s is None or not (math.isfinite(header.fps) and header.fps > 0):
        return [(0, header.num_frames)]
    per_segment = segment_s * header.fps
    count = max(1, math.ceil(header.num_frames / per_segment))
    edges = [min(header.num_frames, round(i * per_segment)) for i in range(count)]
    edges.append(header.num_frames)
    ranges = [(a, b) for a, b in itertools.pairwise(edges) if b > a]
    if len(ranges) > 1 and ranges[-1][1] - ranges[-1][0] < FRAME_FACTOR:
        ranges[-2:] = [(ranges[-2][0], ranges[-1][1])]
    return ranges


def plan_video(
    header: Header,
    budget: VideoBudget,
    context: Context,
    *,
    segment_s: float | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
) -> list[PartPlan]:
    """Return one part a segment, each with its frames, size and times.

    The budget of the official video-file path is used where it fits the context; where the
    official class would raise, the documented total of 7,864,320 pixels is.

    Raises:
        SizeError: If the video has too few frames or an impossible size.
        LimitExceededError: If not even the documented total fits the context.
    """
    plans = []
    ranges = split_video(header, segment_s)
    for segment, (first, last) in enumerate(ranges):
        chosen = choose_frames(
            last - first, header.fps, fps or budget.fps, max_frames or budget.max_frames
        )
        tried = []
        for total_px in (budget.total_px, min(budget.total_px, DOCUMENTED_TOTAL_PX)):
            height, width = frame_size(
                len(chosen), header.height_px, header.width_px, budget, total_px
            )
            plan = PartPlan(
                segment=segment,
                frame_indices=tuple(first + i for i in chosen),
                width_px=width,
                height_px=height,
                start_s=first / header.fps,
                end_s=last / header.fps,
                seconds=pair_seconds(chosen, header.fps),
            )
            excess = context.excess(plan)
            if excess <= 0:
                break
            tried.append(context.max_tokens + excess)
        else:
            raise LimitExceededError(
                "",
                f"{len(chosen)} frames of {width}x{height} px need {tried[-1]} tokens, the context "
                f"is {context.max_tokens}: lower recipe.video.max_frames or raise "
                "recipe.max_tokens",
            )
        plans.append(plan)
    return plans


def plan_unit(
    header: Header,
    recipe: Recipe | RerankRecipe,
    context: Context,
    *,
    uri: str,
    fps: float | None = None,
    max_frames: int | None = None,
) -> list[PartPlan]:
    """Return the parts, one a row, that a unit with this header is decoded to.

    Raises:
        CorruptMediaError: If no size or frame choice exists for the medium.
        LimitExceededError: If it has too many pages or does not fit the context.
    """
    try:
        if header.kind == "document":
            pages = len(header.page_sizes_px)
            if pages > recipe.document.max_pages:
                raise LimitExceededError(
                    uri,
                    f"{pages} pages, the limit is {recipe.document.max_pages}: raise "
                    "recipe.document.max_pages",
                )
            plans = plan_document(header, recipe.document)
        elif header.kind == "video":
            plans = plan_video(
                header,
                recipe.video,
                context,
                segment_s=recipe.segmentation.video_s,
                fps=fps,
                max_frames=max_frames,
            )
        else:
            plans = [plan_image(header, recipe.image)]
    except SizeError as error:
        raise CorruptMediaError(uri, str(error)) from None
    except LimitExceededError as error:
        raise LimitExceededError(uri, error.reason) from None
    for plan in plans:
        excess = context.excess(plan)
        if excess > 0:
            raise LimitExceededError(
                uri,
                f"needs {context.max_tokens + excess} tokens, the context is {context.max_tokens}: "
                "lower the pixel budget or raise recipe.max_tokens",
            )
    return plans
