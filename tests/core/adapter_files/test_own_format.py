"""Adapter files of our own format: nothing is lost, and an adapter is told from one of another model."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from idadapter_core.adapter import Adapter, load_adapter, save_adapter
from idadapter_core.errors import CheckpointError, MismatchError
from idadapter_core.files import state_digest
from idadapter_core.methods.uniid import UniIDConfig
from idadapter_core.sites import Site, attention_sites
from tests.core.adapter_files.writing import State, read_own, write
from tests.tiny.features import face_features
from tests.tiny.uniid import TINY_SD15, write_published

# --- own format ------------------------------------------------------------------------------------------------------


def test_own_format_keeps_every_weight(adapter: Adapter, tmp_path: Path) -> None:
    save_adapter(adapter, tmp_path / "own.safetensors")
    again = load_adapter(tmp_path / "own.safetensors")
    assert again.digest == adapter.digest
    assert again.config == adapter.config
    assert again.method == "uniid"
    before, after = adapter.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_every_perturbed_weight_survives_and_changes_the_digest(state: State, tmp_path: Path) -> None:
    digests = {state_digest(state)}
    for number, key in enumerate(list(state)[::7]):
        perturbed = {**state, key: state[key] + 1 / 3}
        adapter = load_adapter(write(tmp_path / "perturbed.bin", perturbed))
        save_adapter(adapter, tmp_path / "own.safetensors")
        again = load_adapter(tmp_path / "own.safetensors")
        assert torch.equal(again.state_dict()[key], perturbed[key]), key
        digests.add(again.digest)
        assert len(digests) == number + 2
    save_adapter(load_adapter(write(tmp_path / "x.bin", state)), tmp_path / "own.safetensors")
    assert load_adapter(tmp_path / "own.safetensors").digest in digests


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(adapter: Adapter, tmp_path: Path, dtype: torch.dtype) -> None:
    save_adapter(adapter, tmp_path / "half.safetensors", dtype)
    stored, _ = read_own(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    half = load_adapter(tmp_path / "half.safetensors")
    assert half.digest != adapter.digest
    assert str(dtype).removeprefix("torch.") in half.info
    assert {p.dtype for p in half.encoder.parameters()} == {torch.float32}
    assert {p.dtype for p in half.layers.parameters()} == {dtype}
    save_adapter(half, tmp_path / "again.safetensors")
    assert load_adapter(tmp_path / "again.safetensors").digest == half.digest
    one, other = (a.encode(face_features(1)).adapter_tokens for a in (adapter, half))
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one, other, atol=0.2, rtol=0)


def test_the_config_travels_inside_the_file(adapter: Adapter, tmp_path: Path) -> None:
    config = dataclasses.replace(adapter.config, recognizer="feedfacefeedface")
    save_adapter(dataclasses.replace(adapter, config=config), tmp_path / "own.safetensors")
    again = load_adapter(tmp_path / "own.safetensors")
    assert again.config == config
    assert "feedfacefeedface" in again.info


def own_file(adapter: Adapter, path: Path, **changes: str | None) -> Path:
    """A file of our own with changed metadata; None removes an entry."""
    save_adapter(adapter, path)
    tensors, metadata = read_own(path)
    save_file(tensors, path, {k: v for k, v in {**metadata, **changes}.items() if v is not None})
    return path


@pytest.mark.parametrize("version", ["2", "99", "x", "1.5", None])
def test_newer_format_versions_are_refused(adapter: Adapter, tmp_path: Path, version: str | None) -> None:
    path = own_file(adapter, tmp_path / "own.safetensors", format_version=version)
    with pytest.raises(
        CheckpointError, match=rf"own\.safetensors: written in format version {version or '.none.'}.* update"
    ):
        load_adapter(path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"method": "faceid"}, "method 'faceid' is unknown to this release"),
        ({"method": None}, "method None is unknown"),
        ({"kind": None}, "its kind is (none)"),
        ({"kind": "lora"}, "its kind is lora"),
        ({"config": None}, "config cannot be read"),
        ({"config": "{"}, "config cannot be read"),
        ({"config": "[]"}, "config cannot be read"),
        ({"config": "null"}, "config cannot be read"),
    ],
)
def test_damaged_metadata(adapter: Adapter, tmp_path: Path, changes: dict[str, str], text: str) -> None:
    path = own_file(adapter, tmp_path / "own.safetensors", **changes)
    with pytest.raises(CheckpointError, match=re.escape(text)) as caught:
        load_adapter(path)
    assert str(caught.value).startswith("own.safetensors: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head_width", 0),
        ("head_width", -64),
        ("head_width", None),
        ("adapter_width", "64"),
        ("adapter_width", 64.0),
        ("adapter_width", 100),
        ("adapter_width", 128),
        ("adapter_tokens", 0),
        ("adapter_depth", -1),
        ("text_widths", [64, 64, 64]),
        ("text_widths", None),
        ("site_widths", 3),
        ("site_widths", [[1]]),
        ("site_widths", ["a"]),
        ("recognizer", 5),
        ("future", 1),
    ],
)
def test_config_that_does_not_describe_the_weights(
    adapter: Adapter, tmp_path: Path, name: str, value: object
) -> None:
    config = json.dumps({**dataclasses.asdict(adapter.config), name: value})
    with pytest.raises(CheckpointError, match=r"^own\.safetensors: "):
        load_adapter(own_file(adapter, tmp_path / "own.safetensors", config=config))


# --- does the adapter fit? -------------------------------------------------------------------------------------------


def unet(depths: dict[str, int], side: str = "input") -> tuple[Site, ...]:
    return attention_sites(
        f"{stem}.transformer_blocks.{depth}.attn2.to_k.weight"
        for stem, count in depths.items()
        for depth in range(count)
    )


SEVEN = unet(
    {
        "input_blocks.1.1": 1,
        "input_blocks.2.1": 1,
        "middle_block.1": 1,
        **{f"output_blocks.{i}.1": 1 for i in range(4)},
    }
)


def widths(sites: tuple[Site, ...], channels: tuple[int, ...], context: int) -> dict[str, tuple[int, int]]:
    return {site.comfy_module: (width, context) for site, width in zip(sites, channels, strict=True)}


def test_an_adapter_fits_its_unet(adapter: Adapter) -> None:
    adapter.require_sites(SEVEN, widths(SEVEN, TINY_SD15.site_widths, 64), "SD15")


def test_another_family_is_refused_with_both_names(adapter: Adapter, tmp_path: Path) -> None:
    sdxl = unet({"input_blocks.1.1": 70})
    for_sd15 = dataclasses.replace(
        adapter, name="face.bin", config=UniIDConfig(site_widths=(320,) * 16, context_width=768)
    )
    with pytest.raises(MismatchError) as caught:
        for_sd15.require_sites(sdxl, widths(sdxl, (640,) * 70, 2048), "SDXL")
    assert str(caught.value) == (
        "face.bin was made for SD1.5, this checkpoint is SDXL. Load a checkpoint of the adapter's family, or an adapter that was "
        "made for this one."
    )
    assert "The two differ" not in str(caught.value)


def test_the_same_family_of_other_widths_is_refused(adapter: Adapter) -> None:
    with pytest.raises(MismatchError, match="The two differ in the widths of their layers"):
        adapter.require_sites(SEVEN, widths(SEVEN, (64,) * 7, 64), "SD15")
    with pytest.raises(MismatchError, match=r"text width 64, this checkpoint is SD21: .*text width 128"):
        adapter.require_sites(SEVEN, widths(SEVEN, TINY_SD15.site_widths, 128), "SD21")


def test_an_adapter_without_adapter_branch_fits_any_unet(state: State, tmp_path: Path) -> None:
    _, text_file = write_published(tmp_path, state)
    load_adapter(text_file).require_sites(SEVEN, widths(SEVEN, (8,) * 7, 8), "SD15")
