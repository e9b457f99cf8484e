"""Which face network an adapter was trained with, as its file records it."""

from __future__ import annotations

from pathlib import Path

from .faces.iresnet import IResNet, digest, load_iresnet
from .files import file_digest


def recorded_recognizer(path: Path | None, stages: bool, network: IResNet | None = None) -> str:
    """What names a face network in the features of Extract Face Features; empty for none.

    A method that reads the embedding alone takes the recogniser of a face package: an .onnx file, named by its bytes. One that
    reads the inner stages has a torch network, named by its weights, whatever file they come from.

    Args:
        stages: whether the inner stages are read.
        network: that of the file, where it is loaded already.
    """
    if path is None:
        return ""
    if not stages and path.suffix == ".onnx":
        return file_digest(path)
    return digest(network or load_iresnet(path))
