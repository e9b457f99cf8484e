"""Read other people's texts: in a known encoding, or not at all."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from ..encodings import encoding_by_mark
from ..errors import ConfigError, InputError

MAX_CAPTION = 100_000
"""Characters. CLIP reads 77 tokens; a longer text is not a caption but a misnamed table or log."""
_MAX_FILE = 16 * MAX_CAPTION  # bytes of a caption file: several lines with four bytes per character
_MARK = "\ufeff"
_NAME_IT = (
    "name the right one with --encoding (utf-16-le for UTF-16 without a byte order mark), or save it as UTF-8"
)
_UNDECODED = re.compile("[\0\udc80-\udcff]")
# Control characters other than white space, the replacement character of decoders, and noncharacters.
_SUSPECT = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd\ufffe\uffff]")
BLANK = " \t\r\n\v\f"
"""White space to strip from file names in a list; other kinds may belong to the name."""


def check_encoding(name: str) -> None:
    """Raise ConfigError if Python has no text encoding of this name."""
    try:
        "".encode(name)
        b"".decode(name)
    except (LookupError, ValueError) as error:
        raise ConfigError(
            f"--encoding must be one that Python knows (cp1251, cp932, gb18030, latin-1, utf-16-le, ...), got {name!r}"
        ) from error


def decode_text(content: bytes, encoding: str = "") -> str:
    """Decode a file: by its byte order mark (UTF-8, 16, 32), else as UTF-8, else in the named encoding.

    A named encoding is also used for ASCII content, because encodings like ISO-2022-JP hide their escapes in it. UTF-16 without a mark is
    an exception: it would read two ASCII letters as one.

    Raises:
        InputError: names the first byte that does not fit.
    """
    if marked := encoding_by_mark(content):
        return _decode(content, marked)
    if not encoding:
        return _decode(content, "utf-8")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return _decode(content, encoding)
    is_plain = text.isascii() and not _SUSPECT.search(text)
    if is_plain and "a".encode(encoding) != b"a":
        return text
    return _decode(content, encoding) if text.isascii() or "\0" in text else text


def decode_lines(content: bytes, encoding: str = "") -> str:
    """As `decode_text`, but bytes that are not UTF-8 become surrogates, to be reported by `undecoded` line by line.

    Files with a byte order mark or in the named encoding are read completely or not at all. Raises InputError.
    """
    if encoding or encoding_by_mark(content) not in ("", "utf-8-sig"):
        return decode_text(content, encoding)
    return content.decode("utf-8-sig", "surrogateescape").lstrip(_MARK)


def undecoded(text: str) -> str:
    """Describe the first byte of a text from `decode_lines` that is not UTF-8, or the first NUL; "" if there is neither."""
    found = _UNDECODED.search(text)
    if not found:
        return ""
    if found[0] == "\0":
        return f"a NUL at position {found.start()} is the sign of a wrong encoding; {_NAME_IT}"
    place = len(text[: found.start()].encode("utf-8", "surrogateescape"))
    return _no_text(ord(found[0]) - 0xDC00, place, "UTF-8")


def require_file(path: Path) -> int:
    """Size of a file in bytes. Pipes and devices, which may never end, are refused without opening them.

    Raises:
        OSError: not a file, missing, or not a possible file name.
    """
    try:
        facts = path.stat()
    except ValueError as error:  # a NUL, or a lone surrogate
        raise OSError(0, f"no file can have this name: {error}") from error
    if stat.S_ISDIR(facts.st_mode):
        raise IsADirectoryError(0, "it is a folder")
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(0, "it is a pipe or a device, no file")
    return facts.st_size


def read_file(path: Path, most: int | None = None) -> bytes:
    """Read a file of at most `most` bytes.

    Raises:
        OSError: as `require_file`.
        InputError: more than `most` bytes.
    """
    size = require_file(path)
    if most is not None and size > most:
        raise InputError(f"it has {size:,} bytes, at most {most:,} are read")
    return path.read_bytes()


def read_caption(path: Path, encoding: str = "") -> str:
    """Read a caption file: its first line that is not empty.

    Raises:
        InputError: names the file and the reason.
    """
    try:
        return first_line(decode_text(read_file(path, _MAX_FILE), encoding))
    except OSError as error:
        raise InputError(f"its caption {path.name} cannot be read ({error.strerror or error})") from error
    except InputError as error:
        raise InputError(f"its caption {path.name} cannot be read: {error}") from error


def first_line(text: str) -> str:
    """The first line that is not empty, as a caption. Raises InputError as `caption_of`."""
    # Not splitlines: U+2028 and the like may occur in a line.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return caption_of(next((line for line in lines if line.strip()), ""))


def caption_of(text: str) -> str:
    """A caption on one line, without lone surrogates, which scraped texts have and tokenizers refuse.

    Raises:
        InputError: the text contains characters that show a wrong decoding, or is far too long.
    """
    if len(text) > MAX_CAPTION:
        raise InputError(f"it has {len(text):,} characters, at most {MAX_CAPTION:,} are a caption")
    if found := _SUSPECT.search(text):
        raise InputError(
            f"it has the character U+{ord(found[0]):04X} at position {found.start()}, the sign of a wrong encoding; {_NAME_IT}"
        )
    # A byte order mark inside a text comes from concatenated files.
    return " ".join(text.replace(_MARK, "").encode("utf-8", "replace").decode().split())


def _decode(content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding).lstrip(_MARK)  # some programs add a second mark
    except UnicodeDecodeError as error:
        name = _NAMES.get(encoding, encoding)
        raise InputError(_no_text(content[error.start], error.start, name)) from error
    except UnicodeError as error:  # some encodings do not give the position
        raise InputError(f"it is no {encoding} ({error})") from error


def _no_text(byte: int, place: int, encoding: str) -> str:
    return f"byte 0x{byte:02x} at position {place} is no {encoding}; name the right encoding with --encoding, or save it as UTF-8"


_NAMES = {"utf-8": "UTF-8", "utf-8-sig": "UTF-8", "utf-16": "UTF-16", "utf-32": "UTF-32"}
