"""A step's forward pass: where the identity acts, and that it acts as at inference."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from idadapter_core.data.references import PhotoVariant, photo_tensors
from idadapter_core.mechanisms.text import with_identity_clause
from idadapter_core.stable_diffusion.inject import inject
from idadapter_core.stable_diffusion.inject.text import insert_tokens
from idadapter_core.stable_diffusion.text import LENGTH
from idadapter_core.training import bundle as bundles
from idadapter_core.training.adapters import trainable
from idadapter_core.training.config import RunConfig
from idadapter_core.training.parts import Parts, load_parts
from idadapter_core.training.samples import Batch
from tests.core.training.bundle.passes import (
    KEPT,
    KINDS,
    ROWS,
    alone,
    batch_of,
    features,
    fresh,
    gap,
    opened,
    passed,
    running,
)
from tests.tiny.toy import Toy

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------ who is in the picture


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_fresh_adapter_is_the_base(
    parts: Parts, configs: dict[str, RunConfig], batch: Batch, faces: Batch, kind: str
) -> None:
    """In the UNet. In the text the identity is there from the start, where the method has it."""
    given = faces if "uniid" in kind else batch
    with running(parts, configs[kind], fresh(parts, configs[kind])) as bundle:
        losses, call = passed(parts, bundle, given)
        with_adapter, base = bundle.measure(given)
    plain = parts.base.text.encode(list(given.prompts)).states
    assert gap(call.prediction, alone(parts.base.unet, call)) < 1e-5
    same_text = [gap(row, own) < 1e-5 for row, own in zip(call.states, plain, strict=True)]
    expected = {"uniid": [True] * 4, "uniid text": [False] * 4}
    assert same_text == expected.get(kind, [not keep for keep in KEPT])
    target = given.noise
    assert torch.allclose(losses["mse"], (call.prediction - target).square().mean((1, 2, 3)))
    assert torch.allclose(with_adapter, losses["mse"])
    expected_base = (alone(parts.base.unet, call, plain) - target).square().mean((1, 2, 3))
    assert torch.allclose(base, expected_base, atol=1e-6)


@torch.no_grad()
def test_idadapter_where_the_identity_is_dropped(
    parts: Parts, configs: dict[str, RunConfig], batch: Batch
) -> None:
    """Exactly the UNet with the trained K/V weights: no gates, no word."""
    adapter = opened(parts, configs["idadapter"])
    merged = copy.deepcopy(parts.base.unet)
    for name, module in merged.named_modules():
        if name.endswith(".attn2"):
            site = next(s for s in _sites(merged) if s.diffusers_module == name)
            delta = adapter.layers.deltas[str(site.index)]
            module.to_k.weight.add_(delta.to_k.weight)
            module.to_v.weight.add_(delta.to_v.weight)
    with running(parts, configs["idadapter"], adapter) as bundle:
        _, call = passed(parts, bundle, batch)
        _, base = bundle.measure(batch)
    plain = parts.base.text.encode(list(batch.prompts)).states
    expected = alone(merged, call, plain)
    assert gap(call.prediction[3], expected[3]) < 1e-4
    assert min(gap(call.prediction[row], expected[row]) for row in range(3)) > 0.01
    untouched = alone(parts.base.unet, call, plain)
    assert gap(untouched, expected) > 0.01
    assert torch.allclose(base, (untouched - batch.noise).square().mean((1, 2, 3)), atol=1e-5)


def _sites(unet: Any) -> Any:
    from idadapter_core.sites import attention_sites

    return attention_sites(unet.state_dict())


@pytest.mark.parametrize("kind", ["uniid", "zeros"])
@torch.no_grad()
def test_tokens_of_zeroed_features_where_the_identity_is_dropped(
    parts: Parts, configs: dict[str, RunConfig], batch: Batch, faces: Batch, kind: str
) -> None:
    """Those that negative prompts have at inference."""
    adapter = opened(parts, configs[kind])
    given = faces if kind == "uniid" else batch
    with running(parts, configs[kind], adapter) as bundle:
        _, call = passed(parts, bundle, given)
    identity = adapter.encode(features(parts, 0))
    assert identity.adapter_tokens_uncond is not None
    states = parts.base.text.encode(list(given.prompts)).states
    with inject(parts.base.unet, adapter) as injected, injected.identity(identity.adapter_tokens_uncond):
        expected = alone(parts.base.unet, call, states)
    assert gap(call.prediction[3], expected[3]) < 1e-4
    assert min(gap(call.prediction[row], expected[row]) for row in range(3)) > 0.01
    assert gap(expected, alone(parts.base.unet, call, states)) > 0.01


@torch.no_grad()
def test_uniid_text_tokens_of_zeroed_features(
    parts: Parts, configs: dict[str, RunConfig], faces: Batch
) -> None:
    adapter = opened(parts, configs["uniid text"])
    with running(parts, configs["uniid text"], adapter) as bundle:
        _, call = passed(parts, bundle, faces)
    zeros = tuple(torch.zeros_like(stage[:1]) for stage in faces.stages)
    text, _ = adapter.encoder(torch.zeros(1, 512), zeros)
    plain = parts.base.text.encode(list(faces.prompts[3:])).states
    assert gap(call.states[3:], insert_tokens(plain, text["l"])) < 1e-5


# ------------------------------------------------------------------------------------------------ as at inference


@pytest.mark.parametrize("numbers", [(1, 2), (6, 6)])
@torch.no_grad()
def test_idadapter_learns_from_what_it_is_given_at_inference(
    parts: Parts, configs: dict[str, RunConfig], batch: Batch, numbers: tuple[int, int]
) -> None:
    """Of the same N photos: E_r and the identity word in the text."""
    config = configs["idadapter"]
    vision = parts.networks.vision
    assert vision is not None
    photos = [parts.train_rows[number] for number in numbers]
    tensors = [
        photo_tensors(parts.index.load(row), PhotoVariant(row), vision.preprocess)
        for row in (*photos, photos[0])
    ]
    given = dataclasses.replace(
        batch,
        crops=torch.stack([t["crops"] for t in tensors]).expand(4, -1, -1, -1, -1),
        heads=torch.stack([t["heads"] for t in tensors[:2]]).expand(4, -1, -1, -1, -1),
        embedding=None,
        patch_tokens=None,
        class_embedding=None,
        class_nouns=("woman",) * 4,
    )
    adapter = opened(parts, config)
    with running(parts, config, adapter) as bundle:
        _, call = passed(parts, bundle, given)
        assert bundle.injected is not None
        tokens = bundle.injected.setting.groups[0].tokens
    identity = adapter.encode(features(parts, *numbers))
    assert tokens is not None
    assert identity.adapter_tokens is not None
    assert identity.adapter_bias is None
    assert gap(tokens[0], identity.adapter_tokens[0]) < 1e-4
    prompts = ["a photo of a man, woman is sks", "a cat, woman is sks", "woman is sks"]
    expected = parts.base.text.encode(prompts, identity.text_tokens).states
    assert gap(call.states[:3], expected) < 1e-4
    stranger = adapter.encode(features(parts, 9, 10))
    assert gap(parts.base.text.encode(prompts, stranger.text_tokens).states, expected) > 0.01


@torch.no_grad()
def test_uniid_learns_from_what_it_is_given_at_inference(
    parts: Parts, configs: dict[str, RunConfig], faces: Batch
) -> None:
    """Adapter tokens; and text tokens right behind BOS, as long as they come out: rescaling is for inference."""
    for kind in ("uniid", "uniid text"):
        adapter = opened(parts, configs[kind])
        with running(parts, configs[kind], adapter) as bundle:
            _, call = passed(parts, bundle, faces)
            tokens = None if bundle.injected is None else bundle.injected.setting.groups[0].tokens
        plain = parts.base.text.encode(list(faces.prompts)).states
        for row, number in enumerate(ROWS[:3]):
            identity = adapter.encode(features(parts, number))
            if kind == "uniid":
                assert tokens is not None
                assert identity.adapter_tokens is not None
                assert gap(tokens[row], identity.adapter_tokens[0]) < 1e-4
                assert gap(call.states[row], plain[row]) < 1e-5
            else:
                assert tokens is None
                expected = insert_tokens(plain[row : row + 1], identity.text_tokens["l"])
                assert gap(call.states[row : row + 1], expected) < 1e-4
                assert gap(call.states[row], plain[row]) > 0.1


@torch.no_grad()
def test_a_caption_that_is_too_long_loses_its_end(
    parts: Parts, configs: dict[str, RunConfig], batch: Batch, faces: Batch
) -> None:
    """Not the identity clause, nor the run."""
    caption = "a photo of a man " * 40
    for kind, given in (("idadapter", batch), ("uniid text", faces)):
        adapter = opened(parts, configs[kind])
        with running(parts, configs[kind], adapter) as bundle:
            _, call = passed(parts, bundle, dataclasses.replace(given, prompts=(caption,) * 4))
        if kind == "idadapter":
            identity = bundle.encoder.word(given.class_embedding[0].mean(0, keepdim=True))  # type: ignore[index,operator,union-attr]
            noun = given.class_nouns[0]
            words = caption.split()
            fitting = [
                prompt
                for count in range(LENGTH)
                if parts.base.text.length(prompt := with_identity_clause(" ".join(words[:count]), noun))
                <= LENGTH - 2
            ]
            expected = parts.base.text.encode(fitting[-1:], identity).states
            assert len(fitting) > 10
        else:
            text, _ = adapter.encoder(given.embedding[:1, -1], tuple(s[:1] for s in given.stages))  # type: ignore[index]
            count = text["l"].shape[1]
            shorter = " ".join(caption.split()[: LENGTH - 2 - count])
            assert parts.base.text.length(shorter) == LENGTH - 2 - count
            expected = insert_tokens(parts.base.text.encode([shorter]).states, text["l"])
        assert gap(call.states[:1], expected) < 1e-4


def test_shortened_prompts(parts: Parts) -> None:
    text = parts.base.text
    assert text.shortened("a photo of a cat", 70) == "a photo of a cat"
    assert text.shortened("a photo of a cat", 71) == "a photo of a"
    assert text.shortened("a photo of a cat ", 75) == ""
    letters = "x" * 300  # no word to cut at
    assert text.shortened(letters, 5) == "x" * 70
    words = ["man", "of", "a", "catx,"] * 30  # the last one is three tokens
    for spare in range(6):
        short = text.shortened(" ".join(words), spare)
        count = len(short.split())
        assert short == " ".join(words[:count])
        assert text.length(short) <= LENGTH - 2 - spare < text.length(" ".join(words[: count + 1]))


@torch.no_grad()
def test_each_prompt_is_encoded_once(
    parts: Parts, configs: dict[str, RunConfig], faces: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode = parts.base.text.encode

    def note(prompts: Any, *args: Any) -> Any:
        encoded.extend(prompts)
        return encode(prompts, *args)

    monkeypatch.setattr(parts.base.text, "encode", note)
    with running(parts, configs["uniid"], fresh(parts, configs["uniid"])) as bundle:
        first = passed(parts, bundle, faces)[1].states
        assert sorted(encoded) == ["", "a cat", "a photo of a man"]
        assert gap(passed(parts, bundle, faces)[1].states, first) == 0
        assert len(encoded) == 3
        monkeypatch.setattr(bundles, "_KEPT_PROMPTS", 2)
        other = dataclasses.replace(faces, prompts=("a cat", "a man", "", "a photo of a man"))
        states = passed(parts, bundle, other)[1].states
        assert gap(states[[0, 2, 3]], first[[1, 2, 3]]) < 1e-5
        assert gap(states[1], first[1]) > 0.1


# ------------------------------------------------------------------------------------------------ SDXL


@pytest.fixture(scope="module")
def sdxl(toy_sdxl: Toy, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return load_parts(toy_sdxl.config(tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize("kind", ["idadapter", "uniid", "uniid text"])
def test_sdxl(sdxl: Parts, toy_sdxl: Toy, tmp_path: Any, kind: str) -> None:
    """Both encoders hold the identity; pooled text and sizes go with the states; everything learns."""
    config = toy_sdxl.config(tmp_path, loss={"identity": 0.0}, **KINDS[kind])
    given = batch_of(sdxl, config)
    adapter = opened(sdxl, config)
    with running(sdxl, config, adapter) as bundle:
        losses, call = passed(sdxl, bundle, given)
        losses["loss"].backward()
    added = call.more["added_cond_kwargs"]
    assert torch.equal(added["time_ids"], given.sizes)
    plain = sdxl.base.text.encode(list(given.prompts))
    assert plain.pooled is not None
    same_pooled = [gap(one, own) < 1e-5 for one, own in zip(added["text_embeds"], plain.pooled, strict=True)]
    assert same_pooled == ([not keep for keep in KEPT] if kind == "idadapter" else [True] * 4)
    width = sdxl.base.text.widths["l"]
    for states in (slice(0, width), slice(width, None)):
        changed = [
            gap(one[:, states], own[:, states]) > 0.01
            for one, own in zip(call.states, plain.states, strict=True)
        ]
        assert changed == {"idadapter": list(KEPT), "uniid": [False] * 4, "uniid text": [True] * 4}[kind]
    without = [name for name, p in trainable(adapter).items() if p.grad is None or not p.grad.any()]
    assert not without
