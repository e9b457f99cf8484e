"""Finds packages of insightface models on disk and the task of each file, without opening any model."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import FacePackageError

log = logging.getLogger(__name__)

DETECTION = "detection"
RECOGNITION = "recognition"
GENDER_AGE = "genderage"

WANTED_FILES = "det_10g.onnx or scrfd_10g_bnkps.onnx (detection), w600k_r50.onnx or glintr100.onnx (recognition), genderage.onnx"
WHERE_FROM = (
    "Download buffalo_l.zip or antelopev2.zip from the releases of github.com/deepinsight/insightface and unpack it there. "
    "The models are for non-commercial research only."
)
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Package:
    """The models of one folder by task. With a manifest (insightface 2) the library has to open them by task."""

    folder: Path
    models: Mapping[str, Path]
    has_manifest: bool = False


def find_packages(roots: Sequence[Path]) -> dict[str, Path]:
    """Map package names to model folders, for every package below `<root>/models` or `<root>`.

    The first root wins. Packages unpacked one level too deep (`antelopev2/antelopev2`) are found; folders without
    models are ignored.
    """
    packages: dict[str, Path] = {}
    for root in roots:
        for parent in (root / "models", root):
            for folder in _folders(parent):
                for candidate in (folder, folder / folder.name):
                    if _has_models(candidate):
                        packages.setdefault(folder.name, candidate.absolute())
                        break
    return packages


def _folders(parent: Path) -> list[Path]:
    """List the subfolders that may hold packages; empty if the folder is missing or not readable."""
    try:
        return sorted(
            path
            for path in parent.iterdir()
            if path.is_dir() and path.name != "models" and not path.name.startswith(".")
        )
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        log.warning("face packages in %s are left out: %s", parent, error)
        return []


def resolve_package(name: str, roots: Sequence[Path]) -> Path:
    """Return the folder of a package. Raises FacePackageError with the searched folders and how to get the package."""
    packages = find_packages(roots)
    if name not in packages:
        searched = ", ".join(str(path) for root in roots for path in (root / "models" / name, root / name))
        others = f" Found instead: {', '.join(packages)}." if packages else ""
        raise FacePackageError(
            f"the face package '{name}' was not found. Searched: {searched}.{others} "
            f"It should hold {WANTED_FILES}. {WHERE_FROM}"
        )
    return packages[name]


def read_package(folder: Path) -> Package:
    """Determine the tasks of the models in a folder from their inputs and outputs alone, as insightface does.

    Raises FacePackageError for a missing, empty or damaged package and for one without a face detector.
    """
    if not folder.is_dir():
        raise FacePackageError(f"the face package folder {folder} does not exist. {WHERE_FROM}")
    if not _has_models(folder):
        if inside := [path for path in sorted(folder.iterdir()) if path.is_dir() and _has_models(path)]:
            raise FacePackageError(
                f"{folder} holds face packages, and is none itself: name one of {', '.join(map(str, inside))}."
            )
        nothing = (
            "holds no .onnx files"
            if any(folder.iterdir())
            else "is empty (an interrupted download leaves it so)"
        )
        raise FacePackageError(
            f"the face package folder {folder} {nothing}. It should hold {WANTED_FILES}. {WHERE_FROM}"
        )
    models: dict[str, Path] = _manifest_tasks(folder)
    has_manifest = bool(models)
    if not has_manifest:
        for path in sorted(folder.glob("*.onnx")):
            task = model_task(path)
            if task is not None:
                models.setdefault(task, path)
    if DETECTION not in models:
        found = ", ".join(f"{path.name} ({task})" for task, path in models.items()) or "nothing usable"
        raise FacePackageError(
            f"the face package {folder} has no face detector with five landmarks; found {found}. "
            f"A complete package holds {WANTED_FILES}. {WHERE_FROM}"
        )
    return Package(folder, models, has_manifest)


def package_files(folder: Path) -> list[Path]:
    """Return the files that determine the behaviour of a package; empty if the folder is missing or not readable."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".onnx" or path.name == _MANIFEST)
    except OSError:
        return []


def model_task(path: Path) -> str | None:
    """Return the task of an ONNX file, based on the same shapes as in insightface; None for a model not used here.

    Raises FacePackageError if the file is not a complete ONNX model.
    """
    inputs, outputs = read_signature(path)
    if len(outputs) >= 5:
        # Detectors with 6 or 10 outputs have no landmarks.
        return DETECTION if len(outputs) in (9, 15) else None
    if not inputs or not outputs or len(inputs[0]) != 4:
        return None
    height, width = inputs[0][2:]
    last = outputs[0][-1] if outputs[0] else None
    if (height, width) == (192, 192):
        return None  # dense landmarks model, with a square input like a recogniser's
    if (height, width) == (96, 96):
        return GENDER_AGE if last == 3 else None
    is_recognizer = (
        len(inputs) == 1 and height == width and height is not None and height >= 112 and height % 16 == 0
    )
    return RECOGNITION if is_recognizer else None


Shape = tuple[int | None, ...]


def read_signature(path: Path) -> tuple[list[Shape], list[Shape]]:
    """Read the shapes of a model's inputs and outputs (None for a dynamic dimension), without its weights.

    Walks the protobuf fields of the file and skips tensors, so only a few kilobytes of a 250 MB file are read.
    """
    inputs: list[tuple[str, Shape]] = []
    outputs: list[tuple[str, Shape]] = []
    weights: set[str] = set()
    try:
        with path.open("rb") as file:
            end = path.stat().st_size
            graph = next((size for field, size in _fields(file, end) if field == _MODEL_GRAPH), None)
            if graph is None:
                raise _DamagedError("no graph")
            for field, size in _fields(file, file.tell() + graph):
                if field == _GRAPH_INITIALIZER:
                    weights |= {
                        _text(file, n) for f, n in _fields(file, file.tell() + size) if f == _TENSOR_NAME
                    }
                elif field in (_GRAPH_INPUT, _GRAPH_OUTPUT):
                    (inputs if field == _GRAPH_INPUT else outputs).append(
                        _value_info(file, file.tell() + size)
                    )
    except (_DamagedError, UnicodeDecodeError, OSError) as error:
        raise FacePackageError(
            f"{path} ({path.stat().st_size:,} bytes) is not a complete ONNX model: truncated, damaged or something else. "
            f"Delete it and get the package again. {WHERE_FROM}"
        ) from error
    # Old exporters also list weights as inputs.
    return [shape for name, shape in inputs if name not in weights], [shape for _, shape in outputs]


# Field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 5, 11, 12
_TENSOR_NAME = 8
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR, _TENSOR_SHAPE, _SHAPE_DIM, _DIM_VALUE = 1, 2, 1, 1


class _DamagedError(ValueError):
    """The bytes are not a protobuf message of the expected structure."""


def _varint(file: BinaryIO) -> int:
    result = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise _DamagedError("file ends inside a number")
        result |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return result
    raise _DamagedError("number too long")


def _fields(file: BinaryIO, end: int) -> Iterator[tuple[int, int]]:
    """Yield (field number, byte count) of each sub-message or string until `end`; for an integer field, its value.

    The caller may read the content; unread bytes are skipped.
    """
    while file.tell() < end:
        key = _varint(file)
        field, kind = key >> 3, key & 7
        if kind == 0:
            yield field, _varint(file)
            continue
        if kind not in (1, 2, 5) or field == 0:
            raise _DamagedError(f"unknown wire type {kind}")
        size = {1: 8, 5: 4}[kind] if kind != 2 else _varint(file)
        after = file.tell() + size
        if after > end:
            raise _DamagedError("content longer than the file")
        if kind == 2:
            yield field, size
        file.seek(after)


def _text(file: BinaryIO, size: int) -> str:
    return file.read(size).decode()


def _value_info(file: BinaryIO, end: int) -> tuple[str, Shape]:
    name = ""
    shape: Shape = ()
    for field, size in _fields(file, end):
        if field == _VALUE_NAME:
            name = _text(file, size)
        elif field == _VALUE_TYPE:
            shape = _tensor_shape(file, file.tell() + size)
    return name, shape


def _tensor_shape(file: BinaryIO, end: int) -> Shape:
    dims: list[int | None] = []
    for type_field, type_size in _fields(file, end):
        if type_field != _TYPE_TENSOR:
            continue
        for field, size in _fields(file, file.tell() + type_size):
            if field != _TENSOR_SHAPE:
                continue
            for dim_field, dim_size in _fields(file, file.tell() + size):
                if dim_field == _SHAPE_DIM:
                    values = [value for f, value in _fields(file, file.tell() + dim_size) if f == _DIM_VALUE]
                    dims.append(values[0] if values else None)
    return tuple(dims)


def _has_models(folder: Path) -> bool:
    try:
        return folder.is_dir() and (any(folder.glob("*.onnx")) or (folder / _MANIFEST).is_file())
    except OSError as error:
        log.warning("the face package %s is left out: %s", folder, error)
        return False


def _manifest_tasks(folder: Path) -> dict[str, Path]:
    """Read the tasks of a version 2 manifest; empty if there is none (older manifests have no tasks)."""
    path = folder / _MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise FacePackageError(
            f"{path} cannot be read ({error}). Get the package again. {WHERE_FROM}"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("manifest_version") != 2:
        return {}
    tasks = manifest.get("tasks")
    if not isinstance(tasks, dict) or not all(
        isinstance(task, dict) and "file" in task for task in tasks.values()
    ):
        raise FacePackageError(
            f"{path} does not name a file for each task. Get the package again. {WHERE_FROM}"
        )
    return {task: folder / str(entry["file"]) for task, entry in tasks.items()}
