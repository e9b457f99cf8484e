"""UniID in a diffusers UNet: adapters, UNets and identities that do not fit are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from idadapter_core.adapter import Adapter
from idadapter_core.errors import InputError, MismatchError
from idadapter_core.stable_diffusion.inject import eject, inject
from tests.core.stable_diffusion.inject.checks import (
    bad_tokens,
    require_one_device,
    require_refused,
    require_three_rows,
)
from tests.core.stable_diffusion.inject.decoupled import tokens
from tests.tiny.diffusers_unet import predict, traces
from tests.tiny.idadapter import CONFIGS as IDADAPTERS, tiny_idadapter
from tests.tiny.uniid import CONFIGS, tiny_uniid

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def adapter() -> Adapter:
    return tiny_uniid(CONFIGS["sd15"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_width": 96}, "text width 96.*UNet2DConditionModel: .*text width 64"),
        ({"site_widths": (64,) * 7}, "The two differ in the widths of their layers"),
        ({"site_widths": (64,) * 11}, "tiny 0 was made for .*11 attention sites.*7 attention sites"),
        ({"adapter_tokens": 0}, "tiny 0 has no adapter branch, so there is nothing to inject"),
    ],
)
def test_an_adapter_for_another_unet_is_refused(unet: Any, changes: dict[str, Any], message: str) -> None:
    traced = traces(unet)
    with pytest.raises(MismatchError, match=message):
        inject(unet, tiny_uniid(replace(CONFIGS["sd15"], **changes)))
    assert traces(unet) == traced


def test_one_adapter_at_a_time(unet: Any, adapter: Adapter) -> None:
    for first, second in (
        (adapter, tiny_idadapter(IDADAPTERS["sd15"])),
        (tiny_idadapter(IDADAPTERS["sd15"]), adapter),
    ):
        inject(unet, first)
        with pytest.raises(MismatchError, match="injected into this UNet2DConditionModel already"):
            inject(unet, second)
        eject(unet)


def test_fused_projections_are_refused(unet: Any, adapter: Adapter) -> None:
    unet.fuse_qkv_projections()
    with pytest.raises(MismatchError, match=r"fused.*unfuse_qkv_projections\(\)"):
        inject(unet, adapter)


def test_a_processor_that_passes_the_projections_by_is_noticed(unet: Any, adapter: Adapter) -> None:
    class Other:
        def __call__(self, attention: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden_states

    inject(unet, adapter)
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn2.processor = Other()
    with pytest.raises(MismatchError, match=r"ran without calling attn2.to_q, attn2.to_out.0.*Other"):
        predict(unet)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        *bad_tokens(tokens()),
        ({"strength": float("inf")}, InputError, "strength must be a finite number, got inf"),
        ({"strength": torch.tensor([1.0, float("nan")])}, InputError, "strength must be a finite number"),
        ({"strength": torch.ones(2, 1)}, InputError, r"strength must be a number or of shape \(batch,\)"),
        ({"tokens": tokens(3), "strength": torch.ones(2)}, InputError, "tokens has 3 rows, strength 2;"),
    ],
)
def test_bad_identities_are_refused(
    unet: Any, adapter: Adapter, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    require_refused(inject(unet, adapter), tokens(), given, error, message)


@pytest.mark.parametrize("given", [{"tokens": tokens(3)}, {"tokens": tokens(), "strength": torch.ones(3)}])
def test_a_call_with_other_rows_is_refused(unet: Any, adapter: Adapter, given: dict[str, Any]) -> None:
    require_three_rows(inject(unet, adapter), given)


def test_an_adapter_elsewhere_is_refused(unet: Any, adapter: Adapter) -> None:
    require_one_device(unet, adapter, tokens())
