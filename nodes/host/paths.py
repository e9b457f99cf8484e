"""Folders and files of the pack."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path, PurePath

import folder_paths

from ...idadapter_core import published
from ...idadapter_core.doctor import SUFFIXES, ModelFiles, home_packages
from ...idadapter_core.errors import InputError
from ...idadapter_core.faces.packages import find_packages

ADAPTERS, INSIGHTFACE = published.ADAPTERS, published.INSIGHTFACE
RECOGNIZERS = f"{ADAPTERS}_{published.RECOGNIZERS}"
IDENTITIES = f"{ADAPTERS}_{published.IDENTITIES}"
_SUBFOLDERS = {RECOGNIZERS: published.RECOGNIZERS, IDENTITIES: published.IDENTITIES}
_KINDS = {ADAPTERS: published.ADAPTERS, **_SUBFOLDERS}


def register() -> None:
    """Register the pack's folders with ComfyUI, in addition to those in the user's extra_model_paths.yaml."""
    roots = _known(ADAPTERS) or []
    _add(ADAPTERS, [*roots, Path(folder_paths.models_dir) / ADAPTERS])
    for name, subfolder in _SUBFOLDERS.items():
        _add(name, [*_known(name), *(Path(root) / subfolder for root in _known(ADAPTERS))])


def _known(name: str) -> list[Path]:
    paths, _ = folder_paths.folder_names_and_paths.get(name, ([], set()))
    return [Path(path) for path in paths]


def _add(name: str, paths: list[Path]) -> None:
    unique = list(dict.fromkeys(str(path) for path in paths))
    # A folder known from the yaml alone has an empty suffix set, which would accept every file.
    folder_paths.folder_names_and_paths[name] = (unique, set(SUFFIXES[_KINDS[name]]))


def files(name: str) -> list[str]:
    """List the files of a folder for the user's choice, as paths relative to it."""
    found: list[str] = folder_paths.get_filename_list(name)
    if name == ADAPTERS:
        found = [file for file in found if PurePath(file).parts[0] not in _SUBFOLDERS.values()]
    return found


def path_of(name: str, file: str) -> Path:
    """Return the full path of a chosen file.

    Raises:
        InputError: there is no such file; the message names the folder for files of this kind.
    """
    path = find(name, file)
    if path is None:
        folder = folder_of(name)
        missing = "no file yet" if file == folder_hint(name) else f"no file {file!r}"
        raise InputError(f"there is {missing} in {folder}. Put it there, then refresh the node list (R).")
    return path


def find(name: str, file: str) -> Path | None:
    """Return the full path of a chosen file, or None."""
    path = folder_paths.get_full_path(name, file)
    return None if path is None else Path(path)


def stamp(*paths: Path | None) -> str:
    """Fingerprint of files for ComfyUI's cache of node outputs. It changes if one is replaced, overwritten or deleted.

    Modification time and size alone would miss a file of the same size copied with its time. The inode number reveals a replaced
    file, the change time (ctime) one overwritten in place.
    """
    return " ".join(_stamp(path) for path in paths)


def stamp_of(name: str, file: str | None) -> str:
    """Fingerprint of a chosen file, or of all files in the folder if another node chooses it (`file` is None until that ran)."""
    return stamp(*(find(name, each) for each in ([file] if file is not None else files(name))))


def _stamp(path: Path | None) -> str:
    try:
        facts = None if path is None else path.stat()
    except OSError:
        facts = None
    if facts is None:
        return "missing"
    return f"{path}:{facts.st_ino}:{facts.st_size}:{facts.st_mtime_ns}:{facts.st_ctime_ns}"


def folder_of(name: str) -> Path:
    """Return the folder for new files of this kind."""
    return Path(folder_paths.folder_names_and_paths[name][0][0])


def folder_hint(name: str) -> str:
    """Return the entry that a list shows while its folder is empty."""
    return f"(no files yet: put them into models/{below_models(name)})"


def below_models(name: str) -> str:
    """Return a folder for messages, as a path below ComfyUI's `models`."""
    return f"{ADAPTERS}/{_SUBFOLDERS[name]}" if name in _SUBFOLDERS else name


def insightface_roots() -> list[Path]:
    """Return the usual folders of insightface packages, those of other packs included."""
    roots = [*_known(INSIGHTFACE), Path(folder_paths.models_dir) / INSIGHTFACE, *home_packages()]
    return list(dict.fromkeys(roots))


def own_files() -> ModelFiles:
    """List the files in the pack's own folders, and the face packages."""
    return ModelFiles(
        adapters=_listed(ADAPTERS),
        recognizers=_listed(RECOGNIZERS),
        face_packages=find_packages(insightface_roots()),
    )


def model_files() -> ModelFiles:
    """List all files that concern this pack."""
    return replace(
        own_files(),
        identities=_listed(IDENTITIES),
        checkpoints=_listed(published.CHECKPOINTS),
        clip_vision=_listed(published.CLIP_VISION),
    )


def _listed(kind: str) -> dict[str, Path]:
    return {name: path for name in files(kind) if (path := find(kind, name)) is not None}


def comfyui_version() -> str:
    """Version of the running ComfyUI."""
    try:
        found: str = importlib.import_module("comfyui_version").__version__
    except (ImportError, AttributeError):
        return "of unknown version"
    return found
