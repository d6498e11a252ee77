"""Sizes and frames against the stored official grids, and against the rule stated anew."""

import dataclasses
import itertools
import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl_batch.budget import (
    DOCUMENTED_TOTAL_PX,
    Context,
    SizeError,
    choose_frames,
    frame_size,
    pair_seconds,
    plan_unit,
    smart_resize,
    vision_tokens,
)
from qvl_batch.errors import CorruptMediaError, LimitExceededError
from qvl_batch.model.prompt import PromptTokenizer
from qvl_batch.recipe import ImageBudget, Recipe, VideoBudget
from qvl_batch.units import Header

SIDES = st.one_of(st.integers(1, 300), st.integers(300, 9000))
SEEN_GRIDS = {  # (width, height) of the file: (rows, columns) of 16-px patches, officially
    (1, 1): (4, 4),
    (20, 30): (6, 4),
    (48, 48): (4, 4),
    (80, 112): (8, 4),
    (640, 480): (30, 40),
    (1500, 100): (6, 94),
    (333, 517): (32, 20),
    (1240, 1754): (100, 70),
    (6000, 4000): (68, 102),
    (1280, 1440): (90, 80),
    (200, 1): (2, 12),
}


@pytest.mark.parametrize("size", SEEN_GRIDS)
def test_official_grids(size):
    height, width = smart_resize(size[1], size[0], ImageBudget.min_px, ImageBudget.max_px)
    assert (height // 16, width // 16) == SEEN_GRIDS[size]


def test_ratio_above_200_is_refused():
    with pytest.raises(SizeError, match="above 200"):
        smart_resize(1, 201, 4096, 1_843_200)


@settings(max_examples=1500, deadline=None)
@given(SIDES, SIDES, st.sampled_from([(4096, 1_843_200), (131_072, 786_432), (4096, 4096)]))
def test_random_sizes_follow_the_rule(height_px, width_px, budget):
    """Nearest multiple of 32 (half to even) unless that leaves the budget; then scaled into it."""
    min_px, max_px = budget
    if max(height_px, width_px) > 200 * min(height_px, width_px):
        with pytest.raises(SizeError):
            smart_resize(height_px, width_px, min_px, max_px)
        return
    nearest = [max(32, 32 * round(Fraction(side, 32))) for side in (height_px, width_px)]
    area = nearest[0] * nearest[1]
    try:
        found = smart_resize(height_px, width_px, min_px, max_px)
    except SizeError:
        # Only a side that the scaling brings below one patch is refused.
        assert area > max_px
        assert min(height_px, width_px) * math.sqrt(max_px / (height_px * width_px)) < 32.001
        return
    assert found[0] % 32 == found[1] % 32 == 0
    if min_px <= area <= max_px:
        assert list(found) == nearest
        return
    scaled = [
        side * math.sqrt((max_px if area > max_px else min_px) / (height_px * width_px))
        for side in (height_px, width_px)
    ]
    for side, wanted in zip(found, scaled, strict=True):
        # Downwards if it was too large, upwards if too small, by less than one block.
        low, high = (-32, 0) if area > max_px else (0, 32)
        assert low - 1e-3 < side - wanted < high + 1e-3
    assert (found[0] * found[1] <= max_px) if area > max_px else (found[0] * found[1] >= min_px)


@settings(max_examples=1000, deadline=None)
@given(
    st.integers(1, 4000),
    st.sampled_from([1.0, 10.0, 15.0, 23.976, 24.0, 25.0, 29.97, 30.0, 59.94]),
    st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]),
    st.integers(1, 80),
)
def test_frames_follow_the_rule(total, source_fps, fps, max_frames):
    count = total / source_fps * fps
    count = min(min(max(count, 4), max_frames // 2 * 2), total)
    count = math.floor(count / 2) * 2
    if total < 2 or count < 2:
        with pytest.raises(SizeError):
            choose_frames(total, source_fps, fps, max_frames)
        return
    found = choose_frames(total, source_fps, fps, max_frames)
    assert list(found) == torch.linspace(0, total - 1, count).round().long().tolist()


@pytest.mark.parametrize(
    ("total", "source_fps", "number"),
    [(150, 30.0, 4), (250, 25.0, 10), (7, 1.0, 6), (2400, 24.0, 64), (3, 10.0, 2), (2, 10.0, 2)],
)
def test_official_frame_numbers(total, source_fps, number):
    chosen = choose_frames(total, source_fps, 1.0, 64)
    assert len(chosen) == number
    assert chosen[0] == 0
    assert chosen[-1] == total - 1
    assert all(a <= b for a, b in itertools.pairwise(chosen))


def test_official_frame_sizes():
    budget = VideoBudget()
    assert frame_size(4, 240, 320, budget, budget.total_px) == (320, 448)
    assert frame_size(64, 720, 1280, budget, DOCUMENTED_TOTAL_PX) == (352, 640)
    assert frame_size(64, 720, 1280, budget, budget.total_px) == (640, 1152)


def test_stored_video_grids(golden):
    """Every stored grid of a video file is that of our frame choice and size."""
    sizes = {
        "v30_5s_320x240": (150, 30.0, 240, 320),
        "v25_10s_640x360": (250, 25.0, 360, 640),
        "v24_100s_160x120": (2400, 24.0, 120, 160),
        "v1_7s_320x240": (7, 1.0, 240, 320),
    }
    cases = json.loads((golden / "golden.json").read_text())["cases"]
    seen = 0
    for case in cases.values():
        units = case["input"]
        if not (isinstance(units, list) and len(units) == 1 and "video_grid_thw" in case):
            continue
        name = str(units[0].get("video")).removeprefix("media/").removesuffix(".mp4")
        if name not in sizes:
            continue
        total, rate, height_px, width_px = sizes[name]
        options = units[0].get("fps") or 1.0, units[0].get("max_frames") or 64
        chosen = choose_frames(total, rate, *options)
        height, width = frame_size(
            len(chosen), height_px, width_px, VideoBudget(), VideoBudget.total_px
        )
        assert case["video_grid_thw"] == [[len(chosen) // 2, height // 16, width // 16]]
        seen += 1
    assert seen >= 6


def test_times_are_means_of_pairs():
    assert pair_seconds((0, 50, 99, 149), 30.0) == ((50 / 30) / 2, (99 / 30 + 149 / 30) / 2)


@pytest.fixture(scope="module")
def prompts(embedding_folder):
    return PromptTokenizer(embedding_folder)


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 4000), st.integers(16, 4000), st.integers(16, 4000))
def test_a_planned_video_fits_the_context(prompts, frames, height_px, width_px):
    """Where the official budget passes the context, the documented total is used instead."""
    recipe = Recipe(model_digest="x", dim=64)
    context = Context(lambda plan: prompts.count(plans=[plan]), recipe.max_tokens)
    header = Header("video", width_px, height_px, frames, 24.0, frames / 24.0)
    if max(height_px, width_px) > 200 * min(height_px, width_px):
        with pytest.raises(CorruptMediaError):
            plan_unit(header, recipe, context, uri="v")
        return
    try:
        (plan,) = plan_unit(header, recipe, context, uri="v")
    except LimitExceededError as error:
        reason = error.reason
    else:
        tokens = context.count_tokens(plan)
        assert vision_tokens(plan) < tokens <= recipe.max_tokens
        height, width = frame_size(
            plan.num_frames, height_px, width_px, recipe.video, recipe.video.total_px
        )
        official = dataclasses.replace(plan, height_px=height, width_px=width)
        assert plan == official or context.count_tokens(official) > recipe.max_tokens
        return
    # 64 frames at no less than 131,072 px: only long sides that are rounded up pass the context.
    assert "tokens, the context is 8192" in reason
