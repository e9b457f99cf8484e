"""A TAESD that is filled up with zeros computes the same without them."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

from idadapter_core.demo_world.autoencoder import Autoencoder, Shape, save_autoencoder
from idadapter_core.files import read_tensors
from idadapter_core.stable_diffusion.vae import load_autoencoder, tiny_network
from idadapter_core.stable_diffusion.zero_channels import without_zero_channels

SLIM = Shape(12, (8, 8, 16, 16), (0, 1, 1, 1), (0, 1, 2, 1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    file = tmp_path / "vae.safetensors"
    save_autoencoder(Autoencoder(SLIM), file)
    return file


def test_nothing_but_the_time_changes(path: Path) -> None:
    whole = tiny_network(read_tensors(path)[0], path.name).float().eval()
    small = load_autoencoder(path, "sd15", {}).network
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters()) / 20
    pictures, latents = torch.rand(2, 3, 32, 48) * 2 - 1, torch.randn(2, 12, 4, 6)
    with torch.no_grad():
        for name, given in (("encode", pictures), ("decode", latents)):
            expected, found = (getattr(network, name)(given)[0] for network in (whole, small))
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    latents.requires_grad_()
    small.decode(latents)[0].sum().backward()
    assert latents.grad is not None


def test_others_are_left_alone() -> None:
    layers = diffusers.AutoencoderTiny().decoder.layers
    assert without_zero_channels(layers) is layers
    unknown = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 3))
    nn.init.zeros_(unknown[0].weight[:4])
    assert without_zero_channels(unknown) is unknown, "a norm mixes channels"


def test_a_bias_keeps_its_channel() -> None:
    layers = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1))
    with torch.no_grad():
        layers[0].weight[1:] = 0
        layers[0].bias[:] = torch.tensor([0.5, 0.25, 0, -1])
    small = without_zero_channels(layers)
    assert small[0].out_channels == 3, "the third is always zero"
    given = torch.randn(1, 2, 3, 3)
    torch.testing.assert_close(small(given), layers(given))
    with torch.no_grad():
        layers[0].bias.zero_()
        layers[0].weight.zero_()
    torch.testing.assert_close(without_zero_channels(layers)(given), layers(given))
