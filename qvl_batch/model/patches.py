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
    """Return the normalised patches of an image or a video, as the official processor has them.

    Args:
        pixels: uint8 of shape (frames, height, width, 3); sides are multiples of 32.
        device: Where the rows are made: only the uint8 frames are copied there.
        dtype: Of the result; the arithmetic is float32.

    Returns:
        Shape (groups * height / 16 * width / 16, 1536); an image's one frame is repeated.
    """
    frames = torch.tensor(pixels).to(device, non_blocking=True)
    if frames.shape[0] == 1:
        frames = frames.expand(FRAME_FACTOR, -1, -1, -1)
    return _normalised(_ordered(frames, FRAME_FACTOR), dtype)


def still_rows(
    pixels: npt.NDArray[np.uint8], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Return the patches of an image without its repetition: half of every row of ``patch_rows``.

    Returns:
        Shape (height / 16 * width / 16, 768), features ordered (channel, y, x).
    """
    return _normalised(_ordered(torch.tensor(pixels).to(device, non_blocking=True), 1), dtype)


def _ordered(frames: torch.Tensor, depth: int) -> torch.Tensor:
    """Cut into patches of ``depth`` frames.

    Source: the patchify of transformers' Qwen2-VL image processor: rows in 2 x 2 merge blocks,
    features ordered (channel, time, y, x).
    """
    count, height, width, channels = frames.shape
    groups, rows, columns = count // depth, height // PATCH_PX, width // PATCH_PX
    blocks = frames.reshape(
        groups, depth, rows // MERGE, MERGE, PATCH_PX, columns // MERGE, MERGE, PATCH_PX, channels
    )
    # (groups, block row, block column, row in block, column in block, channel, time, y, x)
    return blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(groups * rows * columns, -1)


def _normalised(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return ((rows.to(torch.float32) - _HALF_RANGE) / _HALF_RANGE).to(dtype)


def host_patch_rows(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return ``patch_rows`` in float32 as a numpy array: the official ``pixel_values``."""
    return patch_rows(pixels, torch.device("cpu"), torch.float32).contiguous().numpy()


class LinearPatchEmbed(nn.Module):
    """The tower's patch embedding as one matrix product.

    A convolution whose stride is its kernel sees every value once: the same sum as a Linear on the
    flattened patch, and several times faster (bf16 Conv3d has no fast kernel on several GPUs).
    An image shows the same frame at both times, so for it the two times' weights are one sum.
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        weight = convolution.weight.detach()
        # Summed in float32: rounded once, also in half precision.
        still = weight.to(torch.float32).sum(dim=2).to(weight.dtype)
        self.weight = nn.Parameter(weight.reshape(weight.shape[0], -1), requires_grad=False)
        self.still_weight = nn.Parameter(still.reshape(weight.shape[0], -1), requires_grad=False)
        self.bias = nn.Parameter(convolution.bias.detach(), requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return (patches, hidden) of (patches, 1536), or of an image's (patches, 768)."""
        weight = self.weight if rows.shape[1] == self.weight.shape[1] else self.still_weight
        # A CPU's half-precision products of long rows round by how many rows there are, by which a
        # picture alone would differ from one in a pack.
        on_cpu = rows.device.type == "cpu"
        inner = torch.promote_types(weight.dtype, torch.float32) if on_cpu else weight.dtype
        embedded = nn.functional.linear(rows.to(inner), weight.to(inner), self.bias.to(inner))
        return embedded.to(weight.dtype)
