"""CLIP vision from disk. That it sees what ComfyUI's sees is tested in `tests/nodes/test_training_parity.py`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from idadapter_core.errors import CheckpointError, ConfigError, InputError
from idadapter_core.stable_diffusion.vision import VisionEncoder, load_vision
from tests.harness.shim import run_shim
from tests.tiny.vision import NARROW_WIDTH, PATCHES, WIDTH, config_file, vision_state

run_shim()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("vision"))


def write(folder: Path, width: int = WIDTH, config: bool = True) -> Path:
    save_file(vision_state(width), folder / "vision.safetensors")
    if config:
        (folder / "config.json").write_bytes(config_file(width).read_bytes())
    return folder / "vision.safetensors"


def heads(*sides: int) -> list[np.ndarray]:
    return [
        np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
        for number, side in enumerate(sides)
    ]


def see(encoder: VisionEncoder, *sides: int) -> tuple[torch.Tensor, torch.Tensor]:
    return encoder(encoder.preprocess(heads(*sides)))


def test_shapes(file: Path) -> None:
    encoder = load_vision(file)
    assert (encoder.width, encoder.patches) == (WIDTH, PATCHES)
    patches, classes = see(encoder, 224, 60, 300)
    assert patches.shape == (3, PATCHES, WIDTH)
    assert classes.shape == (3, WIDTH)
    assert not patches.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("kind", ["CLIPVisionModelWithProjection", "CLIPModel"])
def test_a_file_and_a_folder_hold_the_same(kind: str, file: Path, tmp_path: Path) -> None:
    import transformers

    sizes = json.loads(config_file(WIDTH).read_text("utf-8"))
    if kind == "CLIPModel":
        text = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 300}
        whole = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=sizes))
    else:
        whole = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig.from_dict(sizes))
    weights = {name: value for name, value in vision_state().items() if name.startswith("vision_model.")}
    assert set(weights) <= set(whole.state_dict())
    whole.load_state_dict(weights, strict=False)
    whole.save_pretrained(tmp_path)
    one, other = load_vision(file), load_vision(str(tmp_path))
    assert other.digest == one.digest
    assert all(torch.equal(*pair) for pair in zip(see(one, 224), see(other, 224), strict=True))


def test_one_model_in_two_precisions(file: Path) -> None:
    one, narrow = load_vision(file), load_vision(file, dtype=torch.bfloat16)
    assert narrow.digest == one.digest
    torch.testing.assert_close(see(narrow, 224)[0].float(), see(one, 224)[0], atol=0.2, rtol=0)


def test_what_else_a_clip_file_holds_does_not_matter(file: Path, tmp_path: Path) -> None:
    rest = {
        "logit_scale": torch.zeros(1),
        "text_model.final_layer_norm.weight": torch.zeros(4),
        "vision_model.embeddings.position_ids": torch.arange(PATCHES + 1)[None],
    }
    save_file({**vision_state(), **rest}, tmp_path / "clip.safetensors")
    sizes = json.loads(config_file(WIDTH).read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": sizes}))
    assert load_vision(tmp_path / "clip.safetensors").digest == load_vision(file).digest


def test_models_differ(file: Path, tmp_path: Path) -> None:
    assert load_vision(write(tmp_path, NARROW_WIDTH)).digest != load_vision(file).digest


def test_pictures_are_read_one_by_one(file: Path) -> None:
    encoder = load_vision(file)
    together = encoder.preprocess(heads(224, 100))
    assert torch.equal(together[:1], encoder.preprocess(heads(224)))
    assert torch.equal(together[1:], encoder.preprocess(heads(224, 100)[1:]))
    assert together.shape == (2, 3, 224, 224)


def test_what_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="square picture of a head, got 90x100"):
        load_vision(file).preprocess([np.zeros((100, 90, 3), np.uint8)])
    with pytest.raises(ConfigError, match=r"nowhere: no such file or folder"):
        load_vision(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no CLIPVisionModel here"):
        load_vision(tmp_path)
    with pytest.raises(ConfigError, match="width 64 is none of 1024, 1280, 1664.*config.json beside it"):
        load_vision(write(tmp_path, config=False))
    save_file({"lora_up": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"lora.safetensors: holds no CLIP vision model"):
        load_vision(tmp_path / "lora.safetensors")
    state = vision_state()
    del state["vision_model.encoder.layers.1.mlp.fc1.bias"]
    (tmp_path / "config.json").write_bytes(config_file(WIDTH).read_bytes())
    save_file(state, tmp_path / "vision.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing \(.*encoder.layers.1.mlp.fc1.bias\)"):
        load_vision(tmp_path / "vision.safetensors")
