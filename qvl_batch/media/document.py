"""PDF pages: rendered by pdfium at a fixed resolution on white, then resized like an image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pypdfium2 as pdfium

from qvl_batch.errors import CorruptMediaError, LimitExceededError
from qvl_batch.media.image import resize_image
from qvl_batch.units import Header, PartPlan

POINTS_PER_INCH = 72


class DocumentMedium:
    """An opened PDF.

    Args:
        file: Its bytes, seekable; stays open while the medium is used.
        uri: For messages.
        dpi: Resolution at which pages are rendered.
        max_image_px: A page with more rendered pixels refuses the document.

    Raises:
        CorruptMediaError: If it is broken, encrypted, or has no page.
        LimitExceededError: If a page is too large.
    """

    def __init__(self, file: BinaryIO, *, uri: str, dpi: int, max_image_px: int) -> None:
        self._uri, self._scale = uri, dpi / POINTS_PER_INCH
        try:
            self._pdf = pdfium.PdfDocument(file)
        except pdfium.PdfiumError as error:
            raise CorruptMediaError(uri, f"pdfium: {error}") from None
        try:
            sizes = [self._pdf.get_page_size(page) for page in range(len(self._pdf))]
        except pdfium.PdfiumError as error:
            raise CorruptMediaError(uri, f"pdfium: {error}") from None
        if not sizes:
            raise CorruptMediaError(uri, "the document has no page")
        if self._pdf.get_formtype() != pdfium.raw.FORMTYPE_NONE:
            # Without it the filled-in fields of a form stay blank.
            self._pdf.init_forms()
        pages = []
        for page, (width, height) in enumerate(sizes):
            if not all(math.isfinite(side) and side > 0 for side in (width, height)):
                raise CorruptMediaError(uri, f"page {page} measures {width} x {height} points")
            # pdfium's own rounding, so that the header states the rendered size.
            size_px = math.ceil(width * self._scale), math.ceil(height * self._scale)
            if size_px[0] * size_px[1] > max_image_px:
                raise LimitExceededError(
                    uri,
                    f"page {page} has {size_px[0]}x{size_px[1]} px at {dpi} dpi, the limit is "
                    f"{max_image_px} px",
                )
            pages.append(size_px)
        self.header = Header(
            kind="document",
            width_px=pages[0][0],
            height_px=pages[0][1],
            num_frames=len(pages),
            page_sizes_px=tuple(pages),
        )

    def decode(self, plans: Sequence[PartPlan]) -> Iterator[tuple[int, int, npt.NDArray[np.uint8]]]:
        """Yield (part, 0, uint8 RGB of shape (height_px, width_px, 3)) for every planned page."""
        for part, plan in enumerate(plans):
            (number,) = plan.frame_indices
            try:
                page = self._pdf[number]
                rgb = page.render(scale=self._scale).to_pil().convert("RGB")
                page.close()
            except pdfium.PdfiumError as error:
                raise CorruptMediaError(self._uri, f"page {number}: pdfium: {error}") from None
            except MemoryError:
                raise LimitExceededError(
                    self._uri, f"page {number} does not fit the memory"
                ) from None
            yield part, 0, resize_image(rgb, plan.height_px, plan.width_px)

    def close(self) -> None:
        self._pdf.close()
