"""The members of a shard are brought together rightly, or refused by name."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest

from idadapter_core.data.inventory import Inventory
from idadapter_core.data.sources import list_photos
from idadapter_core.data.tars import expand_braces
from idadapter_core.errors import ConfigError

Member = tuple[str, bytes | tuple[bytes, str]]


def write_tar(path: Path, members: list[Member]) -> Path:
    """With members in this order, names twice too; a link is its type and its target."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def texts(**captions: str) -> list[Member]:
    return [(f"{name}.txt", caption.encode()) for name, caption in captions.items()]


def photos(*names: str) -> list[Member]:
    return [(f"{name}.jpg", f"photo {name}".encode()) for name in names]


def seen(path: Path) -> dict[str, tuple[str, str, str]]:
    """Each sample's photo as it is read from the shard, its caption, and its problem."""
    found = {}
    for photo in list_photos(path).photos:
        content = path.read_bytes()[photo.offset : photo.offset + photo.size] if photo.offset else b""
        found[photo.source.partition("::")[2]] = (content.decode(), photo.caption, photo.problem)
    return found


def files(path: Path) -> Inventory:
    return list_photos(path).files


HARD, SYMBOLIC = tarfile.LNKTYPE, tarfile.SYMTYPE


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([*photos("0", "1"), *texts(**{"0": "c0", "1": "c1"})], {"0": "c0", "1": "c1"}),
        ([*texts(a="ca", b="cb"), *photos("b", "a")], {"a": "ca", "b": "cb"}),
        ([("./._0.jpg", b"\0\5\x16\7"), ("./0.jpg", b"photo 0"), ("./._0.txt", b"x"), ("./0.txt", b"c0")], {"0": "c0"}),
        ([("0.JPG", b"photo 0"), ("0.TXT", b"c0")], {"0": "c0"}),
        ([("a/Anna.jpg", b"photo a/Anna"), ("a/ANNA.txt", b"c")], {"a/Anna": "c"}),
        ([*photos("i.01"), *texts(**{"i.01": "c1"}), *photos("i.02"), *texts(**{"i.02": "c2"})], {"i.01": "c1", "i.02": "c2"}),
        ([*photos("i.01", "j", "i.02")], {"i.01": "", "i.02": "", "j": ""}),
        ([*photos("a"), ("a.mask.png", b"mask"), *texts(a="ca")], {"a": "ca"}),
        ([("a.image.jpg", b"photo a"), *texts(a="ca")], {"a": "ca"}),
        ([*photos("a", "a.1"), *texts(**{"a": "ca", "a.1": "c1"})], {"a": "ca", "a.1": "c1"}),
        ([("a.jpg", b"photo a"), ("a.caption", b"ca")], {"a": "ca"}),
        ([("a.jpg", b"photo a"), ("a.json", b'{"caption": "json"}'), ("a.txt", b"")], {"a": "json"}),
        ([("a.jpg", b"photo a"), ("a.png", b"second"), ("a.txt", b"ca")], {"a": "ca"}),
        ([*photos("a"), ("__info__", b"x"), (".cache/b.jpg", b"x")], {"a": ""}),
        ([*photos("a", "b"), *texts(**{"b": "no", "a.jpg": "ca", "b.jpg": "cb"})], {"a": "ca", "b": "cb"}),
        ([("a.JPG", b"photo a"), ("a.JPG.Caption", b"ca"), ("a.jpg.json", b'{"caption": "json"}')], {"a": "ca"}),
        ([*photos("i.01", "i.02"), *texts(**{"i.02.jpg": "c2", "i.01.jpg": "c1"})], {"i.01": "c1", "i.02": "c2"}),
        ([*photos("a"), ("a.mask.png", b"mask"), *texts(**{"a.jpg": "ca"})], {"a": "ca"}),
    ],
    ids=[
        "all photos, then all texts",
        "all texts first, in another order",
        "AppleDouble",
        "upper case",
        "a key in another case",
        "dots in keys",
        "dots in keys, apart",
        "a picture of another kind",
        "a longer ending",
        "a key within a key",
        ".caption",
        "an empty text",
        "a second photo",
        "hidden",
        "the photo's whole name",
        "the photo's whole name, upper case",
        "the photo's whole name, dots in keys",
        "the photo's whole name, a picture of another kind",
    ],
)  # fmt: skip
def test_members_are_joined(members: list[Member], expected: dict[str, str], tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", members)
    assert seen(path) == {key: (f"photo {key}", caption, "") for key, caption in expected.items()}
    assert files(path).files == len(members)


def test_links(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "s.tar",
        [
            *photos("a"),
            *texts(a="ca"),
            ("b.jpg", (HARD, "a.jpg")),
            ("b.txt", (HARD, "./a.txt")),
            ("c/d.jpg", (SYMBOLIC, "../b.jpg")),
            ("e.jpg", (SYMBOLIC, "f.jpg")),
            *photos("f"),
            ("g.jpg", (SYMBOLIC, "/etc/passwd")),
            ("h.jpg", (SYMBOLIC, "h.jpg")),
            ("i.jpg", (HARD, "absent.jpg")),
            *photos("j"),
            ("j.txt", (SYMBOLIC, "absent.txt")),
            ("k.jpg", (tarfile.FIFOTYPE, "")),
        ],
    )
    found = seen(path)
    assert {key: found[key][:2] for key in "abef"} == {
        "a": ("photo a", "ca"),
        "b": ("photo a", "ca"),
        "e": ("photo f", ""),
        "f": ("photo f", ""),
    }
    assert found["c/d"][0] == "photo a"
    for key, reason in (
        ("g", "g.jpg is a link to /etc/passwd"),
        ("h", "h.jpg is a link to h.jpg"),
        ("i", "i.jpg is a link to absent.jpg, which is no file of this shard"),
        ("j", "j.txt is a link to absent.txt"),
        ("k", "k.jpg is a device or a pipe"),
    ):
        assert reason in found[key][2]
    assert files(path).files == 13


@pytest.mark.parametrize(
    ("members", "bad", "reason"),
    [
        ([*photos("a"), *texts(a="1"), *photos("b", "a"), *texts(a="2")], ["a", "a"], "a.jpg is there 2 times"),
        ([*photos("a", "b"), *texts(a="1"), *texts(a="2")], ["a"], "a.txt is there 2 times"),
        ([*photos("a", "b"), *texts(**{"a.jpg": "1"}), *texts(**{"a.jpg": "2"})], ["a"], "a.jpg.txt is there 2 times"),
        ([("a.left.jpg", b"l"), ("a.right.jpg", b"r"), *texts(a="c"), *photos("b")], ["a.left", "a.right"], "one text for 2 photos"),
        ([("a.json", b"{}"), *photos("b")], ["a"], "the sample has no photo, only json"),
        ([("README", b""), *photos("b")], ["README"], "the sample has no photo, only README"),
        ([*photos("a", "b"), ("a.json", b'{"caption": "x", "caption": "y"}')], ["a"], "a.json: the key 'caption' is there twice"),
        ([*photos("a", "b"), ("a.json", b'["x"]')], ["a"], "a.json: it holds a list"),
        ([*photos("a", "b"), ("a.json", b"[" * 100_000)], ["a"], "a.json: it is nested too deeply"),
        ([*photos("a", "b"), ("a.json", b'{"text": {}, "caption": 1.5}')], ["a"], "caption must be a text, got 1.5"),
        ([*photos("a", "b"), ("a.json", b'{"caption": "x\\u0000"}')], ["a"], r"U+0000"),
        ([*photos("a", "b"), ("a.txt", "é".encode("latin-1"))], ["a"], "its caption a.txt cannot be read: byte 0xe9 at position 0"),
    ],
)  # fmt: skip
def test_what_is_unclear_is_refused_by_name(
    members: list[Member], bad: list[str], reason: str, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "s.tar", members)
    listed = list_photos(path)
    problems = [(photo.source, photo.problem) for photo in listed.photos if photo.problem]
    assert [source for source, _ in problems] == [f"s.tar::{key}" for key in bad]
    assert all(reason in problem for _, problem in problems)
    assert [photo.caption for photo in listed.photos if not photo.problem] == [""]
    assert listed.files.files == len(members)


def test_gaps_in_json_are_no_captions(tmp_path: Path) -> None:
    """pandas writes NaN for missing values, and makes numbers of such a column floating point."""
    members: list[Member] = [
        *photos("a"),
        ("a.json", b'\xef\xbb\xbf{" Caption": NaN, "text": null, "Identity": 12.0}'),
    ]
    (photo,) = list_photos(write_tar(tmp_path / "s.tar", members)).photos
    assert (photo.caption, photo.identity, photo.problem) == ("", "12", "")


def test_an_unsorted_shard_that_is_cut_off(tmp_path: Path) -> None:
    """Photos whose caption may be in the lost part are no photos without a caption."""
    path = write_tar(
        tmp_path / "s.tar", [*photos("0", "1", "2", "3"), *texts(**{"0": "c0", "1": "c1", "2": "c2"})]
    )
    path.write_bytes(path.read_bytes()[: 6 * 1024 + 513])
    found = seen(path)
    assert {key: caption for key, (_, caption, problem) in found.items() if not problem} == {
        "0": "c0",
        "1": "c1",
    }
    assert "gave 2 whole samples, then it is cut off inside 2.txt; 2 samples lack files" in found[""][2]
    assert files(path).files == 6


def test_a_shard_that_is_cut_off_in_the_text_of_a_photos_whole_name(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [*photos("i.01"), *texts(**{"i.01.jpg": "c1"})])
    path.write_bytes(path.read_bytes()[: 1024 + 513])
    assert "gave 0 whole samples, then it is cut off inside i.01.jpg.txt" in seen(path)[""][2]


def test_what_is_no_tar_or_more_than_one(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "a.tar", photos("a")).read_bytes()
    for content, reason in (
        (first + first, "goes on after its end mark"),
        (bytes(10240), "holds no files"),
        (gzip.compress(first), "compressed with gzip"),
    ):
        path = tmp_path / "s.tar"
        path.write_bytes(content)
        assert reason in list_photos(path).photos[-1].problem


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    write_tar(tmp_path / "b.tar", photos("0"))
    os.mkfifo(tmp_path / "a.tar")
    (tmp_path / "c.tar").symlink_to("/dev/zero")
    found = list_photos(tmp_path).photos
    assert [photo.source for photo in found] == ["a.tar", "b.tar::0", "c.tar"]
    assert all("it is a pipe or a device, no file" in found[n].problem for n in (0, 2))


def test_a_sparse_member(tmp_path: Path) -> None:
    """Its bytes do not lie one after the other."""
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.map": "0,3", "GNU.sparse.size": "1000", "GNU.sparse.name": "a.jpg"}
    info.size = 3
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"abc"))
    assert "a.jpg is stored with gaps" in list_photos(tmp_path / "s.tar").photos[0].problem


class TestPatterns:
    def test_as_shells_write_them_out(self) -> None:
        assert expand_braces("{2..0}") == ["2", "1", "0"]
        assert expand_braces("{x}-{}-{a,b}") == ["{x}-{}-a", "{x}-{}-b"]
        with pytest.raises(ConfigError, match="more than 1,000,000"):
            expand_braces("{0..99999999999}")
        with pytest.raises(ConfigError, match="more than 1,000,000"):
            expand_braces("{0..9999}{0..9999}")

    @pytest.mark.parametrize("name", ["a{1,2}.tar", "a{1..2}.tar", "{x}.tar"])
    def test_names_with_braces(self, name: str, tmp_path: Path) -> None:
        write_tar(tmp_path / "set {1,2}" / name, photos("0"))
        assert [photo.source for photo in list_photos(tmp_path / "set {1,2}" / name).photos] == [f"{name}::0"]

    def test_a_pattern_in_a_folder_with_braces(self, tmp_path: Path) -> None:
        for number in "01":
            write_tar(tmp_path / "set {1,2}" / f"s-{number}.tar", photos(number))
        found = list_photos(f"{tmp_path}/set {{1,2}}/s-{{0..1}}.tar").photos
        assert [photo.source for photo in found] == ["s-0.tar::0", "s-1.tar::1"]

    def test_a_folder_with_braces(self, tmp_path: Path) -> None:
        (tmp_path / "set {1,2}").mkdir()
        (tmp_path / "set {1,2}" / "a.jpg").write_bytes(b"photo")
        assert list_photos(tmp_path / "set {1,2}").layout == "captions"
