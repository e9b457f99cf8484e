"""A training step at real size: IDAdapter on a frozen base, with and without L_id."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import networks as real
from benchmarks.on_gpu.machine import GIGABYTE, device, synchronise
from benchmarks.on_gpu.parts import Report, Sizes
from benchmarks.on_gpu.sampling import Peak
from idadapter_core.adapter import build_adapter
from idadapter_core.config import parse_config
from idadapter_core.faces.iresnet import STAGE_WIDTHS, IResNet
from idadapter_core.stable_diffusion.base import Base
from idadapter_core.stable_diffusion.networks import Networks
from idadapter_core.stable_diffusion.noise import scaled_linear
from idadapter_core.stable_diffusion.text import TextEncoders
from idadapter_core.stable_diffusion.vae import SCALING, Autoencoder
from idadapter_core.training.adapters import AdapterRequirements, fresh_config, trainable
from idadapter_core.training.bundle import Bundle
from idadapter_core.training.config import RunConfig
from idadapter_core.training.samples import Batch
from tests.harness.comfy import comfyui_path
from tests.tiny.bases import TINY_KL, _text_config
from tests.tiny.diffusers_unet import CONFIGS

METHOD = "idadapter"
_STEPS = 5  # with L_id, after one warm-up step, and as many without
_VISION = {True: (16, 9), False: (1024, 256)}  # width and patches of CLIP vision; key: tiny
# In an image of side 1: eyes, nose and mouth corners at CelebA-HQ's positions.
_FACE = ((0.37, 0.46), (0.63, 0.46), (0.5, 0.61), (0.39, 0.73), (0.61, 0.73))


@dataclass(frozen=True)
class _Case:
    family: str
    pixels: int
    sizes: Sizes

    @property
    def name(self) -> str:
        return f"{self.family} at {self.pixels} px, batch {self.sizes.batch}"


def training(sizes: Sizes, report: Report) -> None:
    for family, pixels in sizes.training:
        _measure(_Case(family, pixels, sizes), report)
        synchronise()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _measure(case: _Case, report: Report) -> None:
    config = _config(case)
    base = _base(case)
    face = IResNet((1, 1, 1, 1)) if case.sizes.tiny else real.recognizer(with_stages=False)
    networks = Networks(real.filled(face, device()).requires_grad_(False))
    adapter = _adapter(case, base)
    parameters = list(trainable(adapter).values())
    bundle = Bundle(base, adapter, networks, config).to(device())
    base.unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(bundle.parameters(), lr=config.train.learning_rate, fused=True)
    batches = _batches(case)

    def run(batch: Batch) -> tuple[float, float]:
        """Seconds of a step, and the share of samples that count in L_id."""
        synchronise()
        began = time.perf_counter()
        losses = bundle(batch)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronise()
        return time.perf_counter() - began, float(losses["counts"].float().mean())

    # Lowest and highest noise levels, so that all kernels are selected.
    for batch in (batches[0], batches[-1]):
        run(batch)
    with Peak() as peak:
        with_term = [run(batch) for batch in batches]
    bundle._config = replace(config, loss=replace(config.loss, identity=0.0))
    without = [run(batch)[0] for batch in batches]
    step, bare = (statistics.mean(values) for values in ([seconds for seconds, _ in with_term], without))
    report(
        {
            "run": case.name,
            "trained, M": sum(parameter.numel() for parameter in parameters) / 1e6,
            "ms per step": 1e3 * step,
            "without L_id, ms": 1e3 * bare,
            "share of L_id, %": 100 * (1 - bare / step),
            "samples that count, %": 100 * statistics.mean(share for _, share in with_term),
            "samples/s": case.sizes.batch / step,
            "peak allocated, GB": peak.allocated / GIGABYTE,
        }
    )


def _config(case: _Case) -> RunConfig:
    train: dict[str, Any] = {"gradient_checkpointing": True, "global_batch_size": case.sizes.batch}
    if case.sizes.half:
        train["mixed_precision"] = "bf16"
    return parse_config(
        RunConfig, {"adapter": {"method": "idadapter"}, "data": {"resolution": case.pixels}, "train": train}
    )


def _base(case: _Case) -> Base:
    """A frozen base model with random weights: UNet and text encoders in the run's precision, the VAE in fp32."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    narrow = torch.bfloat16 if case.sizes.half else torch.float32
    if case.sizes.tiny:
        unet, kl = UNet2DConditionModel(**CONFIGS[case.family]), AutoencoderKL.from_config(TINY_KL)
    else:
        unet, kl = real.unet(case.family), real.autoencoder()
    vae = Autoencoder(real.filled(kl, "cpu"), 1 / SCALING[case.family]).to(device())
    frozen = real.filled(unet, device(), narrow).requires_grad_(False)
    return Base(case.family, frozen, vae, _text(case, narrow), scaled_linear("epsilon"), "random")


def _text(case: _Case, dtype: torch.dtype) -> TextEncoders:
    """Text encoders with the tokenizer that ComfyUI ships."""
    import transformers

    path = comfyui_path()
    assert path is not None
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
        str(path / "comfy" / "sd1_tokenizer"), local_files_only=True
    )
    names = real.ENCODERS[case.family]
    if case.sizes.tiny:
        kinds = {"g": transformers.CLIPTextModelWithProjection}
        encoders = {
            name: kinds.get(name, transformers.CLIPTextModel)(
                transformers.CLIPTextConfig(**_text_config(name, len(tokenizer)))
            )
            for name in names
        }
    else:
        encoders = dict(real.text_encoders(case.family).models.items())
    filled = {name: real.filled(encoder, device(), dtype) for name, encoder in encoders.items()}
    return TextEncoders(case.family, filled, dict.fromkeys(names, tokenizer)).requires_grad_(False)


def _adapter(case: _Case, base: Base) -> Any:
    """An adapter with open gates: closed ones would give most parameters no gradient."""
    settings = {"mixer_heads": 4} if case.sizes.tiny else {}
    wanted = AdapterRequirements(
        METHOD, base.text.widths, _VISION[case.sizes.tiny], "", STAGE_WIDTHS, "adapter", settings
    )
    config = fresh_config(base.unet, wanted)
    state = real.adapter_state(METHOD, config, torch.float32, device())
    return build_adapter(METHOD, config, state, "random")


def _batches(case: _Case) -> Sequence[Batch]:
    """Batches with timesteps spread over all noise levels, in shuffled order; one sample in ten has no identity."""
    count = _STEPS * case.sizes.batch
    timesteps = (torch.arange(count) * 1000 // count)[
        torch.randperm(count, generator=torch.Generator().manual_seed(0))
    ]
    return [
        _batch(case, timesteps[first : first + case.sizes.batch], first)
        for first in range(0, count, case.sizes.batch)
    ]


def _batch(case: _Case, timesteps: torch.Tensor, first: int) -> Batch:
    size, side, (width, patches) = len(timesteps), case.pixels // real.FACTOR, _VISION[case.sizes.tiny]
    generator = torch.Generator().manual_seed(first)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(size, *shape, generator=generator)

    names = [f"drawn {first + number}" for number in range(size)]
    batch = Batch(
        rows=tuple(range(first, first + size)),
        sources=tuple(names),
        prompts=("a photo of a woman in front of a wall",) * size,
        class_nouns=("woman",) * size,
        identity=torch.tensor([(first + number) % 10 != 0 for number in range(size)]),
        timesteps=timesteps,
        noise=drawn(4, side, side),
        posterior=drawn(4, side, side),
        landmarks=case.pixels * torch.tensor(_FACE).expand(size, -1, -1),
        sizes=torch.full((size, 6), float(case.pixels)),
        moments=torch.cat([drawn(4, side, side), torch.full((size, 4, side, side), 0.1)], dim=1),
        embedding=drawn(5, 512),
        patch_tokens=drawn(4, patches, width),
        class_embedding=drawn(4, width),
        denoising=torch.zeros(size, 2),
    )
    return batch.to(device())
