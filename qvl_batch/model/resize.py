"""Resizing of video frames, bit-equal to the official path."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F


def resize_frame(
    frame: npt.NDArray[np.uint8], height_px: int, width_px: int
) -> npt.NDArray[np.uint8]:
    """Resize one frame as qwen-vl-utils 0.0.14 resizes the frames of a video.

    Bicubic with antialiasing in float32, then clamped and rounded: bit-equal to torchvision's
    functional resize on uint8, which Pillow's bicubic and torch's own uint8 kernel are not. (A
    still image is resized by Pillow instead, in the media room.)

    Args:
        frame: uint8 RGB of shape (height, width, 3).
        height_px: Height to reach.
        width_px: Width to reach.

    Returns:
        uint8 RGB of shape (height_px, width_px, 3), contiguous.
    """
    if frame.shape[:2] == (height_px, width_px):
        return np.ascontiguousarray(frame)
    # A decoder's frame may be read-only, which torch warns of; the float copy is made next anyway.
    pixels = torch.from_numpy(frame.astype(np.float32)).permute(2, 0, 1).unsqueeze(0)
    resized = F.interpolate(
        pixels, size=(height_px, width_px), mode="bicubic", antialias=True, align_corners=False
    )
    rounded = resized.clamp_(0, 255).round_().to(torch.uint8)
    return rounded[0].permute(1, 2, 0).contiguous().numpy()
