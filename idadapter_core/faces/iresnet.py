"""IResNet, a face recognition network. UniID uses its inner feature maps.

Architecture and key names: insightface's arcface_torch (`backbones/iresnet.py`), MIT.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, InputError, RecognizerError
from ..files import PICKLE_SUFFIXES, key_problems, read_tensors, some, state_digest, write_safetensors
from .iresnet_onnx import iresnet_state_dict_from_onnx

log = logging.getLogger(__name__)

IRESNET100_LAYERS = (3, 13, 30, 3)
CROP_SIZE = 112
EMBEDDING_WIDTH = 512
STAGE_WIDTHS = (64, 128, 256, 512)
METADATA_KEY = "idadapter.recognizer"

_BLOCK_KEY = re.compile(r"layer([1-4])\.(\d+)\.")
_SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors", ".onnx")


class IBasicBlock(nn.Module):
    """Improved residual block: normalisation first, no activation after the addition (arXiv:2004.04989)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Sequential | None = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, features: Tensor) -> Tensor:
        residual: Tensor = self.prelu(self.bn2(self.conv1(self.bn1(features))))
        residual = self.bn3(self.conv2(residual))
        shortcut = features if self.downsample is None else self.downsample(features)
        return shortcut + residual


def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    first = IBasicBlock(in_channels, channels, stride=2)
    return nn.Sequential(first, *(IBasicBlock(channels, channels, stride=1) for _ in range(blocks - 1)))


class IResNet(nn.Module):
    """A frozen recogniser that maps crops (B, 3, 112, 112), RGB in [-1, 1], to an embedding and four feature maps.

    `layers` are the block counts of the four stages; IResNet-100 has (3, 13, 30, 3). `widths` are the channels of the
    stages; published networks have (64, 128, 256, 512).
    The network stays in eval mode: its batch statistics are part of the published weights.
    """

    def __init__(self, layers: Sequence[int], widths: Sequence[int] = STAGE_WIDTHS) -> None:
        super().__init__()
        for counts, kind in ((layers, "block counts"), (widths, "stage widths")):
            if len(counts) != 4 or any(count < 1 for count in counts):
                raise InputError(f"IResNet needs four {kind} of at least 1, got {tuple(counts)}")
        self.layers, self.widths = tuple(layers), tuple(widths)
        first, second, third, last = self.widths
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.prelu = nn.PReLU(first)
        self.layer1 = _stage(first, first, layers[0])
        self.layer2 = _stage(first, second, layers[1])
        self.layer3 = _stage(second, third, layers[2])
        self.layer4 = _stage(third, last, layers[3])
        self.bn2 = nn.BatchNorm2d(last)
        self.fc = nn.Linear(last * 7 * 7, EMBEDDING_WIDTH)
        self.features = nn.BatchNorm1d(EMBEDDING_WIDTH)
        self.eval()

    def train(self, mode: bool = True) -> IResNet:
        """Stay in eval mode, even if a parent module is set to training."""
        super().train(False)
        return self

    def forward(self, crops: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the embedding (B, 512), not normalised, and the outputs of the four stages:
        (B, 64, 56, 56), (B, 128, 28, 28), (B, 256, 14, 14), (B, 512, 7, 7) with the usual widths.
        """
        if crops.ndim != 4 or tuple(crops.shape[1:]) != (3, CROP_SIZE, CROP_SIZE):
            raise InputError(f"face crops must be (B, 3, {CROP_SIZE}, {CROP_SIZE}), got {tuple(crops.shape)}")
        hidden = self.prelu(self.bn1(self.conv1(crops)))
        stages = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            hidden = stage(hidden)
            stages.append(hidden)
        embedding = self.features(self.fc(torch.flatten(self.bn2(hidden), 1)))
        return embedding, stages

    def extra_repr(self) -> str:
        return f"layers={self.layers}, widths={self.widths}"


def load_iresnet(
    path: str | Path, layers: Sequence[int] | None = None, *, any_layers: bool = False
) -> IResNet:
    """Load a recogniser from a pickle (weights only), .safetensors or .onnx, in float32, eval mode, frozen.

    `layers`: the required block counts. By default those of IResNet-100, the network UniID was trained with, because
    another IResNet has the same output shapes and would give meaningless features without an error. A .safetensors file
    written by `save_iresnet` declares its own counts and widths, which are then accepted.
    `any_layers`: accept any counts and widths, for use without a trained adapter that depends on them.

    Raises RecognizerError if the file cannot be read, is not an IResNet, or is another IResNet.
    """
    path = Path(path)
    state, declared = _read(path)
    if path.suffix.lower() == ".onnx" and not any_layers:
        log.warning(
            "%s is converted from ONNX. Its weights must be those the adapter was trained with; "
            "the original .pth file is the safe choice.",
            path.name,
        )
    found = _block_counts(state)
    if found is None:
        raise RecognizerError(
            f"{path.name} is not an IResNet face recogniser: none of its {len(state)} keys look like "
            f"'layer1.0.conv1.weight' (it has {some(state)}). "
            + ("Name one of insightface." if any_layers else "UniID needs the IResNet-100 of arcface_torch.")
        )
    required = tuple(layers) if layers is not None else declared or IRESNET100_LAYERS
    if found != required and not any_layers:
        hint = " It looks like IResNet-50 (for instance w600k_r50)." if found == (3, 4, 14, 3) else ""
        raise RecognizerError(
            f"{path.name} has {_counts(found)} blocks in its four stages, but {_counts(required)} are needed "
            f"{'(IResNet-100, the network UniID was trained on)' if required == IRESNET100_LAYERS else ''}.{hint} "
            "Another network gives features the adapter does not understand; choose the right file."
        )
    widths = _stage_widths(state)
    if widths != STAGE_WIDTHS and declared is None and not any_layers:
        raise RecognizerError(
            f"{path.name} has {_counts(widths)} channels in its four stages, but published networks have "
            f"{_counts(STAGE_WIDTHS)}. Another network gives features the adapter does not understand; choose the right file."
        )
    with torch.device("meta"):
        net = IResNet(found, widths)
    _check_keys(path, net.state_dict(), state)
    float_state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    net.load_state_dict(float_state, assign=True)
    return net.requires_grad_(False)


def save_iresnet(net: IResNet, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a .safetensors file that declares its block counts and widths, so that `load_iresnet` accepts small networks."""
    state = {key: value for key, value in net.state_dict().items() if value.is_floating_point()}
    metadata = {METADATA_KEY: json.dumps({"layers": list(net.layers), "widths": list(net.widths)})}
    write_safetensors(
        {key: value.to(dtype).contiguous() for key, value in state.items()}, metadata, Path(path)
    )


def digest(net: nn.Module) -> str:
    """Return a digest of a network's weights, the same for every file format and storage precision with equal loaded values."""
    return state_digest({name: t for name, t in net.state_dict().items() if t.is_floating_point()})


def _read(path: Path) -> tuple[Mapping[str, Tensor], tuple[int, ...] | None]:
    """Read the state dict of a file, and the block counts that it declares (our own files only)."""
    if not path.is_file():
        raise RecognizerError(f"face recogniser not found: {path}")
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return iresnet_state_dict_from_onnx(path), None
    if suffix not in _SUFFIXES:
        raise RecognizerError(
            f"{path.name}: a face recogniser must be one of {', '.join(_SUFFIXES)}, not '{path.suffix}'"
        )
    try:
        state, metadata = read_tensors(path)
    except CheckpointError as error:
        raise RecognizerError(str(error)) from error
    if METADATA_KEY not in metadata:
        return state, None
    try:
        declared = tuple(int(count) for count in json.loads(metadata[METADATA_KEY])["layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise RecognizerError(
            f"{path.name}: its metadata '{METADATA_KEY}' must read like {{\"layers\": [3, 13, 30, 3]}}, "
            f"it is {metadata[METADATA_KEY]!r}. Convert the file again."
        ) from error
    return state, declared


def _block_counts(state: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    blocks: dict[int, set[int]] = {1: set(), 2: set(), 3: set(), 4: set()}
    for key in state:
        if match := _BLOCK_KEY.match(key):
            blocks[int(match[1])].add(int(match[2]))
    is_iresnet = all(blocks.values()) and "layer1.0.prelu.weight" in state and "fc.weight" in state
    return tuple(max(indices) + 1 for indices in blocks.values()) if is_iresnet else None


def _stage_widths(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the channels of the four stages, or the usual ones if keys are missing, which the later key check reports."""
    weights = [state.get(f"layer{stage}.0.conv2.weight") for stage in (1, 2, 3, 4)]
    widths = [
        usual if weight is None or not weight.ndim else weight.shape[0]
        for weight, usual in zip(weights, STAGE_WIDTHS, strict=True)
    ]
    return tuple(widths)


def _check_keys(path: Path, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    if problems := key_problems(expected, state):
        raise RecognizerError(f"{path.name} is not an IResNet as published: {problems}.")


def _counts(layers: Sequence[int]) -> str:
    return "/".join(str(count) for count in layers)
