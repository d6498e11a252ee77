"""HTML made of elements: whatever is not an element already is text, and is escaped.

There is no way to put a string into a page unescaped but `Markup`, which only this module and the
style sheet's caller write. Characters that HTML forbids, or that could disturb what stands around
them, are shown by their code.
"""

from __future__ import annotations

import html
import re
import unicodedata

# Without them the parser would wait for an end.
_VOID = frozenset(("meta", "img"))
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]*")
_KEPT_IN_TEXT = "\n\t"
# Control characters, line separators, surrogates (of file names that are no UTF-8).
_UNSAFE_IN_TEXT = frozenset(("Cc", "Cs", "Zl", "Zp"))
# What joins letters or emoji, and turns no direction.
_JOINERS = "\u200c\u200d"


class Markup(str):
    """A piece of HTML that goes into a page as it is."""

    __slots__ = ()


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """Return ``<tag …>children</tag>``.

    Args:
        tag: A name written in the program.
        children: `Markup` as it is; None is nothing; the rest is escaped text.
        attributes: ``class_`` is ``class``, other underscores are hyphens; None leaves one out,
            True writes its name alone, the rest is escaped.

    Raises:
        ValueError: If a name is none.
    """
    written = [tag]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name = key.rstrip("_").replace("_", "-")
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no attribute")
        written.append(name if value is True else f'{name}="{escaped(value)}"')
    if not _NAME.fullmatch(tag):
        raise ValueError(f"{tag!r} is no element")
    start = f"<{' '.join(written)}>"
    if tag in _VOID:
        return Markup(start)
    return Markup(f"{start}{joined(*children)}</{tag}>")


def joined(*children: object) -> Markup:
    """Return the children one after the other, text escaped."""
    return Markup("".join(escaped(child) for child in children if child is not None))


def escaped(value: object) -> str:
    """Return markup as it is, anything else as text that is safe in content and attributes."""
    if isinstance(value, Markup):
        return value
    return html.escape("".join(map(_in_text, str(value))))


def visible(name: str) -> str:
    r"""Return a file name or address with everything that does not print shown by its code.

    A line break becomes ``\n``, a mark that turns the direction of writing ``\u202e``: what is
    left can not pretend to be another name.
    """
    return "".join(char if char.isprintable() or char in _JOINERS else _code(char) for char in name)


def shortened(text: str, most: int) -> str:
    """Return a text of at most so many characters, its middle cut out."""
    if len(text) <= most:
        return text
    tail = (most - 1) * 3 // 5
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def excerpt(text: str, most: int) -> str:
    """Return the beginning of a text, white space joined, cut at a word where there is one."""
    # Four times as much is enough to find it: nobody's million characters are split here.
    words = " ".join(text[: 4 * most].split())
    if len(words) <= most and len(text) <= 4 * most:
        return words
    cut = words[: most - 1]
    return f"{cut.rsplit(' ', 1)[0] if ' ' in cut[most // 2 :] else cut}…"


def _in_text(char: str) -> str:
    if " " <= char < "\x7f" or char in _KEPT_IN_TEXT:
        return char
    return _code(char) if unicodedata.category(char) in _UNSAFE_IN_TEXT else char


def _code(char: str) -> str:
    return ascii(char)[1:-1]
