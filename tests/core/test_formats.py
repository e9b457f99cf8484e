"""What a file is, told from its keys alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from idadapter_core.adapter import load_adapter
from idadapter_core.errors import CheckpointError
from idadapter_core.formats import describe_foreign
from idadapter_core.methods.uniid.files import published_config, published_state
from tests.tiny.uniid import GOLDEN, TINY_SD15, TINY_SDXL, uniid_state as weights

SITE = "down_blocks.0.attentions.0.transformer_blocks.0"

FOREIGN = {
    "IP-Adapter FaceID": [
        "image_proj.proj.0.weight",
        "image_proj.norm.weight",
        "ip_adapter.0.to_q_lora.down.weight",
    ],
    "IP-Adapter Plus Face": [
        "image_proj.latents",
        "image_proj.proj_in.weight",
        "ip_adapter.1.to_k_ip.weight",
    ],
    "IP-Adapter, weights alone": ["ip_adapter.1.to_k_ip.weight", "ip_adapter.1.to_v_ip.weight"],
    "IP-Adapter, training dump": [
        f"unet.{SITE}.attn1.to_q.weight",
        "image_proj_model.proj.weight",
        "adapter_modules.1.to_k_ip.weight",
    ],
    "InstantID": ["image_proj.latents", "image_proj.layers.0.0.to_kv.weight", "ip_adapter.1.to_k_ip.weight"],
    "PuLID": [
        "id_adapter.latents",
        "id_adapter.layers.0.0.to_q.weight",
        "id_adapter_attn_layers.1.id_to_k.weight",
    ],
    "SDXL": [
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
        "first_stage_model.decoder.conv_in.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
    ],
    "SD1.5": [
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        "model.diffusion_model.out.2.weight",
    ],
    "LoRA, kohya": [
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
        "lora_te_text_model.alpha",
    ],
    "LoRA, PEFT": [f"unet.{SITE}.attn1.to_k.lora_A.weight", f"unet.{SITE}.attn1.to_k.lora_B.weight"],
    "LoRA, diffusers": [f"unet.{SITE}.attn1.processor.to_k_lora.down.weight"],
    "LoRA, newer diffusers": [f"unet.{SITE}.attn1.to_k.lora.up.weight"],
    "iResNet": [
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.bn1.weight",
        "layer1.0.prelu.weight",
        "fc.weight",
    ],
    "UNet of diffusers": ["conv_in.weight", f"{SITE}.attn1.to_q.weight", "mid_block.resnets.0.conv1.weight"],
    "CLIP vision": ["vision_model.embeddings.class_embedding", "visual_projection.weight"],
}

WORDS = {
    "IP-Adapter": ("an IP-Adapter or InstantID file", "nodes of those packs"),
    "InstantID": ("an IP-Adapter or InstantID file", "nodes of those packs"),
    "PuLID": ("a PuLID file", "PuLID pack"),
    "SD": ("a Stable Diffusion checkpoint", "Load Checkpoint"),
    "LoRA": ("a LoRA", "Load LoRA"),
    "iResNet": ("a face recognition network (iResNet)", "models/idadapter/recognizers"),
    "UNet": ("a diffusers UNet without any adapter", "the file that holds the adapter"),
    "CLIP": ("a CLIP vision model", "Load CLIP Vision"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_unrelated_files_are_named(tmp_path: Path, kind: str, prefix: str) -> None:
    what, advice = next(words for head, words in WORDS.items() if kind.startswith(head))
    path = tmp_path / "file.safetensors"
    save_file({prefix + key: torch.zeros(1) for key in FOREIGN[kind]}, path)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(path)
    message = str(caught.value)
    assert message.startswith(f"file.safetensors: this is {what}: ")
    assert advice in message


def test_an_ip_adapter_pickle_of_two_levels_is_named(tmp_path: Path) -> None:
    nested = {
        "image_proj": {"norm.weight": torch.ones(4)},
        "ip_adapter": {"1.to_k_ip.weight": torch.ones(4, 4)},
    }
    torch.save(nested, tmp_path / "ip-adapter.bin")
    with pytest.raises(CheckpointError, match=r"ip-adapter\.bin: this is an IP-Adapter or InstantID file"):
        load_adapter(tmp_path / "ip-adapter.bin")


def test_the_name_of_a_file_says_nothing(tmp_path: Path) -> None:
    torch.save(weights(TINY_SD15), tmp_path / "pulid_v1.1_lora.bin")
    assert load_adapter(tmp_path / "pulid_v1.1_lora.bin").config == TINY_SD15
    save_file({"id_adapter.latents": torch.zeros(1)}, tmp_path / "uniid.safetensors")
    with pytest.raises(CheckpointError, match="a PuLID file"):
        load_adapter(tmp_path / "uniid.safetensors")


def test_unknown_files_show_their_first_keys() -> None:
    text = "it holds no ID adapter (first keys: a, b, c); choose a UniID, IDAdapter or IP-Adapter FaceID file"
    assert describe_foreign(["d", "c", "b", "a"]) == text
    assert "first keys: nothing" in describe_foreign([])


@pytest.mark.parametrize("config", [GOLDEN, TINY_SDXL, TINY_SD15])
def test_sizes_are_read_from_the_shapes(config) -> None:  # noqa: ANN001
    with torch.device("meta"):
        state = {key: torch.empty(tensor.shape) for key, tensor in weights(config).items()}
    assert published_config(state, "file") == config


def test_nothing_of_an_unrelated_state_is_taken() -> None:
    unrelated = {key: torch.zeros(1) for keys in FOREIGN.values() for key in keys}
    assert published_state(unrelated, "file") == {}
    similar = {
        "my_text_branch.norm_1.weight": torch.zeros(1),
        "latents": torch.zeros(1),
        "norm_1.weight": torch.zeros(1),
    }
    assert published_state(similar, "file") == {}


def test_the_parts_of_another_model_are_left_out() -> None:
    state = weights(TINY_SD15)
    bare = {key.partition(".")[2]: tensor for key, tensor in state.items()}
    dump = {**bare, f"unet.{SITE}.attn2.to_k.weight": torch.zeros(1), "image_encoder.weight": torch.zeros(1)}
    assert published_state(dump, "file").keys() == state.keys()
