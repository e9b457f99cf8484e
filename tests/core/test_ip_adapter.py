"""IP-Adapter FaceID: its files, its tokens, and its place in a UNet, against diffusers' own."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from idadapter_core import load_adapter, save_adapter
from idadapter_core.adapter import Adapter, initial_adapter
from idadapter_core.errors import CheckpointError, InputError, MismatchError
from idadapter_core.mechanisms.deltas import Place
from idadapter_core.methods.ip_adapter import FaceIDConfig
from idadapter_core.stable_diffusion.inject import inject
from idadapter_core.types import Mix
from tests.harness.shim import run_shim
from tests.tiny.diffusers_unet import diffusers_unet, inputs, predict
from tests.tiny.features import face_features
from tests.tiny.ip_adapter import (
    CONFIGS,
    TINY_SD15,
    TINY_SDXL,
    published,
    tiny_faceid,
    with_lora,
    write_published,
)

KINDS = tuple(CONFIGS)


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return tiny_faceid(tmp_path)


def diffusers_tokens(config: FaceIDConfig, embedding: Tensor) -> Tensor:
    """What diffusers' projection makes of directions."""
    run_shim()
    from diffusers import UNet2DConditionModel

    unet: UNet2DConditionModel = diffusers_unet("sdxl" if config == TINY_SDXL else "sd15")
    unet._load_ip_adapter_weights([published(config)])
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    with torch.no_grad():
        out: Tensor = projection(embedding)
    return out.reshape(len(embedding), config.tokens, config.context_width)


@pytest.mark.parametrize("config", [TINY_SD15, TINY_SDXL], ids=["sd15", "sdxl"])
def test_tokens_are_those_of_diffusers(config: FaceIDConfig, tmp_path: Path) -> None:
    adapter, features = tiny_faceid(tmp_path, config), face_features(3)
    identity = adapter.encode(features)
    direction = torch.nn.functional.normalize(features.embedding, dim=-1)
    assert identity.adapter_tokens is not None
    assert identity.adapter_tokens_uncond is not None
    assert (identity.adapter_tokens - diffusers_tokens(config, direction)).abs().max() <= 1e-5
    nobody = diffusers_tokens(config, torch.zeros_like(direction))
    assert (identity.adapter_tokens_uncond - nobody).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_unet_it_does_what_diffusers_does(kind: str, tmp_path: Path) -> None:
    """K and V, scale and LoRA against diffusers' own loader of the same file."""
    config = CONFIGS[kind]
    adapter = tiny_faceid(tmp_path, config)
    tokens = adapter.encode(face_features(5)).adapter_tokens
    reference = with_lora(diffusers_unet(kind), published(config)["ip_adapter"])
    reference._load_ip_adapter_weights([published(config)])
    for processor in reference.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [1.0]
    direction = torch.nn.functional.normalize(face_features(5).embedding, dim=-1)
    given = inputs(kind)
    given["added_cond_kwargs"] = {
        **given.get("added_cond_kwargs", {}),
        "image_embeds": [direction[:, None].expand(2, -1, -1)],
    }
    with torch.no_grad():
        wanted = reference(**given).sample
    unet = diffusers_unet(kind)
    base = predict(unet, kind)
    with inject(unet, adapter) as injected, injected.identity(tokens):
        found = predict(unet, kind)
    assert (found - wanted).abs().max() <= 2e-5
    assert (found - base).abs().max() > 1e-2
    assert torch.equal(predict(unet, kind), base)


def test_the_lora_lies_where_its_numbers_say(adapter: Adapter) -> None:
    places = set(adapter.mechanisms.deltas)
    layers = [
        f"{attention}.{name}"
        for attention in ("attn1", "attn2")
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    assert places == {Place(number, layer) for number in range(1, 15, 2) for layer in layers}


def test_a_file_of_our_own_is_the_same_adapter(adapter: Adapter, tmp_path: Path) -> None:
    save_adapter(adapter, tmp_path / "own.safetensors")
    again = load_adapter(tmp_path / "own.safetensors")
    assert (again.method, again.config, again.digest) == ("ip_adapter", adapter.config, adapter.digest)


@pytest.mark.parametrize("form", ["flat", "dump", "module"])
def test_other_containers(form: str, adapter: Adapter, tmp_path: Path) -> None:
    nested = published(TINY_SD15)
    flat = {f"{part}.{key}": tensor for part, weights in nested.items() for key, tensor in weights.items()}
    if form == "dump":
        flat = {
            key.replace("image_proj.", "image_proj_model.").replace("ip_adapter.", "adapter_modules."): tensor
            for key, tensor in flat.items()
        }
    if form == "module":
        flat = {f"module.{key}": tensor for key, tensor in flat.items()}
    torch.save(flat, tmp_path / "other.bin")
    assert load_adapter(tmp_path / "other.bin").digest == adapter.digest


def test_a_portrait_has_no_lora(tmp_path: Path) -> None:
    config = replace(TINY_SD15, lora_rank=0, tokens=16)
    found = load_adapter(write_published(tmp_path / "portrait.bin", config))
    assert found.config == config
    assert found.mechanisms.deltas == {}
    assert "Portrait" in found.info


@pytest.mark.parametrize("key", ["perceiver_resampler.proj_in.weight", "latents", "proj.3.weight"])
def test_relatives_are_not_taken_for_it(key: str, tmp_path: Path) -> None:
    nested = published(TINY_SD15)
    nested["image_proj"][key] = torch.zeros(2, 2)
    torch.save(nested, tmp_path / "plus.bin")
    with pytest.raises(CheckpointError, match="IP-Adapter or InstantID file"):
        load_adapter(tmp_path / "plus.bin")


def test_a_file_with_a_gap_is_refused(tmp_path: Path) -> None:
    nested = published(TINY_SD15)
    for name in ("k", "v"):
        del nested["ip_adapter"][f"5.to_{name}_ip.weight"]
    torch.save(nested, tmp_path / "gap.bin")
    with pytest.raises(CheckpointError, match="without a gap"):
        load_adapter(tmp_path / "gap.bin")


def test_several_photos(adapter: Adapter) -> None:
    """Each photo alone and twice is the same; the mean is of directions; side by side all count alike."""
    features = face_features(7, 3)
    one, twice = features.pick([0]), features.pick([0, 0])
    assert torch.allclose(tokens_of(adapter, one), tokens_of(adapter, twice), atol=1e-6)
    louder = replace(one, embedding=one.embedding * 9)
    assert torch.allclose(tokens_of(adapter, one), tokens_of(adapter, louder), atol=1e-6)
    side_by_side = tokens_of(adapter, features, Mix("concatenate"))
    singles = torch.cat([tokens_of(adapter, features.pick([n])) for n in range(3)], dim=1)
    assert torch.allclose(side_by_side, singles, atol=1e-6)
    with pytest.raises(InputError, match="count alike"):
        adapter.encode(features, Mix("concatenate", weights=(1.0, 0.5, 0.5)))
    with pytest.raises(InputError, match="no learned mixing"):
        adapter.encode(features, Mix("learned"))


def tokens_of(adapter: Adapter, features: Any, mix: Mix | None = None) -> Tensor:
    tokens = adapter.encode(features, mix).adapter_tokens
    assert tokens is not None
    return tokens


def test_the_other_packages_embedding_is_refused(adapter: Adapter) -> None:
    features = replace(face_features(3), recognizer="4ab1d643aaaaaaaa")
    with pytest.raises(MismatchError, match=re.escape("antelopev2")):
        adapter.encode(features)


def test_a_start_changes_nothing() -> None:
    fresh = initial_adapter(TINY_SD15, "fresh", seed=3)
    unet = diffusers_unet("sd15")
    base = predict(unet)
    with inject(unet, fresh) as injected, injected.identity(tokens_of(fresh, face_features(3))):
        assert torch.equal(predict(unet), base)
