"""Sampling in the test process with ComfyUI's own functions: tiny models, adapters and people, and views into model calls.

The functions need the `pack` fixture to have run, which `tests/nodes/conftest.py` sees to.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden import recipe
from tests.harness.comfy import pack_nodes
from tests.tiny.checkpoints import tiny_unet
from tests.tiny.uniid import TINY_SD15, TINY_SDXL, uniid_state, write_published

KINDS = ("sdxl", "sd15", "sd21")
SITE_COUNT = {"sdxl": 11, "sd15": 7, "sd21": 7}
# UniID names text encoders l and g only, so an adapter for SD2.1 has no text branch.
CONFIGS = {"sdxl": TINY_SDXL, "sd15": TINY_SD15, "sd21": replace(TINY_SD15, text_widths=())}
SEEDS = {"sdxl": 0, "sd15": 0, "sd21": 1}
CONTEXT_WIDTH = {"sdxl": 128, "sd15": 64, "sd21": 64}
POOLED_WIDTH = 64

Conditioning = list[list[Any]]
Replacement = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
Block = tuple[str, int, int]


@functools.cache
def unet(kind: str) -> Any:
    """The tiny MODEL of that kind. Shared by all tests: none of them may be able to change it."""
    return tiny_unet(kind)


@functools.cache
def adapter(kind: str) -> Any:
    """What Load ID Adapter gives for the tiny adapter of that kind, read from the published layout."""
    from ComfyUI_IDAdapter.nodes.adapter import load

    folder = Path(tempfile.mkdtemp(prefix="tiny-adapter-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    adapter_file, text_file = write_published(folder, uniid_state(CONFIGS[kind], SEEDS[kind]))
    return load(adapter_file, text_file if CONFIGS[kind].text_widths else None)


def person(kind: str, seed: int = 1, *, unconditional: bool = True, text: bool = True) -> Any:
    """An identity of random tokens, as unlike the next person's as can be."""
    from ComfyUI_IDAdapter.idadapter_core import Identity

    config = CONFIGS[kind]

    def tokens(name: str, count: int, width: int) -> Tensor:
        return recipe.value(seed, f"person.{name}", (1, count, width))

    text_tokens = {
        encoder: tokens(encoder, config.text_tokens, width)
        for encoder, width in zip("lg", config.text_widths, strict=False)
    }
    return Identity(
        adapter_tokens=tokens("adapter", config.adapter_tokens, config.context_width),
        adapter_tokens_uncond=tokens("uncond", config.adapter_tokens, config.context_width)
        if unconditional
        else None,
        text_tokens=text_tokens if text else {},
        method="uniid",
        adapter=adapter(kind).adapter.digest,
    )


def face_features(seed: int = 0, count: int = 1) -> Any:
    """Random face features with the stage maps UniID reads."""
    from ComfyUI_IDAdapter.idadapter_core import FaceFeatures

    shapes = [(64, 56), (128, 28), (256, 14), (512, 7)]
    return FaceFeatures(
        embedding=recipe.value(seed, "face_embedding", (count, 512)),
        stages=tuple(
            recipe.value(seed, f"face_stage{number}", (count, channels, side, side))
            for number, (channels, side) in enumerate(shapes, start=1)
        ),
    )


def node(node_id: str, *arguments: Any, **inputs: Any) -> Any:
    """Execute one of the pack's nodes as ComfyUI does; its first output."""
    with torch.inference_mode():
        return pack_nodes()[node_id].execute(*arguments, **inputs).result[0]


def apply(
    model: Any,
    kind: str,
    identity: Any,
    weight: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
    mask: Tensor | None = None,
) -> Any:
    """Apply ID Adapter."""
    return node("IDAdapterApply", model, adapter(kind), identity, weight, start, end, mask)


def rescale(model: Any, mode: str = "normalized", scope: str = "ID adapters", **scales: float) -> Any:
    """Normalized Identity Rescaling, every scale 1 unless given."""
    names = ("adapter_early", "adapter_late", "text_early", "text_late")
    inputs = {**dict.fromkeys(names, 1.0), "early_fraction": 0.5, **scales}
    return node("IDAdapterRescale", model, mode=mode, scope=scope, **inputs)


def attach(conditioning: Conditioning, identity: Any, role: str = "positive") -> Conditioning:
    """Attach Identity to Conditioning."""
    attached: Conditioning = node("IDAdapterAttach", conditioning, identity, role)
    return attached


def prompt(kind: str, name: str, length: int = 77, **options: Any) -> Conditioning:
    """A conditioning of random text states that belong to this name."""
    states = recipe.value(0, f"prompt.{name}", (1, length, CONTEXT_WIDTH[kind]))
    if kind == "sdxl":
        options = {"pooled_output": recipe.value(0, f"pooled.{name}", (1, POOLED_WIDTH)), **options}
    return [[states, options]]


def noise(batch: int = 1, height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    """Noise of a latent batch; the first of a batch are those of a smaller batch."""
    return torch.cat(
        [recipe.value(seed, f"noise.{number}", (1, 4, height, width)) for number in range(batch)]
    )


def sample(
    model: Any,
    positive: Conditioning,
    negative: Conditioning,
    *,
    latent_noise: Tensor | None = None,
    steps: int = 2,
    cfg: float = 4.0,
    sampler: str = "euler",
    **options: Any,
) -> Tensor:
    """What KSampler gives, from an empty latent."""
    import comfy.sample

    latent_noise = noise() if latent_noise is None else latent_noise
    with torch.inference_mode():
        result: Tensor = comfy.sample.sample(
            model,
            latent_noise,
            steps,
            cfg,
            sampler,
            "normal",
            positive,
            negative,
            torch.zeros_like(latent_noise),
            disable_pbar=True,
            seed=0,
            **options,
        )
    return result


def draw(model: Any, kind: str, **options: Any) -> Tensor:
    """`sample` with two stock prompts."""
    return sample(model, prompt(kind, "positive"), prompt(kind, "negative"), **options)


def run_guider(guider: Any, latent_noise: Tensor | None = None, steps: int = 2) -> Tensor:
    """What SamplerCustomAdvanced gives for a guider, with Euler on the normal schedule."""
    import comfy.samplers

    latent_noise = noise() if latent_noise is None else latent_noise
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    with torch.inference_mode():
        result: Tensor = guider.sample(
            latent_noise,
            torch.zeros_like(latent_noise),
            comfy.samplers.sampler_object("euler"),
            sigmas,
            disable_pbar=True,
            seed=0,
        )
    return result


def difference(left: Tensor, right: Tensor) -> float:
    """How far two results are apart, relative to the second."""
    return float((left - right).norm() / right.norm())


@dataclass
class SiteCall:
    """What one attention replacement was given and gave."""

    query: Tensor
    key: Tensor
    value: Tensor
    heads: int
    out: Tensor

    def attention(self, keys: Tensor, values: Tensor) -> Tensor:
        """Plain attention of the recorded queries over (rows or 1, T, C), written without any of the pack's code."""
        rows, _, channels = self.query.shape
        width = channels // self.heads

        def heads(x: Tensor) -> Tensor:
            return x.expand(rows, -1, -1).unflatten(2, (self.heads, width)).transpose(1, 2).double()

        scores = heads(self.query) @ heads(keys).transpose(2, 3) / width**0.5
        return (scores.softmax(-1) @ heads(values)).transpose(1, 2).flatten(2)

    @property
    def text(self) -> Tensor:
        """The plain text cross-attention of these rows."""
        return self.attention(self.key, self.value)


@dataclass
class ModelCall:
    """One call of the UNet."""

    sigma: float
    context: Tensor  # (rows, tokens, width)
    latent: Tensor
    options: dict[str, Any]  # transformer options
    sites: dict[Block, SiteCall] = field(default_factory=dict)

    @property
    def own(self) -> Any:
        """The pack's own state of this call, None where it left the call alone."""
        from ComfyUI_IDAdapter.nodes.host.call import CALL

        return self.options.get(CALL)

    def step(self) -> int:
        """The step of the run that the pack takes this call for."""
        step: int = self.own.run.step(self.sigma)
        return step


def around_sites(model: Any, wrap: Callable[[ModelCall, Block, Replacement], Replacement]) -> Any:
    """A clone whose bound attn2 replacements go through `wrap(call, block, replacement)` at each call of the UNet."""
    from comfy.patcher_extension import WrappersMP

    def wrapper(
        executor: Any,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Any,
        control: Any,
        transformer_options: dict[str, Any],
        **kwargs: Any,
    ) -> Any:
        call = ModelCall(
            float(transformer_options["sigmas"].max()), context.clone(), x.clone(), transformer_options
        )
        replaced = transformer_options.get("patches_replace", {})
        wrapped = {
            block: wrap(call, block, replacement) for block, replacement in replaced.get("attn2", {}).items()
        }
        options = {**transformer_options, "patches_replace": {**replaced, "attn2": wrapped}}
        return executor(x, timesteps, context, y, control, options, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    return clone


def record(model: Any) -> tuple[Any, list[ModelCall]]:
    """A clone of the MODEL, and the list that its calls will be appended to."""
    from comfy.patcher_extension import WrappersMP

    calls: list[ModelCall] = []

    def note(executor: Any, *args: Any, **kwargs: Any) -> Any:
        # Runs for calls without any replacement, too; `wrap` then fills in the sites.
        options = args[5]
        calls.append(ModelCall(float(options["sigmas"].max()), args[2].clone(), args[0].clone(), options))
        return executor(*args, **kwargs)

    def wrap(_: ModelCall, block: Block, replacement: Replacement) -> Replacement:
        def recorded(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            out = replacement(q, k, v, extra)
            reported = (*extra["block"], extra["block_index"])
            calls[-1].sites[reported] = SiteCall(
                q.clone(), k.clone(), v.clone(), extra["n_heads"], out.clone()
            )
            return out

        return recorded

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "record", note)
    return around_sites(clone, wrap), calls


def same_states(row: Tensor, conditioning: Conditioning) -> bool:
    """Whether a row's context is that of a conditioning."""
    states = conditioning[0][0][0]
    return row.shape == states.shape and torch.equal(row, states)


def identity_part(kind: str, call: ModelCall, block: Block, tokens: Tensor) -> Tensor:
    """What identity tokens (1, T, D) add at a site for each row of a call, before any weight."""
    from ComfyUI_IDAdapter.idadapter_core.sites import attention_sites

    sites = attention_sites(unet(kind).model_state_dict())
    index = next(site.index for site in sites if site.comfy == block)
    projection = adapter(kind).adapter.layers.adapter_modules[str(index)]
    keys = F.linear(tokens, projection.to_k_ip.weight)
    values = F.linear(tokens, projection.to_v_ip.weight)
    return call.sites[block].attention(keys, values)


def assert_rows(
    kind: str, call: ModelCall, expected: list[tuple[Conditioning, Tensor | None]], weight: float = 1.0
) -> list[int]:
    """Check for every site that each row got exactly the identity tokens that belong to its conditioning.

    `expected` pairs a conditioning with its tokens, None where there are none. Returns for each row which pair it was.
    """
    found = [
        next(number for number, (states, _) in enumerate(expected) if same_states(row, states))
        for row in call.context
    ]
    assert len(call.sites) == SITE_COUNT[kind]
    for block, site in call.sites.items():
        want = site.text
        for row, number in enumerate(found):
            tokens = expected[number][1]
            if tokens is not None:
                want[row] += weight * identity_part(kind, call, block, tokens)[row]
        torch.testing.assert_close(site.out.double(), want, atol=2e-5, rtol=1e-4)
    return found


def left_half(height: int = 64, width: int = 64) -> Tensor:
    """A mask (1, height, width) of the left half."""
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1
    return mask
