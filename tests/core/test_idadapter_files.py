"""IDAdapter files and identities of IDAdapter: nothing is lost, everything that does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from idadapter_core.adapter import Adapter, build_adapter, initial_adapter, load_adapter, save_adapter
from idadapter_core.errors import CheckpointError, InputError, MismatchError
from idadapter_core.identity import identical, load_identity, save_identity
from idadapter_core.methods.idadapter import METHOD, PRESETS, IDAdapterConfig
from idadapter_core.sites import Site, attention_sites
from idadapter_core.types import Identity
from tests.tiny.features import face_features
from tests.tiny.idadapter import CONFIGS, idadapter_state, tiny_idadapter, vision_features
from tests.tiny.uniid import TINY_SD15, tiny_adapter, uniid_state, write_published

State = dict[str, Tensor]
SMALL = CONFIGS["sd15"]
VARIANTS: dict[str, IDAdapterConfig] = {
    **CONFIGS,
    "resampled": replace(SMALL, tokens=6),
    "no word": replace(SMALL, text_encoders=(), text_widths=()),
    "two words, zeros": replace(SMALL, text_tokens=2, unconditional="zeros", recognizer="0123456789abcdef"),
    "unmixed": replace(SMALL, mixer_depth=0, references=1),
}


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return tiny_idadapter(SMALL)


@pytest.fixture(scope="module")
def uniid(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return tiny_adapter(TINY_SD15, tmp_path_factory.mktemp("uniid"))


@pytest.fixture(scope="module")
def identity(adapter: Adapter) -> Identity:
    """Of one photo, so that its tokens count N times."""
    return adapter.encode(vision_features(1))


def read_own(path: Path) -> tuple[State, dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def changed_file(adapter: Adapter, path: Path, **settings: object) -> Path:
    """A file of this adapter with changed settings in its config."""
    save_adapter(adapter, path)
    tensors, metadata = read_own(path)
    config = {**dataclasses.asdict(adapter.config), **settings}
    save_file(tensors, path, {**metadata, "config": json.dumps(config)})
    return path


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_file_keeps_everything(config: IDAdapterConfig, tmp_path: Path) -> None:
    adapter = tiny_idadapter(config)
    save_adapter(adapter, tmp_path / "own.safetensors")
    again = load_adapter(tmp_path / "own.safetensors")
    assert (again.method, again.config, again.digest) == ("idadapter", config, adapter.digest)
    before, after = adapter.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert again.mechanisms.openings == adapter.mechanisms.openings
    assert again.mechanisms.deltas.keys() == adapter.mechanisms.deltas.keys()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_file_makes_the_same_identities(config: IDAdapterConfig, tmp_path: Path) -> None:
    adapter, features = tiny_idadapter(config), vision_features(1, 3)
    save_adapter(adapter, tmp_path / "own.safetensors")
    one, other = (load_adapter(tmp_path / "own.safetensors") for _ in range(2))
    assert identical(one.encode(features), other.encode(features))
    for module in (one.encoder, adapter.encoder):  # products round by where in memory their weights begin
        module.load_state_dict({key: t.clone() for key, t in module.state_dict().items()}, assign=True)
    assert identical(one.encode(features), adapter.encode(features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(adapter: Adapter, tmp_path: Path, dtype: torch.dtype) -> None:
    save_adapter(adapter, tmp_path / "half.safetensors", dtype)
    stored, _ = read_own(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    half = load_adapter(tmp_path / "half.safetensors")
    assert half.digest != adapter.digest
    assert f"({str(dtype).removeprefix('torch.')})" in half.info
    assert {p.dtype for p in half.encoder.parameters()} == {torch.float32}
    assert {p.dtype for p in half.layers.parameters()} == {dtype}
    assert {delta.weight.dtype for delta in half.mechanisms.deltas.values()} == {dtype}
    for number, gates in adapter.mechanisms.openings.items():
        assert half.mechanisms.openings[number] == pytest.approx(gates, abs=1e-2)
    save_adapter(half, tmp_path / "again.safetensors", dtype)
    assert load_adapter(tmp_path / "again.safetensors").digest == half.digest
    one, other = (each.encode(vision_features(1)).adapter_tokens for each in (adapter, half))
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one, other, atol=0.2, rtol=0)


def test_every_weight_counts_in_the_digest_and_how_they_are_used() -> None:
    config = replace(SMALL, site_widths=(32,), site_heads=(4,), tokens=3)
    state = idadapter_state(config)
    digests = {build_adapter(METHOD.name, config, state, "x").digest}
    assert build_adapter(METHOD.name, replace(config, recognizer="0" * 16), state, "x").digest in digests
    for settings in ({"unconditional": "zeros"}, {"mixer_heads": 1}, {"references": 3}):
        digests.add(build_adapter(METHOD.name, replace(config, **settings), state, "x").digest)
    for key in state:
        digests.add(build_adapter(METHOD.name, config, {**state, key: state[key] + 1 / 3}, "x").digest)
    assert len(digests) == len(state) + 4


def test_info_tells_what_was_read(adapter: Adapter) -> None:
    count = sum(tensor.numel() for tensor in adapter.state_dict().values())
    assert adapter.info.splitlines() == [
        f"tiny 0: IDAdapter, N = 4 references, {count / 1e6:.1f} M parameters (float32)",
        "for a UNet with 7 attention sites, text width 64; identity tokens: up to 65, all kept",
        "CLIP vision of width 64 with 16 patches",
        "identity word (1 embedding) for the text encoders l 64",
        "negative prompts: without the adapters",
        "face recogniser: not recorded in the file; use the very face package it was trained with, others draw somebody else",
    ]


def test_a_start_says_so_wherever_it_is_read(tmp_path: Path) -> None:
    save_adapter(initial_adapter(SMALL, "start"), tmp_path / "start.safetensors")
    start = load_adapter(tmp_path / "start.safetensors")
    assert set(start.mechanisms.openings.values()) == {(0.0, 0.0)}
    assert start.mechanisms.deltas == {}
    assert "Note: it is untrained: all gates are closed" in start.info


def test_a_uniid_has_no_gates(uniid: Adapter) -> None:
    assert (uniid.mechanisms.openings, uniid.mechanisms.deltas, uniid.notes) == ({}, {}, ())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"future": 1}, "unknown settings ['future'] in its config; update"),
        ({"references": 0}, "references must be at least 1, got 0"),
        ({"references": "4"}, "references is '4'"),
        ({"references": 4.0}, "references is 4.0"),
        ({"references": True}, "references is True"),
        ({"references": None}, "references is None"),
        ({"tokens": -1}, "tokens is -1"),
        ({"mixer_depth": -1}, "mixer_depth is -1"),
        ({"mixer_heads": 5}, "width 64 must be divisible by its number of heads, got 5"),
        ({"text_encoders": "l"}, "text_encoders is 'l'"),
        ({"text_encoders": [1]}, "text_encoders is (1,)"),
        ({"text_encoders": ["t5"]}, "text_encoders must be different ones of l, g, h"),
        ({"text_encoders": ["l", "l"], "text_widths": [64, 64]}, "must be different ones of l, g, h"),
        ({"text_encoders": ["l", "g"]}, "must be as many"),
        ({"text_widths": ["64"]}, "text_widths is ('64',)"),
        ({"site_widths": [[32]]}, "site_widths is ([32],)"),
        ({"site_widths": 7}, "site_widths is 7"),
        ({"site_heads": [4]}, "site_widths (7) and site_heads (1) must be as many"),
        ({"unconditional": "none"}, "unconditional must be one of skip, zeros, got 'none'"),
        ({"recognizer": 5}, "recognizer is 5"),
    ],
)
def test_settings_that_cannot_be(
    adapter: Adapter, tmp_path: Path, settings: dict[str, object], text: str
) -> None:
    path = changed_file(adapter, tmp_path / "own.safetensors", **settings)
    with pytest.raises(CheckpointError, match=re.escape(text)) as caught:
        load_adapter(path)
    assert str(caught.value).startswith("own.safetensors: ")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"vision_width": 128}, "of another shape"),
        ({"embedding_width": 256}, "mixer.embedding_projection.weight is (64, 512) instead of (64, 256)"),
        ({"context_width": 128}, "layers.deltas.1.to_k.weight is (32, 64) instead of (32, 128)"),
        ({"mixer_depth": 1}, "12 unexpected (mixer.blocks.1"),
        ({"mixer_depth": 3}, "12 missing (mixer.blocks.2"),
        ({"tokens": 6}, "missing (mixer.resampler.latents"),
        ({"text_encoders": ["g"]}, "6 missing (word.encoders.g.0.weight"),
        ({"text_encoders": [], "text_widths": []}, "6 unexpected (word.encoders.l.0"),
        ({"site_widths": [32, 64], "site_heads": [4, 4]}, "unexpected (layers.deltas.11"),
    ],
)
def test_settings_of_another_adapter(
    adapter: Adapter, tmp_path: Path, settings: dict[str, object], text: str
) -> None:
    path = changed_file(adapter, tmp_path / "own.safetensors", **settings)
    with pytest.raises(CheckpointError, match=re.escape(text)) as caught:
        load_adapter(path)
    assert str(caught.value).startswith("own.safetensors: not a complete IDAdapter file: ")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"layers.gates.3.gate_attention": None}, "1 missing (layers.gates.3.gate_attention)"),
        ({"layers.deltas.5.to_v.weight": None}, "1 missing (layers.deltas.5.to_v.weight)"),
        ({"mixer.embedding_projection.bias": None}, "1 missing (mixer.embedding_projection.bias)"),
        ({"word.encoders.l.3.weight": None}, "1 missing (word.encoders.l.3.weight)"),
        ({"layers.gates.15.gate_attention": ()}, "1 unexpected (layers.gates.15.gate_attention)"),
        ({"mixer.extra": (3,)}, "1 unexpected (mixer.extra)"),
        (
            {"layers.deltas.1.to_k.weight": (32, 128), "layers.deltas.1.to_v.weight": (32, 128)},
            "2 of another shape (layers.deltas.1.to_k.weight is (32, 128) instead of (32, 64), "
            "layers.deltas.1.to_v.weight is (32, 128) instead of (32, 64))",
        ),
        (
            {"layers.gates.3.gate_attention": (1,)},
            "1 of another shape (layers.gates.3.gate_attention is (1,) instead of ())",
        ),
        (
            {"mixer.blocks.0.to_qkv.weight": (64, 64)},
            "1 of another shape (mixer.blocks.0.to_qkv.weight is (64, 64) instead of (192, 64))",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    adapter: Adapter, tmp_path: Path, changes: dict[str, tuple[int, ...] | None], text: str
) -> None:
    path = tmp_path / "odd.safetensors"
    save_adapter(adapter, path)
    tensors, metadata = read_own(path)
    tensors = {key: tensor for key, tensor in tensors.items() if key not in changes}
    tensors |= {key: torch.zeros(shape) for key, shape in changes.items() if shape is not None}
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=re.escape(text)) as caught:
        load_adapter(path)
    assert str(caught.value).startswith("odd.safetensors: not a complete IDAdapter file: ")


def test_an_idadapter_has_no_second_file(adapter: Adapter, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    save_adapter(adapter, own)
    adapter_file, text_file = write_published(tmp_path, uniid_state(TINY_SD15))
    text = r"^own\.safetensors is an IDAdapter file, which holds everything; .* set text_branch to 'none'\.$"
    for pair in ((own, text_file), (adapter_file, own), (own, own)):
        with pytest.raises(InputError, match=text):
            load_adapter(*pair)
    assert load_adapter(own).digest == adapter.digest
    assert load_adapter(adapter_file, text_file).method == "uniid"


# --- does it fit the model? ------------------------------------------------------------------------------------------

_STEMS = [*(f"input_blocks.{i}.1" for i in (1, 2, 4, 5, 7, 8)), "middle_block.1"]
_STEMS += [f"output_blocks.{i}.1" for i in range(3, 12)]
SIXTEEN = attention_sites(f"{stem}.transformer_blocks.0.attn2.to_k.weight" for stem in _STEMS)


def widths(config: IDAdapterConfig, sites: tuple[Site, ...] = SIXTEEN) -> dict[str, tuple[int, int]]:
    """Of a UNet that an adapter of these sizes fits."""
    pairs = zip(sites, config.site_widths, strict=True)
    return {site.comfy_module: (width, config.context_width) for site, width in pairs}


def test_an_adapter_of_another_family_is_refused_with_both_names(adapter: Adapter) -> None:
    for_sd21 = replace(adapter, name="person.safetensors", config=PRESETS["sd21"])
    for_sd21.require_sites(SIXTEEN, widths(PRESETS["sd21"]), "SD21")
    with pytest.raises(MismatchError) as caught:
        for_sd21.require_sites(SIXTEEN, widths(PRESETS["sd15"]), "SD15")
    assert str(caught.value) == (
        "person.safetensors was made for SD2.1, this checkpoint is SD1.5. Load a checkpoint of the adapter's family, or an adapter "
        "that was made for this one."
    )


# --- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("photos", [1, 4])
def test_an_identity_file_keeps_everything(config: IDAdapterConfig, photos: int, tmp_path: Path) -> None:
    identity = tiny_idadapter(config).encode(vision_features(1, photos))
    save_identity(identity, tmp_path / "person.safetensors")
    again = load_identity(tmp_path / "person.safetensors")
    assert identical(again, identity)
    assert (again.adapter_bias is None) == (identity.adapter_bias is None)
    assert (again.adapter_tokens_uncond is None) == (config.unconditional == "skip")
    assert again.text_tokens.keys() == set(config.text_encoders)


def test_how_often_a_token_counts_is_part_of_an_identity(identity: Identity) -> None:
    assert identity.adapter_bias is not None
    for bias in (None, 0 * identity.adapter_bias):
        assert not identical(identity, replace(identity, adapter_bias=bias))
    assert identical(identity, replace(identity, adapter_bias=identity.adapter_bias.clone()))


@pytest.mark.parametrize("shape", [(17,), (1, 16), (1, 18), (2, 17), (1, 17, 1), (1, 17, 64)])
def test_a_damaged_bias_is_refused(identity: Identity, tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "person.safetensors"
    save_identity(identity, path)
    tensors, metadata = read_own(path)
    assert tensors["adapter_bias"].shape == (1, 17)
    save_file({**tensors, "adapter_bias": torch.zeros(shape)}, path, metadata)
    with pytest.raises(
        CheckpointError, match=r"^person\.safetensors: .* has adapter_bias\. Make the identity again"
    ):
        load_identity(path)


def test_a_bias_without_tokens_is_refused(identity: Identity, tmp_path: Path) -> None:
    path = tmp_path / "person.safetensors"
    save_identity(replace(identity, adapter_tokens=None), path)
    with pytest.raises(CheckpointError, match=r"has adapter_bias\. Make the identity again"):
        load_identity(path)


def test_an_identity_of_the_other_method_is_refused(
    adapter: Adapter, uniid: Adapter, identity: Identity
) -> None:
    adapter.require_identity(identity, "person")
    other = uniid.encode(face_features(1))
    uniid.require_identity(other, "person")
    for refusing, refused in ((adapter, other), (uniid, identity)):
        text = (
            f"person was made with another adapter .weights {refused.adapter}., not with .*{refusing.digest}"
        )
        with pytest.raises(MismatchError, match=text):
            refusing.require_identity(refused, "person")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    state = idadapter_state(CONFIGS["sd15"])
    state["layers.gates.3.to_out.bias"][0] = value
    with pytest.raises(
        CheckpointError, match=r"1 weights hold .* not finite \(layers\.gates\.3\.to_out\.bias\)"
    ):
        build_adapter(METHOD.name, CONFIGS["sd15"], state, "broken")


def test_weights_without_their_config_say_so(tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    save_file(idadapter_state(CONFIGS["sd15"]), path)
    with pytest.raises(CheckpointError, match="this is an IDAdapter without its config"):
        load_adapter(path)
