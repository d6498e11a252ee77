"""Small real media for the tests of this room, made with PyAV and Pillow."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
from PIL import Image


def moving_picture(number: int, width: int, height: int) -> npt.NDArray[np.uint8]:
    """A picture that differs from frame to frame everywhere: a sliding ramp and a moving square."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack(
        [(x * 3 + number * 5) % 256, (y * 4 + number * 9) % 256, (x + y + number * 13) % 256],
        axis=-1,
    ).astype(np.uint8)
    left = number * 3 % max(1, width - 12)
    picture[4:16, left : left + 12] = (255, 255, 255)
    return picture


def clip(
    num_frames: int = 40,
    *,
    size: tuple[int, int] = (96, 64),
    fps: int = 10,
    container: str = "mp4",
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    gop: int = 12,
    b_frames: int = 0,
    times: list[int] | None = None,
    mux: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
) -> bytes:
    """A video of `moving_picture`s; ``times`` are pts in 1/1000 s for a variable rate."""
    # A file with a name: moving the index to the front reads the output again.
    with (
        tempfile.NamedTemporaryFile(suffix=f".{container}") as file,
        av.open(file.name, "w", format=container, options=mux or {}) as output,
    ):
        stream = output.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(moving_picture(number, *size), format="rgb24")
            frame.pts = times[number] if times is not None else number
            frame.time_base = Fraction(1, 1000) if times is not None else Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        output.close()
        return file.read()


def with_rotation(mp4: bytes, degrees: int) -> bytes:
    """Return the MP4 with a display matrix that turns it counter-clockwise by ``degrees``."""
    at = mp4.index(b"tkhd") + 4 + 40
    one = 1 << 16
    a, b, c, d = {
        90: (0, -one, one, 0),
        180: (-one, 0, 0, -one),
        270: (0, one, -one, 0),
    }[degrees]
    matrix = [a, b, 0, c, d, 0, 0, 0, 1 << 30]
    packed = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    return mp4[:at] + packed + mp4[at + len(packed) :]


def all_frames(data: bytes) -> Iterator[npt.NDArray[np.uint8]]:
    """Every frame of a video, decoded from first to last without any of the code under test.

    Packets whose bytes are not all there are left out.
    """
    with av.open(io.BytesIO(data)) as container:
        for packet in container.demux(container.streams.video[0]):
            if not packet.is_corrupt:
                for frame in packet.decode():
                    yield frame.to_ndarray(format="rgb24")


def image_bytes(image: Image.Image, name: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def pdf(
    *sizes_pt: tuple[float, float],
    content: bytes = b"",
    catalog: str = "",
    page: str = "",
    trailer: str = "",
    objects: Sequence[str] = (),
) -> bytes:
    """A hand-written PDF with one page a size; ``content`` is drawn on every page.

    ``catalog``, ``page`` and ``trailer`` are further entries of those dictionaries; ``objects`` are
    further ones, numbered from 4 + the number of pages.
    """
    kids = " ".join(f"{4 + i} 0 R" for i in range(len(sizes_pt)))
    bodies = [
        f"<< /Type /Catalog /Pages 2 0 R {catalog} >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(sizes_pt)} >>",
        f"<< /Length {len(content)} >>\nstream\n{content.decode()}\nendstream",
        *(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {w} {h}] /Contents 3 0 R {page} >>"
            for w, h in sizes_pt
        ),
        *objects,
    ]
    out = b"%PDF-1.4\n"
    offsets = []
    for number, body in enumerate(bodies, start=1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    start = len(out)
    out += f"xref\n0 {len(bodies) + 1}\n0000000000 65535 f \n".encode()
    out += b"".join(f"{offset:010} 00000 n \n".encode() for offset in offsets)
    out += f"trailer\n<< /Size {len(bodies) + 1} /Root 1 0 R {trailer} >>\n".encode()
    return out + f"startxref\n{start}\n%%EOF\n".encode()
