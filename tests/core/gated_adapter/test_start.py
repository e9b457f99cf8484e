"""The start of a new IDAdapter: closed gates, no deltas, and values that follow its seed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from idadapter_core.adapter import initial_adapter
from idadapter_core.mechanisms.gated import GateIdentity
from idadapter_core.methods.idadapter import IDAdapterConfig, IDAdapterEncoder, IDAdapterLayers
from idadapter_core.methods.idadapter.encoder import initialise
from tests.core.gated_adapter.gates import LENGTH, draw
from tests.tiny.idadapter import CONFIGS, tiny_idadapter, vision_features


def initialised(config: IDAdapterConfig, seed: int = 0) -> dict[str, Tensor]:
    return dict(initial_adapter(config, "start", seed).state_dict())


def test_a_start_has_closed_gates_and_no_deltas() -> None:
    adapter = initial_adapter(CONFIGS["sd15"], "start")
    for name, tensor in adapter.state_dict().items():
        if "gate_" in name or ".deltas." in name:
            assert not tensor.any(), name
        elif tensor.ndim == 1:
            assert (tensor == (1 if name.endswith("weight") else 0)).all(), name
        else:
            torch.testing.assert_close(tensor.mean(), torch.tensor(0.0), atol=0.02, rtol=0)
            assert len(tensor.unique()) > 0.9 * tensor.numel(), name
    assert set(adapter.mechanisms.openings) == {1, 3, 5, 7, 9, 11, 13}
    assert set(adapter.mechanisms.openings.values()) == {(0.0, 0.0)}
    assert adapter.mechanisms.deltas == {}


def test_a_start_leaves_the_stream_as_it_is_and_still_makes_identities() -> None:
    adapter = initial_adapter(replace(CONFIGS["sd15"], tokens=5), "start")
    made = adapter.encode(vision_features(1, 2))
    assert made.adapter_tokens is not None
    assert 0.5 < made.adapter_tokens.square().mean().sqrt() < 2
    for number, gate in adapter.layers.gates.items():
        keys, values = gate.project(made.adapter_tokens)
        y = draw(number, 1, LENGTH, keys.shape[-1])
        assert torch.equal(gate(y, [GateIdentity(keys, values)]), y)


def test_a_start_follows_its_seed() -> None:
    config = CONFIGS["sd15"]
    one, again, other = initialised(config, 3), initialised(config, 3), initialised(config, 4)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_initialising_replaces_all_values() -> None:
    config = replace(CONFIGS["sd15"], tokens=5)
    encoder, layers = IDAdapterEncoder(config), IDAdapterLayers(config)
    for module in (encoder, layers):
        for parameter in module.parameters():
            nn.init.constant_(parameter, 7.0)
    initialise(encoder, layers, config, 3)
    expected = initialised(config, 3)
    found = {**encoder.state_dict(), **{f"layers.{key}": t for key, t in layers.state_dict().items()}}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_start_of_half_precision_is_the_rounded_one(dtype: torch.dtype) -> None:
    exact = initialised(CONFIGS["sd15"])
    half = initial_adapter(CONFIGS["sd15"], "start", dtype=dtype)
    assert {p.dtype for p in half.layers.parameters()} == {dtype}
    assert {p.dtype for p in half.encoder.parameters()} == {torch.float32}
    for key, tensor in half.state_dict().items():
        torch.testing.assert_close(tensor.to(dtype), exact[key].to(dtype), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("text_tokens", [1, 2])
def test_the_identity_word_starts_at_the_length_of_a_usual_word(text_tokens: int) -> None:
    config = replace(
        CONFIGS["sdxl"], text_hidden=512, text_widths=(768, 1280), text_tokens=text_tokens, vision_width=256
    )
    encoder = initial_adapter(config, "start").encoder
    for scale in (0.1, 1.0, 30.0):
        words = encoder.word(scale * draw("class", 4, 256))
        for word in words.values():
            size = word.square().mean(dim=-1).sqrt()
            assert ((size > 0.007) & (size < 0.028)).all()


def test_untrained_adapters_say_so() -> None:
    (note,) = initial_adapter(CONFIGS["sd15"], "start").notes
    assert note.startswith("it is untrained: all gates are closed")
    config = CONFIGS["sd15"]
    for strengths in ({}, {"gate": 0.0}, {"delta": 0.0}):
        assert tiny_idadapter(config, **strengths).notes == ()
    assert tiny_idadapter(config, gate=0.0, delta=0.0).notes == (note,)
