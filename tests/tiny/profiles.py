"""Colour profiles (ICC, version 2) of a few tags, written out byte by byte: none may be taken from elsewhere."""

from __future__ import annotations

import struct
from collections.abc import Sequence

# The primaries in XYZ, adapted to D50, as columns of red, green and blue.
SRGB = ((0.4360, 0.3851, 0.1431), (0.2225, 0.7169, 0.0606), (0.0139, 0.0971, 0.7141))
DISPLAY_P3 = ((0.5151, 0.2920, 0.1571), (0.2412, 0.6922, 0.0666), (-0.0011, 0.0419, 0.7841))
_D50 = (0.9642, 1.0, 0.8249)


def rgb_profile(primaries: Sequence[Sequence[float]], gamma: float) -> bytes:
    """A screen with these primaries and one gamma."""
    tags = {b"wtpt": _xyz(_D50)}
    for number, name in enumerate("rgb"):
        tags[f"{name}XYZ".encode()] = _xyz([row[number] for row in primaries])
        tags[f"{name}TRC".encode()] = _curve(gamma)
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": _xyz(_D50), b"kTRC": _curve(gamma)})


def black_ink_profile() -> bytes:
    """A printer on which cyan, magenta and yellow ink cannot be seen: lightness is 100 without black ink and 0 with all of it."""
    inks = bytes(
        value for ink in range(16) for value in (0 if ink & 1 else 255, 128, 128)
    )  # Lab; black changes fastest
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (n % 4 == 0) for n in range(9)))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + matrix + identity * 4 + inks + identity * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"wtpt": _xyz(_D50), b"A2B0": table})


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def _curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"made\0" + bytes(79),
        b"cprt": b"text" + bytes(8),
        **tags,
    }
    start = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, start + len(data), len(content))
        data += content
    light = struct.pack(">3i", *(round(value * 65536) for value in _D50))
    head = (
        bytes(8)
        + struct.pack(">I", 0x02400000)
        + kind
        + space
        + connection
        + bytes(12)
        + b"acsp"
        + bytes(28)
        + light
        + bytes(48)
    )
    content = head + table + data
    return struct.pack(">I", len(content)) + content[4:]
