"""Pixels of every mode, as the official code reads them; hostile images are refused."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from qvl_batch.errors import CorruptMediaError, LimitExceededError
from qvl_batch.media.image import ImageMedium, resize_bicubic
from qvl_batch.units import PartPlan
from tests.media.clips import image_bytes, moving_picture

WIDTH, HEIGHT = 64, 32


def decoded(data: bytes, width: int = WIDTH, height: int = HEIGHT, limit: int = 10**6):
    medium = ImageMedium(io.BytesIO(data), uri="i", max_image_px=limit)
    plan = PartPlan(segment=0, frame_indices=(0,), width_px=width, height_px=height)
    ((part, position, frame),) = medium.decode([plan])
    assert (part, position) == (0, 0)
    return medium.header, frame


def uniform(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (WIDTH, HEIGHT), colour)


@pytest.mark.parametrize(
    ("image", "rgb"),
    [
        (uniform("RGB", (10, 20, 30)), (10, 20, 30)),
        (uniform("L", 77), (77, 77, 77)),
        (uniform("1", 1), (255, 255, 255)),
        # Half transparent on white; alpha of a grey picture is dropped instead.
        (uniform("RGBA", (0, 100, 200, 0)), (255, 255, 255)),
        (uniform("RGBA", (0, 100, 200, 255)), (0, 100, 200)),
        (uniform("LA", (50, 0)), (50, 50, 50)),
        # 16-bit grey saturates: 300 of 65535 is white.
        (Image.fromarray(np.full((HEIGHT, WIDTH), 300, np.uint16)), (255, 255, 255)),
    ],
    ids=["RGB", "L", "1", "RGBA clear", "RGBA solid", "LA", "I;16"],
)
def test_modes_become_rgb_as_the_official_code_has_it(image, rgb):
    header, frame = decoded(image_bytes(image))
    assert (header.kind, header.width_px, header.height_px) == ("image", WIDTH, HEIGHT)
    assert frame.dtype == np.uint8
    assert frame.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(frame, np.broadcast_to(rgb, frame.shape))


def test_a_palettes_transparency_is_ignored():
    image = uniform("P", 1)
    image.putpalette([0, 0, 0, 200, 10, 20])
    for transparency in (1, b"\xff\x00"):
        _, frame = decoded(image_bytes(image, transparency=transparency))
        np.testing.assert_array_equal(frame[0, 0], (200, 10, 20))


def test_cmyk_is_converted_as_pillow_does():
    _, frame = decoded(image_bytes(uniform("CMYK", (255, 0, 0, 0)), "TIFF"))
    np.testing.assert_array_equal(frame[0, 0], (0, 255, 255))


def test_orientation_is_ignored():
    picture = Image.fromarray(moving_picture(1, WIDTH, HEIGHT))
    exif = Image.Exif()
    exif[0x0112] = 6
    plain_header, plain = decoded(image_bytes(picture, "JPEG"))
    header, turned = decoded(image_bytes(picture, "JPEG", exif=exif))
    assert header == plain_header
    np.testing.assert_array_equal(turned, plain)


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(name):
    first, second = uniform("RGB", (255, 0, 0)), uniform("RGB", (0, 0, 255))
    data = image_bytes(first, name, save_all=True, append_images=[second])
    np.testing.assert_allclose(decoded(data)[1][0, 0], (255, 0, 0), atol=3)


def test_resize_is_pillows_bicubic():
    pixels = moving_picture(3, 100, 60)
    expected = np.asarray(Image.fromarray(pixels).resize((96, 64), Image.Resampling.BICUBIC))
    _, frame = decoded(image_bytes(Image.fromarray(pixels)), 96, 64)
    np.testing.assert_array_equal(frame, expected)
    np.testing.assert_array_equal(resize_bicubic(pixels, 64, 96), expected)


def png_claiming(width: int, height: int) -> bytes:
    """A tiny PNG that states any size and holds almost nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [1001, 5000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side):
    with pytest.raises(LimitExceededError, match="exceeds limit"):
        decoded(png_claiming(1000, side), limit=10**6)


def test_a_truncated_image_fails():
    whole = image_bytes(Image.fromarray(moving_picture(1, WIDTH, HEIGHT)), "JPEG")
    decoded(whole)
    with pytest.raises(CorruptMediaError, match="runcated"):
        decoded(whole[: len(whole) // 2])
    with pytest.raises(CorruptMediaError):
        decoded(png_claiming(900, 900))


def test_formats_that_start_other_programs_are_refused():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(CorruptMediaError, match="known format"):
        decoded(eps)
