"""Pages of a PDF: their sizes and pixels; broken documents are refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from qvl_batch.errors import CorruptMediaError, LimitExceededError
from qvl_batch.media.document import DocumentMedium
from qvl_batch.units import PartPlan
from tests.media.clips import image_bytes, moving_picture, pdf

# The lower left quarter of a 100 x 200 pt page in red.
RED_QUARTER = b"1 0 0 rg 0 0 50 100 re f"


def opened(data: bytes, dpi: int = 144, limit: int = 10**7) -> DocumentMedium:
    return DocumentMedium(io.BytesIO(data), uri="d", dpi=dpi, max_image_px=limit)


def page(medium: DocumentMedium, number: int, width: int, height: int) -> np.ndarray:
    plan = PartPlan(
        segment=number, frame_indices=(number,), width_px=width, height_px=height, page=number
    )
    ((_, _, frame),) = medium.decode([plan])
    return frame


def test_page_sizes_are_those_pdfium_renders():
    header = opened(pdf((100, 200), (72.1, 36))).header
    assert header.kind == "document"
    assert header.page_sizes_px == ((200, 400), (145, 72))
    assert opened(pdf((100, 200)), dpi=72).header.page_sizes_px == ((100, 200),)


def test_a_page_is_drawn_upright_on_white():
    frame = page(opened(pdf((100, 200), content=RED_QUARTER)), 0, 200, 400)
    assert frame.shape == (400, 200, 3)
    np.testing.assert_array_equal(frame[300, 50], (255, 0, 0))
    np.testing.assert_array_equal(frame[100, 50], (255, 255, 255))
    np.testing.assert_array_equal(frame[300, 150], (255, 255, 255))


def test_a_turned_page_is_turned_in_header_and_pixels():
    medium = opened(pdf((100, 200), page="/Rotate 90", content=RED_QUARTER))
    assert medium.header.page_sizes_px == ((400, 200),)
    frame = page(medium, 0, 400, 200)
    np.testing.assert_array_equal(frame[50, 100], (255, 0, 0))
    np.testing.assert_array_equal(frame[150, 300], (255, 255, 255))


def test_pages_are_decoded_in_any_order_and_resized():
    picture = Image.fromarray(moving_picture(1, 96, 64))
    other = Image.fromarray(moving_picture(9, 96, 64))
    medium = opened(image_bytes(picture, "PDF", save_all=True, append_images=[other]), dpi=72)
    assert medium.header.page_sizes_px == ((96, 64), (96, 64))
    second, first = page(medium, 1, 48, 32), page(medium, 0, 48, 32)
    for frame, drawn in ((first, picture), (second, other)):
        small = np.asarray(drawn.resize((48, 32), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(frame.astype(int) - small).mean() < 12


def test_a_filled_in_form_field_is_drawn():
    field = (
        "<< /Type /Annot /Subtype /Widget /FT /Tx /T (name) /V (x) /F 4 /P 4 0 R "
        "/Rect [0 0 100 50] /AP << /N 6 0 R >> >>"
    )
    look = (
        "<< /Type /XObject /Subtype /Form /BBox [0 0 100 50] /Length 26 >>\n"
        "stream\n0 0 1 rg 0 0 100 50 re f  \nendstream"
    )
    form = pdf(
        (100, 100),
        catalog="/AcroForm << /Fields [5 0 R] >>",
        page="/Annots [5 0 R]",
        objects=[field, look],
    )
    frame = page(opened(form), 0, 64, 64).astype(int)
    assert frame[48, 32, 2] > frame[48, 32, 0] + 50
    np.testing.assert_array_equal(frame[16, 32], (255, 255, 255))


@pytest.mark.parametrize(
    "data",
    [
        pdf((100, 200))[:200],
        b"%PDF-1.7\n" + bytes(500),
        pdf(),
        pdf((100, 100), trailer="/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <"
            + "00" * 32 + "> /U <" + "11" * 32 + "> >> /ID [<00><00>]"),
    ],
    ids=["cut", "rubbish", "no page", "encrypted"],
)  # fmt: skip
def test_broken_documents_are_corrupt(data):
    with pytest.raises(CorruptMediaError):
        opened(data)


def test_a_page_above_the_limit_is_refused():
    with pytest.raises(LimitExceededError, match="page 1 has 400x400 px"):
        opened(pdf((100, 100), (200, 200)), limit=100_000)
