"""Which encoding a text file says it is in."""

from __future__ import annotations

import codecs

# UTF-32 first: its mark of little-endian files begins like that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def encoding_by_mark(content: bytes) -> str:
    """The encoding that the byte order mark at the beginning of a file names, for `bytes.decode`; "" where there is no mark."""
    return next((name for mark, name in _MARKS if content.startswith(mark)), "")
