from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from idadapter_core.data.index import Index
from idadapter_core.data.measure import Models
from idadapter_core.data.scan import scan
from idadapter_core.data.sources import list_photos
from tests.tiny.face_package import write_package
from tests.tiny.people import write_bad, write_people


@dataclass(frozen=True)
class Scanned:
    """A scan of synthetic people and its parts."""

    photos: Path
    package: Path
    index: Index
    bad: dict[str, Path]


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete tiny package."""
    return write_package(tmp_path_factory.mktemp("insightface") / "buffalo_l")


@pytest.fixture(scope="session")
def models(package: Path) -> Models:
    return Models(package, None, "cpu")


@pytest.fixture(scope="session")
def scanned(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Scanned:
    """Three people with three photos each, and bad photos, and their index. Read only."""
    folder = tmp_path_factory.mktemp("scanned")
    write_people(folder / "photos", people=3, photos=3)
    bad = write_bad(folder / "photos" / "bad")
    index = scan(list_photos(folder / "photos"), folder / "index.parquet", package=package, provider="cpu")
    return Scanned(folder / "photos", package, index, bad)


@pytest.fixture
def few(scanned: Scanned, tmp_path: Path) -> Path:
    """Good photos of two people, three each, to be changed."""
    for person in ("person_00", "person_01"):
        shutil.copytree(scanned.photos / person, tmp_path / "photos" / person)
    return tmp_path / "photos"
