"""Sampling with tiny IDAdapters: what every gated adapter is given and gives, and Eq. 7 written out without the pack's code.

Beside `tests/nodes/sampling.py`, which has the models, the prompts and the samplers.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from idadapter_core.adapter import build_adapter, save_adapter
from idadapter_core.methods.idadapter import METHOD
from tests.nodes.sampling import Block, Conditioning, ModelCall, node, same_states, unet
from tests.tiny.idadapter import (
    CONFIGS,
    FILE_NAMES,
    idadapter_state,
    vision_features,
    write_tiny_idadapters,
)

KINDS = ("sdxl", "sd15", "sd21")
REFERENCES = 4


@dataclass(frozen=True)
class Made:
    """Which tiny IDAdapter: the model it is for, and what its weights are like (see `idadapter_state`)."""

    kind: str
    seed: int = 0
    gate: float = 0.5
    delta: float = 0.3
    unconditional: str = "skip"
    closed: tuple[str, ...] = ()  # ends of gates' names that are exactly 0
    dtype: torch.dtype = torch.float32

    @property
    def config(self) -> Any:
        return replace(CONFIGS[self.kind], unconditional=self.unconditional)


@functools.cache
def weights(made: Made) -> dict[str, Tensor]:
    """All weights of an adapter, as its file holds them."""
    state = idadapter_state(made.config, made.seed, gate=made.gate, delta=made.delta)
    for key in state:
        if key.endswith(made.closed):
            state[key] = torch.zeros_like(state[key])
    return {key: tensor.to(made.dtype) for key, tensor in state.items()}


def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tiny-idadapter-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def adapter_file(made: Made) -> Path:
    """The file of an adapter in the project's own format."""
    if made == Made(made.kind):
        write_tiny_idadapters(folder := _folder())
        return folder / "idadapter" / FILE_NAMES[made.kind]
    file = _folder() / "adapter.safetensors"
    save_adapter(build_adapter(METHOD.name, made.config, weights(made), "tiny"), file)
    return file


@functools.cache
def adapter(made: Made) -> Any:
    """What Load ID Adapter gives for the file of an adapter."""
    from ComfyUI_IDAdapter.nodes.adapter import load

    return load(adapter_file(made), None)


@functools.cache
def person(made: Made, seed: int = 1, photos: int = REFERENCES) -> Any:
    """An identity that the adapter made of random features; fewer photos than references weigh more each."""
    from ComfyUI_IDAdapter.idadapter_core import Mix

    return adapter(made).encode(vision_features(seed, photos), Mix())


def apply(
    model: Any,
    made: Made,
    identity: Any,
    weight: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
    mask: Tensor | None = None,
) -> Any:
    """Apply ID Adapter."""
    return node("IDAdapterApply", model, adapter(made), identity, weight, start, end, mask)


@dataclass
class GateIO:
    """The image tokens (rows, N, C) that the gates of a site were given and gave."""

    before: Tensor
    after: Tensor
    size: tuple[int, int]  # height and width of the image tokens
    self_attention: Tensor  # (rows, N, C), what self-attention had just added


@dataclass
class GatedCall(ModelCall):
    """One call of the UNet, with each time that the gates of a site ran, in that order."""

    gates: list[tuple[Block, GateIO]] = field(default_factory=list)

    @property
    def by_block(self) -> dict[Block, GateIO]:
        return dict(self.gates)


def record_gates(model: Any) -> tuple[Any, list[GatedCall]]:
    """A clone of the MODEL, and the list that its calls will be appended to."""
    from comfy.patcher_extension import WrappersMP
    from ComfyUI_IDAdapter.nodes.host.gated import GatePatch

    calls: list[GatedCall] = []

    def watched(patch: Any) -> Any:
        if not isinstance(patch, GatePatch):
            return patch

        def recorded(x: Tensor, extra: dict[str, Any]) -> Tensor:
            before = x.clone()
            out = patch(x, extra)
            size = (int(extra["activations_shape"][-2]), int(extra["activations_shape"][-1]))
            block = (*extra["block"], extra["block_index"])
            calls[-1].gates.append((block, GateIO(before, out.clone(), size, extra["test_self_attention"])))
            return out

        return recorded

    def remember(n: Tensor, extra: dict[str, Any]) -> Tensor:
        extra["test_self_attention"] = n.clone()
        return n

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        x, _, context, _, _, options = args
        calls.append(GatedCall(float(options["sigmas"].max()), context.clone(), x.clone(), options))
        patches = {name: list(some) for name, some in options.get("patches", {}).items()}
        patches["middle_patch"] = [watched(patch) for patch in patches.get("middle_patch", ())]
        patches["attn1_output_patch"] = [*patches.get("attn1_output_patch", ()), remember]
        return executor(*args[:5], {**options, "patches": patches}, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "record gates", wrapper)
    return clone, calls


@dataclass(frozen=True)
class Present:
    """One identity in one row: its tokens (1, T, D), their bias (1, T) and its strength, a number or (N, 1)."""

    tokens: Tensor
    bias: Tensor | None = None
    strength: float | Tensor = 1.0


ByRow = Callable[[int, tuple[int, int]], Sequence[Present]]


def positive(identity: Any, strength: float | Tensor = 1.0) -> Present:
    """An identity where a positive prompt acts."""
    return Present(identity.adapter_tokens, identity.adapter_bias, strength)


def sites(kind: str) -> dict[Block, int]:
    """The number in files of each site, by its address in ComfyUI."""
    from ComfyUI_IDAdapter.idadapter_core.sites import attention_sites

    return {site.comfy: site.index for site in attention_sites(unet(kind).model_state_dict())}


def equation_7(made: Made, block: Block, y: Tensor, people: Sequence[Present]) -> Tensor:
    """What the gated adapter of a site makes of the image tokens (N, C) of one row, in fp64.

    Each identity: y + beta * tanh(gamma) * S([y, E_r]), S over all tokens of both, of which those of y are kept; then the
    gated feed-forward with the sum of the betas.
    """
    number = sites(made.kind)[block]
    heads = made.config.site_heads[(number - 1) // 2]
    head = f"layers.gates.{number}."
    state = {key.removeprefix(head): t.double() for key, t in weights(made).items() if key.startswith(head)}
    y = y.double()
    length, channels = y.shape

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (channels,), state[f"{name}.weight"], state[f"{name}.bias"])

    x = y
    for present in people:
        tokens = F.linear(present.tokens[0].double(), state["linear.weight"], state["linear.bias"])
        together = norm("norm1", torch.cat([y, tokens]))
        query, keys, values = (
            F.linear(together, state["to_qkv.weight"]).view(-1, 3, heads, channels // heads).unbind(1)
        )
        logits = torch.einsum("ihc,jhc->hij", query, keys) / (channels // heads) ** 0.5
        if present.bias is not None:
            logits[..., length:] += present.bias[0].double()
        attended = torch.einsum("hij,jhc->ihc", logits.softmax(-1), values).flatten(1)
        out = F.linear(attended, state["to_out.weight"], state["to_out.bias"])[:length]
        x = x + present.strength * state["gate_attention"].tanh() * out
    value, gate = F.linear(norm("norm2", x), state["ff_in.weight"], state["ff_in.bias"]).chunk(2, dim=-1)
    fed = F.linear(value * F.gelu(gate), state["ff_out.weight"], state["ff_out.bias"])
    total = sum((present.strength for present in people), start=0.0)
    return x + total * state["gate_feed_forward"].tanh() * fed


def assert_gates(
    made: Made,
    call: GatedCall,
    expected: Sequence[tuple[Conditioning, Sequence[Present] | ByRow]],
    closed: Sequence[int] = (),
) -> list[int]:
    """Check at every site that each row got exactly the identities that belong to its conditioning, and others nothing.

    `expected` pairs a conditioning with the identities of its rows, where they differ as a function of the row and the size of
    the site. Sites whose number is in `closed` have closed gates. Returns for each row which pair it was.
    """
    found = [
        next(number for number, (states, _) in enumerate(expected) if same_states(row, states))
        for row in call.context
    ]
    assert [block for block, _ in call.gates] == list(dict(call.gates)), "a site ran twice in one model call"
    assert call.by_block.keys() == sites(made.kind).keys()
    for block, site in call.gates:
        for row, number in enumerate(found):
            given = expected[number][1]
            people = given(row, site.size) if callable(given) else given
            if not people or sites(made.kind)[block] in closed:
                assert torch.equal(site.after[row], site.before[row])
                continue
            want = equation_7(made, block, site.before[row], people)
            assert (want - site.before[row]).norm() > 1e-3 * want.norm()
            torch.testing.assert_close(site.after[row].double(), want, atol=3e-5, rtol=1e-4)
    return found


def at_work(model: Any) -> dict[str, Tensor]:
    """The K and V weights of the MODEL's cross-attention as ComfyUI patches them in, by key."""
    import comfy.model_management as memory

    with torch.inference_mode():
        memory.load_models_gpu([model])
        return key_value_weights(model)


def key_value_weights(model: Any) -> dict[str, Tensor]:
    """Copies of the K and V weights of the MODEL's cross-attention as they are now, by key."""
    return {
        key: tensor.clone()
        for key, tensor in model.model.state_dict().items()
        if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }


def deltas(made: Made) -> dict[str, Tensor]:
    """What an adapter adds to the weights of a model, by the model's keys."""
    from ComfyUI_IDAdapter.idadapter_core.sites import attention_sites

    return {
        f"diffusion_model.{site.comfy_module}.{name}.weight": weights(made)[
            f"layers.deltas.{site.index}.{name}.weight"
        ]
        for site in attention_sites(unet(made.kind).model_state_dict())
        for name in ("to_k", "to_v")
    }
