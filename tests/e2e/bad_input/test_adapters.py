"""Messages in ComfyUI where an adapter file is damaged, something else, or for another model."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.e2e.bad_input.refusals import Code, refusal, refused_adapter, weights
from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import NONE, add_text, uniid_graph
from tests.tiny.checkpoints import CHECKPOINT_NAMES
from tests.tiny.files import ADAPTER, ADAPTER_SDXL, RECOGNIZER, TEXT_BRANCH
from tests.tiny.idadapter import FILE_NAMES

pytestmark = pytest.mark.server

UNRELATED: dict[str, tuple[dict[str, torch.Tensor], str, str]] = {
    "checkpoint": (
        weights("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"),
        "this is a Stable Diffusion checkpoint",
        "Load Checkpoint",
    ),
    "lora": (
        weights("lora_unet_down_blocks_0.lora_up.weight", "lora_unet_down_blocks_0.lora_down.weight"),
        "this is a LoRA",
        "Load LoRA",
    ),
    "ip-adapter": (
        weights("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"),
        "this is an IP-Adapter or InstantID file",
        "nodes of those packs",
    ),
    "clip vision": (
        weights("vision_model.embeddings.class_embedding"),
        "this is a CLIP vision model",
        "Load CLIP Vision",
    ),
    "something": (
        weights("banana.weight"),
        "it holds no ID adapter",
        "choose a UniID, IDAdapter or IP-Adapter FaceID file",
    ),
}


@pytest.mark.parametrize("kind", UNRELATED)
def test_an_unrelated_file(server: ComfyServer, put: Callable[[str], Path], kind: str) -> None:
    state, what, advice = UNRELATED[kind]
    path = put("idadapter/unrelated.safetensors")
    save_file(state, path)
    message = refused_adapter(server, path.name)
    assert "unrelated.safetensors" in message
    assert what in message
    assert advice in message


def test_the_checkpoint_itself(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/checkpoint.safetensors")
    shutil.copy(server.models_dir / "checkpoints" / CHECKPOINT_NAMES["sdxl"], path)
    message = refused_adapter(server, path.name)
    assert (
        "checkpoint.safetensors: this is a Stable Diffusion checkpoint: load it with Load Checkpoint"
        in message
    )


def test_the_face_network(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/face.safetensors")
    shutil.copy(server.models_dir / "idadapter" / "recognizers" / RECOGNIZER, path)
    message = refused_adapter(server, path.name)
    assert "face recognition network (iResNet)" in message
    assert "models/idadapter/recognizers" in message


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>", bytes(range(256)) * 40])
def test_a_file_that_holds_no_weights(
    server: ComfyServer, put: Callable[[str], Path], suffix: str, content: bytes
) -> None:
    path = put(f"idadapter/broken{suffix}")
    path.write_bytes(content)
    message = refused_adapter(server, path.name)
    assert f"broken{suffix}: cannot be read ({len(content):,} bytes)" in message
    assert "download it again" in message


@pytest.mark.parametrize("source", [ADAPTER, ADAPTER_SDXL, FILE_NAMES["sdxl"]])
def test_a_truncated_adapter(server: ComfyServer, put: Callable[[str], Path], source: str) -> None:
    whole = server.models_dir / "idadapter" / source
    path = put(f"idadapter/half{whole.suffix}")
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    message = refused_adapter(server, path.name)
    assert f"half{whole.suffix}: cannot be read" in message
    assert "truncated" in message
    assert "download it again" in message


def test_a_plain_pickle_with_code(server: ComfyServer, put: Callable[[str], Path], tmp_path: Path) -> None:
    path, touched = put("idadapter/code.bin"), tmp_path / "touched"
    path.write_bytes(pickle.dumps({"more": Code(touched)}))
    assert "code.bin: cannot be read" in refused_adapter(server, path.name)
    assert not touched.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_code(
    server: ComfyServer, put: Callable[[str], Path], tmp_path: Path, zipped: bool
) -> None:
    path, touched = put("idadapter/code.bin"), tmp_path / "touched"
    content = {"weights": torch.ones(2), "more": Code(touched)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refused_adapter(server, path.name)
    assert "code.bin: loading this pickle would run code, which is never done here" in message
    assert ".safetensors" in message
    assert not touched.exists()


def test_an_adapter_with_missing_weights(server: ComfyServer, put: Callable[[str], Path]) -> None:
    state = torch.load(server.models_dir / "idadapter" / ADAPTER, weights_only=True)
    dropped = next(key for key in state if key.endswith("proj_out.bias"))
    path = put("idadapter/incomplete.bin")
    torch.save({key: tensor for key, tensor in state.items() if key != dropped}, path)
    message = refused_adapter(server, path.name)
    assert "incomplete.bin" in message
    assert "1 missing" in message
    assert dropped in message


def test_an_adapter_for_another_model(server: ComfyServer) -> None:
    graph, _ = uniid_graph(kind="sd15", id_prompt=False)
    message = refusal(server, graph, "IDAdapterApply")
    assert "uniid_tiny" in message or "adapter_branch/pytorch_model.bin" in message
    assert "TinySD15" in message
    assert "11" in message
    assert "7" in message
    assert "Load a checkpoint of the adapter's family" in message


def test_an_adapter_without_its_text_branch(server: ComfyServer) -> None:
    graph, nodes = uniid_graph(text_branch=NONE)
    info = add_text(graph, nodes["adapter"], 1)
    result = server.run(graph.workflow).check()
    text = result.outputs[info.id]["text"][0]
    assert "no text branch" in text
    assert "as text_branch" in text
    assert "no text branch" in result.log


def test_a_text_branch_without_an_adapter(server: ComfyServer) -> None:
    graph, nodes = uniid_graph(adapter=TEXT_BRANCH, text_branch=NONE)
    info = add_text(graph, nodes["adapter"], 1)
    result = server.run(graph.workflow).check()
    text = result.outputs[info.id]["text"][0]
    assert "no adapter branch" in text
    assert "Choose the adapter branch's file as adapter" in text


def test_no_adapter_file_at_all(server: ComfyServer) -> None:
    folder = server.models_dir / "idadapter"
    hidden = server.base / "idadapter"
    folder.rename(hidden)
    folder.mkdir()
    try:
        (hint,) = server.object_info("IDAdapterLoadAdapter")["input"]["required"]["adapter"][1]["options"]
        assert "models/idadapter" in hint
        message = refused_adapter(server, hint)
    finally:
        folder.rmdir()
        hidden.rename(folder)
    assert f"there is no file yet in {folder}" in message
    assert "refresh the node list" in message


def test_the_text_branch_chosen_twice(server: ComfyServer) -> None:
    message = refused_adapter(server, TEXT_BRANCH, TEXT_BRANCH)
    assert (
        "is chosen twice, as adapter and as text_branch; it already holds a text branch, but no adapter branch"
        in message
    )
    assert "choose the file of the adapter branch as adapter, or set text_branch to 'none'" in message


def test_the_branches_exchanged(server: ComfyServer) -> None:
    message = refused_adapter(server, TEXT_BRANCH, ADAPTER)
    assert "the two branches are exchanged" in message
    assert "Exchange the two files" in message


def test_the_adapter_branch_chosen_as_text_branch(server: ComfyServer) -> None:
    message = refused_adapter(server, ADAPTER, ADAPTER)
    assert "is chosen twice, as adapter and as text_branch; it holds no text branch" in message
    assert "choose the file of the text branch as text_branch" in message


def test_features_of_another_recogniser_than_the_adapters(server: ComfyServer, other_recogniser: str) -> None:
    graph, _ = uniid_graph(adapter=other_recogniser, text_branch=NONE)
    message = refusal(server, graph, "IDAdapterMixFeatures")
    assert "other_recogniser.safetensors was trained with another face recogniser" in message
    assert "0123456789abcdef" in message
    assert "Load Face Analyzer" in message
