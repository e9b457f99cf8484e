"""UniID: the published code's tokens, the published sizes, and what an identity takes from the photos."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from idadapter_core.adapter import Adapter, initial_adapter, load_adapter, save_adapter
from idadapter_core.errors import InputError, MismatchError
from idadapter_core.mechanisms.text import normalize_text_tokens
from idadapter_core.methods.uniid import UniIDConfig, UniIDEncoder
from idadapter_core.methods.uniid.encoder import layers
from idadapter_core.types import Identity, Mix
from tests.golden import recipe
from tests.golden.compare import assert_published
from tests.tiny.features import RECOGNIZER, face, face_features
from tests.tiny.uniid import GOLDEN, TINY_SD15, branch, tiny_adapter, uniid_state, write_published

FOLDER = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with safe_open(FOLDER / "uniid_sdxl_like.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def seed() -> int:
    with safe_open(FOLDER / "uniid_sdxl_like.safetensors", "pt") as file:
        return int(file.metadata()["seed"])


@pytest.fixture(scope="module")
def identity(seed: int, tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """The golden identity, of an adapter that was read from files in the published layout."""
    adapter = tiny_adapter(GOLDEN, tmp_path_factory.mktemp("golden"), seed)
    return adapter.encode(face_features(seed))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return tiny_adapter(TINY_SD15, tmp_path_factory.mktemp("tiny"))


# --- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["l", "g"])
def test_text_tokens_are_the_published_ones(
    identity: Identity, golden: dict[str, Tensor], encoder: str
) -> None:
    assert_published(
        f"text tokens {encoder}", identity.text_tokens[encoder], golden[f"text_tokens_{encoder}"]
    )


@pytest.mark.parametrize("name", ["adapter_tokens", "adapter_tokens_uncond"])
def test_adapter_tokens_are_the_published_ones(
    identity: Identity, golden: dict[str, Tensor], name: str
) -> None:
    assert_published(name, getattr(identity, name), golden[name])


def test_normalized_text_tokens_are_the_published_ones(
    identity: Identity, golden: dict[str, Tensor], seed: int
) -> None:
    norms = {
        "l": recipe.value(seed, "reference_norm_l", (3, 1)).abs()[:, 0] * 10 + 5,
        "g": recipe.value(seed, "reference_norm_g", (3, 1)).abs()[:, 0] * 20 + 5,
    }
    tokens = normalize_text_tokens(identity.text_tokens, norms)
    assert_published("normalized text tokens", tokens, golden["text_tokens_normalized"])


# --- published sizes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of the published text branch, adapter branch without K/V, and K/V, as our modules have them."""
    with torch.device("meta"):
        encoder, projections = UniIDEncoder(UniIDConfig()), layers(UniIDConfig())
    shapes = {key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items()}
    parts = {
        name: {key.removeprefix(name): shape for key, shape in shapes.items() if key.startswith(name)}
        for name in ("text_branch.", "adapter_branch.")
    }
    assert sum(map(len, parts.values())) == len(shapes)
    parts["projections"] = {key: tuple(tensor.shape) for key, tensor in projections.state_dict().items()}
    return parts


def test_keys_and_shapes_are_the_published_ones(published: dict[str, dict[str, tuple[int, ...]]]) -> None:
    layout = json.loads((FOLDER / "uniid_layout.json").read_text())
    recorded = {name: {key: tuple(shape) for key, shape in keys.items()} for name, keys in layout.items()}
    assert published["text_branch."] == recorded["text_branch"]
    assert {**published["adapter_branch."], **published["projections"]} == recorded["adapter_branch"]


def test_parameter_counts_are_the_published_ones(published: dict[str, dict[str, tuple[int, ...]]]) -> None:
    millions = {
        name: sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e6
        for name, shapes in published.items()
    }
    assert round(millions["text_branch."], 1) == 117.6
    assert round(millions["projections"], 1) == 340.8
    assert round(millions["adapter_branch."] + millions["projections"], 1) == 399.8


# --- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"text_widths": (), "adapter_tokens": 0}, "needs a text branch (text_widths), an adapter branch"),
        ({"text_widths": (64, 64, 64)}, "at most 2 entries (l, g), got (64, 64, 64)"),
        ({"text_widths": (100,)}, "width 100 must be divisible by head_width 64"),
        ({"adapter_width": 96}, "width 96 must be divisible by head_width 64"),
        (
            {"stage_widths": (64, 128, 256)},
            "stage_widths must have 4 entries, one per stage of the recogniser, got (64, 128, 256)",
        ),
        ({"stage_widths": (64, 128, 0, 512)}, "stage_widths must be at least 1, got (64, 128, 0, 512)"),
    ],
)
def test_impossible_configs(changes: dict[str, int], text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        dataclasses.replace(UniIDConfig(), **changes)


def test_width_of_an_absent_branch_does_not_matter() -> None:
    assert not UniIDConfig(adapter_tokens=0, adapter_width=96).has_adapter_branch


# --- encode ----------------------------------------------------------------------------------------------------------


def test_a_recogniser_with_narrower_stages(tiny: Adapter, tmp_path: Path) -> None:
    """The file records the widths; features of another network are refused."""
    narrow = dataclasses.replace(tiny.config, stage_widths=(16, 32, 64, 96))
    adapter = initial_adapter(narrow, "narrow")
    save_adapter(adapter, tmp_path / "narrow.safetensors")
    read = load_adapter(tmp_path / "narrow.safetensors")
    assert read.config == narrow
    usual = face_features(1)
    stages = tuple(stage[:, :width] for stage, width in zip(usual.stages, narrow.stage_widths, strict=True))
    features = dataclasses.replace(usual, stages=stages)
    assert torch.equal(read.encode(features).text_tokens["l"], adapter.encode(features).text_tokens["l"])
    with pytest.raises(MismatchError, match=r"another kind of face network.*\(64, 56, 56\).*\(16, 56, 56\)"):
        read.encode(usual)


def test_an_identity_knows_where_it_comes_from(tiny: Adapter) -> None:
    identity = tiny.encode(face_features(1))
    assert (identity.method, identity.adapter, identity.recognizer) == ("uniid", tiny.digest, RECOGNIZER)
    assert identity.adapter_tokens is not None
    assert not identity.adapter_tokens.requires_grad
    assert identity.adapter_tokens.shape == (1, 25, 64)
    assert {name: tuple(tensor.shape) for name, tensor in identity.text_tokens.items()} == {"l": (1, 3, 64)}


def test_unconditional_tokens_do_not_depend_on_the_photos(tiny: Adapter) -> None:
    one = tiny.encode(face_features(1)).adapter_tokens_uncond
    many = tiny.encode(face_features(2, 3), Mix("mean")).adapter_tokens_uncond
    assert one is not None
    assert many is not None
    assert torch.equal(one, many)


def test_half_precision_features_are_accepted(tiny: Adapter) -> None:
    features = face_features(1)
    half = dataclasses.replace(
        features, embedding=features.embedding.half(), stages=tuple(stage.half() for stage in features.stages)
    )
    one, other = tiny.encode(features).adapter_tokens, tiny.encode(half).adapter_tokens
    assert one is not None
    assert other is not None
    assert other.dtype == torch.float32
    torch.testing.assert_close(other, one, atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("sexes", "word"),
    [
        (["M"], "man"),
        (["F"], "woman"),
        ([None], ""),
        (["M", "F"], ""),
        (["M", "F", "F"], "woman"),
        (["M", None, None], "man"),
    ],
)
def test_class_word_is_the_majority_of_the_faces(tiny: Adapter, sexes: list[str | None], word: str) -> None:
    features = face_features(1, len(sexes), faces=[face(sex=sex) for sex in sexes])
    assert tiny.encode(features).class_word == word


def test_faces_left_out_do_not_vote(tiny: Adapter) -> None:
    features = face_features(1, 3, faces=[face(sex=sex) for sex in ("M", "F", "F")])
    assert tiny.encode(features, Mix(weights=(1, 0, 0))).class_word == "man"
    assert tiny.encode(face_features(1)).class_word == ""


def test_learned_mixing_is_refused(tiny: Adapter) -> None:
    with pytest.raises(
        InputError, match="UniID has no learned mixing; set mode to auto, concatenate or mean"
    ):
        tiny.encode(face_features(1), Mix("learned"))


def test_features_without_stages_are_refused(tiny: Adapter) -> None:
    bare = dataclasses.replace(face_features(1), stages=())
    with pytest.raises(
        MismatchError, match=r"UniID reads .* set `recognizer` from 'from package' to UniID's network"
    ):
        tiny.encode(bare)


def test_features_of_another_network_are_refused_with_both_sizes(tiny: Adapter) -> None:
    features = face_features(1)
    short = dataclasses.replace(features, stages=features.stages[:3])
    with pytest.raises(
        MismatchError, match=r"stage maps of .*\(256, 14, 14\)\], not 512 and .*\(512, 7, 7\)\]"
    ):
        tiny.encode(short)
    narrow = dataclasses.replace(features, embedding=torch.zeros(1, 256))
    with pytest.raises(MismatchError, match="an embedding of 256 .*, not 512"):
        tiny.encode(narrow)


def test_another_recogniser_is_refused_with_both_names(tiny: Adapter) -> None:
    trained = dataclasses.replace(
        tiny, config=dataclasses.replace(tiny.config, recognizer="feedfacefeedface")
    )
    with pytest.raises(
        MismatchError, match=rf"trained with another face recogniser .*\(feedfacefeedface, not {RECOGNIZER}\)"
    ):
        trained.encode(face_features(1))
    assert trained.encode(face_features(1, recognizer="feedfacefeedface")).recognizer == "feedfacefeedface"


def test_half_an_adapter_gives_half_an_identity(tiny: Adapter, tmp_path: Path) -> None:
    adapter_file, text_file = write_published(tmp_path, uniid_state(TINY_SD15))
    whole = tiny.encode(face_features(1))
    only_text = load_adapter(text_file).encode(face_features(1))
    assert only_text.adapter_tokens is None
    assert only_text.adapter_tokens_uncond is None
    assert torch.equal(only_text.text_tokens["l"], whole.text_tokens["l"])
    only_adapter = load_adapter(adapter_file).encode(face_features(1))
    assert not only_adapter.text_tokens
    assert only_adapter.adapter_tokens is not None
    assert whole.adapter_tokens is not None
    assert torch.equal(only_adapter.adapter_tokens, whole.adapter_tokens)


# --- projections and text tokens -------------------------------------------------------------------------------------


def test_keys_and_values_are_not_swapped(tiny: Adapter, tmp_path: Path) -> None:
    state = uniid_state(TINY_SD15)
    state["adapter_branch.adapter_modules.3.to_v_ip.weight"] *= 2
    changed = load_adapter(*write_published(tmp_path, state))
    tokens = recipe.value(1, "tokens", (2, 25, 64))
    for index in range(1, 15, 2):
        keys, values = tiny.layers.project(index, tokens)
        changed_keys, changed_values = changed.layers.project(index, tokens)
        assert torch.equal(changed_keys, keys)
        assert torch.equal(changed_values, 2 * values if index == 3 else values)
    weight = branch(state, "adapter")["adapter_branch.adapter_modules.3.to_k_ip.weight"]
    torch.testing.assert_close(tiny.layers.project(3, tokens)[0], tokens @ weight.T)


def test_projections_of_half_precision_weights_are_float32(tmp_path: Path) -> None:
    state = {key: tensor.half() for key, tensor in uniid_state(TINY_SD15).items()}
    adapter = load_adapter(*write_published(tmp_path, state))
    tokens = recipe.value(1, "tokens", (1, 25, 64))
    keys, _ = adapter.layers.project(1, tokens.half())
    assert keys.dtype == torch.float32
    assert adapter.layers.adapter_modules["1"].to_k_ip.weight.dtype == torch.float16


def test_normalizing_forgets_the_magnitude() -> None:
    tokens = {"l": recipe.value(1, "l", (1, 3, 8)), "g": recipe.value(1, "g", (1, 3, 12))}
    norms = {"l": torch.tensor([1.0, 2.0, 3.0]), "g": torch.tensor([4.0, 5.0, 6.0])}
    out = normalize_text_tokens(tokens, norms)
    torch.testing.assert_close(out[0, :, :8].norm(dim=-1), norms["l"])
    torch.testing.assert_close(out[0, :, 8:].norm(dim=-1), norms["g"])
    louder = normalize_text_tokens({name: 50 * tensor for name, tensor in tokens.items()}, norms)
    torch.testing.assert_close(louder, out)
    zero = normalize_text_tokens({"l": torch.zeros(1, 3, 8)}, norms)
    assert not zero.any()
