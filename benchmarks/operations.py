"""Operations of a training step at real size: counted by PyTorch while the real networks, adapter included, run forward and backward
on the meta device, which computes shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import networks
from benchmarks.networks import FACTOR
from idadapter_core.adapter import Adapter
from idadapter_core.faces.align import TEMPLATE, TEMPLATE_SIZE
from idadapter_core.faces.iresnet import EMBEDDING_WIDTH, STAGE_WIDTHS
from idadapter_core.methods import METHODS, idadapter
from idadapter_core.methods.uniid.config import ENCODERS, FUSED_SIDE
from idadapter_core.methods.uniid.encoder import STAGE_SIDES
from idadapter_core.stable_diffusion.inject import inject
from idadapter_core.stable_diffusion.noise import scaled_linear
from idadapter_core.stable_diffusion.text import LENGTH
from idadapter_core.training.adapters import Wanted, fresh_config
from idadapter_core.training.bundle import BORDER
from idadapter_core.training.config import LossConfig, TrainConfig

EYES = 0.25  # how far apart they are in CelebA-HQ and FFHQ, as a share of the picture's side
REFERENCES = 4


@dataclass(frozen=True)
class Recipe:
    """A published run."""

    name: str
    method: str
    family: str
    branch: str = "adapter"
    resolution: int = 512
    batch: int = 16  # samples of a GPU in a step
    passes: float = 16  # through the photos

    @property
    def mixes(self) -> bool:
        return self.method == idadapter.METHOD.name


def operations(function: Callable[[], object]) -> int:
    """Of a call: two for each multiplication with addition."""
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def meta(*shape: int, dtype: torch.dtype = torch.float32, learned: bool = False) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype, requires_grad=learned)


@cache
def adapter(recipe: Recipe) -> Adapter:
    settings = {"references": REFERENCES} if recipe.mixes else {}
    widths = networks.text_encoders(recipe.family).widths
    wanted = Wanted(recipe.method, widths, (1024, 256), "", recipe.branch, settings)
    config, parts = fresh_config(networks.unet(recipe.family), wanted), METHODS[recipe.method]
    with torch.device("meta"):
        layers = parts.layers(config, nn)
        mechanisms = parts.mechanisms(config, layers)
        return Adapter("", "", recipe.method, config, parts.encoder(config), layers, mechanisms)


@cache
def step_operations(recipe: Recipe) -> tuple[int, int]:
    """Of one sample with its identity, with gradient checkpointing, without L_id: all, and those of the backward pass."""
    unet, trained = networks.unet(recipe.family).train(), adapter(recipe)
    unet.enable_gradient_checkpointing()
    injected = inject(unet, trained) if trained.config.has_adapter_branch else None
    with FlopCounterMode(display=False) as counter:
        tokens, states, pooled = (mixed if recipe.mixes else read)(recipe, trained)
        if injected is not None:
            injected.set_identity(tokens)
        latents = meta(1, 4, recipe.resolution // FACTOR, recipe.resolution // FACTOR)
        added = {"text_embeds": pooled, "time_ids": meta(1, 6)} if recipe.family == "sdxl" else None
        predicted = unet(latents, meta(1, dtype=torch.long), states, added_cond_kwargs=added).sample
        forward = counter.get_total_flops()
        predicted.sum().backward()
    if injected is not None:
        injected.eject()
    return counter.get_total_flops(), counter.get_total_flops() - forward


Conditioning = tuple[Tensor | None, Tensor, Tensor | None]  # tokens for the UNet, states and pooled text


def mixed(recipe: Recipe, trained: Adapter) -> Conditioning:
    """IDAdapter's, through the text encoders."""
    config, found, pooled = trained.config, [], None
    patches = meta(1, REFERENCES * config.vision_patches, config.vision_width)
    tokens, word = trained.encoder(patches, meta(1, EMBEDDING_WIDTH), meta(1, config.vision_width))
    for name in networks.ENCODERS[recipe.family]:
        rows = word[name][:, :1].expand(-1, LENGTH, -1)
        given = meta(1, LENGTH, dtype=torch.long), meta(1, LENGTH, dtype=torch.bool)
        states, pooled = networks.text_encoders(recipe.family)._run(name, *given, rows)
        found.append(states)
    return tokens, torch.cat(found, dim=-1), pooled


def read(recipe: Recipe, trained: Adapter) -> Conditioning:
    """UniID's; its few prompts are encoded once in a run and not counted."""
    sides = (FUSED_SIDE,) * 3 + (STAGE_SIDES[3],)
    stages = tuple(meta(1, width, size, size) for width, size in zip(STAGE_WIDTHS, sides, strict=True))
    text, tokens = trained.encoder(meta(1, EMBEDDING_WIDTH), stages)
    states = meta(1, LENGTH, networks.unet(recipe.family).config.cross_attention_dim)
    if text:
        inserted = torch.cat([text[name] for name in ENCODERS if name in text], dim=-1)
        states = torch.cat([inserted, states[:, inserted.shape[1] :]], dim=1)
    return tokens, states, meta(1, 1280)


@cache
def identity_operations(recipe: Recipe) -> float:
    """Of L_id for a sample on average: decoding around the face and the face network, where it counts."""
    if not recipe.mixes:
        return 0.0
    crop = TEMPLATE_SIZE / float(TEMPLATE[1, 0] - TEMPLATE[0, 0]) * EYES * recipe.resolution / FACTOR
    side = min(math.floor(crop) + 1 + 2 * BORDER, recipe.resolution // FACTOR)
    latents, face = (
        meta(1, *size, learned=True) for size in ((4, side, side), (3, TEMPLATE_SIZE, TEMPLATE_SIZE))
    )
    decode = operations(lambda: networks.autoencoder().decode(latents).sample.sum().backward())
    look = operations(lambda: networks.recognizer(recipe.method)(face)[0].sum().backward())
    counts = float((scaled_linear("epsilon").alphas_cumprod >= LossConfig().gate_alpha).float().mean())
    return counts * (1 - TrainConfig().drop_identity - TrainConfig().drop_both) * (decode + look)


@cache
@torch.no_grad()
def cache_operations(recipe: Recipe) -> tuple[int, int]:
    """For a photo's entries: of latents (IDAdapter's mirrored as well) and face network, and of CLIP vision."""
    picture, face, head = (meta(1, 3, side, side) for side in (recipe.resolution, TEMPLATE_SIZE, 224))
    encode = (2 if recipe.mixes else 1) * operations(lambda: networks.autoencoder().encode(picture))
    look = operations(lambda: networks.recognizer(recipe.method)(face))
    see = operations(lambda: networks.vision()(pixel_values=head)) if recipe.mixes else 0
    return encode + look, see
