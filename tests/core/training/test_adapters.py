"""The adapter that is trained: it fits its base, starts as nothing, learns in all its parts, and comes back from its file.

Longer than 450 lines, because all its tests share three base models that take seconds to make.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from idadapter_core.adapter import Adapter, load_adapter, save_adapter
from idadapter_core.errors import CheckpointError, ConfigError, MismatchError
from idadapter_core.faces.iresnet import STAGE_WIDTHS
from idadapter_core.methods.idadapter import PRESETS, IDAdapterConfig
from idadapter_core.methods.uniid import UniIDConfig
from idadapter_core.sites import attention_sites
from idadapter_core.stable_diffusion.inject import inject
from idadapter_core.training.adapters import (
    AdapterRequirements,
    fresh_adapter,
    fresh_config,
    load_start,
    to_adapter,
    trainable,
)
from tests.golden import recipe
from tests.harness.shim import run_shim
from tests.tiny.diffusers_unet import diffusers_unet, inputs, predict
from tests.tiny.features import RECOGNIZER, face_features
from tests.tiny.idadapter import CONFIGS as IDADAPTERS
from tests.tiny.uniid import CONFIGS as UNIIDS, TINY_SDXL, tiny_uniid

KINDS = ("sd15", "sd21", "sdxl")
TEXT_WIDTHS = {"sd15": {"l": 64}, "sd21": {"h": 64}, "sdxl": {"l": 64, "g": 64}}
VISION = (64, 16)
# What a run trains: method, branch, settings, and the weights that have gradients while the adapter is nothing yet.
STARTS: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "idadapter": ("idadapter", "adapter", {}, ("gate_", "layers.deltas.", "word.")),
    "resampled": (
        "idadapter",
        "adapter",
        {"tokens": 5, "resampler_depth": 1, "references": 2},
        ("gate_", "layers.deltas.", "word."),
    ),
    "uniid adapter": (
        "uniid",
        "adapter",
        {"adapter_depth": 2},
        ("resampler.proj_out.", "resampler.norm_out.bias"),
    ),
    "uniid text": ("uniid", "text", {"text_depth": 2}, ("text_branch.",)),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def unets() -> dict[str, Any]:
    return {kind: diffusers_unet(kind) for kind in KINDS}


def base_of(kind: str) -> dict[str, Any]:
    """What the frozen models of a tiny base are like."""
    return {
        "text_widths": TEXT_WIDTHS[kind],
        "vision": VISION,
        "recognizer": RECOGNIZER,
        "stage_widths": STAGE_WIDTHS,
    }


def fresh(unet: Any, start: str = "idadapter", kind: str = "sd15", seed: int = 0, **settings: Any) -> Adapter:
    method, branch, own, _ = STARTS[start]
    wanted = AdapterRequirements(method, **base_of(kind), branch=branch, settings={**own, **settings})
    return fresh_adapter(unet, wanted, seed)


def start_from(path: Path, unet: Any, **changes: Any) -> Adapter:
    given = {**base_of("sd15"), "method": "idadapter", "branch": "adapter", "settings": {}, **changes}
    return load_start(path, unet, AdapterRequirements(**given))


def encoded(adapter: Adapter) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Tokens and text tokens of two people, as a training makes them: with gradients."""
    features, config = face_features(1, 2), adapter.config
    if isinstance(config, UniIDConfig):
        text, tokens = adapter.encoder(features.embedding, features.stages)
        return tokens, text
    width, patches = config.vision_width, config.references * config.vision_patches
    seen = recipe.value(1, "patches", (2, patches, width)), recipe.value(1, "class", (2, width))
    tokens, text = adapter.encoder(seen[0], features.embedding, seen[1])
    return tokens, text


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_of_a_tiny_base_are_read_from_it(kind: str, unets: dict[str, Any]) -> None:
    config = fresh(unets[kind], "idadapter", kind).config
    wanted = replace(IDADAPTERS[kind], mixer_heads=1, text_hidden=64, recognizer=RECOGNIZER)
    assert config == replace(wanted, vision_patches=VISION[1])
    config = fresh(unets[kind], "uniid adapter", kind).config
    wanted = replace(UNIIDS[kind], text_widths=(), recognizer=RECOGNIZER)
    width = wanted.context_width
    assert config == replace(wanted, text_depth=4, text_hidden=1024, adapter_width=width)
    if kind != "sd21":
        config = fresh(unets[kind], "uniid text", kind).config
        wanted = replace(UNIIDS[kind], adapter_tokens=0, recognizer=RECOGNIZER)
        assert config == replace(wanted, adapter_depth=6, adapter_width=768)


@pytest.mark.parametrize("branch", ["adapter", "text"])
def test_uniid_has_the_stage_widths_of_the_recogniser(branch: str, unets: dict[str, Any]) -> None:
    around = {**base_of("sd15"), "stage_widths": (16, 32, 64, 96), "branch": branch}
    config = fresh_config(unets["sd15"], AdapterRequirements("uniid", **around, settings={}))
    assert config.stage_widths == (16, 32, 64, 96)
    with pytest.raises(ConfigError, match="stage_widths is .*, but the base and the run decide it"):
        fresh_config(
            unets["sd15"], AdapterRequirements("uniid", **around, settings={"stage_widths": STAGE_WIDTHS})
        )


def test_heads_divide_whatever_width_there_is(unets: dict[str, Any]) -> None:
    given: dict[str, Any] = {
        "recognizer": "",
        "stage_widths": STAGE_WIDTHS,
        "branch": "adapter",
        "settings": {},
    }
    config = fresh_config(unets["sd15"], AdapterRequirements("idadapter", {"l": 64}, (96, 16), **given))
    assert isinstance(config, IDAdapterConfig)
    assert config.mixer_heads == 3
    given["branch"] = "text"
    config = fresh_config(unets["sd15"], AdapterRequirements("uniid", {"l": 48}, None, **given))
    assert isinstance(config, UniIDConfig)
    assert config.head_width == 16


REAL = {
    "sd15": ({"cross_attention_dim": 768, "attention_head_dim": 8}, {"l": 768}),
    "sd21": ({"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}, {"h": 1024}),
    "sdxl": (
        {
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {"l": 768, "g": 1280},
    ),
}


@pytest.mark.parametrize("family", REAL)
def test_sizes_of_the_real_bases_are_the_published_ones(family: str) -> None:
    run_shim()
    from diffusers import UNet2DConditionModel

    sizes, text_widths = REAL[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sizes)

    def config(method: str, branch: str) -> Any:
        given = {
            "text_widths": text_widths,
            "vision": (1024, 256),
            "recognizer": "",
            "stage_widths": STAGE_WIDTHS,
        }
        return fresh_config(unet, AdapterRequirements(method, **given, branch=branch, settings={}))

    assert config("idadapter", "adapter") == PRESETS[family]
    if family == "sdxl":
        assert config("uniid", "adapter") == UniIDConfig(text_widths=())
        assert config("uniid", "text") == UniIDConfig(adapter_tokens=0)


def test_settings_are_the_users(unets: dict[str, Any]) -> None:
    config = fresh(unets["sdxl"], "resampled", "sdxl", mixer_depth=0, context_width=128).config
    assert (config.tokens, config.references, config.mixer_depth) == (5, 2, 0)
    config = fresh(unets["sdxl"], "idadapter", "sdxl", text_encoders=("g",)).config
    assert (config.text_encoders, config.text_widths) == (("g",), (64,))
    adapter = fresh(unets["sdxl"], "idadapter", "sdxl", text_encoders=())
    assert encoded(adapter)[1] == {}
    config = fresh(unets["sd15"], "uniid adapter", adapter_width=96, adapter_tokens=7).config
    assert (config.adapter_width, config.adapter_tokens, config.head_width) == (96, 7, 32)


@pytest.mark.parametrize(
    ("start", "settings", "message"),
    [
        (
            "idadapter",
            {"site_widths": (64,) * 7},
            r"settings.site_widths is \(64, .*but the base and the run",
        ),
        ("idadapter", {"context_width": 768}, "settings.context_width is 768, .*it is 64. Leave it out"),
        ("idadapter", {"vision_width": 1024}, "settings.vision_width is 1024"),
        ("idadapter", {"recognizer": "another"}, "settings.recognizer is 'another'"),
        ("idadapter", {"text_encoders": ("l", "g")}, "text_encoders names g, but the base has l"),
        ("idadapter", {"tokens": 2.5}, "settings.tokens must be of the kind of 0, got 2.5"),
        ("idadapter", {"mixer_heads": 7}, "adapter.settings: width 64 must be divisible by .* got 7"),
        ("uniid adapter", {"text_widths": (64,)}, "settings.text_widths"),
        ("uniid adapter", {"adapter_tokens": 0}, "adapter.settings: a UniID adapter needs"),
        ("uniid adapter", {"adapter_depth": 0}, "adapter.settings: adapter_depth must be at least 1"),
        ("uniid adapter", {"head_width": 0}, "adapter.settings: head_width must be at least 1"),
        ("uniid text", {"adapter_tokens": 25}, "settings.adapter_tokens is 25"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(
    start: str, settings: dict[str, Any], message: str, unets: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=message):
        fresh(unets["sd15"], start, **settings)


def test_a_base_without_what_the_method_reads_is_refused(unets: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="this base has h. Set adapter.branch to 'adapter'"):
        fresh(unets["sd21"], "uniid text", "sd21")
    around: dict[str, Any] = {**base_of("sd15"), "vision": None, "branch": "adapter", "settings": {}}
    with pytest.raises(ConfigError, match=r"name the model as base\.vision"):
        fresh_config(unets["sd15"], AdapterRequirements("idadapter", **around))


# --- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["idadapter", "resampled", "uniid adapter"])
def test_a_start_leaves_the_unet_exactly_as_it_is(start: str, kind: str, unets: dict[str, Any]) -> None:
    unet = unets[kind]
    base = predict(unet, kind)
    adapter = fresh(unet, start, kind)
    tokens, _ = encoded(adapter)
    with inject(unet, adapter) as injected, injected.identity(tokens):
        assert torch.equal(predict(unet, kind), base)


def test_a_start_of_uniid_has_the_key_and_value_weights_of_the_unet(unets: dict[str, Any]) -> None:
    unet, adapter = unets["sdxl"], fresh(unets["sdxl"], "uniid adapter", "sdxl")
    sites = attention_sites(unet.state_dict())
    assert len(sites) == len(adapter.layers.adapter_modules) == 11
    for site in sites:
        layer = unet.get_submodule(site.diffusers_module)
        projection = adapter.layers.adapter_modules[str(site.index)]
        assert torch.equal(projection.to_k_ip.weight, layer.to_k.weight)
        assert torch.equal(projection.to_v_ip.weight, layer.to_v.weight)
        assert projection.to_k_ip.weight.data_ptr() != layer.to_k.weight.data_ptr()


@pytest.mark.parametrize("start", ["uniid adapter", "uniid text"])
def test_the_random_weights_of_a_uniid_start_are_as_pytorch_makes_them(
    start: str, unets: dict[str, Any]
) -> None:
    """Uniform up to one over the root of what goes in, norms at rest; from the seed alone."""
    adapter = fresh(unets["sdxl"], start, "sdxl")
    again, other = (fresh(unets["sdxl"], start, "sdxl", seed).encoder for seed in (0, 1))
    count = 0
    for name, module in adapter.encoder.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.Linear) and name != "adapter_branch.adapter_resampler.proj_out":
            count += 1
            bound = module.in_features**-0.5
            for key, parameter in module.named_parameters():
                assert 0.8 * bound < parameter.abs().max() <= bound, name
                assert torch.equal(parameter, again.get_parameter(f"{name}.{key}"))
                assert not torch.equal(parameter, other.get_parameter(f"{name}.{key}"))
            assert module.weight.std() == pytest.approx(bound / 3**0.5, rel=0.1), name
    assert count > 10


# --- learning --------------------------------------------------------------------------------------------------------


def loss_of(unet: Any, adapter: Adapter, kind: str) -> Tensor:
    """A loss through all that the adapter does: tokens in the UNet, text tokens in what the UNet is told."""
    tokens, text = encoded(adapter)
    given = inputs(kind)
    if text:
        told = torch.cat(list(text.values()), dim=-1)
        count = told.shape[1]
        states = given["encoder_hidden_states"]
        given["encoder_hidden_states"] = torch.cat([states[:, :1], told, states[:, 1 : 7 - count]], dim=1)
    if adapter.config.has_adapter_branch:
        with inject(unet, adapter) as injected, injected.identity(tokens):
            out = unet(**given).sample
    else:
        out = unet(**given).sample
    target = recipe.value(2, "unet.target", out.shape)
    loss: Tensor = (out - target).square().mean()
    return loss


def changed(before: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> set[str]:
    return {name for name, p in parameters.items() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("start", STARTS)
def test_every_parameter_learns_from_its_first_or_second_step_on(
    start: str, kind: str, unets: dict[str, Any]
) -> None:
    unet, adapter = unets[kind], fresh(unets[kind], start, kind)
    parameters = trainable(adapter)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in parameters.values())
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.0)
    at_once = {name for name in parameters if any(part in name for part in STARTS[start][3])}
    for expected in (at_once, set(parameters)):
        before = {name: p.detach().clone() for name, p in parameters.items()}
        optimizer.zero_grad()
        loss_of(unet, adapter, kind).backward()
        without = [name for name, p in parameters.items() if p.grad is None]
        assert not without, "no gradient, not even of zeros"
        optimizer.step()
        assert changed(before, parameters) == expected
    assert all(p.grad is None for p in unet.parameters())


def test_the_parameters_are_named_as_in_files(unets: dict[str, Any], tmp_path: Path) -> None:
    for start in STARTS:
        adapter = fresh(unets["sd15"], start)
        names = list(trainable(adapter))
        save_adapter(adapter, tmp_path / "adapter.safetensors")
        read = load_adapter(tmp_path / "adapter.safetensors")
        assert names == list(adapter.state_dict()) == list(read.state_dict())


# --- to a file and back ----------------------------------------------------------------------------------------------


def trained(unet: Any, start: str, kind: str = "sd15") -> tuple[Adapter, dict[str, nn.Parameter]]:
    adapter = fresh(unet, start, kind)
    parameters = trainable(adapter)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter += 0.1 * recipe.value(3, name, parameter.shape or (1,)).view_as(parameter)
    return adapter, parameters


@pytest.mark.parametrize("start", STARTS)
def test_a_trained_adapter_comes_back_from_its_file(
    start: str, unets: dict[str, Any], tmp_path: Path
) -> None:
    method, branch, _, _ = STARTS[start]
    adapter, parameters = trained(unets["sd15"], start)
    finished = to_adapter(adapter, parameters, "trained")
    assert finished.digest != adapter.digest
    assert all(p.requires_grad for p in parameters.values()), "the training cannot go on"
    save_adapter(finished, tmp_path / "adapter.safetensors")
    back = start_from(tmp_path / "adapter.safetensors", unets["sd15"], method=method, branch=branch)
    assert (back.digest, back.config) == (finished.digest, adapter.config)
    assert all(torch.equal(p, parameters[name]) for name, p in trainable(back).items())


def test_a_start_goes_on_with_another_number_of_photos(unets: dict[str, Any], tmp_path: Path) -> None:
    """The number is what the run teaches: first one photo, then four."""
    first = fresh(unets["sd15"], "idadapter", references=1)
    save_adapter(first, tmp_path / "first.safetensors")
    second = start_from(tmp_path / "first.safetensors", unets["sd15"], settings={"references": 4})
    assert isinstance(second.config, IDAdapterConfig)
    assert (first.config.references, second.config.references) == (1, 4)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    save_adapter(second, tmp_path / "second.safetensors")
    assert load_adapter(tmp_path / "second.safetensors").config.references == 4


def test_an_incomplete_state_makes_no_adapter(unets: dict[str, Any]) -> None:
    adapter, parameters = trained(unets["sd15"], "uniid adapter")
    name = "adapter_branch.adapter_modules.3.to_v_ip.weight"
    for state, message in (
        (
            {key: p for key, p in parameters.items() if key != name},
            "1 missing .adapter_branch.adapter_modules.3",
        ),
        ({**parameters, "another": torch.zeros(1)}, "1 unexpected .another"),
        ({**parameters, name: torch.zeros(1)}, "1 of another shape"),
        ({**parameters, name: torch.full_like(parameters[name], float("nan"))}, "1 weights .* not finite"),
    ):
        with pytest.raises(CheckpointError, match=message):
            to_adapter(adapter, state, "trained")


def test_masters_of_a_half_precision_file_are_fp32(unets: dict[str, Any], tmp_path: Path) -> None:
    adapter, _ = trained(unets["sd15"], "idadapter")
    save_adapter(adapter, tmp_path / "half.safetensors", torch.bfloat16)
    parameters = trainable(start_from(tmp_path / "half.safetensors", unets["sd15"]))
    assert {p.dtype for p in parameters.values()} == {torch.float32}


def test_one_branch_of_a_file_with_both_goes_on(unets: dict[str, Any], tmp_path: Path) -> None:
    both = tiny_uniid(TINY_SDXL)
    save_adapter(both, tmp_path / "both.safetensors")
    for branch in ("adapter", "text"):
        given = {**base_of("sdxl"), "method": "uniid", "branch": branch}
        adapter = start_from(tmp_path / "both.safetensors", unets["sdxl"], **given)
        parameters = trainable(adapter)
        assert parameters.keys() == {key for key in both.state_dict() if key.startswith(f"{branch}_branch.")}
        assert adapter.config.recognizer == RECOGNIZER, "the run's is not recorded"
        assert adapter.config.has_text_branch == (branch == "text")
        assert adapter.config.has_adapter_branch == (branch == "adapter")


def test_two_trained_branches_make_one_adapter_with_the_heads_of_both(
    unets: dict[str, Any], tmp_path: Path
) -> None:
    """Heads of another width than the published 64 cannot be told from the weights."""
    paths = []
    for start in ("uniid adapter", "uniid text"):
        adapter = fresh(unets["sd15"], start, head_width=16)
        save_adapter(adapter, tmp_path / f"{start}.safetensors")
        paths.append(tmp_path / f"{start}.safetensors")
    both = load_adapter(*paths)
    assert both.config.head_width == 16
    assert (both.config.text_depth, both.config.adapter_depth) == (2, 2)
    features = face_features(1)
    found = both.encode(features)
    parts = [load_adapter(path).encode(features) for path in paths]
    assert torch.equal(found.adapter_tokens, parts[0].adapter_tokens)  # type: ignore[arg-type]
    assert torch.equal(found.text_tokens["l"], parts[1].text_tokens["l"])
    save_adapter(fresh(unets["sd15"], "uniid text", head_width=32), paths[1])
    with pytest.raises(MismatchError, match="are 16 wide, those of .* 32"):
        load_adapter(*paths)


@pytest.mark.parametrize(
    ("start", "given", "error", "message"),
    [
        ("idadapter", {"method": "uniid"}, ConfigError, "method idadapter, but adapter.method is uniid"),
        ("idadapter", {"settings": {"tokens": 8}}, ConfigError, "settings.tokens is 8, .* made with 0"),
        (
            "idadapter",
            {"kind": "sdxl"},
            MismatchError,
            "was made for .*7 attention sites.*11 attention sites",
        ),
        (
            "idadapter",
            {"text_widths": {"h": 64}},
            MismatchError,
            "encoders l of width 64, this base has h of",
        ),
        (
            "idadapter",
            {"vision": (128, 16)},
            MismatchError,
            "width 64 with 16 patches, but base.vision has width 128",
        ),
        ("idadapter", {"vision": None}, MismatchError, "but none is named"),
        ("idadapter", {"recognizer": "another"}, MismatchError, f"with the face recogniser {RECOGNIZER}"),
        ("uniid adapter", {"method": "uniid", "branch": "text"}, MismatchError, "the adapter branch only"),
        (
            "uniid text",
            {"method": "uniid", "branch": "text", "text_widths": {"l": 64, "g": 64}},
            MismatchError,
            "text encoders l of width 64, this base has l of width 64, g of width 64",
        ),
    ],
)
def test_a_file_of_another_kind_is_no_start(
    start: str,
    given: dict[str, Any],
    error: type[Exception],
    message: str,
    unets: dict[str, Any],
    tmp_path: Path,
) -> None:
    save_adapter(fresh(unets["sd15"], start), tmp_path / "adapter.safetensors")
    given = dict(given)
    unet = unets[given.pop("kind", "sd15")]
    with pytest.raises(error, match=message):
        start_from(tmp_path / "adapter.safetensors", unet, **given)
