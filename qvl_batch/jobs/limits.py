"""Limits of the media room from a job's configuration."""

from __future__ import annotations

from qvl_batch.config import LimitsSection
from qvl_batch.media.decoder import DecodeLimits
from qvl_batch.media.fetch import FetchLimits


def fetch_limits(limits: LimitsSection) -> FetchLimits:
    return FetchLimits(max_object_bytes=limits.max_object_bytes, timeout_s=limits.fetch_timeout_s)


def decode_limits(limits: LimitsSection) -> DecodeLimits:
    return DecodeLimits(
        timeout_s=limits.decode_timeout_s,
        memory_bytes=limits.decode_memory_bytes,
        max_image_px=limits.max_image_px,
        max_text_bytes=limits.max_text_bytes,
    )
