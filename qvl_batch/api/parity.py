"""The quick check before a run writes: does this stack still give the vectors it should?

A text, an image, a page and a short video go through the whole path (decoding child, prompt,
engine, float32 on the CPU) with the shipped checkpoint, and are compared with stored values. A test
compares the stored values with plain transformers. It takes a few seconds, most of them to import
torch, and is done once a process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import qvl_batch
from qvl_batch.api.certificate import Certificate, stack_versions
from qvl_batch.api.compare import DIFFERENT, EQUAL, CaseResult
from qvl_batch.api.inputs import Item, parse_item
from qvl_batch.errors import ModelError, UnitError
from qvl_batch.recipe import DocumentBudget, ImageBudget, VideoBudget

if TYPE_CHECKING:
    from qvl_batch.units import EmbedInput, Vision

PACKAGE = Path(qvl_batch.__file__).parent
# Package data by its place: the demo room is not entered.
CHECKPOINT = PACKAGE / "demo" / "checkpoint" / "embedding"
CASES = PACKAGE / "api" / "stack_check"
MAX_ABS_DIFF = 1e-4
MAX_TOKENS = 1024
IMAGE = ImageBudget(min_px=4096, max_px=16_384)
VIDEO = VideoBudget(fps=2.0, min_px=4096, max_px=16_384)
DOCUMENT = DocumentBudget(min_px=4096, max_px=16_384)


@dataclass(frozen=True, kw_only=True)
class StackValues:
    """What one case came to: sha256 hex of ids and pixels, grids, and the vector."""

    ids: str
    pixels: str
    grid: list[list[int]]
    vector: list[float]


def check_items(folder: Path = CASES) -> dict[str, Item]:
    """Return the cases by name."""
    items = {
        "text": "Two red circles left of a blue square, and a note: übergroß, 12.5 km, 東京.",
        "image": {"image": folder / "picture.png", "text": "a picture"},
        "page": {"document": folder / "page.pdf", "page": 0},
        "video": {"video": folder / "clip.mp4", "instruction": "Find the clip"},
    }
    return {name: parse_item(item) for name, item in items.items()}


def measure(checkpoint: Path = CHECKPOINT, folder: Path = CASES) -> dict[str, StackValues]:
    """Run every case through the whole path.

    Raises:
        ModelError: If a case can not be decoded or embedded at all.
    """
    from qvl_batch.model.engine import EmbedEngine
    from qvl_batch.model.prompt import PromptTokenizer

    # Decoding, which imports torch in its child, and loading, which does so here, at once.
    with ThreadPoolExecutor(1) as pool:
        decoding = pool.submit(
            _decode, PromptTokenizer(checkpoint, max_tokens=MAX_TOKENS), check_items(folder)
        )
        engine = EmbedEngine(checkpoint, max_tokens=MAX_TOKENS, dtype="float32", device="cpu")
        inputs = decoding.result()
    try:
        vectors = engine.embed_vectors(list(inputs.values()))
    except UnitError as error:
        raise _broken(f"a case can not be embedded: {error}") from None
    return {
        name: StackValues(
            ids=_digest(engine.tokenizer.encode(unit).ids.astype("<i8")),
            pixels=_digest(*(vision.pixels for vision in _visions(unit))),
            grid=[list(vision.grid) for vision in _visions(unit)],
            vector=vector.tolist(),
        )
        for (name, unit), vector in zip(inputs.items(), vectors, strict=True)
    }


def _decode(tokenizer: Any, items: Mapping[str, Item]) -> dict[str, EmbedInput]:
    from qvl_batch.api.reader import ItemReader
    from qvl_batch.storage import Storage

    reader = ItemReader(tokenizer, storage=Storage(), image=IMAGE, video=VIDEO, document=DOCUMENT)
    inputs = {}
    try:
        for name, item in items.items():
            try:
                inputs[name] = reader.read(item)
            except UnitError as error:
                raise _broken(f"the {name} can not be decoded: {error}") from None
    finally:
        reader.close()
    return inputs


def _visions(unit: EmbedInput) -> tuple[Vision, ...]:
    return (*unit.videos, *unit.images)


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def compare(name: str, found: StackValues, stored: StackValues) -> CaseResult:
    """Return how one case ended; its reason names every part that differs."""
    words = {True: "equal", False: "different"}
    ours, theirs = np.array(found.vector), np.array(stored.vector)
    same_width = ours.shape == theirs.shape
    off = float(np.abs(ours - theirs).max()) if same_width else float("inf")
    parts = {
        "ids": found.ids == stored.ids,
        "grid": found.grid == stored.grid,
        "pixels": found.pixels == stored.pixels,
        # Not `off > …`: a NaN must not pass.
        "vector": off <= MAX_ABS_DIFF,
    }
    wrong = [part for part, equal in parts.items() if not equal]
    return CaseResult(
        case=name,
        status=DIFFERENT if wrong else EQUAL,
        ids=words[parts["ids"]],
        grid=words[parts["grid"]] if stored.grid else "-",
        pixels=words[parts["pixels"]] if stored.grid else "-",
        # Coarse, so that the noise of another processor gives the same certificate.
        cosine=round(float(ours @ theirs), 5) if same_width else None,
        max_abs_diff=math.ceil(off * 1e6) / 1e6 if math.isfinite(off) else None,
        reason=f"{', '.join(wrong)} of the {name}" if wrong else "",
    )


def read_stored(folder: Path = CASES) -> dict[str, StackValues]:
    stored = json.loads((folder / "stored.json").read_text(encoding="utf-8"))
    return {name: StackValues(**values) for name, values in stored.items()}


def certify(checkpoint: Path = CHECKPOINT, folder: Path = CASES) -> Certificate:
    """Run and compare every case; the certificate may say that the stack is broken.

    Raises:
        ModelError: If a case can not be decoded or embedded at all.
    """
    from qvl_batch.model.load import weights_digest

    stored = read_stored(folder)
    found = measure(checkpoint, folder)
    digest = hashlib.sha256((folder / "stored.json").read_bytes()).hexdigest()
    return Certificate(
        reference=f"built-in cases, sha256 {digest}",
        checkpoints={"embedding": weights_digest(checkpoint)},
        thresholds={"max_abs_diff": MAX_ABS_DIFF},
        cases=tuple(compare(name, found[name], stored[name]) for name in stored),
    )


@functools.cache
def check_stack(checkpoint: Path = CHECKPOINT, folder: Path = CASES) -> Certificate:
    """Return the certificate of a stack that holds.

    Raises:
        ModelError: If it does not, naming the parts that differ and of which case.
    """
    certificate = certify(checkpoint, folder)
    if not certificate.holds:
        wrong = "; ".join(case.reason for case in certificate.cases if case.reason)
        raise _broken(wrong)
    return certificate


def _broken(what: str) -> ModelError:
    versions = ", ".join(f"{name} {number}" for name, number in stack_versions().items())
    return ModelError(
        f"This installation does not give the vectors it should: {what} (with {versions}).",
        "Install the tested versions (requirements.lock), or set model.check: false to write what "
        "it gives.",
    )
