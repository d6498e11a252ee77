"""The small world of the demo: scenes of shapes, pages and motions, drawn and told in English.

The shipped checkpoint was trained on exactly this look and on this closed vocabulary. Sizes are
shares of the picture's side, so a scene drawn at any side looks alike once it is brought to the
64 x 64 pixels that the checkpoint knows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from qvl_batch.demo.drawing import Point, Rgb, averaged, blank, font, place, tinted

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "cyan")
BACKGROUNDS = ("white", "gray", "black", "beige")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
POSITIONS = ("center", "top left", "top right", "bottom left", "bottom right")
COUNTS = (2, 3, 4, 5)
RELATIONS = ("left of", "above")
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "growing", "shrinking")
TURNS = tuple(f"turning {colour}" for colour in COLOURS)
WORDS = (
    *("apple", "bread", "chair", "dance", "eagle", "flute", "grape", "hotel"),
    *("igloo", "juice", "knife", "lemon", "mouse", "night", "ocean", "piano"),
    *("queen", "river", "sugar", "tiger", "uncle", "voice", "wheat", "zebra"),
)
KINDS = ("single", "count", "pair", "page", "clip")

_CENTRES: dict[str, Point] = {
    "center": (0.5, 0.5),
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
}
_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
# Header colours too light for white letters.
_LIGHT = ("yellow", "pink", "cyan")
_INK: Rgb = (20, 20, 20)


def _require(value: object, allowed: tuple[object, ...], name: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; the world knows {', '.join(map(str, allowed))}")


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


@dataclass(frozen=True, kw_only=True)
class Single:
    """One shape."""

    colour: str
    shape: str
    size: str = "large"
    texture: str = "plain"
    position: str = "center"
    background: str = "white"

    def __post_init__(self) -> None:
        _require(self.colour, COLOURS, "colour")
        _require(self.shape, SHAPES, "shape")
        _require(self.size, SIZES, "size")
        _require(self.texture, TEXTURES, "texture")
        _require(self.position, POSITIONS, "position")
        _require(self.background, BACKGROUNDS, "background")

    def caption(self) -> str:
        what = _article(f"{self.size} {self.texture} {self.colour} {self.shape}")
        return f"{what} in the {self.position} on a {self.background} background"

    def render(self, side_px: int, rng: random.Random) -> Image.Image:
        """Return an RGB picture of ``side_px`` x ``side_px``; ``rng`` moves and tints it a bit."""
        canvas = blank(self.background, side_px, rng)
        rgb = tinted(self.colour, rng)
        radius = (0.115 if self.size == "small" else 0.21) * rng.uniform(0.92, 1.08)
        x, y = (v + rng.uniform(-0.03, 0.03) for v in _CENTRES[self.position])
        place(canvas, self.shape, rgb, (x, y), radius, self.texture)
        return averaged(canvas)


@dataclass(frozen=True, kw_only=True)
class Count:
    """Two to five equal shapes."""

    count: int
    colour: str
    shape: str
    background: str = "white"

    def __post_init__(self) -> None:
        _require(self.count, COUNTS, "count")
        _require(self.colour, COLOURS, "colour")
        _require(self.shape, SHAPES, "shape")
        _require(self.background, BACKGROUNDS, "background")

    def caption(self) -> str:
        plural = self.shape + ("es" if self.shape.endswith("s") else "s")
        what = f"{_NUMBERS[self.count]} {self.colour} {plural}"
        return f"{what} on a {self.background} background"

    def render(self, side_px: int, rng: random.Random) -> Image.Image:
        """Return an RGB picture of ``side_px`` x ``side_px``; ``rng`` places the shapes."""
        canvas = blank(self.background, side_px, rng)
        rgb = tinted(self.colour, rng)
        cells = [(x, y) for x in (0.2, 0.5, 0.8) for y in (0.2, 0.5, 0.8)]
        for cell in rng.sample(cells, self.count):
            x, y = (v + rng.uniform(-0.03, 0.03) for v in cell)
            place(canvas, self.shape, rgb, (x, y), 0.125 * rng.uniform(0.9, 1.1))
        return averaged(canvas)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two different shapes, the first left of or above the second."""

    colour: str
    shape: str
    relation: str
    other_colour: str
    other_shape: str
    background: str = "white"

    def __post_init__(self) -> None:
        _require(self.relation, RELATIONS, "relation")
        _require(self.background, BACKGROUNDS, "background")
        for colour in (self.colour, self.other_colour):
            _require(colour, COLOURS, "colour")
        for shape in (self.shape, self.other_shape):
            _require(shape, SHAPES, "shape")
        if (self.colour, self.shape) == (self.other_colour, self.other_shape):
            raise ValueError(f"both shapes of the pair are {_article(self.colour)} {self.shape}")

    def caption(self) -> str:
        first = _article(f"{self.colour} {self.shape}")
        second = _article(f"{self.other_colour} {self.other_shape}")
        return f"{first} {self.relation} {second} on a {self.background} background"

    def render(self, side_px: int, rng: random.Random) -> Image.Image:
        """Return an RGB picture of ``side_px`` x ``side_px``."""
        canvas = blank(self.background, side_px, rng)
        objects = ((self.shape, self.colour, 0.27), (self.other_shape, self.other_colour, 0.73))
        for shape, colour, along in objects:
            across = 0.5 + rng.uniform(-0.12, 0.12)
            centre = (along, across) if self.relation == "left of" else (across, along)
            place(canvas, shape, tinted(colour, rng), centre, 0.18 * rng.uniform(0.93, 1.07))
        return averaged(canvas)


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page with a title on a coloured header, a large word and lines below."""

    title: str
    word: str
    colour: str

    def __post_init__(self) -> None:
        _require(self.title, WORDS, "title")
        _require(self.word, WORDS, "word")
        _require(self.colour, COLOURS, "colour")
        if self.title == self.word:
            raise ValueError(f"title and word of the page are both {self.title!r}")

    def caption(self) -> str:
        header = _article(f"{self.colour} header")
        return f"a page titled {self.title} with the word {self.word} with {header}"

    def render(self, side_px: int, rng: random.Random) -> Image.Image:
        """Return an RGB picture of ``side_px`` x ``side_px``."""
        canvas = blank("paper", side_px, rng, spread=8)
        side = canvas.width
        draw = ImageDraw.Draw(canvas)
        header = int(0.30 * side)
        draw.rectangle([0, 0, side, header], fill=tinted(self.colour, rng))
        ink = (0, 0, 0) if self.colour in _LIGHT else (255, 255, 255)
        lines = ((self.title, 0.04 * header, ink), (self.word, 0.34 * side, _INK))
        for word, top, fill in lines:
            corner = (side * (0.06 + rng.uniform(0, 0.03)), top + side * rng.uniform(0, 0.02))
            draw.text(corner, word, font=font(int(0.235 * side)), fill=fill)
        for row in range(4):
            y = side * (0.68 + 0.08 * row)
            right = side * rng.uniform(0.6, 0.94)
            draw.line([0.06 * side, y, right, y], fill=(150, 150, 150), width=max(1, side // 64))
        return averaged(canvas)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A shape that moves, grows, shrinks or turns to another colour half-way."""

    colour: str
    shape: str
    motion: str
    background: str = "white"

    def __post_init__(self) -> None:
        _require(self.colour, COLOURS, "colour")
        _require(self.shape, SHAPES, "shape")
        _require(self.motion, MOTIONS + TURNS, "motion")
        _require(self.background, BACKGROUNDS, "background")
        if self.motion == f"turning {self.colour}":
            raise ValueError(f"{_article(self.colour)} {self.shape} cannot turn {self.colour}")

    def caption(self) -> str:
        what = _article(f"{self.colour} {self.shape}")
        return f"{what} {self.motion} on a {self.background} background"

    def frames(self, side_px: int, num_frames: int, rng: random.Random) -> list[Image.Image]:
        """Return ``num_frames`` >= 2 RGB pictures of ``side_px`` x ``side_px``, first to last."""
        background = blank(self.background, side_px, rng)
        rgb = tinted(self.colour, rng)
        turned = tinted(self.motion.removeprefix("turning "), rng) if self._turns else rgb
        rest_x, rest_y = rng.uniform(0.35, 0.65), rng.uniform(0.35, 0.65)
        rest_radius = 0.16 * rng.uniform(0.92, 1.08)
        pictures = []
        for index in range(num_frames):
            t = index / (num_frames - 1)
            x, y, radius = rest_x, rest_y, rest_radius
            match self.motion:
                case "moving left":
                    x = 0.78 - 0.56 * t
                case "moving right":
                    x = 0.22 + 0.56 * t
                case "moving up":
                    y = 0.78 - 0.56 * t
                case "moving down":
                    y = 0.22 + 0.56 * t
                case "growing":
                    radius = 0.08 + 0.18 * t
                case "shrinking":
                    radius = 0.26 - 0.18 * t
            canvas = background.copy()
            place(canvas, self.shape, turned if t > 0.5 else rgb, (x, y), radius)
            pictures.append(averaged(canvas))
        return pictures

    @property
    def _turns(self) -> bool:
        return self.motion in TURNS


Scene = Single | Count | Pair | Page | Clip


def random_scene(kind: str, rng: random.Random) -> Scene:
    """Return a scene of one of ``KINDS``, every value of its vocabulary as likely as another."""
    _require(kind, KINDS, "kind")
    colour, other_colour = rng.choice(COLOURS), rng.choice(COLOURS)
    shape, other_shape = rng.choice(SHAPES), rng.choice(SHAPES)
    background = rng.choice(BACKGROUNDS)
    if kind == "single":
        return Single(
            colour=colour,
            shape=shape,
            size=rng.choice(SIZES),
            texture=rng.choice(TEXTURES),
            position=rng.choice(POSITIONS),
            background=background,
        )
    if kind == "count":
        return Count(count=rng.choice(COUNTS), colour=colour, shape=shape, background=background)
    if kind == "pair":
        # Another colour when the shapes are equal: the two objects must differ.
        if (colour, shape) == (other_colour, other_shape):
            other_colour = rng.choice([c for c in COLOURS if c != colour])
        return Pair(
            colour=colour,
            shape=shape,
            relation=rng.choice(RELATIONS),
            other_colour=other_colour,
            other_shape=other_shape,
            background=background,
        )
    if kind == "page":
        title, word = rng.sample(WORDS, 2)
        return Page(title=title, word=word, colour=colour)
    turns = tuple(turn for turn in TURNS if turn != f"turning {colour}")
    motion = rng.choice((*MOTIONS, rng.choice(turns)))
    return Clip(colour=colour, shape=shape, motion=motion, background=background)
