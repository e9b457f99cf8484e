"""Count the operations of a training step at real size.

PyTorch counts them while the real networks, adapter included, run forward and backward on the meta device, which only tracks shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import networks
from benchmarks.networks import FACTOR
from idadapter_core.adapter import Adapter
from idadapter_core.faces.align import TEMPLATE, TEMPLATE_SIZE
from idadapter_core.faces.iresnet import EMBEDDING_WIDTH, STAGE_WIDTHS
from idadapter_core.mechanisms import Mechanisms
from idadapter_core.methods import METHODS, Method
from idadapter_core.methods.method import BatchFeatures, Needs
from idadapter_core.stable_diffusion.inject import inject
from idadapter_core.stable_diffusion.inject.text import insert_states
from idadapter_core.stable_diffusion.noise import scaled_linear
from idadapter_core.stable_diffusion.text import LENGTH, Conditioning
from idadapter_core.training.adapters import AdapterRequirements, fresh_config
from idadapter_core.training.bundle import BORDER
from idadapter_core.training.config import LossConfig, TrainConfig

EYES = 0.25  # distance between the eyes in CelebA-HQ and FFHQ, as a share of the image's side
REFERENCES = 4
DEEPEST_SIDE = 7  # of the face network's last stage


@dataclass(frozen=True)
class Recipe:
    """A published training run."""

    name: str
    method: str
    family: str
    branch: str = "adapter"
    resolution: int = 512
    batch: int = 16  # samples per GPU and step
    passes: float = 16  # over the photos

    @property
    def parts(self) -> Method:
        return METHODS[self.method]

    @property
    def needs(self) -> Needs:
        return self.parts.needs(adapter(self).config)

    def default(self, section: str, name: str) -> Any:
        """The method's own default, or None if it uses the trainer's."""
        assert self.parts.recipe is not None
        return self.parts.recipe.defaults.get(section, {}).get(name)

    @property
    def looks_at_faces(self) -> bool:
        """Whether the loss includes L_id."""
        return self.default("loss", "identity") != 0


def operations(function: Callable[[], object]) -> int:
    """Count the operations of a call; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def meta(*shape: int, dtype: torch.dtype = torch.float32, learned: bool = False) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype, requires_grad=learned)


@cache
def adapter(recipe: Recipe) -> Adapter:
    is_one_photo = recipe.parts.recipe is None or recipe.parts.recipe.known_by_target
    settings = {} if is_one_photo else {"references": REFERENCES}
    widths = networks.text_encoders(recipe.family).widths
    wanted = AdapterRequirements(
        recipe.method, widths, (1024, 256), "", STAGE_WIDTHS, recipe.branch, settings
    )
    config = fresh_config(networks.unet(recipe.family), wanted)
    with torch.device("meta"):
        encoder, layers = recipe.parts.encoder(config), recipe.parts.layers(config, nn)
    return Adapter("", "", recipe.method, config, encoder, layers, Mechanisms())


@cache
def step_operations(recipe: Recipe) -> tuple[int, int]:
    """Operations of one sample with identity, gradient checkpointing and without L_id: total, and in the backward pass."""
    unet, trained = networks.unet(recipe.family).train(), adapter(recipe)
    unet.enable_gradient_checkpointing()
    injected = inject(unet, trained) if trained.config.has_adapter_branch else None
    with FlopCounterMode(display=False) as counter:
        tokens, text = conditioning(recipe, trained)
        if injected is not None:
            injected.set_identity(tokens)
        latents = meta(1, 4, recipe.resolution // FACTOR, recipe.resolution // FACTOR)
        added = {"text_embeds": text.pooled, "time_ids": meta(1, 6)} if recipe.family == "sdxl" else None
        predicted = unet(latents, meta(1, dtype=torch.long), text.states, added_cond_kwargs=added).sample
        forward = counter.get_total_flops()
        predicted.sum().backward()
    if injected is not None:
        injected.eject()
    unet.disable_gradient_checkpointing()
    return counter.get_total_flops(), counter.get_total_flops() - forward


def conditioning(recipe: Recipe, trained: Adapter) -> tuple[Tensor | None, Conditioning]:
    """Tokens for the UNet, and the text conditioning. Prompts without identity words are encoded once per run and not counted."""
    assert recipe.parts.recipe is not None
    encoded = recipe.parts.recipe.encode(trained.encoder, trained.config, features(recipe))
    if recipe.parts.text == "word":
        found, pooled = [], None
        for name in networks.ENCODERS[recipe.family]:
            rows = encoded.text[name][:, :1].expand(-1, LENGTH, -1)
            given = meta(1, LENGTH, dtype=torch.long), meta(1, LENGTH, dtype=torch.bool)
            states, pooled = networks.text_encoders(recipe.family)._run(name, *given, rows)
            found.append(states)
        return encoded.tokens, Conditioning(torch.cat(found, dim=-1), pooled)
    width = networks.unet(recipe.family).config.cross_attention_dim
    plain = Conditioning(meta(1, LENGTH, width), meta(1, 1280))
    return encoded.tokens, insert_states(plain, encoded.text) if encoded.text else plain


def features(recipe: Recipe) -> BatchFeatures:
    """Features of one sample: references and target, or the target alone."""
    needs = recipe.needs
    count = REFERENCES if needs.vision else 0
    sides = (needs.shallow_side,) * 3 + (DEEPEST_SIDE,)
    stages = tuple(meta(1, width, side, side) for width, side in zip(STAGE_WIDTHS, sides, strict=True))
    width, patches = needs.vision or (0, 0)
    return BatchFeatures(
        meta(1, count + 1, EMBEDDING_WIDTH),
        stages if needs.stages else (),
        meta(1, count, patches, width) if needs.vision else None,
        meta(1, count, width) if needs.vision else None,
        torch.tensor([True]),
    )


@cache
def identity_operations(recipe: Recipe) -> float:
    """Average operations of L_id per sample: decoding around the face and the face network, where L_id counts."""
    if not recipe.looks_at_faces:
        return 0.0
    crop = TEMPLATE_SIZE / float(TEMPLATE[1, 0] - TEMPLATE[0, 0]) * EYES * recipe.resolution / FACTOR
    side = min(math.floor(crop) + 1 + 2 * BORDER, recipe.resolution // FACTOR)
    latents, face = (
        meta(1, *size, learned=True) for size in ((4, side, side), (3, TEMPLATE_SIZE, TEMPLATE_SIZE))
    )
    decode = operations(lambda: networks.autoencoder().decode(latents).sample.sum().backward())
    look = operations(lambda: networks.recognizer(recipe.needs.stages)(face)[0].sum().backward())
    counts = float((scaled_linear("epsilon").alphas_cumprod >= LossConfig().gate_alpha).float().mean())
    return counts * (1 - TrainConfig().drop_identity - TrainConfig().drop_both) * (decode + look)


@cache
@torch.no_grad()
def cache_operations(recipe: Recipe) -> tuple[int, int]:
    """Operations per photo to build the cache: latents (for IDAdapter also mirrored) with face network, and CLIP vision."""
    picture, face, head = (meta(1, 3, side, side) for side in (recipe.resolution, TEMPLATE_SIZE, 224))
    encode = (1 if recipe.default("data", "flip") is False else 2) * operations(
        lambda: networks.autoencoder().encode(picture)
    )
    look = operations(lambda: networks.recognizer(recipe.needs.stages)(face))
    see = operations(lambda: networks.vision()(pixel_values=head)) if recipe.needs.vision else 0
    return encode + look, see
