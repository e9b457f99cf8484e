"""The autoencoder: a picture to an eighth of its sides, and back.

Its file has the form of the tiny autoencoders that ComfyUI loads (TAESD: 64 channels everywhere, three blocks a level). Such a network is too
slow to be trained on a CPU. So most of it is left out while it learns: the larger a level's pictures, the fewer channels and blocks it has. In the file
the missing channels are zeros. A block of zeros passes on what it gets, as long as that is not negative, so both compute the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import read_tensors, write_safetensors

METADATA_KEY = "demo_world.autoencoder"
FULL_WIDTH, FULL_BLOCKS = 64, (1, 3, 3, 3)  # of the file's form
FACTOR = 8
SCALING = 0.18215  # Stable Diffusion 1's
_ENCODER_CONVS = (0, 2, 6, 10)  # where the file has the convolution that leads into a level; then its blocks
_DECODER_CONVS = (17, 12, 7, 1)
_DECODER_BLOCKS = (18, 13, 8, 3)
_ENCODER_LAST, _DECODER_LAST = 14, 19


@dataclass(frozen=True)
class Shape:
    """Levels from the picture's own size down to an eighth of it."""

    latent_channels: int = 12
    widths: tuple[int, ...] = (16, 32, 64, 64)
    encoder_blocks: tuple[int, ...] = (0, 1, 2, 3)
    decoder_blocks: tuple[int, ...] = (0, 2, 3, 3)


def _conv(inside: int, outside: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, stride, 1, bias=bias)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )
        with torch.no_grad():
            for weight in self.conv[4].parameters():
                weight.mul_(0.1)  # many blocks in a row begin as little more than nothing

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv(x))


def _blocks(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(_Block(width) for _ in range(count)))


def _level(hidden: Tensor, blocks: nn.Module) -> Tensor:
    """What a level's blocks make of what is led into it. Where there are none, the file's blocks of zeros still cut off below 0."""
    result: Tensor = blocks(hidden) if len(list(blocks.children())) else F.relu(hidden)
    return result


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) in 0..1 to latents (B, C, H/8, W/8)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inputs = (3, *shape.widths)
        self.convs = nn.ModuleList(
            [
                _conv(before, width, 1 if level == 0 else 2, bias=level == 0)
                for level, (before, width) in enumerate(zip(inputs, shape.widths, strict=False))
            ]
        )
        self.blocks = nn.ModuleList(map(_blocks, shape.widths, shape.encoder_blocks))
        self.last = _conv(shape.widths[-1], shape.latent_channels)

    def forward(self, pictures: Tensor) -> Tensor:
        hidden = pictures
        for conv, blocks in zip(self.convs, self.blocks, strict=True):
            hidden = _level(conv(hidden), blocks)
        latents: Tensor = self.last(hidden)
        return latents


class Decoder(nn.Module):
    """Latents (B, C, h, w), of about -3..3, to pictures (B, 3, 8h, 8w) of about 0..1."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inputs = (*shape.widths[1:], shape.latent_channels)
        last = len(shape.widths) - 1
        self.convs = nn.ModuleList(
            [
                _conv(before, width, bias=level == last)
                for level, (before, width) in enumerate(zip(inputs, shape.widths, strict=True))
            ]
        )
        self.blocks = nn.ModuleList(map(_blocks, shape.widths, shape.decoder_blocks))
        self.last = _conv(shape.widths[0], 3)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = torch.tanh(latents / 3) * 3
        deepest = len(self.convs) - 1
        for level in range(deepest, -1, -1):
            if level < deepest:
                hidden = F.interpolate(hidden, scale_factor=2)
            hidden = self.convs[level](hidden)
            hidden = _level(F.relu(hidden) if level == deepest else hidden, self.blocks[level])
        pictures: Tensor = self.last(hidden)
        return pictures


class Autoencoder(nn.Module):
    """Both ways. Pictures are RGB in -1..1."""

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = Shape() if shape is None else shape
        self.encoder, self.decoder = Encoder(self.shape), Decoder(self.shape)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), with sides that 8 divides, to latents (B, C, H/8, W/8) of a deviation
        near 1 in each channel."""
        latents: Tensor = self.encoder(pictures * 0.5 + 0.5)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pictures (B, 3, 8h, 8w), which may reach a little beyond -1..1."""
        pictures: Tensor = self.decoder(latents)
        return pictures * 2 - 1

    def forward(self, pictures: Tensor) -> Tensor:
        return self.decode(self.encode(pictures))


def save_autoencoder(net: Autoencoder, path: Path) -> None:
    """Write the file that ComfyUI loads as a VAE, in half precision.

    As with every VAE of Stable Diffusion 1, what it calls latents are ours divided by `SCALING`, which the diffusion model undoes.
    """
    state: dict[str, Tensor] = {"vae_scale": torch.tensor(SCALING), "vae_shift": torch.zeros(())}
    for name, source in _names(net.shape).items():
        state[name] = _padded(name, net.state_dict().get(source), net.shape).half()
    write_safetensors(state, {METADATA_KEY: json.dumps(asdict(net.shape))}, path)


def load_autoencoder(path: Path) -> Autoencoder:
    """The network without its zeros, in float32 and eval mode.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
    """
    state, metadata = read_tensors(path)
    try:
        facts = json.loads(metadata[METADATA_KEY])
        widths = {key: tuple(facts[key]) for key in ("widths", "encoder_blocks", "decoder_blocks")}
        shape = Shape(facts["latent_channels"], **widths)
        net = Autoencoder(shape)
        expected = net.state_dict()
        cut = {
            source: _cut(state[name].float(), expected[source])
            for name, source in _names(shape).items()
            if source in expected
        }
        net.load_state_dict(cut)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path.name} is no autoencoder of the demo world; get the file again."
        ) from error
    return net.eval().requires_grad_(False)


def _names(shape: Shape) -> Mapping[str, str]:
    """The file's names of all weights, and ours; a name of a block that we lack points to nothing."""
    names: dict[str, str] = {}

    def both(theirs: str, ours: str, bias: bool = True) -> None:
        for part in ("weight", "bias") if bias else ("weight",):
            names[f"{theirs}.{part}"] = f"{ours}.{part}"

    deepest = len(shape.widths) - 1
    for level in range(deepest + 1):
        both(f"taesd_encoder.{_ENCODER_CONVS[level]}", f"encoder.convs.{level}", level == 0)
        both(f"taesd_decoder.{_DECODER_CONVS[level]}", f"decoder.convs.{level}", level == deepest)
        firsts = {"encoder": _ENCODER_CONVS[level] + 1, "decoder": _DECODER_BLOCKS[level]}
        for side, first in firsts.items():
            for block in range(FULL_BLOCKS[level]):
                for conv in (0, 2, 4):
                    both(
                        f"taesd_{side}.{first + block}.conv.{conv}",
                        f"{side}.blocks.{level}.{block}.conv.{conv}",
                    )
    both(f"taesd_encoder.{_ENCODER_LAST}", "encoder.last")
    both(f"taesd_decoder.{_DECODER_LAST}", "decoder.last")
    return names


def _padded(name: str, value: Tensor | None, shape: Shape) -> Tensor:
    """A weight in the size that the file's form has, with zeros for what we lack."""
    outside = inside = FULL_WIDTH
    if name.startswith("taesd_encoder.0."):
        inside = 3
    elif name.startswith(f"taesd_encoder.{_ENCODER_LAST}."):
        outside = shape.latent_channels
    elif name.startswith("taesd_decoder.1."):
        inside = shape.latent_channels
    elif name.startswith(f"taesd_decoder.{_DECODER_LAST}."):
        outside = 3
    full = torch.zeros((outside, inside, 3, 3) if name.endswith("weight") else (outside,))
    if value is not None:
        full[tuple(slice(0, side) for side in value.shape)] = value
    return full


def _cut(full: Tensor, like: Tensor) -> Tensor:
    return full[tuple(slice(0, side) for side in like.shape)].clone()
