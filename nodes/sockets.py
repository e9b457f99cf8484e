"""The pack's socket types, its menu category, and the options of its file lists."""

from __future__ import annotations

from comfy_api.latest import io

from .host import paths
from .host.choices import AUTO

CATEGORY = "IDAdapter"

FaceAnalyzerSocket = io.Custom("FACE_ANALYZER")
FaceFeaturesSocket = io.Custom("FACE_FEATURES")
AdapterSocket = io.Custom("ID_ADAPTER")
IdentitySocket = io.Custom("IDENTITY")


def file_options(folder: str) -> list[str]:
    """Return the files of a folder, or a single entry naming the folder if it is empty."""
    return paths.files(folder) or [paths.folder_hint(folder)]


def auto_options(files: list[str]) -> list[str]:
    """Put `auto` before the choices of a list, unless it only says that there are none."""
    return files if files[0].startswith("(") else [AUTO, *files]
