"""Compare images on CUDA and on the CPU: ComfyUI with the same seeded weights and noise on both.

python -m benchmarks.on_gpu.parity OUT.safetensors [--tiny]         # writes the latents of this machine's CPU
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.on_gpu.machine import device, start
from benchmarks.on_gpu.parts import REAL, TINY, Report, Sizes

_KINDS = ("sd15", "sd21", "sdxl")


def parity(sizes: Sizes, report: Report) -> None:
    _exactly()
    reference = _on_cpu(sizes)
    for name, found in latents(sizes).items():
        expected = reference[name]
        report(
            {
                "case": name,
                "largest difference": float((found - expected).abs().max()),
                "relative difference": float((found - expected).norm() / expected.norm()),
            }
        )


def latents(sizes: Sizes) -> dict[str, Tensor]:
    """Latents of both methods on ComfyUI's device, by case, moved to the CPU: small models of each family, and full-width SD1.5."""
    from tests.nodes import idadapter_sampling, sampling

    found = {}
    for kind in _KINDS[:1] if sizes.tiny else _KINDS:
        person = sampling.person(kind)
        model = sampling.rescale(sampling.apply(sampling.unet(kind), kind, person), adapter_early=0.5)
        found[f"UniID, small {kind}"] = sampling.draw(model, kind)
        made = idadapter_sampling.Made(kind)
        identity = idadapter_sampling.person(made, photos=1)
        model = idadapter_sampling.apply(sampling.unet(kind), made, identity)
        found[f"IDAdapter, small {kind}"] = sampling.draw(model, kind)
    if not sizes.tiny:
        found |= _full_width()
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def _full_width() -> dict[str, Tensor]:
    """SD1.5 at 256 px. The effects of random full-width layers add up, so the identity is weak."""
    from ComfyUI_IDAdapter.idadapter_core import Mix

    from tests.nodes.sampling import node, noise, sample

    generator = torch.Generator().manual_seed(0)
    prompts = [[[torch.randn(1, 77, 768, generator=generator), {}]] for _ in range(2)]
    found = {}
    for method, title in (("uniid", "UniID"), ("idadapter", "IDAdapter")):
        base = models.unet("sd15", torch.float32)
        adapter = models.loaded_adapter(method, models.adapter_config(method, "sd15"), torch.float32)
        person = adapter.encode(models.face_features(1), Mix())
        applied = node("IDAdapterApply", base, adapter, person, 0.5, 0.0, 1.0)
        positive, negative = prompts
        found[f"{title}, SD1.5 at full width, 256 px"] = sample(
            applied, positive, negative, latent_noise=noise(1, 32, 32)
        )
    return found


def _on_cpu(sizes: Sizes) -> dict[str, Tensor]:
    """`latents` on the CPU, from a separate process if ComfyUI uses another device here."""
    from safetensors.torch import load_file

    if device().type == "cpu":
        return latents(sizes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "latents.safetensors"
        command = [sys.executable, "-m", "benchmarks.on_gpu.parity", str(path)]
        done = subprocess.run(
            [*command, "--tiny"] if sizes.tiny else command, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the process for the CPU failed: {done.stderr[-800:]}")
        return dict(load_file(path))


def _exactly() -> None:
    """Disable TF32, so that products and convolutions are exact fp32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def main() -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    start(cpu=True)
    save_file(latents(TINY if options.tiny else REAL), options.output)


if __name__ == "__main__":
    main()
