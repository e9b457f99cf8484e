"""A text is decoded rightly or refused with the place, and a caption holds nothing that comes of a wrong encoding."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

import pytest

from idadapter_core.data.texts import (
    MAX_CAPTION,
    caption_of,
    check_encoding,
    decode_text,
    first_line,
    read_caption,
)
from idadapter_core.errors import ConfigError, InputError

CAFE = "a woman in a café"


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (CAFE.encode(), ""),
        (CAFE.encode("utf-8-sig"), ""),
        (CAFE.encode("utf-16"), ""),
        (codecs.BOM_UTF16_BE + CAFE.encode("utf-16-be"), ""),
        (CAFE.encode("utf-32"), ""),
        (codecs.BOM_UTF32_BE + CAFE.encode("utf-32-be"), ""),
        (CAFE.encode("cp1252"), "cp1252"),
        (CAFE.encode("utf-16-le"), "utf-16-le"),
        # Texts that tell their encoding by themselves do so beside files of another one, too.
        (CAFE.encode(), "cp1251"),
        (CAFE.encode("utf-16"), "cp1251"),
        (b"\xef\xbb\xbf\xef\xbb\xbf" + CAFE.encode(), ""),
    ],
)
def test_encodings(content: bytes, encoding: str) -> None:
    assert first_line(decode_text(content, encoding)) == CAFE


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("фото женщины", "cp1251"), ("女性の写真", "cp932"), ("日本", "iso2022_jp"), ("照片", "gb18030")],
)
def test_a_named_encoding(text: str, encoding: str) -> None:
    content = text.encode(encoding)
    assert first_line(decode_text(content, encoding)) == text
    with pytest.raises(InputError):
        first_line(decode_text(content))


def test_plain_ascii_is_not_taken_for_two_byte_letters() -> None:
    assert first_line(decode_text(b"a photo!", "utf-16-le")) == "a photo!"


@pytest.mark.parametrize(
    ("content", "encoding", "reason"),
    [
        (CAFE.encode("latin-1"), "", r"byte 0xe9 at position 16 is no UTF-8.*--encoding"),
        (CAFE.encode("utf-16")[:-1], "", r"at position 34 is no UTF-16"),
        (b"\x81\x20", "cp932", r"byte 0x81 at position 0 is no cp932"),
        (CAFE.encode("utf-16-le"), "", r"U\+0000 at position|is no UTF-8"),
        ("фото".encode("utf-16-le"), "", r"U\+0004 at position 1.*utf-16-le"),
        ("a \ufffd b".encode(), "", r"U\+FFFD at position 2"),
        (b"a\0b", "", r"U\+0000 at position 1"),
        (b"a\x1bb", "", r"U\+001B"),
        ("a\x93b".encode(), "", r"U\+0093"),
        ("“smart”".encode("cp1252"), "latin-1", r"U\+0093"),
    ],
)
def test_what_is_no_text(content: bytes, encoding: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        first_line(decode_text(content, encoding))


@pytest.mark.parametrize("name", ["nix", "rot13", "hex", "utf-8\0"])
def test_encodings_that_there_are_not(name: str) -> None:
    with pytest.raises(ConfigError, match="--encoding must be"):
        check_encoding(name)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\r\n \n one \r\ntwo", "one"),
        ("one\rtwo", "one"),
        ("one\u2028two\x85three\x0cfour\nfive", "one two three four"),
        ("", ""),
        (" \n\n", ""),
    ],
)
def test_the_first_line(text: str, line: str) -> None:
    assert first_line(text) == line


def test_a_text_that_is_far_too_long() -> None:
    assert caption_of("a" * MAX_CAPTION)
    with pytest.raises(InputError, match="100,001 characters, at most 100,000"):
        caption_of("a" * (MAX_CAPTION + 1))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "log.txt").write_bytes(b"\n" * 2_000_000)
    for name, reason in (
        ("pipe", "it is a pipe"),
        ("loop", "symbolic link"),
        ("folder", "it is a folder"),
        ("absent", "No such file"),
        ("log", "2,000,000 bytes"),
        ("nul\0", "no file can have this name"),
    ):
        with pytest.raises(InputError, match=f"its caption {name}.txt cannot be read.*{reason}"):
            read_caption(tmp_path / f"{name}.txt")
