"""The autoencoder: encodes a picture to latents of an eighth of its side, and decodes them.

Its file has the layout of the tiny autoencoders that ComfyUI loads (TAESD: 64 channels at every level, three blocks per level). A network
of that size is too slow to train on a CPU, so the trained one is smaller: the higher a level's resolution, the fewer channels and blocks
it has. In the file the missing channels and blocks are zeros. A block of zeros is the identity for inputs that are not negative, so both
networks compute the same.
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
FULL_WIDTH, FULL_BLOCKS = 64, (1, 3, 3, 3)  # of the file's layout
FACTOR = 8
SCALING = 0.18215  # Stable Diffusion 1's
_ENCODER_CONVS = (0, 2, 6, 10)  # each level's first convolution in the file; its blocks follow
_DECODER_CONVS = (17, 12, 7, 1)
_DECODER_BLOCKS = (18, 13, 8, 3)
_ENCODER_LAST, _DECODER_LAST = 14, 19


@dataclass(frozen=True)
class Shape:
    """Size of the trained network, by level: full resolution, 1/2, 1/4 and 1/8."""

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
                weight.mul_(0.1)  # a chain of blocks starts close to the identity

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv(x))


def _blocks(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(_Block(width) for _ in range(count)))


def _level(hidden: Tensor, blocks: nn.Module) -> Tensor:
    """Apply the blocks of a level. Without any, apply the ReLU that remains of the blocks of zeros in the file."""
    result: Tensor = blocks(hidden) if len(list(blocks.children())) else F.relu(hidden)
    return result


class Encoder(nn.Module):
    """Maps pictures (B, 3, H, W) in 0..1 to latents (B, C, H/8, W/8)."""

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
    """Maps latents (B, C, h, w), of about -3..3, to pictures (B, 3, 8h, 8w) of about 0..1."""

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
    """Encoder and decoder for RGB pictures in -1..1."""

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = Shape() if shape is None else shape
        self.encoder, self.decoder = Encoder(self.shape), Decoder(self.shape)

    def encode(self, pictures: Tensor) -> Tensor:
        """Encode pictures (B, 3, H, W), RGB in -1..1 with sides divisible by 8.

        Returns:
            Latents (B, C, H/8, W/8) with a standard deviation near 1 in each channel.
        """
        latents: Tensor = self.encoder(pictures * 0.5 + 0.5)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to RGB pictures (B, 3, 8h, 8w), whose values may slightly exceed -1..1."""
        pictures: Tensor = self.decoder(latents)
        return pictures * 2 - 1

    def forward(self, pictures: Tensor) -> Tensor:
        return self.decode(self.encode(pictures))


def save_autoencoder(net: Autoencoder, path: Path) -> None:
    """Write the file that ComfyUI loads as a VAE, in half precision.

    As with every VAE of Stable Diffusion 1, the file's latents are ours divided by `SCALING`; the diffusion model multiplies them again.
    """
    state: dict[str, Tensor] = {"vae_scale": torch.tensor(SCALING), "vae_shift": torch.zeros(())}
    for name, source in _names(net.shape).items():
        state[name] = _padded(name, net.state_dict().get(source), net.shape).half()
    write_safetensors(state, {METADATA_KEY: json.dumps(asdict(net.shape))}, path)


def load_autoencoder(path: Path) -> Autoencoder:
    """Load the network without the padding of zeros, in float32 and eval mode.

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
            f"{path.name} is not an autoencoder of the demo world; get the file again."
        ) from error
    return net.eval().requires_grad_(False)


def _names(shape: Shape) -> Mapping[str, str]:
    """Map the file's weight names to ours. Names of blocks that the trained network lacks map to names that it does not have."""
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
    """Pad a weight with zeros to its size in the file; None: zeros only."""
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
