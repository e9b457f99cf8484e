"""The base models that training loads, and ComfyUI with the same files: one and the same model."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from idadapter_core.sites import attention_sites
from idadapter_core.stable_diffusion.base import Base, load_base, unet_family
from idadapter_core.stable_diffusion.config import BaseConfig
from idadapter_core.stable_diffusion.sampler import sample, simple_schedule
from idadapter_core.stable_diffusion.single_file import KL, TEXT_ENCODERS, SingleFile
from idadapter_core.stable_diffusion.vae import autoencoder_from_state
from idadapter_core.stable_diffusion.vision import load_vision, published_sizes
from tests.golden import recipe
from tests.nodes.sampling import KINDS
from tests.tiny.bases import TINY_KL, WIDTH, write_tiny_base
from tests.tiny.checkpoints import CHECKPOINT_NAMES, write_tiny_checkpoints
from tests.tiny.vision import config_file, shapes, vision_state

TEXT_TOLERANCE = 1e-5
IMAGE_TOLERANCE = 1e-4
PICTURE_TOLERANCE = 1e-3  # a whole run
PROMPTS = ("", "a photo of a man, man is sks", "Desks and SKS1, sks's caf\u00e9 & \U0001f600; " + "cat " * 60)
ENCODERS = {"sd15": ("l",), "sd21": ("h",), "sdxl": ("l", "g")}


@pytest.fixture(scope="module")
def folder(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoints, and a folder of configurations for each."""
    folder = tmp_path_factory.mktemp("bases")
    write_tiny_checkpoints(folder)
    for kind in KINDS:
        write_tiny_base(folder / kind, kind)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def config(folder: Path, comfyui: Path, kind: str, **changes: str) -> BaseConfig:
    settings = {
        "path": str(folder / "checkpoints" / CHECKPOINT_NAMES[kind]),
        "family": kind,
        "config": str(folder / kind),
        "tokenizer": str(comfyui / "comfy" / "sd1_tokenizer"),
    }
    return BaseConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def base(folder: Path, comfyui: Path, kind: str) -> Base:
    return load_base(config(folder, comfyui, kind))


@pytest.fixture(scope="module")
def host(folder: Path, kind: str) -> Any:
    """MODEL, CLIP and VAE, as CheckpointLoaderSimple gives them."""
    import comfy.sd

    return comfy.sd.load_checkpoint_guess_config(str(folder / "checkpoints" / CHECKPOINT_NAMES[kind]))[:3]


def assert_close(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    difference = float((found - expected).abs().max())
    print(f"{name}: largest difference {difference:.2e}, of values up to {float(expected.abs().max()):.2f}")
    assert difference <= tolerance, name


def host_encode(clip: Any, text: str) -> tuple[Tensor, Tensor]:
    from nodes import CLIPTextEncode

    with torch.inference_mode():
        ((states, options),) = CLIPTextEncode().encode(clip, text)[0]
    return states.clone(), options["pooled_output"].clone()


def word(kind: str, count: int) -> dict[str, Tensor]:
    return {name: recipe.value(0, f"word.{name}", (1, count, WIDTH)) / WIDTH**0.5 for name in ENCODERS[kind]}


# --- text ---


def test_prompts_have_the_same_states(kind: str, base: Base, host: Any) -> None:
    found = base.text.encode(PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        states, pooled = host_encode(host[1], prompt)
        assert_close(f"{kind}, {prompt[:20]!r}", found.states[number : number + 1], states, TEXT_TOLERANCE)
        if kind == "sdxl":
            assert found.pooled is not None
            assert_close(f"{kind}, pooled", found.pooled[number : number + 1], pooled, TEXT_TOLERANCE)
        else:
            assert found.pooled is None


@pytest.mark.parametrize("count", [1, 2])
def test_the_identity_word_has_the_same_states(kind: str, count: int, base: Base, host: Any) -> None:
    from ComfyUI_IDAdapter.idadapter_core import Identity
    from ComfyUI_IDAdapter.nodes.host.text import encode_prompt

    embeddings = word(kind, count)
    person = Identity(
        adapter_tokens=torch.zeros(1, 4, WIDTH),
        adapter_tokens_uncond=None,
        text_tokens=embeddings,
        method="idadapter",
        adapter="0123456789abcdef",
    )
    prompts = PROMPTS[1:]
    found = base.text.encode(prompts, embeddings)
    plain = base.text.encode(prompts)
    for number, prompt in enumerate(prompts):
        with torch.inference_mode():
            ((states, options),) = encode_prompt(host[1], prompt, person, 1.0)
        name = f"{kind}, {count} embeddings, {prompt[:20]!r}"
        assert_close(name, found.states[number : number + 1], states, TEXT_TOLERANCE)
        if found.pooled is not None:
            assert_close(
                f"{name}, pooled", found.pooled[number : number + 1], options["pooled_output"], TEXT_TOLERANCE
            )
    assert (found.states - plain.states).abs().max() > 0.1


def test_well_known_names_have_the_same_length(kind: str, base: Base, host: Any) -> None:
    from ComfyUI_IDAdapter.nodes.host.text import reference_norms

    with torch.inference_mode():
        expected = reference_norms(host[1], 3)
    found = base.text.reference_norms(3)
    assert list(found) == list(ENCODERS[kind])
    for name in found:
        assert_close(f"{kind}, {name}", found[name], expected[name], TEXT_TOLERANCE)


# --- pictures and latents ---


def images(rows: int = 2) -> Tensor:
    """(rows, 3, 40, 56), RGB in -1..1."""
    return recipe.value(0, "parity.images", (rows, 3, 40, 56)).tanh()


def host_images(pictures: Tensor) -> Tensor:
    """IMAGE of pictures in -1..1."""
    return (pictures.movedim(1, -1) + 1) / 2


def compare_decoding(name: str, base_vae: Any, host_vae: Any, latents: Tensor, scaling: float) -> None:
    with torch.inference_mode():
        expected = host_vae.decode(latents / scaling).clone()
    found = host_images(base_vae.decode(latents)).clamp(0, 1)
    assert_close(f"{name}, decoded", found, expected, IMAGE_TOLERANCE)
    assert expected.std() > 0.01


SCALING = {"sd15": 0.18215, "sd21": 0.18215, "sdxl": 0.13025}


def test_taesd_makes_the_same_latents_and_pictures(kind: str, base: Base, host: Any) -> None:
    vae = host[2]
    with torch.inference_mode():
        expected = vae.encode(host_images(images())).clone() * SCALING[kind]
    moments = base.vae.moments(images())
    assert_close(f"{kind}, encoded", moments[:, :4], expected, IMAGE_TOLERANCE * float(expected.abs().max()))
    assert moments[:, 4:].eq(0).all()
    compare_decoding(kind, base.vae, vae, 10 * recipe.value(0, "parity.latents", (2, 4, 5, 7)), SCALING[kind])


@functools.cache
def host_kl() -> Any:
    """A tiny AutoencoderKL of ComfyUI's."""
    import comfy.ldm.models.autoencoder
    import comfy.sd

    sizes = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4, "in_channels": 3}
    rest = {"double_z": True, "resolution": 64, "out_ch": 3, "attn_resolutions": [], "dropout": 0.0}
    parameters = {"ddconfig": {**sizes, **rest}, "embed_dim": 4}
    network = comfy.ldm.models.autoencoder.AutoencoderKL(**parameters)
    recipe.fill(network, 0, "kl.")
    return comfy.sd.VAE(sd=network.state_dict(), config={"params": parameters})


@pytest.mark.parametrize("kind", ["sd15", "sdxl"], scope="module")
def test_a_kl_autoencoder_of_its_own_makes_the_same_latents_and_pictures(
    kind: str, folder: Path, comfyui: Path, tmp_path: Path
) -> None:
    vae = host_kl()
    file = tmp_path / "kl.safetensors"
    save_file({name: value.clone() for name, value in vae.first_stage_model.state_dict().items()}, file)
    found = load_base(config(folder, comfyui, kind, vae=str(file))).vae
    assert tuple(found.network.config.block_out_channels) == tuple(TINY_KL["block_out_channels"])
    moments = found.moments(images())
    raw: list[Tensor] = []  # mean and log of the variance, of which ComfyUI keeps the mean
    network = vae.first_stage_model
    handle = network.regularization.register_forward_hook(lambda module, given, out: raw.append(given[0]))
    with torch.inference_mode():
        expected = vae.encode(host_images(images())).clone() * SCALING[kind]
    handle.remove()
    assert_close(f"KL, {kind}, mean", moments[:, :4], expected, IMAGE_TOLERANCE)
    deviation = (raw[0].chunk(2, dim=1)[1] / 2).exp() * SCALING[kind]
    assert_close(f"KL, {kind}, deviation", moments[:, 4:], deviation, IMAGE_TOLERANCE)
    latents = recipe.value(0, "parity.latents", (2, 4, 5, 7))
    compare_decoding(f"KL, {kind}", found, vae, latents, SCALING[kind])


# --- noise levels and whole pictures ---


@pytest.mark.parametrize("steps", [1, 4, 7, 20, 30, 1000])
def test_the_noise_levels_of_simple(steps: int, kind: str, base: Base, host: Any) -> None:
    import comfy.samplers

    sampling = host[0].get_model_object("model_sampling")
    expected = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    timesteps, sigmas = simple_schedule(base.schedule, steps)
    torch.testing.assert_close(sigmas, expected, rtol=1e-4, atol=0)
    assert timesteps.tolist() == [int(sampling.timestep(sigma)) for sigma in expected[:-1]]


def test_zero_terminal_snr_has_the_same_noise_levels(folder: Path, comfyui: Path, tmp_path: Path) -> None:
    import comfy.model_sampling
    import comfy.samplers

    write_tiny_base(tmp_path, "sd21", rescale_betas_zero_snr=True)
    base = load_base(config(folder, comfyui, "sd21", config=str(tmp_path)))
    sampling = comfy.model_sampling.ModelSamplingDiscrete(zsnr=True)
    expected = comfy.samplers.calculate_sigmas(sampling, "simple", 20)
    _, sigmas = simple_schedule(base.schedule, 20)
    torch.testing.assert_close(sigmas, expected, rtol=1e-3, atol=0)
    assert base.schedule.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("cfg", [3.0, 1.0])
def test_the_sampler_draws_the_same_picture(cfg: float, kind: str, base: Base, host: Any) -> None:
    from nodes import CLIPTextEncode, EmptyLatentImage, KSampler, VAEDecode

    model, clip, vae = host
    text, negative, width, height = "a photo of a man", "blurry", 96, 64
    with torch.inference_mode():
        conditionings = [CLIPTextEncode().encode(clip, prompt)[0] for prompt in (text, negative)]
        empty = EmptyLatentImage().generate(width, height)[0]
        latents = KSampler().sample(model, 7, 4, cfg, "euler", "simple", *conditionings, empty)[0]
        expected = VAEDecode().decode(vae, latents)[0].clone()
    steps: list[tuple[int, int]] = []
    found = sample(
        base,
        base.text.encode([text]),
        base.text.encode([negative]),
        seeds=[7],
        steps=4,
        cfg=cfg,
        width=width,
        height=height,
        before_step=lambda step, count: steps.append((step, count)),
    )
    picture = host_images(base.vae.decode(found)).clamp(0, 1)
    assert_close(f"{kind}, cfg {cfg:g}", picture, expected, PICTURE_TOLERANCE)
    assert expected.std() > 0.01
    assert steps == [(step, 4) for step in range(4)]


# --- CLIP vision ---


@pytest.fixture(scope="module")
def vision_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny CLIP vision model as published ones are: in half precision, which ComfyUI rounds any file to."""
    folder = tmp_path_factory.mktemp("vision")
    save_file({name: value.half() for name, value in vision_state().items()}, folder / "vision.safetensors")
    (folder / "config.json").write_bytes(config_file(WIDTH).read_bytes())
    return folder / "vision.safetensors"


def head(side: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("side", [224, 336, 150])
def test_clip_vision_sees_the_same(side: int, vision_file: Path) -> None:
    import comfy.clip_vision
    from ComfyUI_IDAdapter.nodes.host.vision import encode_heads

    encoder = load_vision(vision_file)
    heads = [head(side, number) for number in range(2)]
    with torch.inference_mode():
        patches, classes = encode_heads(comfy.clip_vision.load(str(vision_file)), heads)
    found_patches, found_classes = encoder(encoder.preprocess(heads))
    assert (encoder.width, encoder.patches) == (WIDTH, patches.shape[1])
    assert_close(f"{side}, patches", found_patches, patches, IMAGE_TOLERANCE)
    assert_close(f"{side}, class", found_classes, classes, IMAGE_TOLERANCE)


@pytest.mark.parametrize("side", [224, 336, 150, 1024])
def test_clip_vision_is_shown_the_same_pixels(side: int, vision_file: Path) -> None:
    from comfy.clip_model import clip_preprocess

    expected = clip_preprocess(torch.from_numpy(head(side))[None].float() / 255)
    assert torch.equal(load_vision(vision_file).preprocess([head(side)]), expected)


# --- the published sizes, which a file does not tell ---

# Output depths are listed from the last block to the first.
REAL = {
    "sd15": {"depths": [1, 1, 1, 0], "levels": [1, 2, 4, 4], "out": [1] * 9 + [0] * 3, "middle": 1},
    "sdxl": {"depths": [0, 2, 10], "levels": [1, 2, 4], "out": [0, 0, 0, 2, 2, 2, 10, 10, 10], "middle": 10},
}
REAL["sd21"] = REAL["sd15"]


def real_unet(kind: str) -> Any:
    """ComfyUI's UNet of the published size, without memory for its weights."""
    import comfy.ops
    import comfy.supported_models as families
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    family = {"sd15": families.SD15, "sd21": families.SD20, "sdxl": families.SDXL}[kind]
    sizes = REAL[kind]
    blocks = [2] * len(sizes["levels"])
    config = {
        **{"image_size": 32, "in_channels": 4, "out_channels": 4, "legacy": False},
        **{name: family.unet_config[name] for name in ("context_dim", "model_channels", "adm_in_channels")},
        "use_linear_in_transformer": family.unet_config["use_linear_in_transformer"],
        "use_spatial_transformer": True,
        "num_res_blocks": blocks,
        "channel_mult": sizes["levels"],
        "transformer_depth": [depth for depth in sizes["depths"] for _ in range(2)],
        "transformer_depth_output": sizes["out"],
        "transformer_depth_middle": sizes["middle"],
        "num_classes": None if family.unet_config["adm_in_channels"] is None else "sequential",
        **{name: family.unet_extra_config.get(name, -1) for name in ("num_heads", "num_head_channels")},
    }
    return UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init)


@pytest.mark.parametrize("kind", KINDS, scope="module")
def test_unets_of_published_sizes_are_known(kind: str, tmp_path: Path) -> None:
    """Every weight has its place, and every attention layer as many heads as ComfyUI gives it."""
    real = real_unet(kind)
    file = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, file)
    checkpoint = SingleFile(file, kind, None)
    checkpoint.unet_state = dict(real.state_dict())
    unet = checkpoint.unet()
    assert unet_family(real.state_dict()) == unet_family(unet.state_dict()) == kind
    sites = attention_sites(real.state_dict())
    assert len(sites) == {"sd15": 16, "sd21": 16, "sdxl": 70}[kind]
    for site in sites:
        expected = real.get_submodule(site.comfy_module).heads
        assert unet.get_submodule(site.diffusers_module).heads == expected, site.name


@pytest.mark.parametrize(
    ("name", "file", "unread"),
    [
        ("l", "sd1_clip_config.json", 0),
        ("h", "text_encoders/sd2_clip_config.json", 1),
        ("g", "clip_config_bigg.json", 0),
    ],
)
def test_text_encoders_of_published_sizes_are_known(name: str, file: str, unread: int, comfyui: Path) -> None:
    config = json.loads((comfyui / "comfy" / file).read_text(encoding="utf-8"))
    known = TEXT_ENCODERS[name]
    assert known["num_hidden_layers"] == config["num_hidden_layers"] - unread
    for key in (
        *("hidden_size", "intermediate_size", "num_attention_heads", "hidden_act"),
        *("projection_dim", "vocab_size", "eos_token_id"),
    ):
        assert known[key] == config[key], key


@pytest.mark.parametrize("size", ["vitl", "h", "g", "vitl_336"])
def test_clip_vision_of_published_sizes_is_known(size: str, comfyui: Path) -> None:
    file = comfyui / "comfy" / f"clip_vision_config_{size}.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes(config).items()}
    found = published_sizes(file, state)
    assert found == {key: config[key] for key in found}


def test_the_kl_autoencoder_of_published_size_is_known() -> None:
    import comfy.ldm.models.autoencoder

    sizes = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 4, "in_channels": 3}
    rest = {"double_z": True, "resolution": 256, "out_ch": 3, "attn_resolutions": [], "dropout": 0.0}
    with torch.device("meta"):
        real = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig={**sizes, **rest}, embed_dim=4)
    weights = {name: torch.zeros(value.shape) for name, value in real.state_dict().items()}
    found = autoencoder_from_state(weights, "real", "sd15", KL)
    assert sum(value.numel() for value in found.network.state_dict().values()) == sum(
        value.numel() for value in weights.values()
    )
