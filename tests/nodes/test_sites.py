"""Every cross-attention layer of the UNet is reached, the middle block included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nodes.sampling import KINDS, SITE_COUNT, apply, draw, person, record, unet

TABLE = Path(__file__).parents[1] / "golden" / "attention_sites.json"

_FOUR_LEVELS: dict[str, Any] = {
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3,
}
LEVELS: dict[str, dict[str, Any]] = {
    "SD1.5": _FOUR_LEVELS,
    "SD2.1": _FOUR_LEVELS,
    "SDXL": {
        "channel_mult": [1, 2, 4],
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    },
}


def full_size_keys(family: str) -> list[str]:
    """The keys of ComfyUI's UNet at full size, built without memory."""
    import comfy.ops
    import comfy.supported_models as supported
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = {"SD1.5": supported.SD15, "SD2.1": supported.SD20, "SDXL": supported.SDXL}[family]
    # Detection is by the first entries of unet_config; the rest of a UNet is the family's levels.
    sizes = {**config.unet_config, **(config.unet_extra_config or {}), **LEVELS[family]}
    network = UNetModel(
        **sizes,
        image_size=32,
        in_channels=4,
        out_channels=4,
        use_spatial_transformer=True,
        legacy=False,
        num_classes="sequential" if sizes["adm_in_channels"] else None,
        device=torch.device("meta"),
        operations=comfy.ops.disable_weight_init,
    )
    return [f"diffusion_model.{key}" for key in network.state_dict()]


@pytest.mark.parametrize(("family", "count"), [("SD1.5", 16), ("SD2.1", 16), ("SDXL", 70)])
def test_sites_of_a_full_size_unet(family: str, count: int) -> None:
    from ComfyUI_IDAdapter.idadapter_core.sites import attention_sites

    sites = attention_sites(full_size_keys(family))
    found = [[site.index, list(site.comfy), site.comfy_module, site.diffusers_module] for site in sites]
    assert len(found) == count
    assert found == json.loads(TABLE.read_text(encoding="utf-8"))[family]


@pytest.mark.parametrize("kind", KINDS)
def test_every_site_fires_in_every_call(kind: str) -> None:
    from ComfyUI_IDAdapter.idadapter_core.sites import attention_sites

    model, calls = record(apply(unet(kind), kind, person(kind)))
    draw(model, kind, steps=2)
    addresses = {site.comfy for site in attention_sites(model.model_state_dict())}
    assert len(addresses) == SITE_COUNT[kind]
    assert ("middle", 0, 0) in addresses
    assert len(calls) == 2
    for call in calls:
        # The keys are what ComfyUI reported while it ran.
        assert call.sites.keys() == addresses
        for site in call.sites.values():
            assert (site.out - site.text).norm() > 0.01 * site.text.norm()
