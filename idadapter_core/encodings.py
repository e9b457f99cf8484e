"""Detects the encoding of a text file from its first bytes."""

from __future__ import annotations

import codecs

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


_ZEROS = (
    ("utf-32-le", (False, True, True, True)),
    ("utf-32-be", (True, True, True, False)),
    ("utf-16-le", (False, True, False, True)),
    ("utf-16-be", (True, False, True, False)),
)


def encoding_by_mark(content: bytes) -> str:
    """Return the encoding given by a byte order mark at the start of a file, for `bytes.decode`; "" without a mark."""
    return next((name for mark, name in _MARKS if content.startswith(mark)), "")


def encoding_by_zeros(content: bytes) -> str:
    """Detect UTF-16 or UTF-32 without a byte order mark, for `bytes.decode`, by zeros in the first four bytes; "" if there are none.

    Only for texts that begin with two ASCII characters, such as TOML, JSON and column names; a few others look the same.
    """
    zeros = tuple(byte == 0 for byte in content[:4])
    return next((name for name, expected in _ZEROS if zeros == expected), "")
