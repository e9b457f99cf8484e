"""Match text files (captions) and photos."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..files import some
from .inventory import TEXT_SUFFIXES, ending_of, is_photo
from .texts import read_caption


def folded(name: str) -> str:
    """Normalise a name for comparison: ignores case and whether accents are separate characters (macOS)."""
    return unicodedata.normalize("NFC", name).casefold()


def stem_of(name: str) -> str:
    ending = ending_of(name)
    return name[: len(name) - len(ending)] if ending else name


@dataclass(frozen=True)
class _Text:
    name: str
    stem: str  # without the extension
    ending: int  # index into TEXT_SUFFIXES

    def rank(self, stem: str) -> tuple[bool, int, bool]:
        """How well it fits a photo with this stem; less is better."""
        return self.stem != stem, self.ending, self.name != self.stem + TEXT_SUFFIXES[self.ending]


class Captions:
    """The caption files of a folder: `photo.txt` or `photo.jpg.txt`, or `.caption`, in any case."""

    def __init__(self, folder: Path, names: Iterable[str], encoding: str = "") -> None:
        """names: of all files in the folder, including photos: a text with the exact name of one photo belongs to no other."""
        self.folder = folder
        self.used: set[str] = set()
        self._encoding = encoding
        self._photos: set[str] = set()
        self._texts: dict[str, list[_Text]] = {}
        for name in names:
            if name.startswith("."):
                continue
            ending = ending_of(name)
            if ending in TEXT_SUFFIXES:
                stem = stem_of(name)
                self._texts.setdefault(folded(stem), []).append(
                    _Text(name, stem, TEXT_SUFFIXES.index(ending))
                )
            elif is_photo(name):
                self._photos |= {name, stem_of(name)}

    def __len__(self) -> int:
        return sum(map(len, self._texts.values()))

    def names(self) -> list[str]:
        """Names of all text files."""
        return [text.name for texts in self._texts.values() for text in texts]

    def find(self, photo: str) -> str:
        """The name of the text file of a photo, given the photo's name; "" if there is none.

        Raises:
            InputError: several fit equally well.
        """
        for name in (photo, stem_of(photo)):
            fitting = [
                text
                for text in self._texts.get(folded(name), ())
                if text.stem == name or text.stem not in self._photos
            ]
            if fitting:
                best = min(text.rank(name) for text in fitting)
                found = sorted(text.name for text in fitting if text.rank(name) == best)
                if len(found) > 1:
                    raise InputError(f"{some(found)} may all be its caption; keep one of them")
                return found[0]
        return ""

    def read(self, photo: str) -> str:
        """The caption of a photo, given the photo's name; "" if there is none.

        Raises:
            InputError: several files fit, or the matching one cannot be read.
        """
        name = self.find(photo)
        if not name:
            return ""
        self.used.add(name)
        return read_caption(self.folder / name, self._encoding)


class Listings:
    """The file names in folders, each folder listed once, for tables that name files in them."""

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._names: dict[Path, list[str]] = {}
        self._folded: dict[Path, dict[str, list[str]]] = {}
        self._captions: dict[Path, Captions] = {}

    def captions(self, folder: Path) -> Captions:
        if folder not in self._captions:
            self._captions[folder] = Captions(folder, self._list(folder), self._encoding)
        return self._captions[folder]

    def find(self, root: Path, name: str) -> str:
        """The actual name of a file on disk, with another case or with / instead of \\ if only that exists.

        Raises:
            InputError: several files match.
        """
        for given in dict.fromkeys((name, name.replace("\\", "/"))):
            if os.path.lexists(root / given):
                return given
            path = root
            for part in Path(given).parts:
                same = self._same(path, part)
                if len(same) > 1:
                    raise InputError(f"{given} may be {some(same)} in {path}; correct its case")
                if not same:
                    break
                path /= same[0]
            else:
                return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
        return name

    def _same(self, folder: Path, part: str) -> list[str]:
        if part in ("..", os.sep) or Path(part).anchor or os.path.lexists(folder / part):
            return [part]
        if folder not in self._folded:
            self._folded[folder] = {}
            for name in self._list(folder):
                self._folded[folder].setdefault(folded(name), []).append(name)
        return self._folded[folder].get(folded(part), [])

    def _list(self, folder: Path) -> list[str]:
        if folder not in self._names:
            try:
                self._names[folder] = sorted(os.listdir(folder))  # noqa: PTH208, of names alone
            except (OSError, ValueError):
                self._names[folder] = []
        return self._names[folder]
