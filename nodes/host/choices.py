"""What `auto` means for each kind of file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

import folder_paths

from ...idadapter_core import Adapter
from ...idadapter_core.doctor import vision_width
from ...idadapter_core.errors import InputError, RecognizerError
from ...idadapter_core.faces.iresnet import digest, load_iresnet
from ...idadapter_core.faces.packages import find_packages
from ...idadapter_core.methods import METHODS
from ...idadapter_core.published import CLIP_VISION, Role
from . import paths

AUTO = "auto"
NONE = "none"
FROM_PACKAGE = "from package"
ADAPTER_BRANCH, TEXT_BRANCH = "adapter_branch", "text_branch"  # folders of the published UniID
USUAL_PACKAGES = ("buffalo_l", "antelopev2")  # the first that is there
USUAL_RECOGNIZER = "glint360k"  # in the name of the network that the published UniID was trained with
_digests: dict[str, str] = {}  # of recognisers, by the stamp of their file


def adapter_file(choice: str) -> str:
    """Return the adapter that is chosen, or for `auto` the only one. A text branch alone does not count.

    Raises:
        InputError: there is none, or there are several.
    """
    if choice != AUTO:
        return choice
    found = [name for name in paths.files(paths.ADAPTERS) if TEXT_BRANCH not in PurePath(name).parts]
    if not found:
        raise InputError(
            f"there is no adapter in {paths.folder_of(paths.ADAPTERS)} yet. {where_from('adapter')} Then refresh the node list (R)."
        )
    return _only(found, "adapter", paths.ADAPTERS)


def text_branch(choice: str, adapter: str) -> str | None:
    """Return the file with the text branch that is chosen, or for `auto` the one beside the adapter's folder, if there is one.

    Raises:
        InputError: there are several.
    """
    if choice != AUTO:
        return None if choice == NONE else choice
    parts = PurePath(adapter).parts
    if ADAPTER_BRANCH not in parts[:-1]:
        return None
    place = parts.index(ADAPTER_BRANCH)
    beside = (*parts[:place], TEXT_BRANCH)
    found = [name for name in paths.files(paths.ADAPTERS) if PurePath(name).parts[: len(beside)] == beside]
    return _only(found, "text_branch", paths.ADAPTERS) if found else None


def package(choice: str) -> str:
    """Return the name of the face package that is chosen, or for `auto` the only one, or the usual one of several."""
    if choice != AUTO:
        return choice
    found = sorted(find_packages(paths.insightface_roots()))
    usual = [name for name in USUAL_PACKAGES if name in found]
    return (usual or found or list(USUAL_PACKAGES))[0]


def recognizer(choice: str, adapter: Adapter) -> str:
    """Return the face network that is chosen, or for `auto` the one that the adapter was trained with.

    Raises:
        InputError: there is none that could be it, or several.
    """
    if choice != AUTO:
        return choice
    found = paths.files(paths.RECOGNIZERS)
    trained_with = adapter.config.recognizer
    needs_file = adapter.kind.needs(adapter.config).stages  # which no package's own network gives
    if trained_with:
        same = next((name for name in found if _digest_of(name) == trained_with), None)
        if same is not None:
            return same
    elif needs_file and found:
        usual = [name for name in found if USUAL_RECOGNIZER in name.lower()]
        return _only(usual or found, "recognizer", paths.RECOGNIZERS)
    if not needs_file:
        return FROM_PACKAGE
    there = f"none of {', '.join(found)} is it" if found else "there is no file yet"
    which = f"the face network it was trained with ({trained_with})" if trained_with else "its face network"
    raise InputError(
        f"{adapter.name} needs {which}, and in {paths.folder_of(paths.RECOGNIZERS)} {there}. {where_from('recognizer')} Then queue again."
    )


def _digest_of(name: str) -> str:
    path = paths.path_of(paths.RECOGNIZERS, name)
    stamp = paths.stamp(path)
    if stamp not in _digests:
        try:
            _digests[stamp] = digest(load_iresnet(path, any_layers=True))
        except RecognizerError:
            _digests[stamp] = ""
    return _digests[stamp]


def clip_vision_files() -> list[str]:
    """List ComfyUI's CLIP vision models."""
    return list(folder_paths.get_filename_list(CLIP_VISION))


def clip_vision(choice: str, adapter: Adapter) -> str | None:
    """Return the CLIP vision model that is chosen, or for `auto` one of the width that the adapter reads; None if it reads none.

    Raises:
        InputError: there is none of that width.
    """
    wanted = adapter.kind.needs(adapter.config).vision
    if wanted is None:
        return None
    if choice != AUTO:
        return choice
    files = clip_vision_files()
    for name in files:
        path = folder_paths.get_full_path(CLIP_VISION, name)
        if path is not None and vision_width(Path(path)) == wanted[0]:
            return name
    others = f" (none of {', '.join(files)} is)" if files else ""
    raise InputError(
        f"{adapter.name} also looks at the photos through a CLIP vision model of width {wanted[0]}, and models/{CLIP_VISION} holds "
        f"none{others}. {where_from('clip_vision')} Then queue again."
    )


def where_from(role: Role) -> str:
    """Say which published files of one kind methods need, where they come from and where they belong."""
    files = dict.fromkeys(
        file for method in METHODS.values() for file in method.published if file.role == role
    )
    if role != "adapter":
        return " ".join(f"Put {file.name} from {file.page} into models/{file.folder}." for file in files)
    named = {file: method.title for method in METHODS.values() for file in method.published}
    return " ".join(
        f"For {named[file]}, put {file.name} from {file.page} into models/{file.folder}." for file in files
    )


def _only(names: Sequence[str], field: str, folder: str) -> str:
    if len(names) == 1:
        return names[0]
    raise InputError(
        f"`{field}` is auto, and models/{paths.below_models(folder)} holds several files for it: {', '.join(names)}. Choose one of them as "
        f"`{field}`."
    )
