"""Messages between the decoder and its child: a JSON header, then raw bytes.

No pickle in either direction: a decoder that a hostile file has taken over must not be able to run
code in the process that reads its answers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, BinaryIO

from qvl_batch.units import Header, PartPlan

PREFIX = struct.Struct("<IQ")
# A document of a million pages states its sizes within this.
MAX_HEADER_BYTES = 16 << 20


def pack(header: Mapping[str, Any], payload_bytes: int = 0) -> bytes:
    """Return the prefix and header of a message that ``payload_bytes`` raw bytes follow."""
    encoded = json.dumps(header, separators=(",", ":")).encode()
    if len(encoded) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(encoded)} bytes")
    return PREFIX.pack(len(encoded), payload_bytes) + encoded


def read_message(file: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """Read one message from a blocking file; None at its end."""
    prefix = file.read(PREFIX.size)
    if len(prefix) < PREFIX.size:
        return None
    header_bytes, payload_bytes = PREFIX.unpack(prefix)
    header, payload = file.read(header_bytes), file.read(payload_bytes)
    if len(header) < header_bytes or len(payload) < payload_bytes:
        return None
    return json.loads(header), payload


def header_to_json(header: Header) -> dict[str, Any]:
    return asdict(header)


def header_from_json(values: Mapping[str, Any]) -> Header:
    """Return the header, every field of it forced to its type.

    Raises:
        KeyError, TypeError, ValueError: If the values are none of ours.
    """
    if values["kind"] not in ("image", "document", "video"):
        raise ValueError(f"kind {values['kind']!r}")
    return Header(
        kind=values["kind"],
        width_px=int(values["width_px"]),
        height_px=int(values["height_px"]),
        num_frames=int(values["num_frames"]),
        fps=float(values["fps"]),
        duration_s=float(values["duration_s"]),
        page_sizes_px=tuple((int(w), int(h)) for w, h in values["page_sizes_px"]),
    )


def plan_to_json(plan: PartPlan) -> list[Any]:
    return [plan.frame_indices, plan.width_px, plan.height_px]


def plan_from_json(values: list[Any]) -> PartPlan:
    indices, width_px, height_px = values
    return PartPlan(segment=0, frame_indices=tuple(indices), width_px=width_px, height_px=height_px)
