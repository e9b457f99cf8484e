"""Which face network an adapter was trained with, as its file records it."""

from __future__ import annotations

from pathlib import Path

from .faces.iresnet import IResNet, digest, load_iresnet
from .files import file_digest
from .methods import idadapter


def recorded_recognizer(path: Path | None, method: str, network: IResNet | None = None) -> str:
    """What names a face network in the features of Extract Face Features; empty for none.

    IDAdapter reads the embedding alone, so it takes the recogniser of a face package: an .onnx file, named by its bytes. UniID
    reads the inner stages of a torch network, named by its weights, whatever file they come from.

    Args:
        network: that of the file, where it is loaded already.
    """
    if path is None:
        return ""
    if method == idadapter.METHOD and path.suffix == ".onnx":
        return file_digest(path)
    return digest(network or load_iresnet(path))
