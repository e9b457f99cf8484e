"""Photos are found however people lay them out, with what is said about them.

One file, because the layouts share the folders that they are told apart in.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from idadapter_core.data import photos as photos_module
from idadapter_core.data.entries import noun_of_caption
from idadapter_core.data.inventory import describe_unread
from idadapter_core.data.sources import ListedPhoto, Source, list_photos
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


def facts(photo: ListedPhoto) -> tuple[str, str, str, str]:
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


def problems(source: Source) -> dict[str, str]:
    return {photo.source: photo.problem for photo in source.photos if photo.problem}


def captions(source: Source) -> dict[str, str]:
    return {photo.source: photo.caption for photo in source.photos if not photo.problem}


def not_read(source: Source) -> dict[str, int]:
    return {kind.kind: kind.count for kind in source.files.unread}


class TestTextsBeside:
    def test_names_in_any_case_and_form(self, tmp_path: Path) -> None:
        texts = {
            "0.TXT": "upper",
            "1.caption": "kohya",
            "2.jpg.txt": "whole name",
            "Anna.Txt": "anna",
            "e\u0301.txt": "accent",
            "4.txt": "txt first",
            "4.caption": "not this",
            "a.txt": "exact",
        }
        touch(
            tmp_path, "0.jpg", "1.JPG", "2.jpg", "3.jpg", "ANNA.jpg", "\u00e9.jpg", "4.jpg", "a.jpg", "A.jpg"
        )
        for name, text in texts.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        source = list_photos(tmp_path)
        assert captions(source) == {
            "0.jpg": "upper",
            "1.JPG": "kohya",
            "2.jpg": "whole name",
            "3.jpg": "",
            "4.jpg": "txt first",
            "A.jpg": "",  # the text has the exact name of the other
            "ANNA.jpg": "anna",
            "a.jpg": "exact",
            "\u00e9.jpg": "accent",
        }
        assert not_read(source) == {".caption": 1}
        assert source.notes == ("captions for 7 of 9 photos; first without: 3.jpg",)

    def test_texts_that_cannot_be_read(self, tmp_path: Path) -> None:
        touch(tmp_path, *(f"{n}.jpg" for n in range(5)))
        for n, content in enumerate(
            ("a".encode("utf-16"), "фото".encode("cp1251"), b"a\0b", "\ufffd".encode(), b"fine")
        ):
            (tmp_path / f"{n}.txt").write_bytes(content)
        source = list_photos(tmp_path)
        assert captions(source) == {"0.jpg": "a", "4.jpg": "fine"}
        assert "1.txt cannot be read: byte 0xf4 at position 0" in problems(source)["1.jpg"]
        assert "U+0000" in problems(source)["2.jpg"]
        assert "U+FFFD" in problems(source)["3.jpg"]
        assert captions(list_photos(tmp_path, encoding="cp1251")) == {
            "0.jpg": "a",
            "1.jpg": "фото",
            "4.jpg": "fine",
        }
        with pytest.raises(ConfigError, match="--encoding"):
            list_photos(tmp_path, encoding="nix")

    def test_several_texts_that_fit_equally_well(self, tmp_path: Path) -> None:
        touch(tmp_path, "Anna.jpg", "ANNA.txt", "anna.txt")
        assert "ANNA.txt, anna.txt may all be its caption" in problems(list_photos(tmp_path))["Anna.jpg"]


class TestWhatIsNotRead:
    def test_everything_is_counted_once(self, tmp_path: Path) -> None:
        names = [
            "a/1.jpg",
            "a/2.JFIF",
            "a/3.jpe",
            "a/4.gif",
            "a/1.txt",
            "a/5.HEIC",
            "a/6.nef",
            "a/7.MOV",
            "a/b.zip",
            "a/c.tar",
        ]
        names += [
            "a/.DS_Store",
            "a/._1.jpg",
            ".git/x.jpg",
            "a/noending",
            "a/lost.txt",
            "a/t.parquet",
            "a/other.csv",
            "a/8.psd",
        ]
        touch(tmp_path, *names)
        source = list_photos(tmp_path, "folders")
        has_heif = "heic" not in " ".join(not_read(source))
        assert [photo.source for photo in source.photos if not photo.source.endswith("HEIC")] == [
            "a/1.jpg",
            "a/2.JFIF",
            "a/3.jpe",
            "a/4.gif",
        ]
        expected = {
            "hidden": 3,
            ".nef": 1,
            ".mov": 1,
            ".zip": 1,
            ".tar": 1,
            "without an ending": 1,
            ".txt": 1,
            ".parquet": 1,
        }
        expected |= {".csv": 1, ".psd": 1} | ({} if has_heif else {".heic": 1})
        assert not_read(source) == expected
        files = source.files
        assert (
            files.files
            == len(names)
            == files.photos + files.texts + files.tables + sum(not_read(source).values())
        )
        advised = {kind.kind for kind in files.unread if kind.advice}
        assert advised == expected.keys()

    def test_hidden_folders_are_counted_by_their_files(self, tmp_path: Path) -> None:
        touch(tmp_path, "bo/1.jpg", ".store/a/1.jpg", ".store/a/2.jpg", ".store/.x", "bo/.y/z.txt")
        (tmp_path / "al").symlink_to(tmp_path / ".store" / "a")
        source = list_photos(tmp_path)
        assert [photo.source for photo in source.photos] == ["al/1.jpg", "al/2.jpg", "bo/1.jpg"]
        assert not_read(source) == {"hidden": 4}

    def test_the_index_itself_is_not_counted(self, tmp_path: Path) -> None:
        touch(
            tmp_path,
            "1.jpg",
            "i.parquet",
            "i.parquet.progress/rank-00000.jsonl",
            ".i.parquet.0123abcd",
            "i.0123456789abcdef.safetensors",
            ".i.0123456789abcdef.safetensors.0123abcd",
            "i.0123456789abcdef.map",
            ".i.0123456789abcdef.map.0123abcd",
            ".i.0123456789abcdef.map.lock",
        )
        assert not_read(list_photos(tmp_path, output=tmp_path / "i.parquet")) == {}
        assert sum(not_read(list_photos(tmp_path, output=tmp_path / "other.parquet")).values()) == 8

    def test_heic_says_how(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(photos_module, "_registers_heif", lambda: False)
        touch(tmp_path, "1.jpg", "2.HEIC")
        source = list_photos(tmp_path)
        assert [photo.source for photo in source.photos] == ["1.jpg"]
        assert "1 .heic (run `pip install pillow-heif`" in describe_unread(source.files.unread)
        (tmp_path / "1.jpg").unlink()
        with pytest.raises(ConfigError, match="no photos found.*1 .heic.*pillow-heif"):
            list_photos(tmp_path)

    def test_a_tar_beside_photos(self, tmp_path: Path) -> None:
        touch(tmp_path, "bo/1.jpg")
        write_tar(tmp_path / "old.tar", {"1.jpg": b"photo"})
        with pytest.raises(ConfigError, match=r"1 photos and 1 \.tar files \(old.tar\).*--layout"):
            list_photos(tmp_path)
        assert not_read(list_photos(tmp_path, "folders")) == {".tar": 1}
        assert not_read(list_photos(tmp_path, "webdataset")) == {"photos outside of the shards": 1}

    def test_shards_in_folders_and_upper_case(self, tmp_path: Path) -> None:
        (tmp_path / "deep").mkdir()
        write_tar(tmp_path / "deep" / "S.TAR", {"1.jpg": b"photo"})
        assert [photo.source for photo in list_photos(tmp_path).photos] == ["deep/S.TAR::1"]

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
    def test_links_pipes_and_odd_names(self, tmp_path: Path) -> None:
        touch(
            tmp_path, "a/x.jpg/1.jpg", "a/é/2.jpg", "a/n\nl/3.jpg", "a/" + "n" * 240 + ".jpg", "a/b::c/4.jpg"
        )
        bad = os.fsencode(tmp_path) + b"/a/\xff\xfe"
        os.mkdir(bad)  # noqa: PTH102
        for name in (b"/5\xe9.jpg", b"/5\xe9.txt"):
            with open(bad + name, "wb") as file:  # noqa: PTH123
                file.write(b"beside")
        (tmp_path / "a" / "loop").symlink_to(".")
        (tmp_path / "a" / "broken.jpg").symlink_to("absent")
        source = list_photos(tmp_path, "folders")
        assert len(source.photos) == 7
        assert captions(source)["a/\udcff\udcfe/5\udce9.jpg"] == "beside"
        assert not_read(source) == {"folders that are there under another name": 1}

    def test_a_folder_that_cannot_be_opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        touch(tmp_path, "al/1.jpg", "bo/1.jpg")
        scandir = os.scandir

        def refusing(path: object) -> object:
            if str(path).endswith("bo"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)  # type: ignore[call-overload]

        monkeypatch.setattr("os.scandir", refusing)
        assert problems(list_photos(tmp_path)) == {"bo": "the folder cannot be opened (Permission denied)"}

    def test_a_folder_in_a_persons_folder(self, tmp_path: Path) -> None:
        touch(tmp_path, "anna/1.jpg", "anna/old/2.jpg", "bo/1.jpg")
        (note,) = list_photos(tmp_path).notes
        assert "1 folders of photos lie in a folder that has photos too (anna/old)" in note


class TestMetadata:
    def test_of_a_hugging_face_folder(self, tmp_path: Path) -> None:
        touch(tmp_path, "0.jpg", "1.jpg", "2.jpg", "sub/3.jpg", "4.jpg")
        lines = [
            {"file_name": "0.JPG", "text": "zero", "identity": "anna"},
            {"file_name": "1.jpg", "text": None},
            {"file_name": "sub\\3.jpg", "text": "three"},
            {"file_name": "9.jpg", "text": "gone"},
            {"file_name": "2.jpg", "text": "a"},
            {"file_name": "2.jpg", "text": "b"},
            {"file_name": "4.jpg", "text": {"en": "x"}},
        ]
        (tmp_path / "Metadata.JSONL").write_text("\n".join([*map(json.dumps, lines), "{broken"]))
        for name in "01":
            (tmp_path / f"{name}.txt").write_text("beside")
        source = list_photos(tmp_path, "captions")
        assert captions(source) == {"0.jpg": "zero", "1.jpg": "beside", "sub/3.jpg": "three"}
        assert source.photos[0].identity == "anna"
        assert [(name, reason[:48]) for name, reason in sorted(problems(source).items())] == [
            ("2.jpg", "Metadata.JSONL:6 says something else about it th"),
            ("4.jpg", "Metadata.JSONL:7: text must be a text, got {'en'"),
            ("9.jpg", "a metadata table names it, but there is no such "),
            ("Metadata.JSONL:8", "the line is no JSON (Expecting property name enc"),
        ]
        assert (source.files.tables, source.files.texts, not_read(source)) == (1, 1, {".txt": 1})

    def test_by_absolute_paths_and_with_two_marks(self, tmp_path: Path) -> None:
        touch(tmp_path, "0.jpg")
        entry = json.dumps({"file_name": str(tmp_path / "0.jpg"), "text": "zero"})
        (tmp_path / "metadata.jsonl").write_text(f"\ufeff{entry}", encoding="utf-8-sig")
        assert captions(list_photos(tmp_path)) == {"0.jpg": "zero"}

    def test_parts_of_a_dataset_are_no_people(self, tmp_path: Path) -> None:
        touch(tmp_path, "train/0.jpg", "Test/1.jpg")
        (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "0.jpg", "text": "zero"}')
        with pytest.raises(
            ConfigError, match="photos in Test, train, which looks like parts.*--layout captions"
        ):
            list_photos(tmp_path)
        source = list_photos(tmp_path, "captions")
        assert captions(source) == {"Test/1.jpg": "", "train/0.jpg": "zero"}
        assert {photo.identity for photo in source.photos} == {""}

    def test_csv_and_a_table_of_another_kind(self, tmp_path: Path) -> None:
        touch(tmp_path, "a/0.jpg", "b/0.jpg")
        (tmp_path / "a" / "metadata.csv").write_text('file_name,text\n0.jpg,"one, two"\n')
        (tmp_path / "b" / "metadata.csv").write_text("x,y\n1,2\n")
        source = list_photos(tmp_path)
        assert captions(source) == {"a/0.jpg": "one, two", "b/0.jpg": ""}
        assert [photo.identity for photo in source.photos] == ["a", "b"]
        assert not_read(source) == {"metadata tables that name no photos": 1}

    def test_empty_rows_of_a_spreadsheet_are_none(self, tmp_path: Path) -> None:
        touch(tmp_path, "0.jpg")
        (tmp_path / "metadata.csv").write_text("file_name,text\n0.jpg,zero\n,\n , \n\n")
        source = list_photos(tmp_path)
        assert (captions(source), problems(source)) == ({"0.jpg": "zero"}, {})


class TestCsv:
    @pytest.mark.parametrize(
        "content",
        [
            b"file,caption\n0.jpg,a photo of her\n",
            b"file, caption\n0.jpg, a photo of her\n",
            b'\xef\xbb\xbf"File","CAPTION"\r\n"0.jpg","a photo\nof her"\r\n\r\n',
            "file;caption\n0.jpg;a photo of her\n".encode("utf-16"),
            b"file\tcaption\n0.jpg\ta photo of her\n",
            b"file|caption|id\n0.jpg|a photo of her|1\n",
            b"sep=;\nfile;caption\n0.jpg;a photo of her\n",
            b"File Name,text\r0.JPG,a photo of her\r,\r",
            b"file,caption\n./0.jpg,a photo\xe2\x80\xa8of her\n",
            b"file,caption,x\n0.jpg,a photo of her," + b"x" * 200_000 + b"\n",
            b'"file" ,"caption", "x"\n"0.jpg" , "a photo\nof her" ,\n',
        ],
        ids=[
            "plain",
            "spaces",
            "Excel",
            "UTF-16",
            "tabs",
            "bars",
            "sep=",
            "old Mac",
            "U+2028",
            "a huge other field",
            "spaces behind quotes",
        ],
    )
    def test_it_is_read_as_what_it_is(self, content: bytes, tmp_path: Path) -> None:
        touch(tmp_path, "0.jpg")
        (tmp_path / "t.csv").write_bytes(content)
        assert captions(list_photos(tmp_path / "t.csv")) == {"0.jpg": "a photo of her"}

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            (b"1.jpg,a, b", "has 3 fields, the first line has 2"),
            (b"1.jpg", "has 1 fields, the first line has 2"),
            (b",x", "names no photo"),
            (b"1.jpg,caf\xe9", "byte 0xe9 at position 3 is no UTF-8"),
            (b"1.jpg," + b"a" * 140_000, "has 140,000 characters in the field caption"),
            (b"a\0.jpg,x", "NUL"),
            (b'1.jpg,"a"b', "cannot be read (',' expected after '\"'). Quotes inside a field are doubled"),
            (b'1.jpg,"Hello, "she" said"', "cannot be read"),
        ],
        ids=[
            "too many",
            "too few",
            "no name",
            "no UTF-8",
            "huge",
            "NUL",
            "a quote",
            "quotes around a delimiter",
        ],
    )
    def test_bad_rows_are_told_by_their_line(self, row: bytes, reason: str, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_bytes(b'file,caption\n0.jpg,"one\ntwo"\n' + row + b"\n2.jpg,fine\n")
        source = list_photos(tmp_path / "t.csv")
        assert captions(source) == {"0.jpg": "one two", "2.jpg": "fine"}
        ((where, problem),) = problems(source).items()
        assert where == "t.csv:4"
        assert reason in problem

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("0.jpg,a\n", r"no column names the photos. Its first line has 0.jpg, a; one must be file,"),
            (
                'file,caption\n0.jpg,x\n1.jpg,"open\n2.jpg,y\n',
                r"begins in line 3 cannot be read \(unexpected end",
            ),
            ('file,caption\n0.jpg,"a\n1.jpg,"b"\n', "begins in line 2 cannot be read.*doubled"),
            ('file,"cap"tion\n0.jpg,a\n', "begins in line 1 cannot be read.*doubled"),
            ("file,caption,Caption\n0.jpg,a,b\n", "column caption is there 2 times"),
            ("", "is empty"),
            ("file,caption\n", "names no photos"),
        ],
    )
    def test_tables_that_cannot_be_read(self, content: str, reason: str, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text(content)
        with pytest.raises(ConfigError, match=reason):
            list_photos(tmp_path / "t.csv")

    def test_the_limit_of_the_csv_module_stays(self, tmp_path: Path) -> None:
        before = csv.field_size_limit()
        (tmp_path / "t.csv").write_text("file,caption\n0.jpg," + "a" * 200_000 + "\n")
        list_photos(tmp_path / "t.csv")
        assert csv.field_size_limit() == before

    def test_quotes_in_fields_between_tabs(self, tmp_path: Path) -> None:
        """They are quotes of the table only where they enclose the whole field."""
        (tmp_path / "t.tsv").write_text(
            'file\tcaption\tx\n0.jpg\t"Hello" he said\t\n1.jpg\t"a ""b""\tc"\t"x" y\n2.jpg\t"Hi" and "bye"\t\n3.jpg\td\te\n'
        )
        assert captions(list_photos(tmp_path / "t.tsv")) == {
            "0.jpg": '"Hello" he said',
            "1.jpg": 'a "b" c',
            "2.jpg": '"Hi" and "bye"',
            "3.jpg": "d",
        }

    def test_a_numbered_table_with_a_row_of_unclear_end(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text('caption,x\n"a"b,\nc,\n')
        with pytest.raises(ConfigError, match="the row that begins in line 2 cannot be read.*doubled"):
            list_photos(tmp_path / "t.csv", numbered=True)

    def test_numbered_rows_are_counted_with_empty_ones(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text("caption,x\na,\n,\nb,\n")
        assert captions(list_photos(tmp_path / "t.csv", numbered=True)) == {
            "0.png": "a",
            "1.png": "",
            "2.png": "b",
        }

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("t.csv", "\ncaption\nfirst\n\nthird\n\n"),
            ("t.jsonl", '{"caption": "first"}\n\n{"caption": "third"}\n\n'),
        ],
    )
    def test_blank_lines_count_in_every_table(self, name: str, content: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text(content)
        source = list_photos(tmp_path / name, numbered=True)
        assert captions(source) == {"0.png": "first", "2.png": "third"}


class TestJson:
    def test_bad_lines_are_told(self, tmp_path: Path) -> None:
        touch(tmp_path, "sub/IMG.jpg")
        lines = [
            b'\xef\xbb\xbf{"file": "SUB\\\\img.JPG", " Caption": ["", null, "a\xe2\x80\xa8b"]}\r',
            b'{"file": "1.jpg", "caption": "caf\xe9"}',
            b'{"file": "1.jpg", "file": "2.jpg"}',
            b'{"file": "3.jpg", "caption": 1.5}',
            b'{"file": "4.jpg", "caption": NaN}',
            b'{"file": true}',
            b'{"file": "\\ud83d.jpg"}',
            b'{"file": "5.jpg", "class_noun": "Frau"}',
            b"[" * 100_000,
            b"{}",
        ]
        (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
        source = list_photos(tmp_path / "t.jsonl")
        assert captions(source) == {"sub/IMG.jpg": "a b", "4.jpg": ""}
        expected = {
            "t.jsonl:2": "byte 0xe9 at position 33",
            "t.jsonl:3": "the key 'file' is there twice",
            "3.jpg": "caption must be a text, got 1.5",
            "t.jsonl:6": "file must be a text, got True",
            "t.jsonl:7": "half a character",
            "5.jpg": "class_noun must be one of man, woman, person, got 'Frau'",
            "t.jsonl:9": "nested too deeply",
            "t.jsonl:10": "the entry names no photo",
        }
        assert problems(source).keys() == expected.keys()
        assert not [name for name, reason in expected.items() if reason not in problems(source)[name]]

    @pytest.mark.parametrize("content", ["", "[" * 100_000, "{", '[{"a": 1, "a": 2}]'])
    def test_lists_that_cannot_be_read(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(ConfigError, match="is no JSON"):
            list_photos(tmp_path / "t.json")

    def test_utf_16(self, tmp_path: Path) -> None:
        for name, content in (
            ("t.json", '[{"file": "é.jpg"}]'),
            ("t.jsonl", '{"file": "é.jpg"}\n'),
            ("t.txt", "é.jpg\n"),
        ):
            (tmp_path / name).write_text(content, encoding="utf-16")
            assert captions(list_photos(tmp_path / name)) == {"é.jpg": ""}


class TestEncodingsOfTables:
    """Without a byte order mark, ASCII at the beginning shows which UTF it is; anything else is named."""

    TABLES = (
        ("t.csv", "file,caption\né.jpg,фото\n"),
        ("t.jsonl", '{"file": "é.jpg", "caption": "фото"}\n'),
        ("t.json", '[{"file": "é.jpg", "caption": "фото"}]'),
    )

    @pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
    def test_without_a_mark(self, encoding: str, tmp_path: Path) -> None:
        for name, content in self.TABLES:
            (tmp_path / name).write_bytes(content.encode(encoding))
            for given in ("", encoding):
                assert captions(list_photos(tmp_path / name, encoding=given)) == {"é.jpg": "фото"}
        touch(tmp_path, "img/0.jpg")
        (tmp_path / "ids.txt").write_bytes("0.jpg bö\n".encode(encoding))
        (photo,) = list_photos(tmp_path / "img", identities=tmp_path / "ids.txt").photos
        assert photo.identity == "bö"

    @pytest.mark.parametrize(
        ("content", "given", "reason"),
        [
            (
                "файл,x\n".encode("cp1251"),
                "",
                "byte 0xf4 at position 0 is no UTF-8; name the right encoding with",
            ),
            ("file,caption\n".encode("utf-16-le"), "cp1251", r"a NUL at position 1 .*--encoding \(utf-16-le"),
            ("ф,file\n".encode("utf-16-le"), "", r"a NUL at position 0 .*--encoding \(utf-16-le"),
        ],
    )
    def test_a_first_line_in_another_encoding(
        self, content: bytes, given: str, reason: str, tmp_path: Path
    ) -> None:
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(
            ConfigError, match=f"its first line has bytes that cannot be read: {reason}"
        ) as caught:
            list_photos(tmp_path / "t.csv", encoding=given)
        assert str(caught.value).isprintable()

    def test_lines_of_json_in_another_encoding(self, tmp_path: Path) -> None:
        (tmp_path / "t.jsonl").write_bytes('{"file": "0.jpg"}'.encode("utf-16-le"))
        (photo,) = list_photos(tmp_path / "t.jsonl", encoding="cp1251").photos
        assert (
            "a NUL at position 1 is the sign of a wrong encoding; name the right one with --encoding"
            in photo.problem
        )

    @pytest.mark.parametrize("name", ["t.json", "ids.txt"])
    def test_texts_that_are_read_whole(self, name: str, tmp_path: Path) -> None:
        touch(tmp_path, "0.jpg")
        path = tmp_path / name
        path.write_bytes('["0.jpg anna"]'.encode("utf-16-le"))
        given, identities = (path, None) if name == "t.json" else (tmp_path, path)
        with pytest.raises(ConfigError, match="cannot be read: a NUL at position 1 .*--encoding"):
            list_photos(given, identities=identities, encoding="cp1251")


class TestLists:
    @pytest.mark.skipif(os.name == "nt", reason="names are Unicode on Windows")
    def test_lines_end_at_line_feeds_alone(self, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_bytes(
            "a\u2028b.jpg\r\nc\x85d.jpg\n \te.jpg\u3000\n\n".encode() + b"f\xe9.jpg"
        )
        found = [photo.source for photo in list_photos(tmp_path / "list.txt").photos]
        assert found == ["a\u2028b.jpg", "c\x85d.jpg", "e.jpg\u3000", "f\udce9.jpg"]


class TestPartlyThere:
    def test_identities(self, tmp_path: Path) -> None:
        touch(tmp_path, "img/0.jpg", "img/1.jpg", "img/2.jpg", "img/my photo.jpg")
        table = tmp_path / "ids.txt"
        table.write_bytes(b"\xef\xbb\xbf0.jpg Anna Smith\r\n1.JPG bo\r\nsub/2.jpg bo\r\nmy photo.jpg al\r\n")
        source = list_photos(tmp_path / "img", identities=table)
        assert [photo.identity for photo in source.photos] == ["Anna Smith", "bo", "", "al"]
        assert source.notes[0] == (
            f"identities for 3 of 4 photos; first without: 2.jpg. Lines of {table} without a photo: 1; first: sub/2.jpg"
        )
        with pytest.raises(
            ConfigError, match="identities for 3 of 4 photos; first without: 2.jpg.*80.0%.*--min-match"
        ):
            list_photos(tmp_path / "img", identities=table, min_match=0.8)
        list_photos(tmp_path / "img", identities=table, min_match=0.75)

    def test_rows_that_are_no_photos_do_not_count(self, tmp_path: Path) -> None:
        """Beside the two photos, a photo that is named but absent, and lines that cannot be read."""
        touch(tmp_path, "img/0.jpg", "img/1.jpg", "texts/0.txt")
        for name in ("metadata.jsonl", "table.jsonl"):
            (tmp_path / "img" / name).write_text(
                '{"file_name": "0.jpg", "text": "zero"}\n{"file_name": "1.jpg"}\n{"file_name": "gone.jpg"}\n{broken\n{}\n'
            )
        table = tmp_path / "ids.txt"
        table.write_text("0.jpg anna\n")
        for given in (tmp_path / "img", tmp_path / "img" / "table.jsonl"):
            source = list_photos(given, identities=table, min_match=0.5)
            assert len(source.photos) == 5
            assert source.notes == tuple(
                f"{kind} for 1 of 2 photos; first without: 1.jpg" for kind in ("identities", "captions")
            )
            source = list_photos(given, captions=tmp_path / "texts", min_match=0.5)
            assert source.notes == ("captions for 1 of 2 photos; first without: 1.jpg",)

    def test_rows_of_shards_that_are_no_photos_do_not_count(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "s.tar", {"0.jpg": b"photo", "0.txt": b"c", "1.json": b"{}", "2.jpg": b"photo"})
        (tmp_path / "t.tar").write_bytes(b"damaged")
        source = list_photos(tmp_path)
        assert (len(source.photos), source.files.photos) == (4, 2)
        assert source.notes == ("captions for 1 of 2 photos; first without: s.tar::2",)

    @pytest.mark.parametrize(
        ("lines", "reason"),
        [
            ("0.jpg anna\n", r"line 1: 0.jpg may be a/0.jpg, b/0.jpg"),
            (
                "a/0.jpg anna\nb/0.jpg bo\nA/0.JPG bo\n",
                r"line 3 says that a/0.jpg shows bo, line 1 says anna",
            ),
        ],
    )
    def test_identities_that_are_unclear(self, lines: str, reason: str, tmp_path: Path) -> None:
        touch(tmp_path, "img/a/0.jpg", "img/b/0.jpg")
        (tmp_path / "ids.txt").write_text(lines)
        with pytest.raises(ConfigError, match=reason):
            list_photos(tmp_path / "img", identities=tmp_path / "ids.txt")

    def test_identities_of_samples(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "s.tar", {"0.jpg": b"photo", "1.jpg": b"photo"})
        (tmp_path / "ids.txt").write_text("0.jpg anna\n1 bo\n")
        source = list_photos(tmp_path / "s.tar", identities=tmp_path / "ids.txt")
        assert [photo.identity for photo in source.photos] == ["anna", "bo"]

    def test_captions(self, tmp_path: Path) -> None:
        touch(tmp_path, *(f"img/{n}.jpg" for n in range(5)))
        touch(tmp_path, "texts/0.TXT", "texts/1.jpg.txt", "texts/2.caption", "texts/other.txt")
        (tmp_path / "texts" / "3.txt").write_bytes(b"caf\xe9")
        source = list_photos(tmp_path / "img", captions=tmp_path / "texts")
        assert captions(source) == {
            "0.jpg": "texts/0.TXT",
            "1.jpg": "texts/1.jpg.txt",
            "2.jpg": "texts/2.caption",
            "4.jpg": "",
        }
        assert "3.txt cannot be read: byte 0xe9" in problems(source)["3.jpg"]
        assert "captions for 3 of 5 photos; first without: 3.jpg. Texts of " in source.notes[0]
        assert source.notes[0].endswith("without a photo: 1; first: other.txt")
        with pytest.raises(ConfigError, match="--captions: captions for 3 of 5 photos.*--min-match"):
            list_photos(tmp_path / "img", captions=tmp_path / "texts", min_match=0.9)

    def test_texts_within_the_folder_of_the_photos(self, tmp_path: Path) -> None:
        """What is read is not counted as not read, and the numbers sum to all files."""
        touch(
            tmp_path, "a.jpg", "b.jpg", "b.txt", "t/a.txt", "t/deep/b.caption", "t/other.txt", "x/other.txt"
        )
        (tmp_path / "ids.txt").write_text("a.jpg anna\n")
        (tmp_path / "link").symlink_to("t")
        for given in ("t", "link"):
            source = list_photos(
                tmp_path, "captions", captions=tmp_path / given, identities=tmp_path / "ids.txt"
            )
            assert captions(source) == {"a.jpg": "t/a.txt", "b.jpg": "t/deep/b.caption"}
            assert not_read(source) == {".txt": 2, "folders that are there under another name": 1}
            files = source.files
            assert (files.photos, files.texts, files.tables, files.files) == (2, 3, 1, 9)
            assert next(kind.first for kind in files.unread if kind.kind == ".txt") == "link/other.txt"

    def test_texts_beside_shards(self, tmp_path: Path) -> None:
        touch(tmp_path, "t/a.txt", "t/b.txt")
        write_tar(tmp_path / "s.tar", {"a.jpg": b"photo"})
        source = list_photos(tmp_path, captions=tmp_path / "t")
        assert (source.files.texts, not_read(source)) == (1, {".txt": 1})

    def test_captions_in_folders(self, tmp_path: Path) -> None:
        touch(
            tmp_path,
            "img/a/0.jpg",
            "img/b/0.jpg",
            "img/b/1.jpg",
            "texts/a/0.txt",
            "texts/B/0.txt",
            "texts/a/1.txt",
        )
        source = list_photos(tmp_path / "img", captions=tmp_path / "texts")
        assert captions(source) == {"a/0.jpg": "texts/a/0.txt", "b/0.jpg": "texts/B/0.txt", "b/1.jpg": ""}
        touch(tmp_path, "flat/0.txt")
        with pytest.raises(ConfigError, match="0.txt may belong to photos in a and in b"):
            list_photos(tmp_path / "img", captions=tmp_path / "flat")


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
        for name in ("s.tar.gz", "S.TGZ", "s.tar.zst"):
            touch(tmp_path, name)
            with pytest.raises(
                ConfigError, match=f"{name}: a shard must be .* not compressed.*Unpack it first"
            ):
                list_photos(tmp_path / name)

    def test_braces(self) -> None:
        assert expand_braces("a-{08..10}.{x,y}") == [f"a-{n}.{e}" for n in ("08", "09", "10") for e in "xy"]


@pytest.mark.parametrize("layout", ["auto", "webdataset"])
@pytest.mark.parametrize("option", [{"root": Path()}, {"numbered": True}])
def test_options_of_tables_are_not_ignored(layout: str, option: dict[str, Any], tmp_path: Path) -> None:
    touch(tmp_path, "0.jpg")
    with pytest.raises(ConfigError, match="belongs to a table"):
        list_photos(tmp_path, layout, **option)


@pytest.mark.parametrize(
    "name", ["absent", "absent.jsonl", "absent.csv", "absent.json", "absent.txt", "photos.zip"]
)
def test_nothing_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such"):
        list_photos(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("photos.zip", "For .zip files: unpack them"),
        ("table.parquet", "For .parquet files: write the table as .jsonl or .csv"),
        ("photo.jpg", "Name the folder that has the photos"),
        ("photo.caption", "Name the folder that has the photos"),
        ("list", "say with --layout what it is"),
    ],
)
def test_a_file_of_another_kind(name: str, advice: str, tmp_path: Path) -> None:
    touch(tmp_path, name)
    with pytest.raises(ConfigError, match=f"{name}: neither a folder nor a file of a known kind.*{advice}"):
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
