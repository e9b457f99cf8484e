"""ID Prompt with IDAdapter: CLIPs with clip skip, with a LoRA, and of other models; and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.golden import recipe
from tests.nodes.word import (
    ENCODERS,
    KINDS,
    PLAIN_TEXT,
    SKS,
    assert_same,
    changed_positions,
    clip,
    id_prompt,
    person,
    states_of,
    taught,
    teach,
    text_encode,
    vectors,
)
from tests.tiny.checkpoints import tiny_clip

# --- CLIPs ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_with_clip_skip(kind: str) -> None:
    from nodes import CLIPSetLastLayer

    skipped, expected = (
        CLIPSetLastLayer().set_last_layer(each, -3)[0] for each in (clip(kind), taught(kind))
    )
    conditioning, _ = id_prompt(skipped, person(kind), PLAIN_TEXT)
    assert_same(conditioning, text_encode(expected, PLAIN_TEXT))
    whole, _ = id_prompt(clip(kind), person(kind), PLAIN_TEXT)
    assert changed_positions(conditioning, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_with_a_lora(kind: str) -> None:
    encoder = ENCODERS[kind][0]
    name = f"clip_{encoder}.transformer.text_model.encoder.layers.0.mlp.fc1.weight"

    def patched(some_clip: Any) -> Any:
        clone = some_clip.clone()
        weight = dict(some_clip.cond_stage_model.named_parameters())[name]
        assert clone.add_patches({name: ("diff", (0.2 * recipe.weight(5, name, weight.shape),))}, 1.0)
        return clone

    conditioning, _ = id_prompt(patched(tiny_clip(kind)), person(kind), PLAIN_TEXT)
    expected = text_encode(patched(teach(tiny_clip(kind), {SKS: 0}, person(kind))), PLAIN_TEXT)
    assert_same(conditioning, expected)
    without, _ = id_prompt(clip(kind), person(kind), PLAIN_TEXT)
    assert changed_positions(conditioning, without)


@pytest.mark.parametrize(
    ("identity_kind", "clip_kind", "wanted", "found"),
    [
        ("sdxl", "sd15", "l 64, g 64", "l 64"),
        ("sd15", "sdxl", "l 64", "l 64, g 64"),
        ("sd21", "sd15", "h 64", "l 64"),
        ("sd15", "sd21", "l 64", "h 64"),
    ],
)
@pytest.mark.parametrize("text", ["a cat", "sks"])
def test_a_clip_of_another_model_is_refused(
    identity_kind: str, clip_kind: str, wanted: str, found: str, text: str
) -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError

    with pytest.raises(MismatchError) as refused:
        id_prompt(clip(clip_kind), person(identity_kind), text)
    message = str(refused.value)
    assert (
        f"made for a model with text encoders of widths {wanted}, this CLIP is that of a model with"
        in message
    )
    assert f"of widths {found}." in message
    assert "Wire the CLIP of a checkpoint of the adapter's family" in message


def test_a_word_of_another_width_is_refused() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError

    wide = person("sd15", l=torch.ones(1, 1, 768))
    with pytest.raises(
        MismatchError, match="made for SD1.5, this CLIP is that of a model with text encoders of widths l 64"
    ):
        id_prompt(clip("sd15"), wide, "sks")


@pytest.mark.parametrize("text", ["a cat", "a photo of sks"])
def test_an_identity_without_a_word_is_warned_of(text: str, caplog: pytest.LogCaptureFixture) -> None:
    wordless = replace(person("sdxl"), text_tokens={})
    conditioning, encoded = id_prompt(clip("sdxl"), wordless, text)
    assert encoded == text
    assert_same(conditioning, text_encode(clip("sdxl"), text))
    assert "ID Prompt: the adapter of this identity has no text branch" in caplog.text


# --- nothing else changes ---


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_changes_neither_the_identity_nor_the_clip(kind: str) -> None:
    identity = person(kind, 2)
    before = {name: tensor.clone() for name, tensor in identity.text_tokens.items()}
    plain = text_encode(clip(kind), PLAIN_TEXT)
    first, _ = id_prompt(clip(kind), identity, "a (sks:1.3) here", token_weight=0.5)
    again, _ = id_prompt(clip(kind), identity, "a (sks:1.3) here", token_weight=0.5)
    assert_same(first, again)
    assert identity.text_tokens.keys() == before.keys()
    assert all(torch.equal(identity.text_tokens[name], tensor) for name, tensor in before.items())
    assert_same(text_encode(clip(kind), PLAIN_TEXT), plain)


def test_identities_in_half_precision_are_read_in_full() -> None:
    half = person("sd15", l=vectors("sd15")["l"].half())
    conditioning, _ = id_prompt(clip("sd15"), half, PLAIN_TEXT)
    expected, _ = id_prompt(clip("sd15"), person("sd15"), PLAIN_TEXT)
    torch.testing.assert_close(states_of(conditioning), states_of(expected), atol=2e-2, rtol=0)
