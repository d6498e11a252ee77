"""Pixels of the golden media, decoded in the child, equal the official ones bit by bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from qvl_batch.budget import plan_image
from qvl_batch.errors import UnitError
from qvl_batch.media.decoder import DecodeLimits, Decoder
from qvl_batch.media.fetch import Fetcher
from qvl_batch.recipe import ImageBudget
from qvl_batch.storage import Storage

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = {
    name: case
    for name, case in json.loads((GOLDEN / "golden.json").read_text())["cases"].items()
    if name.startswith("img_") and name != "img_emptystr" and case["input"][0].get("image")
}
# The official code turned these into the vector of an empty prompt.
REFUSED = {"img_corrupt.jpg", "img_notimage.png", "img_ratio_201x1.png"}


@pytest.fixture(scope="module")
def decoder():
    with Decoder(DecodeLimits(), "tests.media.resizes:crop") as one:
        yield one


def patches(frame: np.ndarray) -> np.ndarray:
    """float32 (patches, 1536): 2 x 2 blocks of 16-px patches; colour, time, row, column."""
    height, width, _ = frame.shape
    values = (frame.astype(np.float32) - np.float32(127.5)) / np.float32(127.5)
    blocks = values.reshape(height // 32, 2, 16, width // 32, 2, 16, 3)
    ordered = blocks.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    return np.repeat(ordered, 2, axis=5).reshape(-1, 1536)


def decoded(decoder: Decoder, path: str) -> np.ndarray:
    with Fetcher(Storage()).fetch(str(GOLDEN / path)) as source:
        plan = plan_image(decoder.open(source, "image"), ImageBudget())
        ((frame,),) = decoder.decode([plan])
    return frame


@pytest.mark.parametrize("name", sorted(CASES.keys() - REFUSED))
def test_an_image_has_the_official_pixels(decoder, name):
    values = patches(decoded(decoder, CASES[name]["input"][0]["image"]))
    stated = CASES[name]["inputs"]["pixel_values"]
    assert list(values.shape) == stated["shape"]
    assert hashlib.sha256(values.tobytes()).hexdigest() == stated["sha256"]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_the_official_class_drops_is_refused(decoder, name):
    with pytest.raises((UnitError, ValueError)):
        decoded(decoder, CASES[name]["input"][0]["image"])
