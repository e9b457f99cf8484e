"""Attention sites of the known UNets against the recorded tables, from either naming scheme."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from idadapter_core.errors import MismatchError
from idadapter_core.sites import Site, attention_sites, family_name, text_family_name

TABLE = json.loads((Path(__file__).parents[1] / "golden" / "attention_sites.json").read_text())
FAMILIES = {"SD1.5": 16, "SD2.1": 16, "SDXL": 70}
LEVELS = {"SD1.5": 4, "SD2.1": 4, "SDXL": 3}
TO_K = ".to_k.weight"


def expected_sites(family: str) -> tuple[Site, ...]:
    return tuple(
        Site(index, (block[0], block[1], block[2]), comfy, diffusers)
        for index, block, comfy, diffusers in TABLE[family]
    )


def ldm_keys(family: str) -> list[str]:
    """The keys that matter, as ComfyUI names them: attention, down- and upsamplers, and a few others."""
    levels = LEVELS[family]
    attention = [comfy for _, _, comfy, _ in TABLE[family]]
    keys = [f"{module}{TO_K}" for module in attention]
    keys += [f"{module.replace('attn2', 'attn1')}{TO_K}" for module in attention]
    keys += [f"input_blocks.{3 * level}.0.op.weight" for level in range(1, levels)]
    for level in range(levels - 1):
        block = 3 * level + 2
        position = 2 if any(module.startswith(f"output_blocks.{block}.1.") for module in attention) else 1
        keys.append(f"output_blocks.{block}.{position}.conv.weight")
    return [*keys, "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight", "out.2.weight"]


def diffusers_keys(family: str) -> list[str]:
    levels = LEVELS[family]
    keys = [f"{module}{TO_K}" for _, _, _, module in TABLE[family]]
    keys += [f"{module.replace('attn2', 'attn1')}{TO_K}" for _, _, _, module in TABLE[family]]
    for side, count in (("down", 2), ("up", 3)):
        keys += [
            f"{side}_blocks.{level}.resnets.{block}.conv1.weight"
            for level in range(levels)
            for block in range(count)
        ]
    return [*keys, "conv_in.weight", "mid_block.resnets.0.conv1.weight"]


@pytest.mark.parametrize(("family", "count"), FAMILIES.items())
@pytest.mark.parametrize("naming", [ldm_keys, diffusers_keys])
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "unet."])
def test_sites_agree_with_the_table(family: str, count: int, naming, prefix: str) -> None:  # noqa: ANN001
    keys = [prefix + key for key in naming(family)]
    random.Random(5).shuffle(keys)
    sites = attention_sites(iter(keys))
    assert len(sites) == count
    assert sites == expected_sites(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_addresses_are_unique_and_the_middle_block_is_among_them(family: str) -> None:
    sites = attention_sites(ldm_keys(family))
    for column in ("index", "comfy", "comfy_module", "diffusers_module", "name"):
        assert len({getattr(site, column) for site in sites}) == len(sites), column
    assert [site.index for site in sites] == list(range(1, 2 * len(sites), 2))
    middle = [site for site in sites if site.comfy[:2] == ("middle", 0)]
    assert [site.comfy_module.split(".transformer")[0] for site in middle] == ["middle_block.1"] * len(middle)
    assert len(middle) == (10 if family == "SDXL" else 1)


def test_other_widths_and_depths() -> None:
    """One residual block a level, two levels, depths 2 (down), 1 (middle) and 3 (up)."""
    keys = ["input_blocks.2.0.op.weight", "output_blocks.1.1.conv.weight"]
    stems = [
        ("input_blocks.3.1", 2),
        ("middle_block.1", 1),
        ("output_blocks.0.1", 3),
        ("output_blocks.1.1", 3),
    ]
    keys += [
        f"{stem}.transformer_blocks.{depth}.attn2{TO_K}" for stem, depths in stems for depth in range(depths)
    ]
    sites = attention_sites(keys)
    assert [(site.comfy, site.diffusers_module.split(".transformer")[0]) for site in sites] == [
        (("input", 3, 0), "down_blocks.1.attentions.0"),
        (("input", 3, 1), "down_blocks.1.attentions.0"),
        *[(("output", 0, depth), "up_blocks.0.attentions.0") for depth in range(3)],
        *[(("output", 1, depth), "up_blocks.0.attentions.1") for depth in range(3)],
        (("middle", 0, 0), "mid_block.attentions.0"),
    ]


def test_a_control_net_beside_the_unet_adds_no_sites() -> None:
    keys = ldm_keys("SD1.5")
    beside = [f"control_model.{key}" for key in keys if not key.startswith("output_blocks")]
    assert attention_sites([*beside, *(f"model.diffusion_model.{key}" for key in keys)]) == expected_sites(
        "SD1.5"
    )


@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"],
        ["transformer_blocks.0.attn2.to_k.weight"],
        ["input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"],
        ["input_blocks.1.1.time_stack.0.attn2.to_k.weight"],
    ],
)
def test_unknown_models_are_refused(keys: list[str]) -> None:
    with pytest.raises(MismatchError, match=r"no cross-attention layers.*SD1\.5, SD2\.1, SDXL"):
        attention_sites(keys)


def test_incomplete_diffusers_keys_are_refused() -> None:
    keys = [f"{module}{TO_K}" for _, _, _, module in TABLE["SDXL"]]
    with pytest.raises(MismatchError, match=r"no down_blocks\.0\.resnets.*pass all keys"):
        attention_sites(keys)


def test_family_names() -> None:
    assert family_name(16, 768) == "SD1.5"
    assert family_name(16, 1024) == "SD2.1"
    assert family_name(70, 2048) == "SDXL"
    assert family_name(11, 128) == "a UNet with 11 attention sites, text width 128"


def test_names_of_the_models_with_some_text_encoders() -> None:
    assert text_family_name({"l": 768}) == "SD1.5"
    assert text_family_name({"h": 1024}) == "SD2.1"
    assert text_family_name({"l": 768, "g": 1280}) == text_family_name({"g": 1280, "l": 768}) == "SDXL"
    flux = text_family_name({"l": 768, "t5xxl": 0})
    assert flux == "a model with text encoders of widths l 768, t5xxl (no CLIP)"
