"""The demo world's autoencoder is a VAE that ComfyUI loads by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from idadapter_core.demo_world.autoencoder import Autoencoder, Shape, load_autoencoder, save_autoencoder


@pytest.mark.parametrize("channels", [4, 12])
def test_comfyui_computes_the_same(channels: int, tmp_path: Path) -> None:
    import comfy.latent_formats
    import comfy.sd
    import comfy.utils

    sd15 = comfy.latent_formats.SD15()
    torch.manual_seed(0)
    path = tmp_path / "vae.safetensors"
    net = Autoencoder(Shape(channels, (8, 8, 16, 16), (0, 1, 1, 1), (0, 1, 2, 1)))
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(1.5)  # so that latents are of a size that the bounds of the decoder matter
    save_autoencoder(net, path)
    ours = load_autoencoder(path)
    state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    vae = comfy.sd.VAE(sd=state, metadata=metadata, dtype=torch.float32)
    assert vae.latent_channels == channels
    pictures = torch.rand(2, 32, 48, 3)
    wanted = ours.encode(pictures.permute(0, 3, 1, 2) * 2 - 1)
    latents = vae.encode(pictures)
    assert latents.shape == (2, channels, 4, 6)
    torch.testing.assert_close(sd15.process_in(latents), wanted, atol=1e-4, rtol=1e-3)
    back = (ours.decode(3 * wanted) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    given = sd15.process_out(3 * wanted)
    torch.testing.assert_close(vae.decode(given), back, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(vae.decode_tiled(given, tile_x=64, tile_y=64), back, atol=1e-4, rtol=1e-3)
