"""Lists of frames: which of them, at what size, at what times."""

from __future__ import annotations

import numpy as np

from qvl_batch.budget import (
    DOCUMENTED_TOTAL_PX,
    FRAME_FACTOR,
    choose_frames,
    frame_size,
    pair_seconds,
    smart_resize,
)
from qvl_batch.recipe import VideoBudget
from qvl_batch.units import PartPlan

# The official frame-list path of qwen-vl-utils 0.0.14: a frame first goes through the image path
# with a factor of 64 (4 to 16,384 such blocks), because the factor is passed where the patch size
# is meant; then all go through the video resize. Their times pretend 2 frames a second.
_LIST_FACTOR_PX = 64
_LIST_MIN_PX = 4 * _LIST_FACTOR_PX**2
_LIST_MAX_PX = 16_384 * _LIST_FACTOR_PX**2
_LIST_FPS = 2.0


def frame_list_indices(num_frames: int, max_frames: int = VideoBudget.max_frames) -> list[int]:
    """Return which frames of a list the official class embeds, in order.

    Above the limit they are evenly spaced and truncated (not rounded, unlike a file's); an odd
    number is made even by repeating the last.
    """
    if num_frames > max_frames:
        chosen = np.linspace(0, num_frames - 1, max_frames, dtype=int).tolist()
    else:
        chosen = list(range(num_frames))
    return chosen + chosen[-1:] * (len(chosen) % FRAME_FACTOR)


def official_first_size(height_px: int, width_px: int) -> tuple[int, int]:
    """Return the (height, width) to which the official class first resizes a listed frame.

    Raises:
        SizeError: If there is none.
    """
    return smart_resize(height_px, width_px, _LIST_MIN_PX, _LIST_MAX_PX, _LIST_FACTOR_PX)


def plan_official_list(
    num_frames: int, height_px: int, width_px: int, budget: VideoBudget
) -> PartPlan:
    """Return the plan of a list in the official way; the size is that of a frame as given.

    Raises:
        SizeError: If no size exists.
    """
    order = frame_list_indices(num_frames, budget.max_frames)
    first = official_first_size(height_px, width_px)
    height, width = frame_size(len(order), *first, budget, DOCUMENTED_TOTAL_PX)
    return _plan(order, height, width, pair_seconds(tuple(range(len(order))), _LIST_FPS))


def plan_sampled_list(
    num_frames: int,
    height_px: int,
    width_px: int,
    budget: VideoBudget,
    total_px: int,
    *,
    fps: float,
    max_frames: int,
) -> PartPlan:
    """Return the plan of a list of frames that were sampled at ``fps`` frames a second.

    All of them are embedded, the last one twice if their number is odd; above ``max_frames`` they
    are chosen as a file's are. Sizes are those of a video file with as many frames.

    Raises:
        SizeError: If no size exists.
    """
    if num_frames > max_frames:
        order = list(choose_frames(num_frames, 1.0, 1.0, max_frames))
    else:
        order = list(range(num_frames))
        order += order[-1:] * (num_frames % FRAME_FACTOR)
    height, width = frame_size(len(order), height_px, width_px, budget, total_px)
    return _plan(order, height, width, pair_seconds(tuple(order), fps))


def _plan(order: list[int], height: int, width: int, seconds: tuple[float, ...]) -> PartPlan:
    return PartPlan(
        segment=0, frame_indices=tuple(order), width_px=width, height_px=height, seconds=seconds
    )
