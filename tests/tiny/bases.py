"""Tiny base models on disk for code that works without ComfyUI. Needs diffusers and transformers.

`write_tiny_base` writes the configurations that the checkpoint files of `tests/tiny/checkpoints.py` lack. `write_diffusers_base`
writes a whole diffusers folder of the same sizes, but with a vocabulary of its own: single bytes and a few words.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.golden import recipe
from tests.harness.shim import run_shim
from tests.tiny.diffusers_unet import CONFIGS

KINDS = ("sd15", "sd21", "sdxl")
WIDTH = 64
"""Of every text encoder."""
VOCABULARY = 49408
"""Words of CLIP's real tokenizer."""
WORDS = ("a", "of", "photo", "man", "person", "is", "cat", "sks", "desks")
"""What is one token in the small vocabulary; everything else is read letter by letter."""

_PREDICTION = {"sd15": "epsilon", "sd21": "v_prediction", "sdxl": "epsilon"}
# SD2.1's encoder has three layers in the checkpoint; diffusers leaves out the last one, which is never read.
_LAYERS = {"l": 3, "h": 2, "g": 3}
_ENCODERS = {
    "sd15": {"l": "text_encoder"},
    "sd21": {"h": "text_encoder"},
    "sdxl": {"l": "text_encoder", "g": "text_encoder_2"},
}
TINY_KL: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32, 32, 32, 32],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
}
"""An AutoencoderKL of 8 pixels to a latent."""
# Random UNets make latents of a spread of about 14, and TAESD's decoder takes them between -3 and 3.
_TAESD_SCALING = 15.0


def write_tiny_base(folder: Path, kind: str, **scheduler_changes: Any) -> Path:
    """The configurations of the tiny checkpoint of that kind, as a diffusers folder has them, without weights: `base.config`."""
    _write(folder / "unet/config.json", {"_class_name": "UNet2DConditionModel", **CONFIGS[kind]})
    _write(folder / "vae/config.json", {**TINY_KL, "scaling_factor": 0.13025 if kind == "sdxl" else 0.18215})
    for name, part in _ENCODERS[kind].items():
        _write(folder / part / "config.json", _text_config(name, VOCABULARY))
    _write(folder / "scheduler/scheduler_config.json", scheduler(kind, **scheduler_changes))
    return folder


def scheduler(kind: str, **changes: Any) -> dict[str, Any]:
    """diffusers' scheduler configuration of a kind."""
    return {
        "_class_name": "EulerDiscreteScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "prediction_type": _PREDICTION[kind],
        **changes,
    }


def write_diffusers_base(folder: Path, kind: str, seed: int = 0, vae: str = "kl") -> Path:
    """A whole tiny diffusers folder of that kind with random weights: UNet, text encoders, tokenizers, VAE ("kl" or "tiny", which
    is TAESD) and scheduler. 5 to 10 megabytes."""
    run_shim()
    import diffusers
    import transformers

    write_tiny_base(folder, kind)
    unet = diffusers.UNet2DConditionModel(**CONFIGS[kind])
    recipe.fill(unet, seed, "unet.")
    unet.save_pretrained(folder / "unet")
    for name, part in _ENCODERS[kind].items():
        size = write_tokenizer(folder / part.replace("text_encoder", "tokenizer"))
        config = transformers.CLIPTextConfig(**_text_config(name, size))
        with_projection = name == "g"
        kinds = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
        encoder = kinds[with_projection](config)
        recipe.fill(encoder, seed, f"{name}.")
        encoder.save_pretrained(folder / part)
    tiny_autoencoder(kind, seed, vae).save_pretrained(folder / "vae")
    return folder


@functools.cache
def diffusers_base(kind: str, vae: str = "kl") -> Path:
    """A folder of `write_diffusers_base` for all tests of a run, none of which may change it."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-base-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_diffusers_base(folder, kind, vae=vae)


def tiny_autoencoder(kind: str, seed: int = 0, vae: str = "kl") -> Any:
    """diffusers' AutoencoderKL or, for "tiny", its AutoencoderTiny with random weights, whose pictures are mostly in range."""
    run_shim()
    import diffusers

    if vae == "tiny":
        network: Any = diffusers.AutoencoderTiny(scaling_factor=_TAESD_SCALING)
        last = network.decoder.layers[-1]
    else:
        config = {**TINY_KL, "scaling_factor": 0.13025 if kind == "sdxl" else 0.18215}
        network = diffusers.AutoencoderKL.from_config(config)
        last = network.decoder.conv_out
    recipe.fill(network, seed, "vae.")
    with torch.no_grad():
        last.weight.mul_(0.5)
        last.bias.fill_(0.5 if vae == "tiny" else 0.0)
    return network


def write_tokenizer(folder: Path) -> int:
    """CLIP's tokenizer with a small vocabulary: all bytes, and `WORDS`. The number of its tokens."""
    letters = list(_byte_letters().values())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
                vocabulary.append(pieces[0] + pieces[1])
            pieces[:2] = [pieces[0] + pieces[1]]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    _write(folder / "vocab.json", {token: number for number, token in enumerate(vocabulary)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", **special})
    return len(vocabulary)


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies: itself where it can be printed."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _text_config(name: str, vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModelWithProjection" if name == "g" else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "projection_dim": WIDTH,
        "num_attention_heads": 4,
        "num_hidden_layers": _LAYERS[name],
        "hidden_act": "quick_gelu" if name == "l" else "gelu",
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 1,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
