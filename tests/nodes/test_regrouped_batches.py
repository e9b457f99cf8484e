"""Other nodes that repeat, regroup or multiply the rows of a model call: right where it can be told, an error where not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nodes.sampling import apply, difference, draw, noise, person, prompt, rescale, unet
from tests.nodes.test_other_packs import OtherPatch, other_callback

KIND = "sd15"


def tiled(model: Any, keep: int | None = None) -> Any:
    """A clone whose model calls run on the batch twice over, as tiled sampling does; or on its first rows only."""

    def wrapper(apply_model: Any, arguments: dict[str, Any]) -> Tensor:
        x, t, c = arguments["input"], arguments["timestep"], dict(arguments["c"])
        if keep is not None:
            return apply_model(x[:keep], t[:keep], **{**c, "c_crossattn": c["c_crossattn"][:keep]}).repeat(
                2, 1, 1, 1
            )
        c["c_crossattn"] = c["c_crossattn"].repeat(2, 1, 1)
        out = apply_model(x.repeat(2, 1, 1, 1), t.repeat(2), **c)
        first, second = out.chunk(2)
        assert torch.allclose(first, second, atol=1e-5)
        return first

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def test_a_batch_repeated_as_a_whole() -> None:
    model = rescale(apply(unet(KIND), KIND, person(KIND)), adapter_early=0.8)
    assert difference(draw(tiled(model), KIND), draw(model, KIND)) < 1e-5


def test_a_mask_does_not_follow_tiles() -> None:
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    with pytest.raises(RuntimeError, match="attn_mask cannot follow the tiles"):
        draw(tiled(apply(unet(KIND), KIND, person(KIND), mask=mask)), KIND)


def test_a_part_of_the_batch_is_refused() -> None:
    with pytest.raises(RuntimeError, match="changed the batch of this model call from 2 rows to 1"):
        draw(tiled(apply(unet(KIND), KIND, person(KIND)), keep=1), KIND)


class TestMultipliedConditionings:
    """Attention Couple repeats each positive chunk once per prompt inside the attention layers."""

    @staticmethod
    def rows(*names: str) -> tuple[Any, ...]:
        from ComfyUI_IDAdapter.idadapter_core import Adapter
        from ComfyUI_IDAdapter.nodes.host.rows import Handle, Row

        adapter: Any = Adapter
        handles = {name: Handle(adapter, torch.zeros(1, 4, 8)) for name in set(names)}
        return tuple(Row((handles[name],), None, 0) for name in names)

    @staticmethod
    def expand(rows: tuple[Any, ...], count: int, kinds: list[int], couple: list[int] | None = None) -> Any:
        from ComfyUI_IDAdapter.nodes.host.rows import expand_rows

        extra: dict[str, Any] = {"cond_or_uncond": kinds}
        if couple is not None:
            extra["cond_or_uncond_couple"] = couple
        return expand_rows(rows, extra, count)

    def test_positives_are_repeated_side_by_side(self) -> None:
        negative, positive = self.rows("negative", "positive")
        assert self.expand((negative, positive), 4, [1, 0]) == (negative, positive, positive, positive)

    def test_two_combined_positives_stay_apart(self) -> None:
        negative, first, second = rows = self.rows("negative", "first", "second")
        assert self.expand(rows, 5, [1, 0, 0]) == (negative, first, first, second, second)

    def test_chunks_that_are_named(self) -> None:
        negative, positive = self.rows("negative", "positive")
        assert self.expand((negative, positive), 3, [1, 0], [1, 0, 0]) == (negative, positive, positive)

    @pytest.mark.parametrize(
        ("count", "kinds", "couple"),
        [(4, [1, 0, 0], [1, 0, 0, 0]), (2, [1, 0, 0], None), (6, [1, 0, 0], None)],
    )
    def test_what_cannot_be_told_is_refused(
        self, count: int, kinds: list[int], couple: list[int] | None
    ) -> None:
        rows = self.rows("negative", "first", "second")
        with pytest.raises(RuntimeError, match=f"turned 3 rows of this model call into {count}"):
            self.expand(rows, count, kinds, couple)


class Strided(OtherPatch):
    """A replacement whose output does not lie in memory in one piece."""

    def __call__(self, *arguments: Any) -> Tensor:
        out = super().__call__(*arguments)
        return out.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_of_another_pack_that_is_not_contiguous(dtype: torch.dtype) -> None:
    """All kinds of kernel add in place: they must not add to a copy."""
    from ComfyUI_IDAdapter.idadapter_core import attention_cpu
    from ComfyUI_IDAdapter.idadapter_core.attention import add_identity, prepare_keys_values, split_heads

    generator = torch.Generator().manual_seed(0)
    keys, values, query = (torch.randn(1, count, 32, generator=generator) for count in (4, 4, 9))
    split = [split_heads(x.to(dtype), 4) for x in (keys, values)]
    for identity in (
        attention_cpu.prepare_blocks(*split, 4),
        attention_cpu.prepare_blocks(*split, 2),
        attention_cpu.prepare_heads(*split),
        prepare_keys_values(keys.to(dtype), values.to(dtype), 4),
    ):
        base = torch.zeros(2, 9, 32, dtype=dtype)
        add_identity(base, query.expand(2, -1, -1).to(dtype), identity, 1.0, inplace=True)
        assert base.abs().sum() > 1

    clone = unet(KIND).clone()
    clone.set_model_attn2_replace(Strided(other_callback, seed=5, weight=0.5, seen=Counter()), "middle", 0)
    plain = unet(KIND).clone()
    plain.set_model_attn2_replace(OtherPatch(other_callback, seed=5, weight=0.5, seen=Counter()), "middle", 0)
    strided, usual = (draw(apply(m, KIND, person(KIND)), KIND, latent_noise=noise(2)) for m in (clone, plain))
    assert difference(strided, usual) < 1e-5


@pytest.mark.parametrize("override", [False, True])
def test_a_silent_patch_of_another_pack_stays_silent(override: bool) -> None:
    """With weight 0 it adds nothing but the rounding between two ways of computing the same attention."""

    def rounding(function: Any, *arguments: Any, **options: Any) -> Tensor:
        return function(*arguments, **options) * (1 + 1e-5)

    clone = unet(KIND).clone()
    clone.set_model_attn2_replace(OtherPatch(other_callback, seed=5, weight=0.0, seen=Counter()), "middle", 0)
    if override:
        options = clone.model_options["transformer_options"]
        options["optimized_attention_override"] = rounding
    with_scope = rescale(clone, scope="every attention patch")
    assert difference(draw(with_scope, KIND), draw(clone, KIND)) < 1e-3


def test_sampling_without_compilation_leaves_the_compiler_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older torch has no such switch, and other nodes' compiled kernels must stay compiled."""
    monkeypatch.delattr(torch.compiler, "set_stance")
    model = apply(unet(KIND), KIND, person(KIND))
    assert torch.isfinite(draw(model, KIND)).all()


def test_compiled_model_on_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    monkeypatch.delattr(torch.compiler, "set_stance")
    compiled = TorchCompileModel.execute(apply(unet(KIND), KIND, person(KIND)), "eager").result[0]
    with pytest.raises(RuntimeError, match="acts on a compiled model"):
        draw(compiled, KIND)


def halves(model: Any) -> Any:
    """A clone whose model calls run on the left and the right half apart, as tiled sampling with one tile at a time does."""

    def wrapper(apply_model: Any, arguments: dict[str, Any]) -> Tensor:
        x, t, c = arguments["input"], arguments["timestep"], arguments["c"]
        return torch.cat([apply_model(part, t, **c) for part in x.chunk(2, dim=-1)], dim=-1)

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def test_a_mask_does_not_follow_a_half_of_the_picture() -> None:
    mask = torch.zeros(1, 16, 16)
    mask[..., :8] = 1
    wide = noise(1, 8, 16)
    with pytest.raises(RuntimeError, match="attn_mask cannot follow the tiles"):
        draw(halves(apply(unet(KIND), KIND, person(KIND), mask=mask)), KIND, latent_noise=wide)
    assert torch.isfinite(draw(halves(apply(unet(KIND), KIND, person(KIND))), KIND, latent_noise=wide)).all()


def in_windows(model: Any) -> Any:
    """ComfyUI's own context windows: two latents of the batch at a time."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    return ContextWindowsManualNode.execute(
        model, context_length=2, context_overlap=0, context_schedule="standard_static", context_stride=1,
        closed_loop=False, fuse_method="pyramid", dim=0, freenoise=False,
    ).result[0]  # fmt: skip


def in_animatediffs_windows(model: Any) -> Any:
    """AnimateDiff's: it takes its windows from the batch itself and says which in its parameters."""

    def wrapper(
        executor: Any, run_model: Any, conds: Any, x: Tensor, t: Tensor, options: dict[str, Any]
    ) -> Any:
        parts = []
        for window in ([0, 1], [2, 3]):
            told = {**options["transformer_options"], "ad_params": {"sub_idxs": window, "full_length": 4}}
            parts.append(
                executor(run_model, conds, x[window], t[window], {**options, "transformer_options": told})
            )
        return [torch.cat(halves) for halves in zip(*parts, strict=True)]

    clone = model.clone()
    clone.add_wrapper_with_key("calc_cond_batch", "windows", wrapper)
    return clone


@pytest.mark.parametrize("windows", [in_windows, in_animatediffs_windows])
def test_masks_of_a_batch_follow_its_windows(windows: Callable[[Any], Any]) -> None:
    """The picture is that of the whole batch at once."""
    masks = torch.zeros(4, 8, 8)
    masks[2] = 1
    masks[3, :, :4] = 1
    model = apply(windows(unet(KIND)), KIND, person(KIND), mask=masks)
    whole = apply(unet(KIND), KIND, person(KIND), mask=masks)
    found, want = draw(model, KIND, latent_noise=noise(4)), draw(whole, KIND, latent_noise=noise(4))
    assert difference(found, want) < 1e-4
    assert difference(draw(apply(unet(KIND), KIND, person(KIND)), KIND, latent_noise=noise(4)), want) > 0.01


def test_masks_of_a_batch_do_not_follow_windows_that_are_not_told() -> None:
    masks = torch.ones(4, 8, 8)

    def wrapper(executor: Any, run_model: Any, conds: Any, x: Tensor, t: Tensor, options: Any) -> Any:
        parts = [executor(run_model, conds, x[i : i + 2], t[i : i + 2], options) for i in (0, 2)]
        return [torch.cat(halves) for halves in zip(*parts, strict=True)]

    clone = unet(KIND).clone()
    clone.add_wrapper_with_key("calc_cond_batch", "windows", wrapper)
    with pytest.raises(RuntimeError, match="attn_mask cannot follow the tiles or windows"):
        draw(apply(clone, KIND, person(KIND), mask=masks), KIND, latent_noise=noise(4))
    assert (
        draw(apply(clone, KIND, person(KIND), mask=masks[:1]), KIND, latent_noise=noise(4)).isfinite().all()
    )


def test_the_message_names_the_node_and_the_real_reason() -> None:
    from ComfyUI_IDAdapter.nodes.host.plan import plan_of

    model = apply(unet(KIND), KIND, person(KIND), mask=torch.ones(1, 8, 8))
    application = replace(plan_of(model).applications[0], node_id="12")
    assert application.title == "Apply ID Adapter (node 12)"


class TestSamplersThatEnlargeTheLatent:
    """SamplerLCMUpscale starts small and enlarges the latent on the way."""

    @staticmethod
    def lcm_upscale(ratio: float = 2.0) -> Any:
        from comfy_extras.nodes_advanced_samplers import SamplerLCMUpscale

        return SamplerLCMUpscale.execute(ratio, -1, "nearest-exact").result[0]

    @staticmethod
    def drawn(model: Any, sampler: Any, latent: Tensor) -> Tensor:
        import comfy.samplers

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(prompt(KIND, "positive"), prompt(KIND, "negative"))
        guider.set_cfg(4.0)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
        with torch.inference_mode():
            result: Tensor = guider.sample(
                latent, torch.zeros_like(latent), sampler, sigmas, disable_pbar=True, seed=0
            )
        return result

    @pytest.mark.parametrize("ratio", [2.0, 1.37, 0.75])
    def test_a_mask_follows_them(self, ratio: float) -> None:
        """The same aspect at another size: white everywhere is as good as no mask, and half a mask is neither that nor none."""
        latent = noise(1, 12, 8)

        def drawn(mask: Tensor | None) -> Tensor:
            torch.manual_seed(0)
            model = rescale(apply(unet(KIND), KIND, person(KIND), mask=mask))
            return self.drawn(model, self.lcm_upscale(ratio), latent)

        half = torch.zeros(1, 12, 8)
        half[..., :4] = 1
        free, white, left = drawn(None), drawn(torch.ones(1, 12, 8)), drawn(half)
        assert free.shape[-2:] == (round(12 * ratio), round(8 * ratio))
        assert difference(white, free) < 1e-5
        torch.manual_seed(0)
        plain = self.drawn(unet(KIND), self.lcm_upscale(ratio), latent)
        assert min(difference(left, free), difference(left, plain)) > 0.01

    def test_another_shape_is_refused_with_the_real_reason(self) -> None:
        import comfy.samplers

        def stretching(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **_: Any) -> Tensor:
            denoised: Tensor = model(x.repeat(1, 1, 1, 2), sigmas[0] * x.new_ones([1]), **(extra_args or {}))
            return denoised

        model = apply(unet(KIND), KIND, person(KIND), mask=torch.ones(1, 8, 8))
        with pytest.raises(RuntimeError, match=r"changes the shape of the latent, here from 8 x 8 to 8 x 16"):
            self.drawn(model, comfy.samplers.KSAMPLER(stretching), noise())
