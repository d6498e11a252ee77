"""From uint8 frames to the vision tower's input rows, on the device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qvl_batch.budget import FRAME_FACTOR, MERGE, PATCH_PX

# (x - 127.5) / 127.5 in float32 is bit-equal to the official processor's fused rescale and
# normalise with mean = std = 0.5; (x / 255 - 0.5) / 0.5 is not.
_HALF_RANGE = 127.5


def patch_rows(
    pixels: npt.NDArray[np.uint8], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Return the normalised patches of an image or a video.

    Source: the patchify of transformers' Qwen2-VL image processor: rows in 2 x 2 merge blocks,
    features ordered (channel, time, y, x); an image's one frame is repeated.

    Args:
        pixels: uint8 of shape (frames, height, width, 3); sides are multiples of 32.
        device: Where the rows are made: only the uint8 frames are copied there.
        dtype: Of the result; the arithmetic is float32.

    Returns:
        Shape (groups * height / 16 * width / 16, 1536).
    """
    frames = torch.tensor(pixels).to(device, non_blocking=True)
    if frames.shape[0] == 1:
        frames = frames.expand(FRAME_FACTOR, -1, -1, -1)
    count, height, width, channels = frames.shape
    groups, rows, columns = count // FRAME_FACTOR, height // PATCH_PX, width // PATCH_PX
    blocks = frames.reshape(
        groups,
        FRAME_FACTOR,
        rows // MERGE,
        MERGE,
        PATCH_PX,
        columns // MERGE,
        MERGE,
        PATCH_PX,
        channels,
    )
    # (groups, block row, block column, row in block, column in block, channel, time, y, x)
    ordered = blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(groups * rows * columns, -1)
    return ((ordered.to(torch.float32) - _HALF_RANGE) / _HALF_RANGE).to(dtype)


def host_patch_rows(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return ``patch_rows`` in float32 as a numpy array: the official ``pixel_values``."""
    return patch_rows(pixels, torch.device("cpu"), torch.float32).contiguous().numpy()


class LinearPatchEmbed(nn.Module):
    """The tower's patch embedding as one matrix product.

    A convolution whose stride is its kernel sees every value once: the same sum as a Linear on the
    flattened patch, and several times faster (bf16 Conv3d has no fast kernel on several GPUs).
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        weight = convolution.weight.detach()
        self.weight = nn.Parameter(weight.reshape(weight.shape[0], -1), requires_grad=False)
        self.bias = nn.Parameter(convolution.bias.detach(), requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return (patches, hidden) of (patches, 1536)."""
        return nn.functional.linear(rows.to(self.weight.dtype), self.weight, self.bias)
