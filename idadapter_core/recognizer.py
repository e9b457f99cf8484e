"""The recorded name of the face network that an adapter was trained with."""

from __future__ import annotations

from pathlib import Path

from .faces.iresnet import IResNet, digest, load_iresnet
from .files import file_digest


def recorded_recognizer(path: Path | None, stages: bool, network: IResNet | None = None) -> str:
    """Return the digest that identifies a face network in the features of Extract Face Features; empty for none.

    A method that uses only the embedding takes the recogniser of a face package: an .onnx file, identified by its bytes. A method
    that uses the inner stages has a torch network, identified by its weights, independent of their file.

    Args:
        stages: whether the inner stages are used.
        network: the network of the file, if it is already loaded.
    """
    if path is None:
        return ""
    if not stages and path.suffix == ".onnx":
        return file_digest(path)
    return digest(network or load_iresnet(path))
