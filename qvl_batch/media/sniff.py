"""Which kind of medium a file is, from its first bytes or from its name.

A name is a hint, the bytes decide. Anything that names other resources (HLS and DASH playlists,
ffconcat, SDP, SVG) is a text here: a demuxer or renderer that gets such a file opens what it names.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qvl_batch.units import Kind

# Room for an EBML header, 21 transport-stream packets and a PDF header behind 1 kB of junk.
HEAD_BYTES = 4096

_NAMES_BY_KIND: dict[Kind, tuple[str, ...]] = {
    "text": (".txt", ".text", ".md"),
    "image": (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff"),
        ".avif",
    ),
    "document": (".pdf",),
    # Not ".ts": it is as often TypeScript as a transport stream, so its bytes are looked at.
    "video": (".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".mts", ".m2ts"),
}
EXTENSIONS: Mapping[str, Kind] = MappingProxyType(
    {name: kind for kind, names in _NAMES_BY_KIND.items() for name in names}
)

_HEIF_BRANDS = frozenset(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
)
_AVIF_BRANDS = frozenset((b"avif", b"avis"))
# Sound, camera raw and still JPEG 2000 live in the same container.
_NO_VIDEO_BRANDS = frozenset((b"M4A ", b"M4B ", b"M4P ", b"F4A ", b"crx ", b"jp2 ", b"jpx "))
# QuickTime files older than the ftyp box begin with one of these.
_OLD_QUICKTIME_BOXES = frozenset((b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"))
_BMP_HEADER_SIZES = frozenset((12, 16, 40, 52, 56, 64, 108, 124))
_MIN_TS_PACKETS = 3

# A text has no other control characters below U+0020 than tab, line feed, vertical tab, form feed
# and carriage return.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")
_PDF_HEADER = re.compile(rb"%PDF-\d")
_PDF_HEADER_LINE = re.compile(rb"[\r\n]%PDF-\d\.\d[ \t]*[\r\n]")
_PDF_OBJECT = re.compile(rb"\d+ \d+ obj\b")
_PDF_HEADER_WITHIN_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Sniffed:
    """What the bytes are: a kind that can be embedded and the format's name, ``jpeg``, ``pdf``, …

    HEIF and AVIF are images by kind; whether they can be decoded is for the decoder to say.
    """

    kind: Kind
    format: str


def kind_of_extension(name: str) -> Kind | None:
    """Return the kind that the name's last extension stands for, in any case; None if unknown."""
    _, dot, extension = name.rpartition("/")[2].rpartition(".")
    return EXTENSIONS.get(f".{extension.lower()}") if dot else None


def sniff(head: bytes) -> Sniffed | None:
    """Return what a file with these first bytes is; None if it is empty, binary or unknown.

    Args:
        head: The first `HEAD_BYTES` bytes, or the whole of a shorter file. Fewer bytes may leave a
            video or a PDF behind junk unrecognised.
    """
    if _PDF_HEADER.match(head):
        return Sniffed("document", "pdf")
    encoding = _text_encoding(head)
    if encoding is not None:
        # Mail or HTTP headers before a PDF are text; so is a note that merely mentions "%PDF-1.7".
        window = head[: _PDF_HEADER_WITHIN_BYTES + 8]
        if _PDF_HEADER_LINE.search(window) and _PDF_OBJECT.search(head):
            return Sniffed("document", "pdf")
        return Sniffed("text", encoding)
    image = _image_format(head)
    if image is not None:
        return Sniffed("image", image)
    boxes = _iso_media(head)
    if boxes is not None:
        return boxes
    video = _video_format(head)
    if video is not None:
        return Sniffed("video", video)
    if _PDF_HEADER.search(head, 0, _PDF_HEADER_WITHIN_BYTES + 6):
        return Sniffed("document", "pdf")
    return None


def _text_encoding(head: bytes) -> str | None:
    """Return the encoding of a text, whose last character may be cut; None if it is none."""
    if head.startswith(codecs.BOM_UTF8):
        encoding = "utf-8-sig"
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    else:
        encoding = "utf-8"
    try:
        # An incremental decoder keeps an incomplete last character back instead of failing.
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return None
    return encoding if text and not _CONTROL.search(text) else None


def _image_format(head: bytes) -> str | None:
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADER_SIZES:
        return "bmp"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "tiff"
    return None


def _iso_media(head: bytes) -> Sniffed | None:
    """Return what an ISO base media file (MP4, QuickTime, 3GP, HEIF, AVIF) holds, by its brands."""
    box_size, box_type = int.from_bytes(head[:4], "big"), head[4:8]
    if box_type in _OLD_QUICKTIME_BOXES:
        return Sniffed("video", "mov")
    if box_type != b"ftyp" or box_size < 16:
        return None
    major = head[8:12]
    brands = {head[at : at + 4] for at in range(16, min(box_size, len(head)), 4)}
    if major in _AVIF_BRANDS or (major in _HEIF_BRANDS and brands & _AVIF_BRANDS):
        return Sniffed("image", "avif")
    if major in _HEIF_BRANDS:
        return Sniffed("image", "heif")
    if major in _NO_VIDEO_BRANDS:
        return None
    if major == b"qt  ":
        return Sniffed("video", "mov")
    return Sniffed("video", "3gp" if major.startswith((b"3gp", b"3g2")) else "mp4")


def _video_format(head: bytes) -> str | None:
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        # The document type stands in the header element, within its first few dozen bytes.
        header = head[:128]
        return "webm" if b"webm" in header else "matroska" if b"matroska" in header else None
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "avi"
    # Plain packets of 188 bytes, or of 192 with a 4-byte time stamp before each (Blu-ray, AVCHD).
    for first_sync, packet_bytes in ((0, 188), (4, 192)):
        syncs = head[first_sync::packet_bytes]
        if len(syncs) >= _MIN_TS_PACKETS and not syncs.strip(b"\x47"):
            return "mpegts"
    return None
