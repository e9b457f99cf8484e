"""The frozen image autoencoder of a base model: AutoencoderKL or TAESD, always in full precision."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, InputError
from ..files import read_tensors
from .pretrained import build_diffusers, freeze, from_library, load_folder, read_json, weights_digest
from .zero_channels import without_zero_channels

SCALING = {"sd15": 0.18215, "sd21": 0.18215, "sdxl": 0.13025}
"""Factor from the latents of an AutoencoderKL to the UNet's units, by family."""


class Autoencoder(nn.Module):
    """Encodes images to latents in the UNet's units, and decodes them."""

    factor = 8  # pixels per latent, along each side

    def __init__(self, network: nn.Module, gain: float, offset: float = 0.0):
        """
        Args:
            network: diffusers' AutoencoderKL or AutoencoderTiny.
            gain: with `offset`, maps the UNet's latents to the network's: latents * gain + offset.
        """
        super().__init__()
        self.network = freeze(network, "cpu", torch.float32)
        config: Any = network.config
        self.channels: int = config.latent_channels  # of a latent
        self.gain = gain
        self.offset = offset
        numbers = f"{weights_digest(self.network.state_dict())} {gain:.6g} {offset:.6g}"
        self.eval()
        self.digest = hashlib.sha256(numbers.encode()).hexdigest()[:16]
        for name in ("encoder", "decoder"):
            part: Any = getattr(network, name)
            if isinstance(getattr(part, "layers", None), nn.Sequential):  # of a TAESD
                part.layers = without_zero_channels(part.layers)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W), RGB in -1..1, to the mean and standard deviation (B, 2 C, h, w) of latents in the UNet's units.

        A latent is drawn as mean + deviation * noise. For TAESD the deviation is 0.

        Raises:
            InputError: wrong shape, or a side that is not a multiple of 8.
        """
        if images.ndim != 4 or images.shape[1] != 3 or any(side % self.factor for side in images.shape[2:]):
            raise InputError(
                f"images must be (B, 3, H, W) with sides that are multiples of {self.factor}, got {tuple(images.shape)}"
            )
        network: Any = self.network
        with torch.autocast(images.device.type, enabled=False):
            encoded = network.encode(images.float())
        if hasattr(encoded, "latent_dist"):
            mean, deviation = encoded.latent_dist.mean, encoded.latent_dist.std
        else:
            mean, deviation = encoded.latents, torch.zeros_like(encoded.latents)
        return torch.cat([(mean - self.offset) / self.gain, deviation / self.gain], dim=1)

    def decode(self, latents: Tensor, *, in_bfloat16: bool = False) -> Tensor:
        """Decode latents (B, C, h, w) in the UNet's units to images (B, 3, H, W), RGB, about -1..1 and not clamped. Gradients flow to
        the latents.

        Args:
            in_bfloat16: compute under autocast: for losses, too coarse for pictures.
        """
        network: Any = self.network
        # SDXL's decoder overflows in float16.
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=in_bfloat16):
            images: Tensor = network.decode(latents.float() * self.gain + self.offset).sample
        return images.float()


def load_autoencoder(path: Path, family: str, kl_config: Mapping[str, Any]) -> Autoencoder:
    """Load an autoencoder from a diffusers folder (its own, or that of a whole model) or from a file.

    Args:
        path: the folder or file.
        family: the family of its latents: sd15, sd21 or sdxl.
        kl_config: diffusers' configuration of an AutoencoderKL; only used for files, which do not contain one.

    Raises:
        ConfigError: no such file, or another kind of autoencoder.
        CheckpointError: it cannot be read.
    """
    if path.is_dir():
        return _from_folder(path if (path / "config.json").is_file() else path / "vae", family)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file or folder; name a VAE in base.vae, or leave it empty.")
    return autoencoder_from_state(read_tensors(path, mapped=True)[0], path.name, family, kl_config)


def _from_folder(folder: Path, family: str) -> Autoencoder:
    config = read_json(folder / "config.json")
    kind = config.get("_class_name")
    if kind not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ConfigError(
            f"{folder}: holds a {kind}; only AutoencoderKL and AutoencoderTiny (TAESD) are supported. Name another in base.vae."
        )
    network = load_folder(from_library("diffusers", kind), folder, torch_dtype=torch.float32)
    if kind == "AutoencoderTiny":
        return Autoencoder(network, 1 / config.get("scaling_factor", 1.0))
    return _kl(network, config, family, str(folder))


def autoencoder_from_state(
    state: Mapping[str, Tensor], name: str, family: str, kl_config: Mapping[str, Any]
) -> Autoencoder:
    """Build an autoencoder from the weights of a file, without a prefix: KL with the names of the original Stable Diffusion or of
    diffusers, or TAESD with ComfyUI's names.

    Raises:
        CheckpointError: unknown names, or sizes that do not match `kl_config`.
    """
    if "taesd_decoder.1.weight" in state:
        return _tiny(state, name, family)
    kind = from_library("diffusers", "AutoencoderKL")
    if "decoder.conv_in.weight" not in state:
        raise CheckpointError(
            f"{name}: holds no VAE that is known here (AutoencoderKL, or TAESD with ComfyUI's names). Name one in base.vae."
        )
    convert = None
    if not any(key.startswith("decoder.up_blocks.") for key in state):
        convert = from_library("diffusers.loaders.single_file_utils", "convert_ldm_vae_checkpoint")
    return _kl(build_diffusers(kind, kl_config, state, name, convert), kl_config, family, name)


def _kl(network: nn.Module, config: Mapping[str, Any], family: str, name: str) -> Autoencoder:
    levels = len(config.get("block_out_channels", ()))
    if config.get("latents_mean") is not None or config.get("latent_channels", 4) != 4 or levels != 4:
        raise ConfigError(
            f"{name}: this VAE does not make the latents of Stable Diffusion (4 channels, 8 pixels to a latent, scaled by one "
            "number). Name another in base.vae."
        )
    return Autoencoder(network, 1 / config.get("scaling_factor", SCALING[family]))


def _tiny(state: Mapping[str, Tensor], name: str, family: str) -> Autoencoder:
    """Build a TAESD. ComfyUI feeds it latents divided by the family's scaling, which two numbers in the file undo."""
    scale = float(state.get("vae_scale", torch.tensor(1.0)))
    shift = float(state.get("vae_shift", torch.tensor(0.0)))
    return Autoencoder(tiny_network(state, name), scale / SCALING[family], -shift * scale)


def tiny_network(state: Mapping[str, Tensor], name: str) -> Any:
    """Build diffusers' AutoencoderTiny from a TAESD's weights with ComfyUI's names.

    Raises:
        CheckpointError: the weights do not match.
    """
    renamed = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part == "taesd_encoder":
            renamed[f"encoder.layers.{rest}"] = value
        elif part == "taesd_decoder":  # diffusers has no counterpart of its first layer, which has no weights
            number, _, rest = rest.partition(".")
            renamed[f"decoder.layers.{int(number) - 1}.{rest}"] = value
    channels = {"latent_channels": state["taesd_decoder.1.weight"].shape[1]}
    return build_diffusers(from_library("diffusers", "AutoencoderTiny"), channels, renamed, name)
