"""Shapes and colours on a canvas, as the demo's checkpoint saw them in training."""

from __future__ import annotations

import math
import random
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Rgb = tuple[int, int, int]
Point = tuple[float, float]

_RGB: dict[str, Rgb] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (240, 220, 40),
    "purple": (130, 40, 160),
    "orange": (245, 135, 25),
    "pink": (250, 140, 190),
    "cyan": (50, 210, 220),
    "white": (250, 250, 250),
    "gray": (128, 128, 128),
    "black": (12, 12, 12),
    "beige": (222, 200, 160),
    "paper": (245, 244, 238),
}
# Scenes are drawn at twice their side and averaged down: Pillow's shapes have no smooth edges.
_OVERSAMPLING = 2


def tinted(name: str, rng: random.Random, spread: float = 14) -> Rgb:
    """Return the colour of that name, each channel moved by up to ``spread`` levels."""
    red, green, blue = (int(min(255, max(0, v + rng.uniform(-spread, spread)))) for v in _RGB[name])
    return red, green, blue


def blank(name: str, side_px: int, rng: random.Random, spread: float = 6) -> Image.Image:
    """Return a canvas of that colour for a picture of ``side_px``, to be `averaged` in the end."""
    side = side_px * _OVERSAMPLING
    return Image.new("RGB", (side, side), tinted(name, rng, spread))


def averaged(canvas: Image.Image) -> Image.Image:
    """Return the canvas at the picture's own side."""
    return canvas.reduce(_OVERSAMPLING)


def _star(x: float, y: float, r: float) -> list[Point]:
    radii = [r if corner % 2 == 0 else 0.42 * r for corner in range(10)]
    angles = [corner * math.pi / 5 for corner in range(10)]
    return [
        (x + radius * math.sin(a), y - radius * math.cos(a))
        for radius, a in zip(radii, angles, strict=True)
    ]


def _cross(x: float, y: float, r: float) -> list[Point]:
    arm = 0.33 * r
    quarter = [(-arm, -r), (arm, -r), (arm, -arm)]
    # The same three corners, turned by a right angle four times.
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-dy, dx) for dx, dy in quarter]
    return [(x + dx, y + dy) for dx, dy in corners]


def _heart(x: float, y: float, r: float) -> list[Point]:
    unit = 0.062 * r
    points = []
    for step in range(24):
        t = step * math.pi / 12
        up = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x + unit * 16 * math.sin(t) ** 3, y - unit * up))
    return points


def _polygon(shape: str, x: float, y: float, r: float) -> list[Point]:
    match shape:
        case "square":
            k = 0.86 * r
            return [(x - k, y - k), (x + k, y - k), (x + k, y + k), (x - k, y + k)]
        case "diamond":
            return [(x, y - r), (x + 0.72 * r, y), (x, y + r), (x - 0.72 * r, y)]
        case "triangle":
            return [(x, y - r), (x + 0.95 * r, y + 0.8 * r), (x - 0.95 * r, y + 0.8 * r)]
        case "star":
            return _star(x, y, r)
        case "cross":
            return _cross(x, y, r)
        case _:
            return _heart(x, y, r)


def _stencil(shape: str, side: int, x: float, y: float, r: float) -> Image.Image:
    """Return a mask of mode L, 255 inside the shape with centre (x, y) and radius r, in pixels."""
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        draw.ellipse([x - r, y - r, x + r, y + r], fill=255)
        if shape == "ring":
            hole = 0.57 * r
            draw.ellipse([x - hole, y - hole, x + hole, y + hole], fill=0)
    else:
        draw.polygon(_polygon(shape, x, y, r), fill=255)
    return mask


def _paint(rgb: Rgb, texture: str, side: int) -> Image.Image:
    """Return a full canvas of the colour, with dark stripes or dots if the texture has them."""
    paint = Image.new("RGB", (side, side), rgb)
    if texture == "plain":
        return paint
    draw = ImageDraw.Draw(paint)
    dark = tuple(int(0.25 * v) for v in rgb)
    step = max(4, int(0.11 * side))
    for y in range(0, side + step, step):
        if texture == "striped":
            draw.rectangle([0, y, side, y + step // 2 - 1], fill=dark)
            continue
        dot = 0.26 * step
        for x in range(0, side + step, step):
            draw.ellipse([x - dot, y - dot, x + dot, y + dot], fill=dark)
    return paint


def place(
    canvas: Image.Image, shape: str, rgb: Rgb, centre: Point, radius: float, texture: str = "plain"
) -> None:
    """Draw a shape; centre and radius are shares of the canvas's side."""
    side = canvas.width
    stencil = _stencil(shape, side, side * centre[0], side * centre[1], side * radius)
    canvas.paste(_paint(rgb, texture, side), (0, 0), stencil)


@lru_cache(maxsize=64)
def font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font at that size."""
    return ImageFont.load_default(size_px)
