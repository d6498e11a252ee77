"""Decoded parts as an Arrow column, written with one copy of the pixels and read with none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qvl_batch import schema
from qvl_batch.units import PartPlan, Vision

# A part before it is written: what it was planned as, and its pixels.
Part = tuple[PartPlan, npt.NDArray[np.uint8]]

_FACTS = [field for field in schema.PART if field.name != "pixels"]


def parts_array(parts_of_units: Sequence[Sequence[Part]]) -> pa.Array:
    """Return a list of `schema.PART` for each unit."""
    parts = [part for unit in parts_of_units for part in unit]
    plans = [plan for plan, _ in parts]
    columns = {
        "segment": [plan.segment for plan in plans],
        "page": [plan.page for plan in plans],
        "start_s": [plan.start_s for plan in plans],
        "end_s": [plan.end_s for plan in plans],
        "width_px": [plan.width_px for plan in plans],
        "height_px": [plan.height_px for plan in plans],
        "num_frames": [plan.num_frames for plan in plans],
        "seconds": [plan.seconds for plan in plans],
    }
    arrays = [pa.array(values, schema.PART.field(name).type) for name, values in columns.items()]
    arrays.append(_binary_array([np.ascontiguousarray(pixels) for _, pixels in parts]))
    structs = pa.StructArray.from_arrays(arrays, fields=list(schema.PART))
    offsets = np.cumsum([0, *(len(unit) for unit in parts_of_units)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), structs)


def _binary_array(blobs: Sequence[npt.NDArray[np.uint8]]) -> pa.Array:
    """Return a large_binary array with one copy of the pixels, not two."""
    offsets = np.cumsum([0, *(blob.nbytes for blob in blobs)], dtype=np.int64)
    data = np.empty(int(offsets[-1]), np.uint8)
    for blob, start in zip(blobs, offsets, strict=False):
        data[start : start + blob.nbytes] = blob.reshape(-1)
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(blobs), [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    )


def iter_parts(column: pa.ChunkedArray) -> Iterator[list[tuple[dict[str, Any], Vision]]]:
    """Yield each unit's parts: what is known of a part, and its frames as views of the block."""
    lists = column.combine_chunks()
    structs = lists.values
    facts = pa.StructArray.from_arrays([structs.field(f.name) for f in _FACTS], fields=_FACTS)
    pixels = structs.field("pixels")
    offsets = lists.offsets.to_pylist()
    for first, last in itertools.pairwise(offsets):
        parts = []
        for place in range(first, last):
            part = facts[place].as_py()
            frames = np.frombuffer(pixels[place].as_buffer(), np.uint8)
            shape = (part["num_frames"], part["height_px"], part["width_px"], 3)
            vision = Vision(pixels=frames.reshape(shape), seconds=tuple(part.pop("seconds")))
            parts.append((part, vision))
        yield parts
