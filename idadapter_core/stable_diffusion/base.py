"""Base models outside ComfyUI: the frozen UNet, text encoders, VAE and noise schedule of SD1.5, SD2.1 and SDXL.

They are loaded from a diffusers folder or a single-file checkpoint on disk, and give the same results as ComfyUI with the same
weights.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..mechanisms.text import reference_names
from ..sites import attention_sites, family_name
from .config import BaseConfig
from .noise import NoiseSchedule, scaled_linear
from .pretrained import freeze, from_library, load_folder, published_names, read_json, weights_digest
from .single_file import KL, SingleFile
from .text import TextEncoders
from .vae import Autoencoder, load_autoencoder

log = logging.getLogger(__name__)

# Text encoders by family, in the order of their concatenated states: name and subfolder.
_TEXT_ENCODERS = {
    "sd15": {"l": "text_encoder"},
    "sd21": {"h": "text_encoder"},
    "sdxl": {"l": "text_encoder", "g": "text_encoder_2"},
}
_SIZE_IDS = 6  # SDXL's size conditioning: original size, crop and target size


@dataclass(frozen=True, eq=False)
class Base:
    """A base model: all networks around the adapter, frozen and in evaluation mode."""

    family: str  # sd15, sd21 or sdxl
    unet: Any  # diffusers' UNet2DConditionModel, in the requested dtype
    vae: Autoencoder  # fp32
    text: TextEncoders  # in the UNet's dtype
    schedule: NoiseSchedule
    digest: str  # of all weights; does not depend on folder or file, fp32 or bf16


def load_base(
    config: BaseConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Base:
    """Load the base model of a configuration.

    Args:
        config: `path` is a diffusers folder or a checkpoint file. `config` and `tokenizer` supplement a file.
        device: device of all parts.
        dtype: dtype of the UNet and the text encoders. The VAE is always in fp32.

    Raises:
        ConfigError: no such file, a missing part, another model family, or an unsupported kind of model.
        CheckpointError: a file cannot be read or has the wrong contents.
        MismatchError: the model is not Stable Diffusion.
    """
    if not config.path:
        raise ConfigError(
            "base.path is empty; name a diffusers folder or a checkpoint file of Stable Diffusion."
        )
    path = Path(config.path).expanduser()
    if not path.exists():
        raise ConfigError(
            f"{path}: no such file or folder. base.path names a diffusers folder or a checkpoint file on this machine; nothing "
            "is downloaded."
        )
    source: _Folder | SingleFile
    if path.is_dir():
        _require_no_configs(config)
        source = _Folder(path, config.family, dtype)
    else:
        source = SingleFile(path, config.family, _configs(config))
    _require_family(source.unet_state, config.family, path)
    unet = freeze(source.unet(), device, dtype)
    encoders = _TEXT_ENCODERS[config.family]
    models = {name: source.text_encoder(name, folder) for name, folder in encoders.items()}
    tokenizers = {name: _tokenizer(config, path, folder) for name, folder in encoders.items()}
    text = TextEncoders(config.family, models, tokenizers)
    freeze(text, device, dtype)
    _require_text(unet, text, path)
    if config.vae:
        vae = load_autoencoder(Path(config.vae).expanduser(), config.family, source.kl_config)
    else:
        vae = source.autoencoder()
    _require_channels(unet, vae, path)
    vae = vae.to(device)
    schedule = noise_schedule(source.scheduler(), config.prediction_type, path.name)
    return Base(config.family, unet, vae, text, schedule, _digest(unet, text, vae, schedule))


def _configs(config: BaseConfig) -> Path | None:
    folder = Path(config.config).expanduser() if config.config else None
    if folder is not None and not (folder / "unet" / "config.json").is_file():
        raise ConfigError(
            f"{folder}: has no unet/config.json. base.config names a folder with diffusers configurations."
        )
    return folder


def _require_no_configs(config: BaseConfig) -> None:
    if config.config:
        raise ConfigError(
            f"base.config completes a checkpoint file, but {config.path} is a folder with configurations of its own. Leave "
            "base.config out."
        )


class _Folder:
    """A diffusers folder, with the same interface as `SingleFile`."""

    def __init__(self, path: Path, family: str, dtype: torch.dtype):
        self.path = path
        self.family = family
        self._unet = load_folder(
            from_library("diffusers", "UNet2DConditionModel"), path / "unet", torch_dtype=dtype
        )
        self.unet_state = self._unet.state_dict()

    def unet(self) -> nn.Module:
        return self._unet

    def text_encoder(self, name: str, folder: str) -> nn.Module:
        kind = "CLIPTextModelWithProjection" if name == "g" else "CLIPTextModel"
        return load_folder(from_library("transformers", kind), self.path / folder)

    def autoencoder(self) -> Autoencoder:
        return load_autoencoder(self.path / "vae", self.family, {})

    @property
    def kl_config(self) -> dict[str, Any]:
        """Return the configuration for a VAE in a separate file: that of the folder's VAE, if it has one."""
        path = self.path / "vae" / "config.json"
        config = read_json(path) if path.is_file() else {}
        return config if config.get("_class_name") == "AutoencoderKL" else KL

    def scheduler(self) -> dict[str, Any]:
        return read_json(self.path / "scheduler" / "scheduler_config.json")


def unet_family(state: Mapping[str, Tensor]) -> str:
    """Return sd15, sd21 or sdxl from a UNet's weights, at any width, with ldm or diffusers names."""
    if any(name.startswith(("label_emb.", "add_embedding.")) for name in state):
        return "sdxl"
    linear = any(name.endswith(".proj_in.weight") and value.ndim == 2 for name, value in state.items())
    return "sd21" if linear else "sd15"


def _require_family(state: Mapping[str, Tensor], family: str, path: Path) -> None:
    sites = attention_sites(state)
    found = unet_family(state)
    if found != family:
        suffix = ".attn2.to_k.weight"
        width = next(value.shape[1] for name, value in state.items() if name.endswith(suffix))
        raise ConfigError(
            f"base.family is {family}, but the model in {path.name} is {family_name(len(sites), width)}, of the family {found}. "
            f'Set base.family to "{found}", or choose another model.'
        )


def _require_channels(unet: Any, vae: Autoencoder, path: Path) -> None:
    found, wanted = unet.config.in_channels, vae.channels
    if found > wanted:
        raise ConfigError(
            f"{path.name}: its UNet reads {found} channels instead of the {wanted} of a latent, so it is made for inpainting or editing. "
            "Choose the plain text-to-image model."
        )
    if found < wanted:
        raise ConfigError(
            f"{path.name}: its UNet reads latents of {found} channels, the VAE makes {wanted}. They do not belong together; set base.vae "
            "to the VAE of this model, or leave it empty."
        )


def _require_text(unet: Any, text: TextEncoders, path: Path) -> None:
    widths = text.widths
    if sum(widths.values()) != unet.config.cross_attention_dim:
        raise ConfigError(
            f"{path.name}: the text encoders give {widths}, the UNet reads {unet.config.cross_attention_dim}. They do not belong "
            "together; complete the folder with those of one model."
        )
    if text.family == "sdxl":
        model: Any = text.models["g"]
        wanted = model.config.projection_dim + _SIZE_IDS * unet.config.addition_time_embed_dim
        if unet.config.projection_class_embeddings_input_dim != wanted:
            raise ConfigError(
                f"{path.name}: its UNet is told {unet.config.projection_class_embeddings_input_dim} numbers beside the text instead "
                f"of {wanted}, so it is no SDXL base model (the refiner is none). Choose the base model."
            )


def _tokenizer(config: BaseConfig, path: Path, text_folder: str) -> Any:
    """Load the tokenizer of a text encoder from `base.tokenizer`, else from the folder."""
    name = text_folder.replace("text_encoder", "tokenizer")
    folders = [Path(folder).expanduser() / name for folder in (config.config, str(path)) if folder]
    if config.tokenizer:
        folders = [Path(config.tokenizer).expanduser()]
    for folder in folders:
        has_files = all((folder / file).is_file() for file in ("vocab.json", "merges.txt"))
        if has_files or (folder / "tokenizer.json").is_file():
            kind = from_library("transformers", "CLIPTokenizer")
            return kind.from_pretrained(str(folder), local_files_only=True)
    raise ConfigError(
        f"no tokenizer in {' or '.join(map(str, folders))} (vocab.json and merges.txt). A checkpoint file has none: name a folder "
        "with CLIP's in base.tokenizer, for example comfy/sd1_tokenizer of ComfyUI, or the tokenizer folder of any Stable "
        "Diffusion model."
    )


def noise_schedule(scheduler: Mapping[str, Any], prediction_type: str, name: str) -> NoiseSchedule:
    """Build the noise schedule of a diffusers scheduler configuration.

    Args:
        scheduler: the configuration; `beta_start`, `beta_end` and `num_train_timesteps` default to the usual values.
        prediction_type: epsilon, v_prediction, or auto for the value in the configuration.
        name: name of the model, for messages.

    Raises:
        ConfigError: the schedule is not Stable Diffusion's, or does not suit the prediction type.
    """
    kind = scheduler.get("beta_schedule")
    if kind != "scaled_linear" or scheduler.get("trained_betas") is not None:
        given = "trained_betas" if scheduler.get("trained_betas") is not None else f"beta_schedule {kind!r}"
        raise ConfigError(
            f"{name}: the noise schedule of {scheduler.get('_class_name', 'its scheduler')} ({given}) is not supported; only "
            "Stable Diffusion's own, scaled_linear, is. Choose another base model."
        )
    declared = scheduler.get("prediction_type", "epsilon")
    log.info(
        "%s: predicts %s%s",
        name,
        declared if prediction_type == "auto" else prediction_type,
        "" if prediction_type == "auto" else f" (set in base.prediction_type; the model says {declared})",
    )
    predicts = declared if prediction_type == "auto" else prediction_type
    # Built as v-prediction first, because alpha-bar may still have to be rescaled to zero terminal SNR.
    schedule = scaled_linear(
        "v_prediction",
        scheduler.get("num_train_timesteps", 1000),
        scheduler.get("beta_start", 0.00085),
        scheduler.get("beta_end", 0.012),
    )
    alphas = schedule.alphas_cumprod
    if scheduler.get("rescale_betas_zero_snr"):
        alphas = _without_signal_at_the_end(alphas)
    return NoiseSchedule(alphas, predicts)


def _without_signal_at_the_end(alphas: Tensor) -> Tensor:
    """Rescale alpha-bar to zero terminal SNR (arXiv 2305.08891, Algorithm 1)."""
    root = alphas.double().sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root.square().float()


def _digest(unet: nn.Module, text: TextEncoders, vae: Autoencoder, schedule: NoiseSchedule) -> str:
    """Digest of everything that predictions depend on: weights, tokenizers, noise levels and prediction type."""
    parts = [weights_digest(unet.state_dict()), vae.digest]
    parts += [
        f"{name} {weights_digest(published_names(model, 'text_model'))} {_words_digest(text.tokenizers[name])}"
        for name, model in text.models.items()
    ]
    parts += [
        schedule.prediction_type,
        hashlib.sha256(schedule.alphas_cumprod.double().cpu().numpy().tobytes()).hexdigest(),
    ]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _words_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer's behaviour: its vocabulary, and the tokens of some sample texts."""
    made = sorted(tokenizer.get_vocab().items()), [tokenizer(text)["input_ids"] for text in reference_names()]
    return hashlib.sha256(repr(made).encode()).hexdigest()[:16]
