"""Frames to tower rows: order, arithmetic, and the patch embedding as a matrix product."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl_batch.model.patches import LinearPatchEmbed, patch_rows, still_rows
from qvl_batch.model.resize import resize_frame
from tests.model.model_inputs import clip, picture

CPU = torch.device("cpu")


def test_order_is_merge_blocks_then_channel_time_y_x():
    """A pixel says where it is: (channel, frame, y, x) can be read off any entry."""
    frames, height, width = 4, 64, 96
    place = np.stack(
        np.meshgrid(*map(np.arange, (frames, height, width, 3)), indexing="ij"), axis=-1
    )
    for axis, picked in (("frame", 0), ("y", 1), ("x", 2), ("channel", 3)):
        pixels = place[..., picked].astype(np.uint8)
        rows = patch_rows(pixels, CPU, torch.float32).numpy() * 127.5 + 127.5
        values = rows.round().astype(int)
        assert values.shape == (2 * 4 * 6, 1536)
        features = values.reshape(2, 2, 3, 2, 2, 3, 2, 16, 16)
        index = np.indices(features.shape)
        group, block_y, block_x, in_y, in_x, channel, time, y, x = index
        expected = {
            "frame": group * 2 + time,
            "y": (block_y * 2 + in_y) * 16 + y,
            "x": (block_x * 2 + in_x) * 16 + x,
            "channel": channel,
        }[axis]
        np.testing.assert_array_equal(features, expected)


def test_an_image_is_its_frame_twice():
    still = picture(1, 32, 64).pixels
    twice = np.repeat(still, 2, axis=0)
    assert torch.equal(patch_rows(still, CPU, torch.float32), patch_rows(twice, CPU, torch.float32))


def test_every_level_is_normalised_in_float32():
    levels = np.arange(256, dtype=np.uint8).repeat(4 * 3).reshape(1, 32, 32, 3)
    found = set(patch_rows(levels, CPU, torch.float32).unique().tolist())
    expected = (np.arange(256, dtype=np.float32) - np.float32(127.5)) / np.float32(127.5)
    assert found == set(expected.tolist())


def test_linear_equals_the_convolution():
    torch.manual_seed(0)
    convolution = torch.nn.Conv3d(3, 64, (2, 16, 16), stride=(2, 16, 16))
    rows = patch_rows(clip(3).pixels, CPU, torch.float32)
    with torch.inference_mode():
        expected = convolution(rows.view(-1, 3, 2, 16, 16)).view(-1, 64)
        found = LinearPatchEmbed(convolution)(rows)
        exact = convolution.double()(rows.double().view(-1, 3, 2, 16, 16)).view(-1, 64)
    # Both sum 1,536 products in float32, in another order; neither is the better one.
    assert float((found - exact).abs().max()) <= 2e-6
    assert float((expected - exact).abs().max()) <= 2e-6


def test_a_still_needs_half_a_row():
    """Its frame once under the summed weights is its frame twice under the convolution's own."""
    torch.manual_seed(1)
    convolution = torch.nn.Conv3d(3, 64, (2, 16, 16), stride=(2, 16, 16))
    embed = LinearPatchEmbed(convolution)
    twice = patch_rows(picture(4).pixels, CPU, torch.float32)
    once = still_rows(picture(4).pixels, CPU, torch.float32)
    times = twice.view(-1, 3, 2, 256)
    assert torch.equal(once.view(-1, 3, 256), times[:, :, 0])
    assert torch.equal(once.view(-1, 3, 256), times[:, :, 1])
    with torch.inference_mode():
        found, plain = embed(once), embed(twice)
        exact = convolution.double()(twice.double().view(-1, 3, 2, 16, 16)).view(-1, 64)
    largest = float(exact.abs().max())
    assert float((found - exact).abs().max()) / largest < 1e-6
    assert float((found - plain).abs().max()) / largest < 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([(32, 64), (96, 32), (64, 64), (160, 128)]))
def test_resize_is_bicubic_antialiased_then_rounded(seed, size):
    frame = np.random.default_rng(seed).integers(0, 256, (48, 70, 3), np.uint8)
    found = resize_frame(frame, *size)
    assert found.shape == (*size, 3)
    assert found.dtype == np.uint8
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(frame).double().permute(2, 0, 1)[None],
        size=size,
        mode="bicubic",
        antialias=True,
    )[0].permute(1, 2, 0)
    # The float32 sums are within 1e-3 levels of the exact ones, then rounded to the nearest.
    assert float((torch.from_numpy(found).double() - exact.clamp(0, 255)).abs().max()) < 0.501


def test_resize_takes_read_only_frames_and_leaves_the_right_size_alone():
    frame = picture(5, 32, 64).pixels[0]
    frame.flags.writeable = False
    np.testing.assert_array_equal(resize_frame(frame, 32, 64), frame)
    assert resize_frame(frame, 64, 64).shape == (64, 64, 3)
