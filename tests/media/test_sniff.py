"""Magic bytes of real files and of look-alikes."""

import io
import subprocess
import sys

import av
import numpy as np
import pypdfium2
import pytest
from PIL import Image

from qvl_batch.media.sniff import EXTENSIONS, HEAD_BYTES, Sniffed, kind_of_extension, sniff
from qvl_batch.units import KINDS


def picture(format_: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.arange(48 * 32 * 3, dtype=np.uint8).reshape(32, 48, 3)).save(out, format_)
    return out.getvalue()


def clip(container_format: str, codec: str = "mpeg4") -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(0, 200, 8):
            pixels = np.full((48, 64, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode(None))
    return out.getvalue()


def pdf() -> bytes:
    document, out = pypdfium2.PdfDocument.new(), io.BytesIO()
    document.new_page(200, 100)
    document.save(out)
    return out.getvalue()


def brands(major: bytes, *compatible: bytes) -> bytes:
    body = major + bytes(4) + b"".join(compatible)
    return (8 + len(body)).to_bytes(4, "big") + b"ftyp" + body + bytes(64)


@pytest.mark.parametrize("name", ["jpeg", "png", "gif", "webp", "bmp", "tiff", "avif"])
def test_real_pictures(name):
    assert sniff(picture(name)[:HEAD_BYTES]) == Sniffed("image", name)


@pytest.mark.parametrize(
    ("container", "codec", "name"),
    [
        ("mp4", "mpeg4", "mp4"),
        ("mov", "mpeg4", "mov"),
        ("3gp", "mpeg4", "3gp"),
        ("matroska", "mpeg4", "matroska"),
        ("webm", "libvpx", "webm"),
        ("mpegts", "mpeg2video", "mpegts"),
        ("avi", "mpeg4", "avi"),
    ],
)
def test_real_clips(container, codec, name):
    assert sniff(clip(container, codec)[:HEAD_BYTES]) == Sniffed("video", name)


def test_transport_stream_with_time_stamps():
    stream = clip("mpegts", "mpeg2video")
    packets = [stream[at : at + 188] for at in range(0, len(stream), 188)]
    stamped = b"".join(bytes(4) + packet for packet in packets)
    assert sniff(stamped[:HEAD_BYTES]) == Sniffed("video", "mpegts")


def test_transport_stream_needs_every_sync_byte():
    stream = bytearray(clip("mpegts", "mpeg2video")[:HEAD_BYTES])
    stream[188] = 0
    assert sniff(bytes(stream)) is None


@pytest.mark.parametrize(
    "junk",
    [b"", b"\xef\xbb\xbf", b"HTTP/1.1 200 OK\r\n\r\n", bytes(900), b"\0" * 10 + b"\n" * 1000],
)
def test_pdf_behind_junk(junk):
    assert sniff((junk + pdf())[:HEAD_BYTES]) == Sniffed("document", "pdf")


def test_pdf_header_after_the_first_kilobyte_is_none():
    assert sniff((bytes(1100) + pdf())[:HEAD_BYTES]) is None


def test_text_that_mentions_pdf_is_text():
    assert sniff(b"The magic is %PDF-1.7, then 1 0 obj follows.").kind == "text"
    assert sniff(b"Headers:\n%PDF-1.7\nand that is all").kind == "text"


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (brands(b"heic", b"mif1"), "heif"),
        (brands(b"mif1", b"heic"), "heif"),
        (brands(b"mif1", b"avif"), "avif"),
        (brands(b"avis", b"msf1"), "avif"),
    ],
)
def test_still_brands_are_no_video(head, name):
    assert sniff(head) == Sniffed("image", name)


def test_sound_brand_is_unknown():
    assert sniff(brands(b"M4A ", b"mp42")) is None


def test_quicktime_without_a_brand():
    assert sniff((1000).to_bytes(4, "big") + b"moov" + bytes(100)) == Sniffed("video", "mov")


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-VERSION:3\nfile:///etc/passwd\n",
        "ffconcat version 1.0\nfile 'a.mp4'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"/>',
        '<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "BMW is a maker of cars, and GIF89a a format",
        "GIF89a was published in 1989",
        "Bug-free code",
        "RIFF, the AVI file's container",
    ],
)
def test_what_only_looks_like_media_is_text(text):
    assert sniff(text.encode()) == Sniffed("text", "utf-8")


def test_a_cut_character_is_still_text():
    text = "größer 東京 🦊".encode()
    assert {sniff(text[:end]) for end in range(1, len(text) + 1)} == {Sniffed("text", "utf-8")}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(encoding):
    assert sniff("Grüße\n".encode(encoding)) == Sniffed("text", encoding)
    assert sniff(b"\xfe\xff" + "Grüße\n🦊".encode("utf-16-be")[:-1]) == Sniffed("text", "utf-16")


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\xef\xbb\xbf",
        b"text with a \0 in it",
        b"escape \x1b[0m",
        "Grüße".encode("latin-1"),
        "a\0b".encode("utf-16"),
        b"\x7fELF\x02\x01\x01" + bytes(50),
        b"PK\x03\x04" + bytes(50),
        b"RIFF\x24\0\0\0WAVEfmt " + bytes(20),
        b"\x1a\x45\xdf\xa3" + bytes(60),
        b"BM" + bytes(60),
        b"\xff\xd8",
    ],
)
def test_unknown_bytes(head):
    assert sniff(head) is None


def test_every_short_head_is_answered():
    for data in (picture("png"), clip("mp4"), pdf(), clip("mpegts", "mpeg2video")):
        for end in range(600):
            sniff(data[:end])


def test_extensions():
    assert kind_of_extension("s3://b/dt=2026/A.JPEG") == "image"
    assert kind_of_extension("a.b/c") is None
    assert kind_of_extension(".png") == "image"
    assert kind_of_extension("index.ts") is None
    assert kind_of_extension("movie.m3u8") is None
    assert kind_of_extension("notes.v2.Md") == "text"
    assert set(EXTENSIONS.values()) <= set(KINDS)


def test_sniffing_loads_no_decoder():
    code = (
        "import sys, qvl_batch.media.sniff;"
        "assert not {'av', 'PIL', 'torch', 'ray', 'lance'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
