"""The cross-attention sites of a UNet, derived from its own keys.

One site has four names: its position as ComfyUI reports it while sampling, its module in ComfyUI (ldm naming), its module in
diffusers, and its number in adapter checkpoints. The number counts *all* attention processors in diffusers' order (down
blocks, up blocks, then the middle block; self-attention before cross-attention), so cross-attention has odd numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .errors import MismatchError

_LDM = re.compile(
    r"(?:^|\.)(?P<stem>(?P<block>input_blocks|middle_block|output_blocks)\.(?P<number>\d+)(?:\.\d+)?)"
    r"\.transformer_blocks\.(?P<depth>\d+)\.attn2\.to_k\.weight$"
)
_DIFFUSERS = re.compile(
    r"(?:^|\.)(?P<stem>(?:(?P<side>down|up)_blocks\.(?P<level>\d+)|mid_block)\.attentions\.(?P<index>\d+))"
    r"\.transformer_blocks\.(?P<depth>\d+)\.attn2\.to_k\.weight$"
)


@dataclass(frozen=True)
class Site:
    """One cross-attention layer."""

    index: int  # number in checkpoints, "adapter_modules.{index}.to_k_ip.weight"
    comfy: tuple[str, int, int]  # (block, block number, depth in the transformer), as ComfyUI reports it
    comfy_module: str  # "input_blocks.4.1.transformer_blocks.0.attn2"
    diffusers_module: str  # "down_blocks.1.attentions.0.transformer_blocks.0.attn2"

    @property
    def name(self) -> str:
        return f"{self.comfy[0]} {self.comfy[1]}.{self.comfy[2]}"


@dataclass(frozen=True)
class _Transformer:
    """One stack of transformer blocks in both naming schemes; `order` sorts stacks as diffusers does."""

    order: tuple[int, int, int]
    block: tuple[str, int]
    comfy_stem: str
    diffusers_stem: str


def attention_sites(keys: Iterable[str]) -> tuple[Site, ...]:
    """Return the cross-attention sites of the UNet with these state-dict keys, in checkpoint order.

    Works for any width and depth of the Stable Diffusion UNet family, with ldm (ComfyUI) or diffusers names, with or without
    a prefix such as "diffusion_model.". Raises MismatchError if the keys belong to no such UNet.
    """
    names = list(keys)
    found = _from_ldm(names) or _from_diffusers(names)
    if not found:
        raise MismatchError(
            "no cross-attention layers of a Stable Diffusion UNet found in this model. ID adapters work in SD1.5, SD2.1, SDXL and models "
            "that were trained from them: load one of the family that the adapter was made for."
        )
    sites: list[Site] = []
    for transformer, depth in sorted(set(found), key=lambda item: (item[0].order, item[1])):
        suffix = f"transformer_blocks.{depth}.attn2"
        sites.append(
            Site(
                index=2 * len(sites) + 1,
                comfy=(*transformer.block, depth),
                comfy_module=f"{transformer.comfy_stem}.{suffix}",
                diffusers_module=f"{transformer.diffusers_stem}.{suffix}",
            )
        )
    return tuple(sites)


def _from_ldm(names: list[str]) -> list[tuple[_Transformer, int]]:
    matches = [match for name in names if (match := _LDM.search(name))]
    down_ends = _block_numbers(names, r"input_blocks\.(\d+)\.0\.op\.weight")
    up_ends = _block_numbers(names, r"output_blocks\.(\d+)\.\d+\.conv\.weight")
    seen: dict[str, _Transformer] = {}
    found: list[tuple[_Transformer, int]] = []
    for match in sorted(matches, key=lambda m: (m["block"], int(m["number"]))):
        stem, number = match["stem"], int(match["number"])
        if stem not in seen:
            seen[stem] = _ldm_transformer(match["block"], number, stem, down_ends, up_ends)
        found.append((seen[stem], int(match["depth"])))
    return found


def _ldm_transformer(
    block: str, number: int, stem: str, down_ends: list[int], up_ends: list[int]
) -> _Transformer:
    if block == "middle_block":
        return _Transformer((2, 0, 0), ("middle", 0), stem, "mid_block.attentions.0")
    if block == "input_blocks":  # block 0 is conv_in; a downsampler closes each level with a block of its own
        ends = [end for end in down_ends if end < number]
        level, index = len(ends), number - (ends[-1] + 1 if ends else 1)
        return _Transformer(
            (0, level, index), ("input", number), stem, f"down_blocks.{level}.attentions.{index}"
        )
    ends = [end for end in up_ends if end < number]  # the upsampler sits inside the last block of its level
    level, index = len(ends), number - (ends[-1] + 1 if ends else 0)
    return _Transformer((1, level, index), ("output", number), stem, f"up_blocks.{level}.attentions.{index}")


def _block_numbers(names: list[str], pattern: str) -> list[int]:
    compiled = re.compile(r"(?:^|\.)" + pattern + "$")
    return sorted({int(match[1]) for name in names if (match := compiled.search(name))})


def _from_diffusers(names: list[str]) -> list[tuple[_Transformer, int]]:
    resnets: dict[tuple[str, int], int] = {}
    for name in names:
        if resnet := re.search(r"(?:^|\.)(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", name):
            level = (resnet[1], int(resnet[2]))
            resnets[level] = max(resnets.get(level, 0), int(resnet[3]) + 1)

    def residual_blocks(side: str, level: int) -> int:
        if (side, level) not in resnets:
            raise MismatchError(
                f"the keys name no {side}_blocks.{level}.resnets, so the UNet's blocks cannot be counted; "
                "pass all keys of its state dict, not only those of its attention layers"
            )
        return resnets[side, level]

    found: list[tuple[_Transformer, int]] = []
    for name in names:
        if not (match := _DIFFUSERS.search(name)):
            continue
        index = int(match["index"])
        if match["side"] is None:
            transformer = _Transformer((2, 0, index), ("middle", 0), "middle_block.1", match["stem"])
        elif match["side"] == "down":
            down = int(match["level"])
            number = 1 + index + sum(residual_blocks("down", i) + 1 for i in range(down))
            transformer = _Transformer(
                (0, down, index), ("input", number), f"input_blocks.{number}.1", match["stem"]
            )
        else:
            up = int(match["level"])
            number = index + sum(residual_blocks("up", i) for i in range(up))
            transformer = _Transformer(
                (1, up, index), ("output", number), f"output_blocks.{number}.1", match["stem"]
            )
        found.append((transformer, int(match["depth"])))
    return found


_FAMILIES = {(16, 768): "SD1.5", (16, 1024): "SD2.1", (70, 2048): "SDXL"}
_TEXT_FAMILIES = {
    (("l", 768),): "SD1.5",
    (("h", 1024),): "SD2.1",
    (("g", 1280), ("l", 768)): "SDXL",
    (("g", 1280),): "the SDXL refiner",
}


def family_name(count: int, context_width: int) -> str:
    """Return the common name of the UNet with this many sites and this text width, or the numbers if it has none."""
    unknown = f"a UNet with {count} attention sites, text width {context_width}"
    return _FAMILIES.get((count, context_width), unknown)


def is_known_family(count: int, context_width: int) -> bool:
    """Return whether the UNet has a common name (see `family_name`)."""
    return (count, context_width) in _FAMILIES


def text_family_name(widths: Mapping[str, int]) -> str:
    """Return the common name of the models with these text encoders, or the widths if they have none.

    Args:
        widths: width by encoder name; 0 for an encoder that is not CLIP.
    """
    known = _TEXT_FAMILIES.get(tuple(sorted(widths.items())))
    shown = ", ".join(f"{name} {width or '(no CLIP)'}" for name, width in widths.items())
    return known or f"a model with text encoders of widths {shown}"
