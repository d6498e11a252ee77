"""Vectors as they are stored: truncate, renormalise in float32, encode on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

# A vector this short has no direction worth storing.
MIN_NORM = 1e-6


def truncate(vectors: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the first ``dim`` dimensions, renormalised (Matryoshka), float32 (n, dim)."""
    head = vectors[:, :dim].to(torch.float32)
    return head / head.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def is_bad(vectors: torch.Tensor, dim: int) -> torch.Tensor:
    """Return which rows hold a NaN or Inf, or have a norm near 0 within ``dim``: bool (n,)."""
    head = vectors[:, :dim].to(torch.float32)
    return ~torch.isfinite(head).all(dim=1) | ~(head.norm(dim=1) > MIN_NORM)


def quantise_int8(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 (n, dim) in -127..127 and the float32 scale (n,) that gives the values back.

    Symmetric and per row: ``scale = max|x| / 127``, ``q = round(x / scale)``, so that
    ``q * scale`` is within half a step of ``x``.
    """
    scale = vectors.abs().amax(dim=1) / 127
    steps = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (vectors / steps[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def pack_signs(vectors: torch.Tensor) -> torch.Tensor:
    """Return uint8 (n, dim / 8): bit 1 where x > 0, the first dimension in the highest bit.

    The order is that of ``numpy.packbits``.
    """
    bits = (vectors > 0).reshape(vectors.shape[0], vectors.shape[1] // 8, 8).to(torch.uint8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=vectors.device)
    return (bits * weights).sum(dim=2, dtype=torch.uint8)


def encode(
    vectors: torch.Tensor, dim: int, encodings: Sequence[str]
) -> dict[str, npt.NDArray[np.generic]]:
    """Return the table's vector columns of full vectors; only these leave the device.

    Args:
        vectors: Floats of shape (n, full dimension), n may be 0.
        dim: Dimensions to keep.
        encodings: Any of ``float32, float16, int8, binary``.

    Returns:
        ``vector`` float32 or float16 (n, dim), ``vector_int8`` int8 (n, dim) and ``vector_scale``
        float32 (n,), ``vector_bits`` uint8 (n, dim / 8): those that are asked for.
    """
    kept = truncate(vectors, dim)
    columns = {}
    if "float32" in encodings:
        columns["vector"] = kept
    if "float16" in encodings:
        columns["vector"] = kept.to(torch.float16)
    if "int8" in encodings:
        columns["vector_int8"], columns["vector_scale"] = quantise_int8(kept)
    if "binary" in encodings:
        columns["vector_bits"] = pack_signs(kept)
    return {name: column.cpu().numpy() for name, column in columns.items()}
