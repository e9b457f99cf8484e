"""Calculate hours, memory and communication of the published recipes at real size. Needs no timing and no weights.

    python -m benchmarks.training_cost                          # the tables of docs/training_costs.md
    python -m benchmarks.training_cost --utilisation 0.2        # share of the GPU's peak in bf16; fewer hours with a higher share

Operations are counted (`benchmarks/operations.py`), bytes are sizes of tensors. Both are divided by the speeds below, those of a GPU
of the H100 class.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import networks
from benchmarks.networks import parameters
from benchmarks.operations import Recipe, adapter, cache_operations, identity_operations, step_operations
from tests.harness.shim import run_shim

BF16, TF32, FP32 = 989e12, 495e12, 67e12  # peak operations/s
# Shares of the peaks: VAE and face network (TF32), CLIP vision (fp32).
CONVOLUTIONS, PRODUCTS = (0.25, 0.6)
LINKS = {
    "8 GPUs, NVLink": (8, 400e9),  # bytes/s
    "32 GPUs, 100 Gbit/s": (32, 12.5e9),
    "32 GPUs, 400 Gbit/s": (32, 50e9),
}
PHOTOS = {"30 k": 30_000, "1 M": 1_000_000, "6 M": 6_000_000}
HOURS = f"run | passes | samples/s | share of L_id | {' | '.join(f'hours, {name} photos' for name in PHOTOS)} | cache of 1 M photos, hours"
MEMORY = "GB on each GPU | trained, M | frozen | weights, gradients, Adam | averaged weights, if any | buckets, with several GPUs"
MEMORY += " | sum, without activations | a checkpoint on disk"
EXCHANGE = f"run | samples of a GPU | GB exchanged | ms to compute | {' | '.join(LINKS)}"


# The paper's number of samples, as passes over its CelebA-HQ.
MIXED: Any = {"batch": 4, "passes": 50_000 * 4 / 30_000}
TEXT: Any = {"branch": "text", "passes": 12}
RECIPES = (
    Recipe("IDAdapter, SD1.5 512 px", "idadapter", "sd15", **MIXED),
    Recipe("IDAdapter, SD2.1 512 px", "idadapter", "sd21", **MIXED),
    Recipe("IDAdapter, SDXL 1024 px", "idadapter", "sdxl", resolution=1024, **MIXED),
    Recipe("UniID, text, SD1.5 512 px", "uniid", "sd15", **TEXT),
    Recipe("UniID, text, SDXL 512 px", "uniid", "sdxl", **TEXT),
    Recipe("UniID, adapter, SD1.5 512 px", "uniid", "sd15"),
    Recipe("UniID, adapter, SD2.1 512 px", "uniid", "sd21"),
    Recipe("UniID, adapter, SDXL 512 px", "uniid", "sdxl"),
)


def sample_seconds(recipe: Recipe, utilisation: float) -> tuple[float, float]:
    """Seconds per sample on one GPU, and seconds of L_id in it."""
    term = identity_operations(recipe) / (TF32 * CONVOLUTIONS)
    return step_operations(recipe)[0] / (BF16 * utilisation) + term, term


def cache_seconds(recipe: Recipe) -> float:
    """GPU seconds per photo to build the cache."""
    convolutions, products = cache_operations(recipe)
    return convolutions / (TF32 * CONVOLUTIONS) + products / (FP32 * PRODUCTS)


def hours(recipe: Recipe, utilisation: float) -> list[str]:
    seconds, term = sample_seconds(recipe, utilisation)
    runs = [f"{recipe.passes * photos * seconds / 3600:,.1f}" for photos in PHOTOS.values()]
    share = f"{100 * term / seconds:.0f} %" if term else ""
    return [
        f"{recipe.passes:.3g}",
        f"{1 / seconds:.3g}",
        share,
        *runs,
        f"{cache_seconds(recipe) * 1e6 / 3600:.1f}",
    ]


def trained_parameters(recipe: Recipe) -> int:
    return parameters(adapter(recipe).encoder) + parameters(adapter(recipe).layers)


def memory(recipe: Recipe, _: float) -> list[str]:
    narrow = parameters(networks.unet(recipe.family)) + parameters(networks.text_encoders(recipe.family))
    wide = parameters(networks.autoencoder()) + parameters(networks.recognizer(recipe.needs.stages))
    wide += parameters(networks.vision()) if recipe.needs.vision else 0
    frozen, count = 2 * narrow + 4 * wide, trained_parameters(recipe)
    parts = (frozen, 18 * count, 4 * count, 4 * count, frozen + 26 * count, 16 * count)
    return [f"{count / 1e6:.0f}", *(f"{part / 1e9:.1f}" for part in parts)]


def exchange(recipe: Recipe, utilisation: float) -> list[str]:
    """Efficiency without overlap of the ring all-reduce, and with overlap with the backward pass."""
    compute = recipe.batch * sample_seconds(recipe, utilisation)[0]
    backward, size = (
        recipe.batch * step_operations(recipe)[1] / (BF16 * utilisation),
        4 * trained_parameters(recipe),
    )
    cells = [str(recipe.batch), f"{size / 1e9:.1f}", f"{1e3 * compute:.0f}"]
    for gpus, bandwidth in LINKS.values():
        travel = 2 * (gpus - 1) / gpus * size / bandwidth
        shares = (compute / (compute + travel), compute / (compute + max(0.0, travel - backward)))
        cells.append(" to ".join(f"{100 * share:.0f} %" for share in shares))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--utilisation", type=float, default=0.4, help="0..1")
    utilisation = parser.parse_args().utilisation
    run_shim()
    for head, row in ((HOURS, hours), (MEMORY, memory), (EXCHANGE, exchange)):
        print(f"\n| {head} |\n|{' --- |' * (head.count('|') + 1)}")
        for recipe in RECIPES:
            print(f"| {' | '.join([recipe.name, *row(recipe, utilisation)])} |")


if __name__ == "__main__":
    main()
