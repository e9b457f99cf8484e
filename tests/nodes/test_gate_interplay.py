"""IDAdapter together with UniID, with the host's other features and with what other packs do to self-attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import recipe
from tests.nodes import sampling
from tests.nodes.idadapter_sampling import (
    KINDS,
    Made,
    apply,
    assert_gates,
    at_work,
    deltas,
    person,
    positive,
    record_gates,
)
from tests.nodes.sampling import (
    SITE_COUNT,
    Conditioning,
    assert_rows,
    attach,
    difference,
    draw,
    noise,
    prompt,
    rescale,
    sample,
    unet,
)
from tests.nodes.test_interplay import OTHERS
from tests.nodes.test_other_packs import other_node
from tests.tiny.checkpoints import tiny_unet

Change = Callable[[Any], Any]


def prompts(kind: str) -> tuple[Conditioning, Conditioning]:
    return prompt(kind, "positive"), prompt(kind, "negative")


class TestWithUniID:
    """Both methods on one MODEL: gates before the cross-attention, tokens in it."""

    @staticmethod
    def uniid(model: Any, kind: str, weight: float = 1.0, start: float = 0.0, end: float = 1.0) -> Any:
        return sampling.apply(model, kind, sampling.person(kind), weight, start, end)

    @pytest.mark.parametrize("kind", KINDS)
    def test_each_does_what_it_does(self, kind: str) -> None:
        made, uniid, (pos, neg) = Made(kind), sampling.person(kind), prompts(kind)
        identity = person(made, photos=2)
        model = apply(self.uniid(unet(kind), kind, 0.6), made, identity, 0.9)
        model, gate_calls = record_gates(model)
        model, calls = sampling.record(model)
        sample(model, pos, neg)
        for call, gates in zip(calls, gate_calls, strict=True):
            pairs = [(pos, uniid.adapter_tokens), (neg, uniid.adapter_tokens_uncond)]
            assert sorted(assert_rows(kind, call, pairs, weight=0.6)) == [0, 1]
            assert sorted(assert_gates(made, gates, [(pos, [positive(identity, 0.9)]), (neg, [])])) == [0, 1]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("rescaled", [False, True])
    def test_order_does_not_matter(self, kind: str, rescaled: bool) -> None:
        made = Made(kind)

        def result(model: Any) -> Tensor:
            return draw(rescale(model, adapter_early=0.8) if rescaled else model, kind)

        uniid_first = result(apply(self.uniid(unet(kind), kind), made, person(made)))
        uniid_last = result(self.uniid(apply(unet(kind), made, person(made)), kind))
        assert torch.equal(uniid_first, uniid_last)
        assert difference(uniid_first, result(self.uniid(unet(kind), kind))) > 0.01
        assert difference(uniid_first, result(apply(unet(kind), made, person(made)))) > 0.01

    @pytest.mark.parametrize("kind", ["sdxl", "sd15"])
    @pytest.mark.parametrize("uniid_first", [True, False])
    def test_in_windows_that_do_not_meet(self, kind: str, uniid_first: bool) -> None:
        """In each step only one of the two acts; the other's part is as if it were alone."""
        made = Made(kind)
        windows = ((0.0, 0.5), (0.5, 1.0)) if uniid_first else ((0.5, 1.0), (0.0, 0.5))
        model = self.uniid(unet(kind), kind, 1.0, *windows[0])
        model, gate_calls = record_gates(apply(model, made, person(made), 1.0, *windows[1]))
        model, calls = sampling.record(model)
        draw(model, kind, steps=4, cfg=1.0)
        border = unet(kind).get_model_object("model_sampling").percent_to_sigma(0.5)
        for call, gates in zip(calls, gate_calls, strict=True):
            assert bool(call.sites) == ((call.sigma > border) == uniid_first)
            assert bool(gates.gates) != bool(call.sites)

    @pytest.mark.parametrize("kind", ["sdxl", "sd15"])
    def test_split_halves(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a device on which only one row fits, the negative has UniID's tokens and no gates."""
        made = Made(kind)
        model = apply(self.uniid(unet(kind), kind), made, person(made))
        together = draw(model, kind)
        monkeypatch.setattr(model.model, "memory_required", lambda *_, **__: math.inf)
        assert difference(draw(model, kind), together) < 1e-4

    def test_attached_to_one_of_them(self) -> None:
        """A prompt with a person attached has that person alone."""
        kind, made = "sd15", Made("sd15")
        (pos, neg), uniid = prompts(kind), sampling.person(kind, 2)
        model = apply(self.uniid(unet(kind), kind, 0.6), made, person(made))
        model, gate_calls = record_gates(model)
        model, calls = sampling.record(model)
        sample(model, attach(pos, uniid), neg, steps=1)
        pairs = [(pos, uniid.adapter_tokens), (neg, sampling.person(kind).adapter_tokens_uncond)]
        assert sorted(assert_rows(kind, calls[0], pairs, weight=0.6)) == [0, 1]
        assert gate_calls[0].gates == []
        gate_calls.clear()
        sample(model, attach(pos, person(made, 2)), neg, steps=1)
        pairs_of_gates = [(pos, [positive(person(made, 2))]), (neg, [])]
        assert sorted(assert_gates(made, gate_calls[0], pairs_of_gates)) == [0, 1]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
    def test_attention_in_half_precision(self, dtype: torch.dtype) -> None:
        kind, made = "sdxl", Made("sdxl")

        def result(model: Any) -> Tensor:
            return draw(apply(self.uniid(model, kind), made, person(made, photos=2)), kind)

        half = tiny_unet(kind, dtype=dtype)
        half.model.manual_cast_dtype = None
        half.set_model_compute_dtype(dtype)
        assert difference(result(half), result(unet(kind))) < 0.15


def middle_patch_of_another_pack(model: Any) -> Any:
    """As GLIGEN acts: something of its own added to the image tokens."""

    def add(x: Tensor, extra: dict[str, Any]) -> Tensor:
        return x + 0.3 * recipe.value(5, "middle", (1, 1, x.shape[-1])) * x.std()

    clone = model.clone()
    clone.set_model_patch(add, "middle_patch")
    return clone


def attn1_replacement_of_another_pack(model: Any) -> Any:
    """Self-attention replaced in some blocks, under keys of both lengths; one of them attends to nothing."""
    from comfy.ldm.modules.attention import optimized_attention

    def half(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        return 0.5 * optimized_attention(q, k, v, extra["n_heads"])

    clone = model.clone()
    clone.set_model_attn1_replace(half, "middle", 0)
    clone.set_model_attn1_replace(lambda q, k, v, extra: v, "output", 1, 0)
    return clone


def attn1_patch_of_another_pack(model: Any) -> Any:
    def change(n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> list[Tensor]:
        return [n, context.roll(1, 1), value * 0.9]

    clone = model.clone()
    clone.set_model_attn1_patch(change)
    return clone


def attn1_output_patch_of_another_pack(model: Any) -> Any:
    clone = model.clone()
    clone.set_model_attn1_output_patch(lambda n, extra: n * 0.5)
    return clone


PACKS: dict[str, Change] = {
    "middle patch": middle_patch_of_another_pack,
    "attn1 replacement": attn1_replacement_of_another_pack,
    "attn1 patch": attn1_patch_of_another_pack,
    "attn1 output patch": attn1_output_patch_of_another_pack,
    "attn2 replacement": lambda model: other_node(model, "sd15")[0],
}


@pytest.mark.parametrize("other", PACKS)
@pytest.mark.parametrize("gated", [False, True])
def test_other_packs_before_or_after(other: str, gated: bool) -> None:
    """Both act, and the order of the nodes does not matter; the gates work on what the other has made of the image tokens."""
    kind, made, change = "sd15", Made("sd15"), PACKS[other]
    pos, neg = prompts(kind)

    def ours(model: Any) -> Any:
        applied = apply(model, made, person(made), 0.7)
        return rescale(applied, gated=True, adapter_late=0.6) if gated else applied

    before, after = ours(change(unet(kind))), change(ours(unet(kind)))
    assert torch.equal(draw(before, kind), draw(after, kind))
    assert difference(draw(before, kind), draw(change(unet(kind)), kind)) > 0.01
    assert difference(draw(before, kind), draw(ours(unet(kind)), kind)) > 1e-3
    if not gated:
        for model in (before, after):
            recorded, calls = record_gates(model)
            sample(recorded, pos, neg, steps=1)
            pairs = [(pos, [positive(person(made), 0.7)]), (neg, [])]
            assert [sorted(assert_gates(made, call, pairs)) for call in calls] == [[0, 1]]


def test_two_packs_around_ours() -> None:
    kind, made = "sd15", Made("sd15")
    around = middle_patch_of_another_pack(apply(middle_patch_of_another_pack(unet(kind)), made, person(made)))
    before = apply(middle_patch_of_another_pack(middle_patch_of_another_pack(unet(kind))), made, person(made))
    assert torch.equal(draw(around, kind), draw(before, kind))


@pytest.mark.parametrize("other", OTHERS)
def test_features_of_the_host_before_or_after(other: str) -> None:
    kind, made, change = "sd15", Made("sd15"), OTHERS[other]
    options: dict[str, Any] = {"latent_noise": noise(1, 16, 16)}
    torch.manual_seed(0)
    before = draw(apply(change(unet(kind)), made, person(made)), kind, **options)
    torch.manual_seed(0)
    after = draw(change(apply(unet(kind), made, person(made))), kind, **options)
    assert before.isfinite().all()
    # A LoRA's and our changes of the same weights are added in the order of the nodes, which rounds differently.
    assert difference(before, after) < 1e-4 if other == "lora" else torch.equal(before, after)
    assert difference(before, draw(change(unet(kind)), kind, **options)) > 0.01
    assert difference(before, draw(apply(unet(kind), made, person(made)), kind, **options)) > 1e-3


def gligen() -> Any:
    """ComfyUI's own GLIGEN for the tiny SD1.5, its gates open."""
    import comfy.gligen
    import comfy.model_management as memory
    import comfy.model_patcher

    widths = (32, 64, 64, 64, 64, 32, 32)  # in the order in which the UNet runs: input, middle, output
    fusers = [comfy.gligen.GatedSelfAttentionDense(width, 64, 4, width // 4) for width in widths]
    network = comfy.gligen.Gligen(fusers, comfy.gligen.PositionNet(64, 64), 64)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(
                torch.tensor(0.4)
                if parameter.ndim == 0
                else recipe.weight(0, f"gligen.{name}", parameter.shape)
            )
    return comfy.model_patcher.CoreModelPatcher(
        network, load_device=memory.get_torch_device(), offload_device=memory.unet_offload_device()
    )


@pytest.mark.parametrize("gated", [False, True])
def test_gligen(gated: bool) -> None:
    """Its middle patch comes with the conditioning."""
    kind, made = "sd15", Made("sd15")
    box = [(recipe.value(0, "gligen", (1, 64)), 4, 4, 2, 2)]
    pos, neg = prompt(kind, "positive", gligen=("position", gligen(), box)), prompt(kind, "negative")
    applied = apply(unet(kind), made, person(made))
    model, calls = record_gates(rescale(applied, gated=True) if gated else applied)
    both = sample(model, pos, neg)
    assert len(calls) == 4, "ComfyUI runs the prompts of a call with GLIGEN apart"
    positives = [call for call in calls if call.gates]
    assert len(positives) == 2
    for call in positives:
        assert len(call.by_block) == SITE_COUNT[kind]
        if not gated:
            assert assert_gates(made, call, [(pos, [positive(person(made))])]) == [0]
    assert difference(both, sample(unet(kind), pos, neg)) > 0.01
    assert difference(both, sample(applied, prompt(kind, "positive"), neg)) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_attention_override_sees_only_the_hosts_own_layers(kind: str) -> None:
    """Overrides of other packs look up the layer in what ComfyUI tells them; the gated layers are none of its."""
    lengths: list[int] = []

    def override(attention: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, **options: Any) -> Tensor:
        lengths.append(k.shape[1])
        out: Tensor = attention(q, k, v, heads, **options)
        return out

    made = Made(kind)
    base = unet(kind).clone()
    base.model_options["transformer_options"]["optimized_attention_override"] = override
    plain = draw(base, kind, steps=1)
    plain_lengths, lengths[:] = list(lengths), []
    result = draw(apply(base, made, person(made)), kind, steps=1)
    assert lengths == plain_lengths
    assert difference(result, plain) > 0.01


def test_compiled_model() -> None:
    """ComfyUI's own compile node drops the guards that would tell two identities apart."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    kind = "sd15"
    for strength, number, gated in ((1.0, 1, False), (0.6, 2, True)):
        made = Made(kind)
        applied = apply(unet(kind), made, person(made, number), strength, 0.0, 0.9)
        applied = rescale(applied, adapter_early=0.5, gated=True) if gated else applied
        compiled = TorchCompileModel.execute(applied, "eager").result[0]
        assert difference(draw(compiled, kind, steps=2), draw(applied, kind, steps=2)) < 1e-5


def test_compiled_model_whose_weights_alone_change() -> None:
    """Nothing of ours runs in the UNet then: it stays compiled, with the changed weights."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    kind, made = "sd15", Made("sd15", gate=0.0)
    applied = apply(unet(kind), made, person(made))
    compiled = TorchCompileModel.execute(applied, "eager").result[0]
    assert difference(draw(compiled, kind), draw(applied, kind)) < 1e-5
    assert difference(draw(compiled, kind), draw(unet(kind), kind)) > 0.01


def test_hooks_of_conditionings() -> None:
    """A LoRA that a conditioning brings along changes the weights while it acts, on top of ours."""
    import comfy.hooks

    from tests.nodes.test_key_value_deltas import lora

    kind, made = "sd15", Made("sd15")
    loras = comfy.hooks.create_hook_lora(lora(kind), 0.8, 0.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(prompt(kind, "positive"), loras)
    applied = apply(unet(kind), made, person(made))
    model, calls = record_gates(applied)
    sample(model, hooked, prompt(kind, "negative"), steps=1)
    pairs = [(prompt(kind, "positive"), [positive(person(made))]), (prompt(kind, "negative"), [])]
    rows = [assert_gates(made, call, pairs) for call in calls if call.gates]
    assert rows == [[0]]
    base, changes = at_work(unet(kind)), deltas(made)
    for key, weight in at_work(applied).items():
        assert torch.equal(weight, base[key] + changes[key])
