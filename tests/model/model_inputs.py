"""Inputs and edits that the model tests share."""

import json

import numpy as np

from qvl_batch.units import EmbedInput, Vision


def edit_json(path, change):
    """Load a JSON file, let ``change`` alter it in place, and write it back."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def picture(seed, height_px=64, width_px=96):
    """An image of random colours."""
    rng = np.random.default_rng(seed)
    return Vision(rng.integers(0, 256, (1, height_px, width_px, 3), np.uint8))


def clip(seed, groups=3, height_px=64, width_px=64):
    """A video of random colours with one time a pair of frames."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (2 * groups, height_px, width_px, 3), np.uint8)
    return Vision(pixels, tuple(0.3 + 1.7 * group for group in range(groups)))


def mixed_inputs(count):
    """Units of every kind and many lengths, in a fixed order."""
    kinds = [
        lambda i: EmbedInput(texts=(f"a note about item {i} " * (1 + i % 7),)),
        lambda i: EmbedInput(images=(picture(i, 32 * (2 + i % 3), 64),)),
        lambda i: EmbedInput(
            texts=(f"caption {i}",), images=(picture(i), picture(i + 100, 64, 64))
        ),
        lambda i: EmbedInput(videos=(clip(i, 1 + i % 4),)),
        lambda i: EmbedInput(
            texts=("one", "two"),
            images=(picture(i, 96, 64),),
            videos=(clip(i, 2), clip(i + 50, 1, 32, 64)),
            instruction="Find the clip",
        ),
        lambda i: EmbedInput(),
    ]
    return [kinds[i % len(kinds)](i) for i in range(count)]
