"""Text files: UTF-8 with or without a byte order mark, UTF-16 with one."""

from __future__ import annotations

import codecs

from qvl_batch.errors import CorruptMediaError, EmptyMediaError, LimitExceededError


def decode_text(data: bytes, *, uri: str, max_bytes: int) -> str:
    """Return the text of a file, without its byte order mark.

    Raises:
        LimitExceededError: If there are more than ``max_bytes``.
        CorruptMediaError: If the bytes are in no encoding read here, or hold a NUL character.
        EmptyMediaError: If there is nothing but white space.
    """
    if len(data) > max_bytes:
        raise LimitExceededError(uri, f"{len(data)} bytes of text, the limit is {max_bytes}")
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if utf16 else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise CorruptMediaError(
            uri, f"not {encoding.removesuffix('-sig')} text: {error.reason} at byte {error.start}"
        ) from None
    if "\0" in text:
        raise CorruptMediaError(uri, f"not text: a NUL character at position {text.index(chr(0))}")
    if not text.strip():
        raise EmptyMediaError(uri, f"{len(data)} bytes hold white space only")
    return text
