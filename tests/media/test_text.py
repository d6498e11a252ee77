"""Which bytes are text."""

from __future__ import annotations

import pytest

from qvl_batch.errors import CorruptMediaError, EmptyMediaError, LimitExceededError
from qvl_batch.media.text import decode_text

WORDS = "Grüße, 東京 🦀\n"


def text_of(data: bytes, max_bytes: int = 1000) -> str:
    return decode_text(data, uri="t", max_bytes=max_bytes)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode_is_read_without_its_mark(encoding):
    assert text_of(WORDS.encode(encoding)) == WORDS


def test_utf16_of_either_byte_order_needs_a_mark():
    assert text_of(b"\xfe\xff" + WORDS.encode("utf-16-be")) == WORDS
    with pytest.raises(CorruptMediaError):
        text_of("plain".encode("utf-16-le"))


@pytest.mark.parametrize("data", [b"caf\xe9", b"\xff\xfea", b"a\0b", b"\xef\xbb\xbf\xff"])
def test_other_bytes_are_corrupt(data):
    with pytest.raises(CorruptMediaError):
        text_of(data)


@pytest.mark.parametrize("data", [b" \n\t ", b"\xef\xbb\xbf", "\u3000".encode()])
def test_white_space_alone_is_empty(data):
    with pytest.raises(EmptyMediaError):
        text_of(data)


def test_a_text_has_a_largest_size():
    assert text_of(b"a" * 10, 10) == "a" * 10
    with pytest.raises(LimitExceededError, match="11 bytes"):
        text_of(b"a" * 11, 10)
