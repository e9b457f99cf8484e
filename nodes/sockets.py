"""The pack's own socket types, its menu category, and how lists of files appear in the nodes."""

from __future__ import annotations

from comfy_api.latest import io

from .host import paths

CATEGORY = "IDAdapter"
NONE = "none"

FaceAnalyzerSocket = io.Custom("FACE_ANALYZER")
FaceFeaturesSocket = io.Custom("FACE_FEATURES")
AdapterSocket = io.Custom("ID_ADAPTER")
IdentitySocket = io.Custom("IDENTITY")


def file_options(folder: str) -> list[str]:
    """The files of a folder, or one entry that says where they belong."""
    return paths.files(folder) or [paths.folder_hint(folder)]
