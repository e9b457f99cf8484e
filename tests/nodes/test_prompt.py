"""ID Prompt: identity text tokens in an otherwise ordinary conditioning."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness.comfy import pack_nodes
from tests.nodes.sampling import Conditioning, apply, person, prompt, record, rescale, sample, unet
from tests.tiny.checkpoints import tiny_clip

COUNT = 3  # identity text tokens


@functools.cache
def clip(kind: str) -> Any:
    """The tiny CLIP of that kind, shared."""
    return tiny_clip(kind)


def id_prompt(
    kind: str,
    text: str,
    identity: Any = None,
    class_word: str = "auto",
    token_weight: float = 1.0,
    with_clip: Any = None,
) -> tuple[Conditioning, str]:
    """ID Prompt: its conditioning and the prompt as encoded."""
    identity = person(kind) if identity is None else identity
    with torch.inference_mode():
        output = pack_nodes()["IDAdapterPrompt"].execute(
            with_clip or clip(kind), identity, text, class_word, token_weight
        )
    conditioning, encoded = output.result
    return conditioning, encoded


def plain(kind: str, text: str) -> Tensor:
    """The states of CLIP Text Encode."""
    from nodes import CLIPTextEncode

    with torch.inference_mode():
        states: Tensor = CLIPTextEncode().encode(clip(kind), text)[0][0][0]
    return states


def norms(kind: str, with_clip: Any = None) -> dict[str, Tensor]:
    from ComfyUI_IDAdapter.nodes.host.text import reference_norms

    with torch.inference_mode():
        found: dict[str, Tensor] = reference_norms(with_clip or clip(kind), COUNT)
    return found


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_tokens_stand_after_the_start_at_reference_length(kind: str) -> None:
    from ComfyUI_IDAdapter.nodes.host.conditioning import TEXT_POSITIONS

    identity = person(kind)
    ((states, options),), _ = id_prompt(kind, "photo of a person in a cafe", identity)
    assert states.shape == plain(kind, "photo of a person in a cafe").shape
    assert options[TEXT_POSITIONS] == (1, 2, 3)
    parts = states[0, 1 : 1 + COUNT].split(64, dim=-1)
    assert len(parts) == len(identity.text_tokens)
    for (encoder, tokens), part in zip(identity.text_tokens.items(), parts, strict=True):
        torch.testing.assert_close(part.norm(dim=-1), norms(kind)[encoder], rtol=1e-4, atol=0)
        direction = torch.cosine_similarity(part, tokens[0], dim=-1)
        torch.testing.assert_close(direction, torch.ones(COUNT))
    assert ("pooled_output" in options) is True


def test_reference_is_the_length_of_a_name() -> None:
    """Within the range of what the encoder gives the tokens of names themselves."""
    from ComfyUI_IDAdapter.idadapter_core.mechanisms.text import reference_names

    lengths = torch.stack([plain("sd15", name)[0, 1:3].norm(dim=-1) for name in reference_names()[:20]])
    reference = norms("sd15")["l"]
    assert (reference[:2] > 0.5 * lengths.min()).all()
    assert (reference[:2] < 1.5 * lengths.max()).all()


def test_token_weight() -> None:
    (((one, _),), _), (((half, _),), _) = (id_prompt("sdxl", "a cat", token_weight=w) for w in (1.0, 0.5))
    torch.testing.assert_close(half[:, 1:4], one[:, 1:4] / 2)
    assert torch.equal(half[:, 4:], one[:, 4:])


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
@pytest.mark.parametrize(
    ("words", "chunks"), [(1, 1), (71, 1), (72, 1), (73, 2), (75, 2), (76, 2), (147, 2), (150, 3), (300, 5)]
)
def test_nothing_of_a_long_prompt_is_lost(kind: str, words: int, chunks: int) -> None:
    text = " ".join(["cat", "dog", "red"][i % 3] for i in range(words))
    ((states, _),), _ = id_prompt(kind, text)
    before = plain(kind, text)
    assert states.shape[1] == 77 * chunks
    # Start, words and the end of each chunk.
    written = words + 1 + -(-words // 75)
    assert torch.equal(states[:, 0], before[:, 0])
    torch.testing.assert_close(states[:, 1 + COUNT : COUNT + written], before[:, 1:written])


def test_prompt_weights_work() -> None:
    ((weighted, _),), _ = id_prompt("sdxl", "a (red:1.5) cat")
    torch.testing.assert_close(weighted[:, 4:], plain("sdxl", "a (red:1.5) cat")[:, 1:-3])
    assert not torch.allclose(weighted[:, 4:], plain("sdxl", "a red cat")[:, 1:-3])


@pytest.mark.parametrize(
    ("seen", "chosen", "expected"),
    [("woman", "auto", "woman"), ("", "auto", "person"), ("woman", "man", "man"), ("", "girl", "girl")],
)
def test_class_word(seen: str, chosen: str, expected: str) -> None:
    identity = replace(person("sd15"), class_word=seen)
    ((states, _),), encoded = id_prompt("sd15", "a <class word> and a <class word>", identity, chosen)
    assert encoded == f"a {expected} and a {expected}"
    torch.testing.assert_close(states[:, 4:], plain("sd15", encoded)[:, 1:-3])


def test_identity_without_text_branch(caplog: pytest.LogCaptureFixture) -> None:
    ((states, options),), _ = id_prompt("sdxl", "a cat", person("sdxl", text=False))
    assert torch.equal(states, plain("sdxl", "a cat"))
    assert not any(key.startswith("idadapter") for key in options)
    assert "no text branch" in caplog.text


@pytest.mark.parametrize(
    ("clip_kind", "identity_kind", "wanted", "found"),
    [
        ("sd15", "sdxl", "l 64, g 64", "l 64"),
        ("sdxl", "sd15", "l 64", "l 64, g 64"),
        ("sd21", "sdxl", "l 64, g 64", "h 64"),
    ],
)
def test_clip_of_another_model(clip_kind: str, identity_kind: str, wanted: str, found: str) -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError

    with pytest.raises(MismatchError) as refused:
        id_prompt(clip_kind, "a cat", person(identity_kind))
    assert f"made for a model with text encoders of widths {wanted}, this CLIP is" in str(refused.value)
    assert f"that of a model with text encoders of widths {found}." in str(refused.value)


def test_reference_norms_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = tiny_clip("sd15")
    encoded: list[Any] = []
    original = fresh.encode_from_tokens

    def counted(*arguments: Any, **options: Any) -> Any:
        encoded.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(fresh, "encode_from_tokens", counted)
    first = norms("sd15", fresh)
    again = norms("sd15", fresh)
    assert len(encoded) == 1
    assert torch.equal(first["l"], again["l"])
    # The copies that ComfyUI makes for each node share them.
    assert torch.equal(norms("sd15", fresh.clone())["l"], first["l"])


def test_reference_norms_follow_the_clip() -> None:
    from nodes import CLIPSetLastLayer

    base = tiny_clip("sd15")
    skipped = CLIPSetLastLayer().set_last_layer(base, -2)[0]
    lora = base.clone()
    name = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    weight = dict(base.cond_stage_model.named_parameters())[name]
    assert lora.add_patches({name: ("diff", (torch.full_like(weight, 0.2),))}, 1.0)
    found = [norms("sd15", each)["l"] for each in (lora, base, skipped)]
    for left, right in ((0, 1), (1, 2), (0, 2)):
        assert not torch.allclose(found[left], found[right], rtol=1e-3)
    # Whatever was measured before it.
    assert torch.equal(norms("sd15", tiny_clip("sd15"))["l"], found[1])


@pytest.mark.parametrize("words", [5, 75])
def test_positive_and_negative_share_one_call(words: int) -> None:
    kind, identity = "sdxl", person("sdxl")
    positive, _ = id_prompt(kind, " ".join(["cat"] * words), identity)
    model, calls = record(rescale(apply(unet(kind), kind, identity), text_early=0.5))
    sample(model, positive, prompt(kind, "negative"), steps=2)
    assert [call.context.shape[0] for call in calls] == [2, 2]


def test_tokens_reach_the_model_where_they_stand() -> None:
    """Rescaling of the text finds the tokens of the node's own conditioning."""
    kind, identity = "sd15", person("sd15")
    positive, _ = id_prompt(kind, "photo of a person", identity)
    model, calls = record(rescale(unet(kind), text_early=0.5, text_late=2.0))
    sample(model, positive, prompt(kind, "negative"), steps=2, cfg=1.0)
    for call, scale in zip(calls, (0.5, 2.0), strict=True):
        expected = positive[0][0][0].clone()
        expected[1:4] *= scale
        torch.testing.assert_close(call.context[0], expected.to(call.context))


def test_encoders_that_are_no_clip_are_named() -> None:
    """A CLIP of Flux or SD3 has a T5 beside or instead of CLIP's text models."""
    from types import SimpleNamespace

    from ComfyUI_IDAdapter.nodes.host.text import require_text_encoders

    clip = tiny_clip("sdxl")
    other = SimpleNamespace(
        tokenize=lambda text: {**clip.tokenize(text), "t5xxl": []}, cond_stage_model=clip.cond_stage_model
    )
    with pytest.raises(
        RuntimeError, match=r"widths l 64, g 64, this CLIP is .* l 64, g 64, t5xxl \(no CLIP\)"
    ):
        require_text_encoders(other, person("sdxl"))


def test_more_text_tokens_than_any_name_has() -> None:
    from ComfyUI_IDAdapter.nodes.host.text import reference_norms

    norms = reference_norms(tiny_clip("sdxl"), 12)
    assert all(torch.isfinite(values).all() and values.shape == (12,) for values in norms.values())


def test_checkpoint_without_a_text_encoder() -> None:
    with pytest.raises(RuntimeError, match="ID Prompt got no CLIP"):
        pack_nodes()["IDAdapterPrompt"].execute(None, person("sdxl"), "a photo", "auto", 1.0)


def test_class_word_in_any_case() -> None:
    _, encoded = id_prompt("sdxl", "a <Class Word> and a <class word>", class_word="woman")
    assert encoded == "a woman and a woman"
