"""Paths of the demo world's shipped files, and the files of its networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import key_problems, read_tensors, write_safetensors

Network = TypeVar("Network", bound=nn.Module)

ASSETS = Path(__file__).parent / "assets"
AUTOENCODER = "autoencoder.safetensors"
KIND = "demo_world"  # in the metadata of a network's file
READER = "reader.safetensors"
CLIP_VISION = "clip_vision"  # a folder
VISION_CONFIG, VISION_WEIGHTS = f"{CLIP_VISION}/config.json", f"{CLIP_VISION}/model.safetensors"
BASE = "base.safetensors"
ADAPTERS = "adapters"  # a folder
METHODS: Mapping[str, str] = {
    "uniid": "UniID",
    "idadapter": "IDAdapter",
    "faceid": "IP-Adapter FaceID",
}
"""Titles of the methods with a shipped adapter, by the names of the files in that folder."""
JUDGE = "second_recognizer.safetensors"
FACE_PACKAGES = "insightface"  # a root folder of packages, in insightface's layout
FACE_PACKAGE = "demo_world"  # the name of the package in it
PACKAGE = f"{FACE_PACKAGES}/models/{FACE_PACKAGE}"  # its folder among the assets
DETECTOR_FILE, RECOGNIZER_FILE, SEX_AND_AGE_FILE = "detector.onnx", "recognizer.onnx", "sex_and_age.onnx"


def shipped(name: str) -> Path:
    """Return the path of a file or folder of the assets.

    Raises:
        CheckpointError: this copy of the project does not have it.
    """
    path = ASSETS / name
    if not path.exists():
        raise CheckpointError(
            f"{name} is missing in {ASSETS}; get this project again, or build it with `python -m idadapter_core demo-world build`."
        )
    return path


def adapter_file(name: str) -> str:
    """Name of an adapter's file among the assets, or among the files of a build."""
    return f"{ADAPTERS}/{name}.safetensors"


def face_package() -> Path:
    """Return the folder of the demo world's insightface package."""
    return shipped(PACKAGE)


def save_network(network: nn.Module, kind: str, path: Path, left_out: str = "") -> None:
    """Write a network in half precision.

    Args:
        kind: name of the network in the metadata of the file.
        left_out: part of weight names that the file omits, because not every release of a library has it.
    """
    state = {
        _without(left_out, key): value.half().contiguous()
        for key, value in network.state_dict().items()
        if value.is_floating_point()
    }
    write_safetensors(state, {KIND: kind}, path)


def read_network(kind: str, path: Path) -> dict[str, Tensor]:
    """Read the weights from a file of `save_network`, in half precision.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
    """
    state, metadata = read_tensors(path)
    if (found := metadata.get(KIND, "something else")) != kind:
        raise CheckpointError(
            f"{path.name} is not a {kind} of the demo world, but {found}; get the file again."
        )
    return state


def load_network(network: Network, kind: str, path: Path, left_out: str = "") -> Network:
    """Load a file of `save_network` into a network and return it, in float32 and eval mode, without gradients.

    Raises:
        CheckpointError: the file is missing, damaged or of another network.
    """
    state = read_network(kind, path)
    expected = {key: value for key, value in network.state_dict().items() if value.is_floating_point()}
    if problems := key_problems({_without(left_out, key): value for key, value in expected.items()}, state):
        raise CheckpointError(
            f"{path.name} is not the {kind} of the demo world, but another one: {problems}; get the file again."
        )
    network.load_state_dict({key: state[_without(left_out, key)].float() for key in expected}, strict=False)
    return network.eval().requires_grad_(False)


def _without(part: str, name: str) -> str:
    return name.replace(part, "") if part else name
