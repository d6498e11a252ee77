"""Pictures that the caller already holds: Pillow images and numpy arrays.

They come from the caller's own program, so that they need no child process; their pixels are read
and resized as those of a file are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from qvl_batch.errors import CorruptMediaError
from qvl_batch.media.image import resize_image, to_rgb
from qvl_batch.units import Header


def is_picture(value: object) -> bool:
    """Whether the value is a Pillow image or an array of two or three dimensions."""
    return isinstance(value, Image.Image) or (
        isinstance(value, np.ndarray) and value.ndim in (2, 3)
    )


def read_picture(value: Image.Image | npt.NDArray[np.uint8], *, uri: str) -> Image.Image:
    """Return a picture in mode RGB, as the official code converts it.

    Args:
        value: A Pillow image, or uint8 of shape (height, width), (height, width, 3) RGB or
            (height, width, 4) RGBA.
        uri: For messages.

    Raises:
        CorruptMediaError: If an array is of another type or shape, or an image can not be read.
    """
    if isinstance(value, np.ndarray):
        channels = value.shape[2] if value.ndim == 3 else 1
        if value.dtype != np.uint8 or channels not in (1, 3, 4) or 0 in value.shape:
            raise CorruptMediaError(
                uri,
                f"an array of {value.dtype} {value.shape}; a picture is uint8 of shape "
                "(height, width, 3)",
            )
        value = Image.fromarray(value[..., 0] if value.ndim == 3 and channels == 1 else value)
    try:
        return to_rgb(value)
    except Exception as error:
        # A lazily opened image is read here, and plugins raise whatever malformed bytes cause.
        raise CorruptMediaError(uri, f"{type(error).__name__}: {error}") from None


def picture_header(picture: Image.Image) -> Header:
    return Header(kind="image", width_px=picture.width, height_px=picture.height)


def resize_picture(picture: Image.Image, height_px: int, width_px: int) -> npt.NDArray[np.uint8]:
    """Return uint8 (height_px, width_px, 3), resized as an image file is."""
    return resize_image(picture, height_px, width_px)
