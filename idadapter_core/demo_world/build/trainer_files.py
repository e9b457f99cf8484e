"""Writes the demo world as input of the trainer: a folder of photos with captions, and the base model as a diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ...extra import require
from ...files import read_tensors, replacing
from ...stable_diffusion.pretrained import read_json
from ...stable_diffusion.vae import tiny_network
from .. import Person, caption
from ..base import TABLE, BaseModel, text_config, whole_table
from ..words import BEGIN, END, VOCABULARY
from .pictures import PictureSet

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
}


def write_photos(pictures: PictureSet, folder: Path) -> None:
    """Write each photo as `PERSON/NN.png` with its caption in `PERSON/NN.txt`. Files that exist are kept.

    Pictures of other styles are left out: a sketch does not show who somebody is as a photo does, and users bring photos.
    """
    counts: dict[int, int] = {}
    people: dict[int, Person] = {}
    for pixels, fact in zip(pictures.pixels, pictures.facts, strict=True):
        number = counts[fact.person] = counts.get(fact.person, -1) + 1
        if fact.factors.style != "photo":
            continue
        home = folder / f"{fact.person:06d}"
        home.mkdir(parents=True, exist_ok=True)
        photo = home / f"{number:02d}.png"
        if photo.is_file():
            continue
        person = people.setdefault(fact.person, Person.sample(fact.person))
        with replacing(home / f"{number:02d}.txt") as file:
            file.write_text(caption(person, fact.factors) + "\n", "utf-8", newline="\n")
        with replacing(photo) as file, file.open("wb") as stream:
            Image.fromarray(pixels).save(stream, "PNG")


def write_base_folder(base: BaseModel, autoencoder: Path, folder: Path) -> None:
    """Write a diffusers folder without tokenizer: the text encoder has CLIP's whole vocabulary, so CLIP's own tokenizer fits.

    Args:
        autoencoder: the file of `save_autoencoder`.
    """
    base.unet.save_pretrained(str(folder / "unet"))
    _whole_text_encoder(base.text).save_pretrained(str(folder / "text_encoder"))
    vae = tiny_network(read_tensors(autoencoder)[0], autoencoder.name)
    vae.save_pretrained(str(folder / "vae"))
    _forget_unknown_settings(folder / "vae" / "config.json")
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    with replacing(folder / "scheduler" / "scheduler_config.json") as file:
        file.write_text(json.dumps(SCHEDULER, indent=1) + "\n", "utf-8", newline="\n")


def _forget_unknown_settings(config: Path) -> None:
    """Remove a setting that diffusers writes and warns about when it reads it."""
    settings = {name: value for name, value in read_json(config).items() if name != "block_out_channels"}
    with replacing(config) as file:
        file.write_text(json.dumps(settings, indent=1) + "\n", "utf-8", newline="\n")


def _whole_text_encoder(small: nn.Module) -> Any:
    transformers = require("transformers")
    config = transformers.CLIPTextConfig(
        **text_config(VOCABULARY) | {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": END}
    )
    model = transformers.CLIPTextModel(config)
    state = {
        name: whole_table(value) if name.endswith(TABLE) else value
        for name, value in small.state_dict().items()
    }
    with torch.no_grad():
        model.load_state_dict(state)
    return model
