"""IDAdapter in a diffusers UNet: adapters, UNets and identities that do not fit are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from idadapter_core.adapter import Adapter
from idadapter_core.errors import InputError, MismatchError
from idadapter_core.stable_diffusion.inject import inject
from tests.core.stable_diffusion.inject.checks import (
    bad_tokens,
    require_one_device,
    require_refused,
    require_three_rows,
)
from tests.core.stable_diffusion.inject.gated import COUNT, tokens
from tests.tiny.diffusers_unet import diffusers_unet, predict, traces
from tests.tiny.idadapter import CONFIGS, tiny_idadapter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def adapter() -> Adapter:
    return tiny_idadapter(CONFIGS["sd15"])


def test_a_unet_of_another_family_is_refused_with_both_names(unet: Any) -> None:
    traced = traces(unet)
    other = tiny_idadapter(CONFIGS["sdxl"])
    both = "11 attention sites, text width 128.* UNet2DConditionModel: .*7 attention sites, text width 64"
    with pytest.raises(MismatchError, match=f"tiny 0 was made for .*{both}"):
        inject(unet, other)
    assert traces(unet) == traced


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_width": 96}, "text width 96.*text width 64"),
        ({"site_widths": (64,) * 7}, "The two differ in the widths of their layers"),
    ],
)
def test_a_unet_of_other_sizes_is_refused(unet: Any, changes: dict[str, Any], message: str) -> None:
    traced = traces(unet)
    adapter = tiny_idadapter(replace(CONFIGS["sd15"], **changes))
    with pytest.raises(MismatchError, match=message):
        inject(unet, adapter)
    assert traces(unet) == traced


def test_injecting_twice_is_refused(unet: Any, adapter: Adapter) -> None:
    injected = inject(unet, adapter)
    traced = traces(unet)
    with pytest.raises(MismatchError, match="injected into this UNet2DConditionModel already"):
        inject(unet, adapter)
    assert traces(unet) == traced
    injected.eject()
    inject(unet, adapter)


class Wrapper(nn.Module):
    """What a training script may wrap around a model."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_a_wrapper_or_another_model_is_refused(unet: Any, adapter: Adapter) -> None:
    traced = traces(unet)
    for thing in (Wrapper(unet), nn.Linear(2, 2)):
        with pytest.raises(MismatchError, match="no UNet2DConditionModel of diffusers.* not a pipeline"):
            inject(thing, adapter)
    assert traces(unet) == traced


class OtherBlock(nn.Module):
    """A block with the same attention in another order."""

    def __init__(self, block: Any):
        super().__init__()
        self.attn1, self.attn2 = block.attn1, block.attn2


@pytest.mark.parametrize("where", ["norm", "class", "positions", "fuser"])
def test_blocks_of_other_kinds_are_refused(unet: Any, adapter: Adapter, where: str) -> None:
    blocks = unet.mid_block.attentions[0].transformer_blocks
    if where == "norm":
        blocks[0].norm_type = "ada_norm_zero"
    elif where == "class":
        blocks[0] = OtherBlock(blocks[0])
    elif where == "positions":
        blocks[0].pos_embed = nn.Identity()
    else:
        blocks[0].fuser = nn.Identity()
    traced = traces(unet)
    expected = {
        "norm": "'ada_norm_zero', not 'layer_norm'",
        "class": "is a OtherBlock, not a BasicTransformerBlock",
        "positions": "position embeddings",
        "fuser": "GLIGEN",
    }[where]
    with pytest.raises(MismatchError, match=f"mid_block.attentions.0.transformer_blocks.0 .*{expected}"):
        inject(unet, adapter)
    assert traces(unet) == traced


def test_a_unet_without_self_attention_is_refused(adapter: Adapter) -> None:
    with pytest.raises(MismatchError, match="has not self-attention followed by cross-attention"):
        inject(diffusers_unet("sd15", only_cross_attention=True), adapter)


def test_fused_projections_are_refused_before_and_after(unet: Any, adapter: Adapter) -> None:
    unet.fuse_qkv_projections()
    with pytest.raises(MismatchError, match=r"fused.*unfuse_qkv_projections\(\)"):
        inject(unet, adapter)
    unet.unfuse_qkv_projections()
    inject(unet, adapter)
    want = predict(unet)
    unet.fuse_qkv_projections()
    with pytest.raises(MismatchError, match=r"ran without calling attn2.to_k, attn2.to_v.*Unfuse"):
        predict(unet)
    unet.unfuse_qkv_projections()
    assert torch.equal(predict(unet), want)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        *bad_tokens(tokens()),
        ({"bias": torch.zeros(1, COUNT)}, InputError, r"bias must have one value for each of the 5 tokens"),
        ({"bias": torch.zeros(COUNT - 1)}, InputError, r"bias must have .*got shape \(4,\)"),
        ({"rows": torch.ones(2)}, InputError, "rows must be a bool tensor"),
        ({"rows": torch.ones(2, 1, dtype=torch.bool)}, InputError, "rows must be a bool tensor"),
        ({"tokens": tokens(3), "rows": torch.ones(2).bool()}, InputError, "rows has 2 entries, tokens 3"),
        ({"tokens": None, "rows": torch.ones(2).bool()}, InputError, "bias and rows belong to tokens"),
        ({"tokens": None, "bias": torch.zeros(COUNT)}, InputError, "bias and rows belong to tokens"),
        ({"strength": float("nan")}, InputError, "strength must be a finite number, got nan"),
    ],
)
def test_bad_identities_are_refused(
    unet: Any, adapter: Adapter, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    require_refused(inject(unet, adapter), tokens(), given, error, message)


@pytest.mark.parametrize(
    "given", [{"tokens": tokens(3)}, {"tokens": tokens(), "rows": torch.tensor([True, True, False])}]
)
def test_a_call_with_other_rows_is_refused(unet: Any, adapter: Adapter, given: dict[str, Any]) -> None:
    require_three_rows(inject(unet, adapter), given)


def test_an_adapter_elsewhere_is_refused(unet: Any, adapter: Adapter) -> None:
    require_one_device(unet, adapter, tokens())
