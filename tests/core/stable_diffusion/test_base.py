"""Base models from disk: what is loaded, in which state, and what is refused with which words.

That they compute what ComfyUI computes is tested in `tests/nodes/test_training_parity.py`.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from idadapter_core.errors import CheckpointError, ConfigError, InputError, MismatchError
from idadapter_core.stable_diffusion.base import Base, load_base, noise_schedule
from idadapter_core.stable_diffusion.config import BaseConfig
from idadapter_core.stable_diffusion.single_file import SingleFile
from tests.golden import recipe
from tests.tiny.bases import KINDS, diffusers_base, scheduler, tiny_autoencoder

PREDICTIONS = {"sd15": "epsilon", "sd21": "v_prediction", "sdxl": "epsilon"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(kind: str) -> Base:
    return load(diffusers_base(kind), kind)


def load(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **settings: str) -> Base:
    return load_base(BaseConfig(path=str(folder), family=kind, **settings), dtype=dtype)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """A base folder of a kind that a test may change."""

    def make(kind: str) -> Path:
        return Path(shutil.copytree(diffusers_base(kind), tmp_path / "base"))

    return make


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


# --- what is loaded ---


def test_everything_is_frozen_and_in_evaluation_mode(kind: str, base: Base) -> None:
    for part in (base.unet, base.vae, base.text):
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert not any(module.training for module in part.modules())
    assert base.family == kind
    assert base.schedule.prediction_type == PREDICTIONS[kind]
    assert base.schedule.steps == 1000
    assert float(base.schedule.alphas_cumprod[0]) == pytest.approx(1 - 0.00085)


def test_a_base_does_not_change_with_its_files(copy: Callable[[str], Path]) -> None:
    folder = copy("sd15")
    base = load(folder, "sd15")
    parts = {"unet": base.unet, "vae": base.vae, "text": base.text}
    before = {name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in parts.items()}
    for file in folder.rglob("*.safetensors"):
        content = file.read_bytes()
        with file.open("r+b") as opened:
            opened.write(bytes(len(content)))
    for name, part in parts.items():
        assert all(torch.equal(value, before[name][key]) for key, value in part.state_dict().items())


def test_nothing_is_fetched(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load(diffusers_base(kind), kind)


def test_half_of_it_in_half_precision(kind: str, base: Base) -> None:
    narrow = load(diffusers_base(kind), kind, torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.unet.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in narrow.text.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in narrow.vae.parameters()} == {torch.float32}
    assert (narrow.digest, narrow.vae.digest) == (base.digest, base.vae.digest)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "text_encoder_2", "vae"])
def test_the_digest_is_of_all_weights(part: str, copy: Callable[[str], Path]) -> None:
    folder, original = copy("sdxl"), load(diffusers_base("sdxl"), "sdxl")
    file = weights(folder / part)
    state = load_file(file)
    save_file({name: value * (1 + 1e-2) for name, value in state.items()}, file, metadata={"format": "pt"})
    changed = load(folder, "sdxl")
    assert changed.digest != original.digest
    assert (changed.vae.digest != original.vae.digest) == (part == "vae")


def test_a_folder_that_has_a_variant_of_the_weights_only(kind: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    for file in folder.rglob("*.safetensors"):
        halved = {name: value.half() for name, value in load_file(file).items()}
        save_file(halved, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    found = load(folder, kind)
    assert {parameter.dtype for parameter in found.unet.parameters()} == {torch.float32}
    torch.testing.assert_close(
        found.text.encode(["a cat"]).states,
        load(diffusers_base(kind), kind).text.encode(["a cat"]).states,
        atol=0.05,
        rtol=0,
    )


# --- the autoencoder ---


@pytest.mark.parametrize("vae", ["kl", "tiny"])
def test_latents_are_in_the_units_of_the_unet(vae: str, kind: str) -> None:
    found = load(diffusers_base(kind, vae), kind).vae
    network = tiny_autoencoder(kind, vae=vae).eval()
    images = recipe.value(0, "images", (2, 3, 16, 24)).tanh()
    moments = found.moments(images)
    assert moments.shape == (2, 8, 2, 3)
    scaling = network.config.scaling_factor
    with torch.no_grad():
        encoded = network.encode(images)
    if vae == "kl":
        torch.testing.assert_close(moments[:, :4], encoded.latent_dist.mean * scaling)
        torch.testing.assert_close(moments[:, 4:], encoded.latent_dist.std * scaling)
    else:
        torch.testing.assert_close(moments[:, :4], encoded.latents * scaling)
        assert moments[:, 4:].eq(0).all()
    latents = moments[:, :4].clone().requires_grad_()
    decoded = found.decode(latents)
    torch.testing.assert_close(decoded, network.decode(latents / scaling).sample)
    decoded.square().mean().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0


def test_the_autoencoder_stays_in_full_precision_under_autocast(base: Base) -> None:
    images = recipe.value(0, "images", (1, 3, 16, 16)).tanh()
    expected = base.vae.moments(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(base.vae.moments(images.bfloat16().float()), base.vae.moments(images.bfloat16()))
        assert torch.equal(base.vae.moments(images), expected)
        decoded = base.vae.decode(expected[:, :4])
    assert torch.equal(decoded, base.vae.decode(expected[:, :4]))
    assert decoded.dtype is torch.float32


@pytest.mark.parametrize("shape", [(1, 3, 12, 16), (3, 16, 16), (1, 1, 16, 16)])
def test_pictures_of_other_shapes_are_refused(shape: tuple[int, ...], base: Base) -> None:
    with pytest.raises(InputError, match="multiples of 8"):
        base.vae.moments(torch.zeros(shape))


def test_another_autoencoder(base: Base, kind: str, tmp_path: Path) -> None:
    other = diffusers_base(kind, "tiny")
    for path in (other, other / "vae"):
        found = load(diffusers_base(kind), kind, vae=str(path))
        assert type(found.vae.network).__name__ == "AutoencoderTiny"
        assert found.digest != base.digest
    file = tmp_path / "kl.safetensors"
    save_file(tiny_autoencoder(kind, seed=1).state_dict(), file)
    found = load(diffusers_base(kind), kind, vae=str(file))
    assert (found.vae.gain, found.vae.offset) == (base.vae.gain, base.vae.offset)
    assert found.vae.digest != base.vae.digest


# --- what is refused ---


def test_another_family_is_refused(kind: str) -> None:
    for wrong in set(KINDS) - {kind}:
        with pytest.raises(ConfigError, match=f'base.family is {wrong}, but .* Set base.family to "{kind}"'):
            load(diffusers_base(kind), wrong)


def test_the_message_says_what_the_unet_is() -> None:
    with pytest.raises(
        ConfigError, match="is a UNet with 7 attention sites, text width 64, of the family sd15"
    ):
        load(diffusers_base("sd15"), "sdxl")


@pytest.mark.parametrize(
    ("missing", "error", "message"),
    [
        ("unet", CheckpointError, "no UNet2DConditionModel here"),
        ("text_encoder_2", CheckpointError, "no CLIPTextModelWithProjection here"),
        ("tokenizer_2", ConfigError, "no tokenizer in .*base.tokenizer"),
        ("vae", ConfigError, "vae: no such file or folder; name a VAE in base.vae"),
        ("scheduler", ConfigError, r"scheduler_config.json: cannot be read"),
    ],
)
def test_a_folder_that_lacks_a_part(
    missing: str, error: type[Exception], message: str, copy: Callable[[str], Path]
) -> None:
    folder = copy("sdxl")
    shutil.rmtree(folder / missing)
    with pytest.raises(error, match=message):
        load(folder, "sdxl")


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("damage", ["a weight is missing", "a weight is of another shape", "truncated"])
def test_a_folder_whose_weights_are_damaged(part: str, damage: str, copy: Callable[[str], Path]) -> None:
    folder = copy("sd15")
    file = weights(folder / part)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        state = load_file(file)
        name = next(name for name in state if "norm" in name and name.endswith("bias"))
        value = state.pop(name)
        if damage == "a weight is of another shape":
            state[name] = torch.cat([value, value])
        save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=part):
        load(folder, "sd15")


def test_a_unet_for_inpainting_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("sd15")
    state = load_file(weights(folder / "unet"))
    state["conv_in.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(state, weights(folder / "unet"), metadata={"format": "pt"})
    edit(folder / "unet" / "config.json", in_channels=9)
    with pytest.raises(ConfigError, match="reads 9 channels .* inpainting"):
        load(folder, "sd15")


def test_parts_of_two_models_are_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("sdxl")
    file = weights(folder / "text_encoder_2")
    state = load_file(file)
    state["text_projection.weight"] = torch.zeros(32, 64)
    save_file(state, file, metadata={"format": "pt"})
    edit(folder / "text_encoder_2" / "config.json", projection_dim=32)
    with pytest.raises(ConfigError, match="is told 1600 numbers .* instead of 1568"):
        load(folder, "sdxl")


def test_paths_that_name_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="base.path is empty"):
        load_base(BaseConfig())
    with pytest.raises(ConfigError, match="no such file or folder.*nothing is downloaded"):
        load_base(BaseConfig(path="runwayml/stable-diffusion-v1-5"))
    with pytest.raises(ConfigError, match="has no unet/config.json"):
        load(checkpoint(tmp_path / "model.safetensors"), "sd15", config=str(tmp_path))
    with pytest.raises(ConfigError, match="Leave base.config out"):
        load(diffusers_base("sd15"), "sd15", config=str(tmp_path))
    with pytest.raises(ConfigError, match=r"no tokenizer in .*vocab.json and merges.txt"):
        load(diffusers_base("sd15"), "sd15", tokenizer=str(tmp_path))
    with pytest.raises(ConfigError, match=r"nowhere: no such file or folder; name a VAE"):
        load(diffusers_base("sd15"), "sd15", vae=str(tmp_path / "nowhere"))


def test_an_autoencoder_of_another_kind(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("sd15")
    edit(folder / "vae" / "config.json", latents_mean=[0.0] * 4)
    with pytest.raises(ConfigError, match="does not make the latents of Stable Diffusion"):
        load(folder, "sd15")
    edit(folder / "vae" / "config.json", _class_name="AsymmetricAutoencoderKL")
    with pytest.raises(ConfigError, match="holds a AsymmetricAutoencoderKL; only"):
        load(folder, "sd15")
    file = tmp_path / "strange.safetensors"
    save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"strange.safetensors: holds no VAE"):
        load(diffusers_base("sd15"), "sd15", vae=str(file))


# --- checkpoint files ---


def checkpoint(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1), **tensors}, path)
    return path


def test_a_file_without_a_unet(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({"lora_up": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"lora.safetensors: holds no UNet"):
        load(file, "sd15")
    with pytest.raises(MismatchError, match="no cross-attention layers of a Stable Diffusion UNet"):
        load(checkpoint(tmp_path / "another.safetensors"), "sd15")


@pytest.mark.parametrize(
    ("family", "tensors", "prediction", "zero"),
    [
        ("sd15", {}, "epsilon", False),
        ("sdxl", {"v_pred": torch.zeros(1)}, "v_prediction", False),
        ("sdxl", {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, "v_prediction", True),
        ("sd21", {}, "epsilon", False),
        ("sd21", {"bias": torch.tensor([-0.08, 0.08])}, "epsilon", False),
        ("sd21", {"bias": torch.tensor([-0.1, 0.1])}, "v_prediction", False),
        ("sd15", {"bias": torch.tensor([-0.1, 0.1])}, "epsilon", False),
    ],
)
def test_what_a_file_tells_of_its_prediction(
    family: str, tensors: dict[str, torch.Tensor], prediction: str, zero: bool, tmp_path: Path
) -> None:
    name = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    tensors = {name if key == "bias" else key: value for key, value in tensors.items()}
    file = SingleFile(checkpoint(tmp_path / "model.safetensors", **tensors), family, None)
    schedule = noise_schedule(file.scheduler(), "auto", "model")
    assert schedule.prediction_type == prediction
    assert (float(schedule.alphas_cumprod[-1]) == 0) == zero
    assert noise_schedule(file.scheduler(), "v_prediction", "model").prediction_type == "v_prediction"


def test_a_file_on_other_noise_levels_is_refused(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "playground.safetensors", edm_mean=torch.zeros(4))
    with pytest.raises(ConfigError, match=r"playground.safetensors: was trained on EDM's noise levels"):
        SingleFile(file, "sdxl", None).scheduler()


# --- noise schedules ---


def test_zero_terminal_signal() -> None:
    plain = noise_schedule(scheduler("sd21"), "auto", "model").alphas_cumprod
    alphas = noise_schedule(scheduler("sd21", rescale_betas_zero_snr=True), "auto", "model").alphas_cumprod
    assert float(alphas[-1]) == 0
    assert float(alphas[0]) == pytest.approx(float(plain[0]), abs=1e-7)
    assert (alphas.diff() < 0).all()
    assert (alphas[1:] < plain[1:]).all()


def test_no_signal_and_epsilon_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="Set base.prediction_type to v_prediction"):
        noise_schedule(scheduler("sd15", rescale_betas_zero_snr=True), "auto", "model")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (scheduler("sd15", beta_schedule="squaredcos_cap_v2"), "EulerDiscreteScheduler .*squaredcos_cap_v2"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler .*None"),
        (scheduler("sd15", trained_betas=[0.1, 0.2]), "trained_betas"),
        (scheduler("sd15", prediction_type="sample"), "prediction_type must be .*'sample'"),
    ],
)
def test_other_schedules_are_refused_by_name(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        noise_schedule(given, "auto", "model")
