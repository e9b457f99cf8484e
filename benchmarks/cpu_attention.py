"""Compare each CPU attention kernel with the naive way, for the attention sites of one model call.

SD1.5's cross-attention sites, batch 2 (the two halves of CFG), including rescaling; random numbers. "Naive" projects K and V at each
call, attends with PyTorch's attention and adds in two passes, without rescaling. All ways are interleaved; times are CPU time of one
thread, medians over the rounds, summed over the sites. The choice in `idadapter_core/attention_cpu.py` is based on this.

    python -m benchmarks.cpu_attention                                          # bf16 at 512 px, 4, 16 and 25 tokens
    python -m benchmarks.cpu_attention --case fp32:256 --tokens 16 25 32
    ONEDNN_MAX_CPU_ISA=AVX512_CORE python -m benchmarks.cpu_attention --pretend no-bf16     # a processor without bf16 products
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from idadapter_core import attention_cpu
from idadapter_core.attention import (
    PreparedIdentity,
    add_identity,
    merge_heads,
    prepare_keys_values,
    sample_norm,
    split_heads,
)

HEADS, CONTEXT_WIDTH = 8, 768
SITES = ((1, 320, 5), (2, 640, 5), (4, 1280, 5), (8, 1280, 1))  # downsampling, channels, number of sites
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ways(length: int, channels: int, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The ways to compare at one site."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query, base = draw(2, length, channels), draw(2, length, channels)
    states = [draw(1, tokens, CONTEXT_WIDTH) for _ in range(2)]
    to_k, to_v = (draw(channels, CONTEXT_WIDTH) / CONTEXT_WIDTH**0.5 for _ in range(2))
    keys, values = (torch.cat([F.linear(state, weight) for state in states]) for weight in (to_k, to_v))
    split = split_heads(keys, HEADS), split_heads(values, HEADS)

    def naive() -> Tensor:
        k, v = (torch.cat([F.linear(state, weight) for state in states]) for weight in (to_k, to_v))
        parts = (split_heads(part, HEADS) for part in (query, k, v))
        return base + merge_heads(F.scaled_dot_product_attention(*parts)) * 1.0

    def ours(identity: PreparedIdentity) -> Callable[[], Tensor]:
        # Strength 0 keeps `base` unchanged between rounds, at the same cost.
        return lambda: add_identity(base, query, identity, 0.0, base_norm=sample_norm(base), inplace=True)

    return {
        "naive": naive,
        "PyTorch's attention": ours(prepare_keys_values(keys, values, HEADS)),
        "all heads at once": ours(attention_cpu.prepare_blocks(*split, HEADS)),
        "pairs of heads": ours(attention_cpu.prepare_blocks(*split, 2)),
        "heads one by one": ours(attention_cpu.prepare_blocks(*split, 1)),
        "batched heads": ours(attention_cpu.prepare_heads(*split)),
    }


def measure(pixels: int, tokens: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Milliseconds of each way, summed over all sites of one model call."""
    sums: dict[str, float] = {}
    for factor, channels, count in SITES:
        compared = ways((pixels // 8 // factor) ** 2, channels, tokens, dtype)
        times: dict[str, list[float]] = {name: [] for name in compared}
        for number in range(rounds + 1):
            for name in random.Random(number).sample(list(compared), len(compared)):
                start = time.thread_time()
                compared[name]()
                if number:  # the first round warms up
                    times[name].append(time.thread_time() - start)
        for name, seconds in times.items():
            sums[name] = sums.get(name, 0.0) + 1000 * count * statistics.median(seconds)
    return sums


def chosen(dtype: torch.dtype, tokens: int) -> str:
    if together := attention_cpu.block_heads(dtype, HEADS, tokens):
        return {HEADS: "all heads at once", 2: "pairs of heads", 1: "heads one by one"}[together]
    return "batched heads" if attention_cpu.prefers_heads(dtype, tokens) else "PyTorch's attention"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", help="dtype:pixels, for example fp32:256 (repeatable)")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[4, 16, 25], help="numbers of identity tokens"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--pretend", choices=["no-bf16"], help="choose as on a processor without products in bf16"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    processor = attention_cpu.processor()
    if options.pretend:
        processor = replace(processor, bfloat16=False, tiles=False)
        attention_cpu.processor = lambda: processor
    print(f"torch {torch.__version__}, {processor}")
    with torch.inference_mode():
        for case in options.case or ["bf16:512"]:
            name, pixels = case.split(":")
            for tokens in options.tokens:
                sums = measure(int(pixels), tokens, DTYPES[name], options.rounds)
                ratios = (
                    f"{way} {total:.1f} ms ({total / sums['naive']:.2f})" for way, total in sums.items()
                )
                choice = chosen(DTYPES[name], tokens)
                print(f"{case} px, {tokens} tokens: {', '.join(ratios)}; chosen: {choice}", flush=True)


if __name__ == "__main__":
    main()
