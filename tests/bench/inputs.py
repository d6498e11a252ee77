"""What is embedded: texts, pictures and clips of common lengths and sizes, the same every time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from qvl_batch.budget import smart_resize
from qvl_batch.demo.world import COLOURS, SHAPES, WORDS
from qvl_batch.media.image import resize_image, to_rgb
from qvl_batch.units import EmbedInput, Vision

MIN_PX, MAX_PX = 4096, 1_843_200
# (width, height): thumbnails, web pictures, photos at screen size.
PICTURE_SIZES_PX = (
    (224, 224),
    (320, 240),
    (512, 384),
    (512, 512),
    (640, 480),
    (480, 640),
    (800, 600),
    (1024, 768),
)
_VOCABULARY = (*COLOURS, *SHAPES, *WORDS)


@dataclass(frozen=True)
class Item:
    """One unit as its owner has it: a text, or a picture in a file."""

    text: str | None = None
    picture: Path | None = None


def text_of(num_words: int, rng: random.Random) -> str:
    """Return that many words of the tokenizer's world: about one token each."""
    return " ".join(rng.choice(_VOCABULARY) for _ in range(num_words))


def mixed_words(rng: random.Random) -> int:
    """Return a text length as collections have it: log-normal, median 40 words, 4 to 500."""
    return min(500, max(4, round(rng.lognormvariate(math.log(40), 1.0))))


def noise_picture(width_px: int, height_px: int, seed: int) -> npt.NDArray[np.uint8]:
    """Return coarse coloured noise, uint8 (height, width, 3): it compresses about as photos do."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height_px // 16 + 1, width_px // 16 + 1, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((width_px, height_px), Image.Resampling.BICUBIC)
    grain = rng.integers(0, 12, (height_px, width_px, 1), np.uint8)
    return np.asarray(picture) // 2 + 60 + grain


def texts_and_pictures(folder: Path, texts: int, pictures: int, seed: int) -> list[Item]:
    """Write JPEGs and return shuffled units: 3 texts to 2 pictures is the mix of the tables."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    items = [Item(text=text_of(mixed_words(rng), rng)) for _ in range(texts)]
    for number in range(pictures):
        width_px, height_px = rng.choice(PICTURE_SIZES_PX)
        path = folder / f"picture-{number}.jpg"
        pixels = noise_picture(width_px, height_px, seed + number)
        Image.fromarray(pixels).save(path, quality=90)
        items.append(Item(picture=path))
    rng.shuffle(items)
    return items


def load_rgb(path: Path) -> Image.Image:
    """Return a picture in memory, in mode RGB."""
    with Image.open(path) as image:
        return to_rgb(image)


def resized(path: Path) -> npt.NDArray[np.uint8]:
    """Return a picture's pixels as the contract has them: bicubic, within its pixel budget."""
    rgb = load_rgb(path)
    return resize_image(rgb, *smart_resize(rgb.height, rgb.width, MIN_PX, MAX_PX))


def prepare(items: Sequence[Item]) -> list[EmbedInput]:
    """Return engine inputs: what the decoding stage of a job hands over."""
    return [
        EmbedInput(images=(Vision(resized(item.picture)[None]),))
        if item.picture
        else EmbedInput(texts=(item.text or "",))
        for item in items
    ]


def picture_input(width_px: int, height_px: int, seed: int) -> EmbedInput:
    return EmbedInput(images=(Vision(noise_picture(width_px, height_px, seed)[None]),))


def clip_input(frames: int, width_px: int, height_px: int, seed: int) -> EmbedInput:
    """Return a clip with a frame a second."""
    pixels = np.stack([noise_picture(width_px, height_px, seed + i) for i in range(frames)])
    seconds = tuple(0.5 + pair for pair in range(0, frames, 2))
    return EmbedInput(videos=(Vision(pixels, seconds),))


def mixed_inputs(count: int, seed: int) -> list[EmbedInput]:
    """Return 6 texts, 3 pictures and a short clip in every ten, shuffled."""
    rng = random.Random(seed)
    makers: list[Callable[[int], EmbedInput]] = []
    for number in range(count):
        place = number % 10
        if place < 6:
            makers.append(lambda _: EmbedInput(texts=(text_of(mixed_words(rng), rng),)))
        elif place < 9:
            makers.append(
                lambda i: picture_input(
                    *(side // 32 * 32 for side in rng.choice(PICTURE_SIZES_PX)), seed + i
                )
            )
        else:
            makers.append(lambda i: clip_input(rng.choice((4, 8, 12)), 256, 160, seed + i))
    rng.shuffle(makers)
    return [make(number) for number, make in enumerate(makers)]
