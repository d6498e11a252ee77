"""Images, pixel by pixel as the official embedder reads them: Pillow, RGB, bicubic.

EXIF orientation is ignored; RGBA is laid on white; every other mode is converted as Pillow does it
(LA drops its alpha, a palette's transparency is ignored, 16-bit grey saturates to white); of an
animation the first frame counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from qvl_batch.errors import CorruptMediaError, LimitExceededError
from qvl_batch.units import Header, PartPlan

# Pillow tries every plugin it knows unless told otherwise, EPS (a Ghostscript call) among them.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")


class ImageMedium:
    """An opened image.

    Args:
        file: Its bytes, seekable; stays open while the medium is used.
        uri: For messages.
        max_image_px: More pixels than this are refused before they are decoded.

    Raises:
        CorruptMediaError: If no allowed format opens it.
        LimitExceededError: If it is too large.
    """

    def __init__(self, file: BinaryIO, *, uri: str, max_image_px: int) -> None:
        self._uri = uri
        limit_of_others = Image.MAX_IMAGE_PIXELS
        try:
            with warnings.catch_warnings():
                # Pillow warns at the limit and refuses at twice the limit: both refuse here.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                Image.MAX_IMAGE_PIXELS = max_image_px
                self._image = Image.open(file, formats=FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise LimitExceededError(uri, str(error)) from None
        except MemoryError:
            raise LimitExceededError(uri, "the image does not fit the memory") from None
        except Exception as error:
            # Plugins raise whatever they meet in malformed bytes: OSError, SyntaxError,
            # struct.error, ValueError, IndexError, KeyError, zlib.error, …
            raise CorruptMediaError(uri, _reason(error)) from None
        finally:
            Image.MAX_IMAGE_PIXELS = limit_of_others
        width, height = self._image.size
        self.header = Header(kind="image", width_px=width, height_px=height)

    def decode(self, plans: Sequence[PartPlan]) -> Iterator[tuple[int, int, npt.NDArray[np.uint8]]]:
        """Yield (part, 0, uint8 RGB of shape (height_px, width_px, 3)) for every plan."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._image.load()
                rgb = to_rgb(self._image)
        except MemoryError:
            raise LimitExceededError(self._uri, "the image does not fit the memory") from None
        except Exception as error:
            # As above: any exception type may come from malformed bytes.
            raise CorruptMediaError(self._uri, _reason(error)) from None
        for part, plan in enumerate(plans):
            yield part, 0, resize_image(rgb, plan.height_px, plan.width_px)

    def close(self) -> None:
        self._image.close()


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in mode RGB as the official code converts it."""
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def resize_image(rgb: Image.Image, height_px: int, width_px: int) -> npt.NDArray[np.uint8]:
    """Return uint8 (height_px, width_px, 3), resized with Pillow's bicubic filter."""
    return np.asarray(rgb.resize((width_px, height_px), Image.Resampling.BICUBIC))


def resize_bicubic(
    frame: npt.NDArray[np.uint8], height_px: int, width_px: int
) -> npt.NDArray[np.uint8]:
    """Return a uint8 RGB array resized with Pillow: for callers without the model's resize."""
    return resize_image(Image.fromarray(frame), height_px, width_px)


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return f"not a readable image of a known format ({', '.join(FORMATS)})"
    return f"{type(error).__name__}: {error}"
