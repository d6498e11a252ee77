"""The tower against transformers' own, and against itself in any chunks."""

import numpy as np
import pytest
import torch
from transformers import Qwen3VLModel

from qvl_batch.model.load import load_checkpoint
from qvl_batch.model.patches import patch_rows
from qvl_batch.model.tower import VisionTower, join_features
from tests.model.model_inputs import clip, picture

VISIONS = [picture(1), clip(2, 3), picture(3, 32, 160), clip(4, 1, 96, 32), picture(5)]


@pytest.fixture(scope="module")
def visual(embedding_folder):
    model = load_checkpoint(embedding_folder, dtype=torch.float32, device=torch.device("cpu"))
    return model.visual


def rows_of(features):
    return [features.embeds, *features.deepstack]


def difference(found, expected):
    """The largest difference in the norm of one output, relative."""
    pairs = zip(rows_of(found), rows_of(expected), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def test_equals_transformers_in_float64(visual, embedding_folder):
    """Its Conv3d over repeated stills, its positions a patch: all visions in one pass.

    In float32 its own result is 2e-6 away from that in float64, so ours need not be nearer.
    """
    theirs = Qwen3VLModel.from_pretrained(embedding_folder, dtype=torch.float64).visual.eval()
    rows = [patch_rows(vision.pixels, torch.device("cpu"), torch.float64) for vision in VISIONS]
    with torch.inference_mode():
        out = theirs(torch.cat(rows), grid_thw=torch.tensor([v.grid for v in VISIONS]))
    found = join_features(VisionTower(visual, max_patches=10_000).features(VISIONS))
    for ours, expected in zip(
        rows_of(found), [out.pooler_output, *out.deepstack_features], strict=True
    ):
        assert ours.shape == expected.shape
        assert float((ours - expected).norm() / expected.norm()) < 2e-6


@pytest.mark.parametrize("max_patches", [1, 20, 30, 48, 100])
def test_chunks_change_nothing(visual, max_patches):
    whole = VisionTower(visual, max_patches=10_000).features(VISIONS)
    split = VisionTower(visual, max_patches=max_patches).features(VISIONS)
    for vision, found, expected in zip(VISIONS, split, whole, strict=True):
        assert len(found.embeds) == np.prod(vision.grid) // 4
        assert difference(found, expected) < 2e-6


def test_out_of_memory_halves_and_completes(visual):
    whole = VisionTower(visual, max_patches=10_000).features(VISIONS)
    short = VisionTower(visual, max_patches=10_000, hard_limit_patches=30)
    for found, expected in zip(short.features(VISIONS), whole, strict=True):
        assert difference(found, expected) < 2e-6
    assert short.max_patches <= 30


def test_one_image_too_large_is_out_of_memory(visual):
    short = VisionTower(visual, max_patches=10_000, hard_limit_patches=16)
    with pytest.raises(torch.OutOfMemoryError, match="24 patches of one image"):
        short.features([clip(1, 1, 64, 64), picture(1, 64, 96)])


def test_nothing_gives_nothing(visual):
    assert VisionTower(visual, max_patches=10).features([]) == []
