"""Photos are found however people lay them out, with what is said about them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from idadapter_core.data.sources import Photo, list_photos, noun_of_caption
from idadapter_core.data.tars import expand_braces
from idadapter_core.errors import ConfigError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def facts(photo: Photo) -> tuple[str, str, str, str]:
    return photo.source, photo.identity, photo.caption, photo.class_noun


class TestFolders:
    def test_a_folder_per_person(self, tmp_path: Path) -> None:
        touch(
            tmp_path, "bo/2.JPG", "bo/10.png", "al/x/1.webp", "al/notes.md", ".cache/1.png", "al/.hidden.png"
        )
        (tmp_path / "bo/10.txt").write_text("\n a man  on a hill \nanother caption\n", encoding="utf-8")
        source = list_photos(tmp_path)
        assert source.layout == "folders"
        assert source.root == tmp_path
        assert list(map(facts, source.photos)) == [
            ("al/x/1.webp", "al/x", "", ""),
            ("bo/10.png", "bo", "a man on a hill", "man"),
            ("bo/2.JPG", "bo", "", ""),
        ]

    def test_a_flat_folder(self, tmp_path: Path) -> None:
        touch(tmp_path, "1.png", "2.jpeg")
        (tmp_path / "2.txt").write_text("her portrait", encoding="utf-8")
        source = list_photos(tmp_path)
        assert source.layout == "captions"
        assert list(map(facts, source.photos)) == [
            ("1.png", "", "", ""),
            ("2.jpeg", "", "her portrait", "woman"),
        ]

    def test_folders_that_are_no_people(self, tmp_path: Path) -> None:
        touch(tmp_path, "00000/00000.png", "01000/01000.png")
        assert [photo.identity for photo in list_photos(tmp_path, "captions").photos] == ["", ""]

    def test_both_at_once_must_be_said(self, tmp_path: Path) -> None:
        touch(tmp_path, "1.png", "face/1.png")
        with pytest.raises(ConfigError, match=r"\(face, ...\).*--layout folders.*--layout captions"):
            list_photos(tmp_path)
        assert [photo.identity for photo in list_photos(tmp_path, "folders").photos] == ["", "face"]

    def test_links_to_folders_are_followed_once(self, tmp_path: Path) -> None:
        touch(tmp_path, "elsewhere/1.png")
        photos = tmp_path / "photos"
        photos.mkdir()
        (photos / "bo").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "up").symlink_to(photos)
        assert [photo.source for photo in list_photos(photos).photos] == ["bo/1.png"]


class TestTables:
    def test_json_lines(self, tmp_path: Path) -> None:
        lines = [
            {"file": "b.png", "caption": "a person", "identity": "bo", "class_noun": "woman"},
            {"file_name": "sub/a.jpg", "text": ["first \ud83d caption", "second"], "gender": "male"},
        ]
        path = tmp_path / "captions.jsonl"
        path.write_text("\n".join([json.dumps(lines[0]), "", "{broken", "[1]", json.dumps(lines[1])]))
        source = list_photos(path)
        assert (source.layout, source.root) == ("captions", tmp_path)
        assert list(map(facts, source.photos)) == [
            ("b.png", "bo", "a person", "woman"),
            ("captions.jsonl:3", "", "", ""),
            ("captions.jsonl:4", "", "", ""),
            ("sub/a.jpg", "", "first ? caption", "man"),
        ]
        assert [bool(photo.problem) for photo in source.photos] == [False, True, True, False]

    def test_csv_and_another_root(self, tmp_path: Path) -> None:
        path = tmp_path / "captions.csv"
        path.write_text('\ufefffile,caption,identity\na.png,"one, two",7\n/abs/b.png,,\n', encoding="utf-8")
        source = list_photos(path, root=tmp_path / "photos")
        assert source.root == tmp_path / "photos"
        assert list(map(facts, source.photos)) == [("a.png", "7", "one, two", ""), ("/abs/b.png", "", "", "")]

    def test_faceid_6m(self, tmp_path: Path) -> None:
        touch(tmp_path, "0.png", "0.npy", "1.png", "1.npy", "face/0.png", "face/1.png")
        lines = [
            {"image_file": f"/cfs/laion/{n}.jpg", "caption": f"photo {n}", "height": 9} for n in (77, 78)
        ]
        (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        source = list_photos(tmp_path / "captions.jsonl", numbered=True)
        assert list(map(facts, source.photos)) == [
            ("0.png", "", "photo 77", ""),
            ("1.png", "", "photo 78", ""),
        ]

    def test_without_names(self, tmp_path: Path) -> None:
        (tmp_path / "captions.jsonl").write_text('{"caption": "a man"}\n')
        with pytest.raises(ConfigError, match="entry 1 names no photo.*--numbered"):
            list_photos(tmp_path / "captions.jsonl")

    def test_a_list_of_paths(self, tmp_path: Path) -> None:
        touch(tmp_path, "photos/b.png", "photos/a.png")
        (tmp_path / "photos" / "a.txt").write_text("beside")
        (tmp_path / "list.txt").write_text(f"photos/b.png\n\n{tmp_path}/photos/a.png\n")
        source = list_photos(tmp_path / "list.txt")
        assert source.layout == "list"
        assert list(map(facts, source.photos)) == [
            ("photos/b.png", "", "", ""),
            ("photos/a.png", "", "beside", ""),
        ]

    def test_ip_adapter(self, tmp_path: Path) -> None:
        entries = [{"image_file": "1.png", "text": "A dog", "id_embed_file": "1.bin"}]
        (tmp_path / "data.json").write_text(json.dumps(entries))
        source = list_photos(tmp_path / "data.json")
        assert source.layout == "ip-adapter"
        assert list(map(facts, source.photos)) == [("1.png", "", "A dog", "")]
        (tmp_path / "data.json").write_text(json.dumps(entries[0]))
        with pytest.raises(ConfigError, match="must hold a list"):
            list_photos(tmp_path / "data.json")


class TestFilesBeside:
    def test_celeba_identities(self, tmp_path: Path) -> None:
        touch(tmp_path, "img/0.jpg", "img/1.jpg", "img/2.jpg")
        table = tmp_path / "identity.txt"
        table.write_text("0.jpg 2880\n2.jpg 2937\n7.jpg 1\n")
        photos = list_photos(tmp_path / "img", identities=table).photos
        assert [photo.identity for photo in photos] == ["2880", "", "2937"]
        table.write_text("000001.jpg 2880\n")
        with pytest.raises(ConfigError, match=r"speaks of 000001\.jpg, the photos are like 0\.jpg"):
            list_photos(tmp_path / "img", identities=table)
        table.write_text("0.jpg 2880\n1.jpg\n")
        with pytest.raises(ConfigError, match="line 2"):
            list_photos(tmp_path / "img", identities=table)

    def test_captions_of_multi_modal_celeba_hq(self, tmp_path: Path) -> None:
        touch(tmp_path, "img/0.jpg", "img/1.jpg")
        texts = tmp_path / "celeba-caption"
        texts.mkdir()
        (texts / "0.txt").write_text("The woman has wavy hair.\nShe is young.\n")
        photos = list_photos(tmp_path / "img", captions=texts).photos
        assert list(map(facts, photos)) == [
            ("0.jpg", "", "The woman has wavy hair.", "woman"),
            ("1.jpg", "", "", ""),
        ]
        (texts / "0.txt").rename(texts / "zero.txt")
        with pytest.raises(ConfigError, match=r"no text file for any photo.*0\.txt"):
            list_photos(tmp_path / "img", captions=texts)


class TestShards:
    FILES = {
        "a/7.json": b'{"identity": "bo", "caption": "from json", "gender": "F"}',
        "a/7.jpg": b"photo 7",
        "a/7.cls": b"3",
        "8.png": b"photo 8",
        "8.txt": b"from text\nmore",
        "9.json": b"{}",
        "10.webp": b"photo 10",
        "10.json": b"{broken",
    }

    def test_samples_with_facts_and_places(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "s-0.tar", self.FILES)
        write_tar(tmp_path / "s-1.tar", {"7.jpg": b"again"})
        for given in (tmp_path, f"{tmp_path}/s-{{0..1}}.tar", f"{tmp_path}/{{s-0,s-1}}.tar"):
            source = list_photos(given)
            assert (source.layout, source.root) == ("webdataset", tmp_path)
            assert list(map(facts, source.photos)) == [
                ("s-0.tar::a/7", "bo", "from json", "woman"),
                ("s-0.tar::8", "", "from text", ""),
                ("s-0.tar::9", "", "", ""),
                ("s-0.tar::10", "", "", ""),
                ("s-1.tar::7", "", "", ""),
            ]
        assert [photo.problem.partition("(")[0] for photo in source.photos] == [
            "",
            "",
            "the sample has no photo, only json",
            "its .json cannot be read ",
            "",
        ]
        first = source.photos[0]
        content = (tmp_path / "s-0.tar").read_bytes()[first.offset : first.offset + first.size]
        assert content == b"photo 7"

    @pytest.mark.parametrize(
        ("cut", "whole", "reason"),
        [
            (lambda content: content[:512], 0, "cut off inside 1.jpg"),
            (lambda content: content[: 2 * 2048 + 514], 2, "cut off inside 3.jpg"),
            (lambda content: content[: 2 * 2048 + 1024 + 100], 2, "cut off"),
            (lambda content: content[: 2 * 2048 + 1024 + 514], 2, "cut off inside 3.txt"),
            (lambda content: content[: 3 * 2048], 3, "its end mark is missing"),
            (lambda content: content[:2048] + b"x" * 512 + content[2560:], 1, "what follows is no tar"),
            (lambda content: b"x" * 4096, 0, "cannot be read on"),
            (lambda content: b"", 0, "cannot be read on"),
        ],
        ids=[
            "in the first",
            "in a photo",
            "in a header",
            "in a caption",
            "at the end",
            "damaged",
            "no tar",
            "empty",
        ],
    )
    def test_a_shard_that_is_cut_off(
        self, cut: Callable[[bytes], bytes], whole: int, reason: str, tmp_path: Path
    ) -> None:
        files = {}
        for key in "123":
            files |= {f"{key}.jpg": b"photo " + key.encode(), f"{key}.txt": b"caption " + key.encode()}
        path = write_tar(tmp_path / "s.tar", files)
        path.write_bytes(cut(path.read_bytes()))
        photos = list_photos(path).photos
        assert [photo.source for photo in photos] == [*(f"s.tar::{n + 1}" for n in range(whole)), "s.tar"]
        assert photos[-1].problem.startswith(f"the shard gave {whole} whole samples, then it ")
        assert reason in photos[-1].problem
        assert not any(photo.problem for photo in photos[:-1])

    def test_a_shard_that_is_not_there(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "s-0.tar", {"1.jpg": b"photo"})
        photos = list_photos(f"{tmp_path}/s-{{0..1}}.tar").photos
        assert [photo.source for photo in photos] == ["s-0.tar::1", "s-1.tar"]
        assert "No such file" in photos[1].problem

    def test_shards_of_several_datasets(self, tmp_path: Path) -> None:
        for name in ("ffhq", "celeba"):
            (tmp_path / name).mkdir()
            write_tar(tmp_path / name / "s-0.tar", {"1.jpg": b"photo"})
        photos = list_photos(tmp_path, "webdataset").photos
        assert [photo.source for photo in photos] == ["celeba/s-0.tar::1", "ffhq/s-0.tar::1"]

    def test_compressed_shards_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="not compressed"):
            list_photos(tmp_path / "s.tar.gz", "webdataset")

    def test_braces(self) -> None:
        assert expand_braces("a-{08..10}.{x,y}") == [f"a-{n}.{e}" for n in ("08", "09", "10") for e in "xy"]


@pytest.mark.parametrize(
    "name", ["absent", "absent.jsonl", "absent.csv", "absent.json", "absent.txt", "photos.zip"]
)
def test_nothing_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such"):
        list_photos(tmp_path / name)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no photos found"):
        list_photos(tmp_path)


@pytest.mark.parametrize(
    ("caption", "noun"),
    [
        ("A man, 40, in a suit", "man"),
        ("She has wavy hair", "woman"),
        ("a man and a woman", ""),
        ("a mango on a mantle", ""),
        ("", ""),
    ],
)
def test_nouns_of_captions(caption: str, noun: str) -> None:
    assert noun_of_caption(caption) == noun
