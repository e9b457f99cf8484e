"""Overhead of an identity adapter in one UNet forward in ComfyUI, compared with the plain model and with a naive adapter.

SD1.5 at full width with random weights on the CPU, batch 2 (the two halves of CFG), through ComfyUI's own `apply_model`. The
overhead is measured in situ: the time of the adapter's own code inside real forwards, minus the text attention that it contains
(weights are random: trained ones cost the same). Whole forwards are compared too, but other load changes them by more than the
effect. Times are CPU time of one thread. Rounds are interleaved; the output shows medians over rounds.

    python -m benchmarks.attention_overhead                     # UniID: fp32 256 px and bf16 512 px, 4, 16 and 25 tokens
    python -m benchmarks.attention_overhead --case fp32:256 --tokens 25 --rounds 9
    python -m benchmarks.attention_overhead --gated             # IDAdapter: bf16 256 px, 257 and 1028 tokens

UniID: "naive" is the common way: K and V of the identity projected at each call for both halves, `repeat`, attention, a new tensor
for the weighted residual and one for the sum; no rescaling. "ours" is the pack's patch with normalized rescaling.

IDAdapter: "naive" is Eq. 7 as written, in both halves and at each call: E_r through its linear map and norm, queries, keys and
values for image and E_r, attention, dropping the rows of E_r, the feed-forward. "ours" is the pack's patch; "ours, floor" is the
part of it that Eq. 7 needs for the image tokens of the positive half alone (their projections, the attention among themselves, the
feed-forward): the same patch with a single identity token. "ours, fresh" has all gates and deltas at 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.models import SD15_WIDTHS, unet
from tests.harness.comfy import import_comfy, load_pack

CONTEXT_WIDTH, CONTEXT_LENGTH = 768, 77


@dataclass
class Clock:
    """CPU time of the adapter's code and of the text attention inside it, in one forward."""

    adapter: float = 0.0
    text: float = 0.0
    depth: int = 0
    gated: bool = False  # inside a gated adapter, where attention calls are not the text's

    @property
    def added(self) -> float:
        return self.adapter - self.text


@dataclass
class Variant:
    """A way to run the model: transformer options, extra model inputs, and measurements."""

    name: str
    options: Callable[[], dict[str, Any]]
    inputs: dict[str, Any] = field(default_factory=dict)
    forwards: list[float] = field(default_factory=list)
    added: list[float] = field(default_factory=list)
    first_added: float = 0.0


CLOCK = Clock()


@contextmanager
def adapter_time(gated: bool = False) -> Iterator[None]:
    start = time.thread_time()
    CLOCK.depth += 1
    CLOCK.gated = gated
    try:
        yield
    finally:
        CLOCK.depth -= 1
        CLOCK.gated = False
        CLOCK.adapter += time.thread_time() - start


def timed_attention(attention: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def timed(*args: Any, **kwargs: Any) -> torch.Tensor:
        start = time.thread_time()
        out = attention(*args, **kwargs)
        if CLOCK.depth and not CLOCK.gated:
            CLOCK.text += time.thread_time() - start
        return out

    return timed


class NaiveAdapter:
    """An attn2 replacement typical of face adapters."""

    def __init__(
        self, projections: Any, index: int, tokens: dict[str, torch.Tensor], plain: Callable[..., Any]
    ):
        module = projections.adapter_modules[str(index)]
        self.to_k, self.to_v = module.to_k_ip, module.to_v_ip
        self.tokens = tokens
        self.plain = plain  # the untimed attention function, for the identity

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]
    ) -> torch.Tensor:
        from comfy.ldm.modules import attention

        with adapter_time():
            out = attention.optimized_attention(
                q, k, v, extra["n_heads"], attn_precision=extra["attn_precision"]
            )
            chunks = [("positive", "negative")[i] for i in extra["cond_or_uncond"]]
            batch = q.shape[0] // len(chunks)
            states = [self.tokens[chunk].repeat(batch, 1, 1) for chunk in ("positive", "negative")]
            keys = dict(zip(("positive", "negative"), (self.to_k(s) for s in states), strict=True))
            values = dict(zip(("positive", "negative"), (self.to_v(s) for s in states), strict=True))
            k_id = torch.cat([keys[chunk] for chunk in chunks])
            v_id = torch.cat([values[chunk] for chunk in chunks])
            residual = self.plain(q, k_id, v_id, extra["n_heads"])
            return out + residual * 1.0


class NaiveGates:
    """Eq. 7 as written, as a middle patch."""

    def __init__(self, layers: Any, tokens: torch.Tensor, sites: Any, plain: Callable[..., Any]):
        self.gates = {site.comfy: layers.gates[str(site.index)] for site in sites}
        self.tokens = tokens
        self.plain = plain

    def __call__(self, x: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        with adapter_time(gated=True):
            gate = self.gates[(*extra["block"], extra["block_index"])]
            length = x.shape[1]
            objects = gate.linear(self.tokens.repeat(x.shape[0], 1, 1))
            together = gate.norm1(torch.cat([x, objects], dim=1))
            query, keys, values = gate.to_qkv(together).chunk(3, dim=-1)
            mixed = gate.to_out(self.plain(query, keys, values, gate.heads))[:, :length]
            x = x + gate.gate_attention.tanh() * mixed
            value, opening = gate.ff_in(gate.norm2(x)).chunk(2, dim=-1)
            fed = gate.ff_out(value * torch.nn.functional.gelu(opening))
            return x + gate.gate_feed_forward.tanh() * fed


def build_variants(
    model: Any, dtype: torch.dtype, pixels: int, token_counts: list[int], plain: Any
) -> list[Variant]:
    """The plain model, and for each token count the naive adapter and ours, with the same weights and tokens."""
    from ComfyUI_IDAdapter.idadapter_core.adapter import Adapter
    from ComfyUI_IDAdapter.idadapter_core.methods.uniid import METHOD, UniIDConfig, UniIDEncoder
    from ComfyUI_IDAdapter.idadapter_core.schedule import RescaleSchedule
    from ComfyUI_IDAdapter.idadapter_core.types import Identity
    from ComfyUI_IDAdapter.nodes.host.model import with_plan
    from ComfyUI_IDAdapter.nodes.host.plan import KEY, Application, Rescale, plan_of
    from ComfyUI_IDAdapter.nodes.host.rows import Row, Rows
    from ComfyUI_IDAdapter.nodes.host.run import Run

    side = pixels // 8
    sigmas = torch.tensor([14.6, 4.0, 1.0, 0.0])
    base = {"sample_sigmas": sigmas, "sigmas": sigmas[1:2], "cond_or_uncond": [1, 0]}
    variants = [Variant("plain", lambda: dict(base))]
    sites = plan_of(model).sites
    for count in token_counts:
        config = UniIDConfig(
            text_widths=(),
            adapter_tokens=count,
            adapter_width=64,
            context_width=CONTEXT_WIDTH,
            site_widths=SD15_WIDTHS,
        )
        projections = METHOD.layers(config, torch.nn).to(dtype).requires_grad_(False)
        tokens = {role: torch.randn(1, count, CONTEXT_WIDTH).to(dtype) for role in ("positive", "negative")}
        replace = {site.comfy: NaiveAdapter(projections, site.index, tokens, plain) for site in sites}
        variants.append(
            Variant(f"naive T={count}", lambda r=replace: {**base, "patches_replace": {"attn2": r}})
        )

        parts = METHOD.mechanisms(config, projections)
        adapter = Adapter("benchmark", "", "uniid", config, UniIDEncoder(config), projections, parts)
        identity = Identity(tokens["positive"], tokens["negative"])
        application = Application(adapter, identity, 1.0, 0.0, 1.0, None)
        patched = with_plan(model, applications=(application,), rescale=Rescale(RescaleSchedule()))
        run = Run(plan_of(patched), tuple(sigmas.tolist()), (side, side), 1)
        handles = [run.handle(application, identity, negative) for negative in (True, False)]
        rows = Rows(run, tuple(Row((handle,), None, 0) for handle in handles))
        options = {**patched.model_options["transformer_options"], "wrappers": patched.wrappers}
        variants.append(Variant(f"ours T={count}", lambda o=options: {**base, **o}, {KEY: rows}))
    return variants


def build_gated_variants(
    model: Any, dtype: torch.dtype, pixels: int, token_counts: list[int], plain: Any
) -> list[Variant]:
    """The plain model, and for each number of identity tokens IDAdapter as written and ours, with the same weights."""
    from ComfyUI_IDAdapter.idadapter_core.adapter import Adapter
    from ComfyUI_IDAdapter.idadapter_core.methods.idadapter import METHOD, PRESETS, IDAdapterLayers
    from ComfyUI_IDAdapter.idadapter_core.types import Identity
    from ComfyUI_IDAdapter.nodes.host.model import with_plan
    from ComfyUI_IDAdapter.nodes.host.plan import KEY, Application, plan_of
    from ComfyUI_IDAdapter.nodes.host.rows import Row, Rows
    from ComfyUI_IDAdapter.nodes.host.run import Run

    config = PRESETS["sd15"]
    layers = IDAdapterLayers(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in layers.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    layers = layers.to(dtype).requires_grad_(False)
    for gate in layers.gates.values():
        gate.gate_attention.fill_(0.5)
        gate.gate_feed_forward.fill_(0.5)

    side = pixels // 8
    sigmas = torch.tensor([14.6, 4.0, 1.0, 0.0])
    base = {"sample_sigmas": sigmas, "sigmas": sigmas[1:2], "cond_or_uncond": [1, 0]}
    variants = [Variant("plain", lambda: dict(base))]
    sites = plan_of(model).sites

    def ours(name: str, count: int, gates: dict[int, tuple[float, float]], bias: bool = False) -> Variant:
        parts = dataclasses.replace(METHOD.mechanisms(config, layers), deltas={}, openings=gates)
        adapter = Adapter(name, name, "idadapter", config, layers, layers, parts)  # without encoder
        logs = torch.full((1, count), 1.386) if bias else None
        identity = Identity(torch.randn(1, count, config.vision_width), None, adapter_bias=logs)
        application = Application(adapter, identity, 1.0, 0.0, 1.0, None)
        patched = with_plan(model, applications=(application,))
        run = Run(plan_of(patched), tuple(sigmas.tolist()), (side, side), 1)
        handles = [run.handle(application, identity, negative) for negative in (True, False)]
        rows = Rows(run, tuple(Row((handle,), None, 0) for handle in handles))
        options = {**patched.model_options["transformer_options"], "wrappers": patched.wrappers}
        return Variant(name, lambda: {**base, **options}, {KEY: rows})

    opened = layers.gates.openings()
    for count in token_counts:
        tokens = torch.randn(1, count, config.vision_width, generator=generator).to(dtype)
        patch = NaiveGates(layers, tokens, sites, plain)
        variants.append(
            Variant(f"naive T={count}", lambda p=patch: {**base, "patches": {"middle_patch": [p]}})
        )
        variants.append(ours(f"ours T={count}", count, opened))
    variants.append(ours("ours, one photo for four (T=257 with bias)", 257, opened, bias=True))
    variants.append(ours("ours, floor (T=1)", 1, opened))
    variants.append(ours("ours, fresh (T=257)", 257, dict.fromkeys(opened, (0.0, 0.0))))
    return variants


def count_our_time() -> None:
    """Time the pack's own code in place: each attention site, and the work of the model wrapper (projecting, deciding, binding)."""
    from ComfyUI_IDAdapter.nodes.host import decoupled, gated, wrappers

    def timed(function: Callable[..., Any], gated: bool) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with adapter_time(gated):
                return function(*args)

        return call

    parts = (
        (decoupled.SiteAttention, "__call__"),
        (decoupled.Decoupled, "project"),
        (decoupled.Decoupled, "attention"),
        (wrappers, "_call"),
        (gated.Gated, "project"),
        (gated.GatePatch, "__call__"),
    )
    for owner, name in parts:
        setattr(owner, name, timed(getattr(owner, name), owner is gated.GatePatch))


def measure(model: Any, variants: list[Variant], dtype: torch.dtype, pixels: int, rounds: int) -> None:
    side = pixels // 8
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, side, side, generator=generator)
    context = torch.randn(2, CONTEXT_LENGTH, CONTEXT_WIDTH, generator=generator).to(dtype)
    for number in range(rounds + 1):
        for variant in random.Random(number).sample(variants, len(variants)):
            CLOCK.adapter = CLOCK.text = 0.0
            start = time.thread_time()
            model.model.apply_model(
                x,
                torch.full((2,), 4.0),
                c_crossattn=context,
                transformer_options=variant.options(),
                **variant.inputs,
            )
            seconds = time.thread_time() - start
            if number == 0:  # warm-up; for ours, it also projects K and V, once per run
                variant.first_added = CLOCK.added
            else:
                variant.forwards.append(seconds)
                variant.added.append(CLOCK.added)


def report(title: str, variants: list[Variant]) -> None:
    plain = statistics.median(variants[0].forwards)
    print(f"\n{title}, {len(variants[0].forwards)} rounds; plain forward {1000 * plain:.0f} ms")
    print(
        "| variant | added ms | added, % of the plain forward (in situ) | whole forward / plain | once per run, ms |"
    )
    print("|---|---|---|---|---|")
    shares = {}
    for variant in variants[1:]:
        added = statistics.median(variant.added)
        # Relative to the rest of the same forward, which other load slows down equally.
        alone = [f - a for f, a in zip(variant.forwards, variant.added, strict=True)]
        share = statistics.median(a / b for a, b in zip(variant.added, alone, strict=True))
        shares[variant.name] = added
        whole = statistics.median(f / p for f, p in zip(variant.forwards, variants[0].forwards, strict=True))
        once = f"{1000 * max(variant.first_added - added, 0):.0f}" if variant.name.startswith("ours") else "-"
        print(f"| {variant.name} | {1000 * added:.1f} | {100 * share:.2f} % | {whole:.3f} | {once} |")
    for name, added in shares.items():
        if (naive := name.replace("ours", "naive")) in shares and naive != name:
            print(f"{name}: {added / shares[naive]:.2f} of the naive way's added time")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", help="dtype:pixels, for example fp32:256 (repeatable)")
    parser.add_argument("--gated", action="store_true", help="measure IDAdapter's gated adapters")
    parser.add_argument("--tokens", type=int, nargs="+", help="numbers of identity tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU time is measured on one thread: 1 is right"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    import_comfy()
    load_pack()
    from comfy.ldm.modules import attention

    plain = attention.attention_pytorch  # as used by ComfyUI on NVIDIA; its CPU default is slower
    attention.optimized_attention = timed_attention(plain)
    count_our_time()
    with torch.inference_mode():
        build = build_gated_variants if options.gated else build_variants
        tokens = options.tokens or ([257, 1028] if options.gated else [4, 16, 25])
        for case in options.case or (["bf16:256"] if options.gated else ["fp32:256", "bf16:512"]):
            name, pixels = case.split(":")
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
            model = unet("sd15", dtype)
            variants = build(model, dtype, int(pixels), tokens, plain)
            measure(model, variants, dtype, int(pixels), options.rounds)
            report(f"SD1.5, {name}, {pixels} px, batch 2, torch {torch.__version__}", variants)


if __name__ == "__main__":
    main()
