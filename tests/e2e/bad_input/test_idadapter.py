"""Messages in ComfyUI where the IDAdapter method meets what it cannot work with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from idadapter_core.adapter import save_adapter
from tests.e2e.bad_input.refusals import Code, load_identity_graph, refusal, refused_adapter
from tests.harness.idadapter_graph import idadapter_graph
from tests.harness.results import difference, picture, text_of
from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import NONE, add_adapter, add_rescale, add_text, rewire
from tests.harness.workflow import Graph
from tests.tiny.checkpoints import CHECKPOINT_NAMES
from tests.tiny.files import ADAPTER, CLIP_VISION_NARROW, PERSON, STRANGER, TEXT_BRANCH
from tests.tiny.idadapter import CONFIGS, FILE_NAMES, FRESH_NAMES, idadapter_state, tiny_idadapter

pytestmark = pytest.mark.server


def test_a_clip_vision_model_of_another_width(server: ComfyServer) -> None:
    graph, _ = idadapter_graph(clip_vision=CLIP_VISION_NARROW)
    message = refusal(server, graph, "IDAdapterMixFeatures")
    assert "was trained with a CLIP vision model of width 64 with 16 patches" in message
    assert (
        "`clip_vision` of Extract Face Features is a CLIP vision model of width 32 with 16 patches" in message
    )
    assert "Choose the one that the adapter was trained with in Load CLIP Vision" in message


def test_no_clip_vision_model_at_all(server: ComfyServer) -> None:
    graph, _ = idadapter_graph(clip_vision=None)
    message = refusal(server, graph, "IDAdapterMixFeatures")
    assert "hold no CLIP vision features, which IDAdapter reads" in message
    assert (
        "Add Load CLIP Vision with the model the adapter was trained with (a CLIP vision model of width 64"
        in message
    )
    assert "wire it to `clip_vision` of Extract Face Features" in message


@pytest.mark.parametrize(
    ("adapter", "kind", "made_for", "found"),
    [
        ("sd15", "sdxl", "7 attention sites, text width 64", "TinySDXL: a UNet with 11 attention sites"),
        ("sdxl", "sd21", "11 attention sites, text width 128", "TinySD21: a UNet with 7 attention sites"),
    ],
)
def test_an_idadapter_for_another_model(
    server: ComfyServer, adapter: str, kind: str, made_for: str, found: str
) -> None:
    graph, _ = idadapter_graph(kind=kind, adapter=FILE_NAMES[adapter], id_prompt=False)
    message = refusal(server, graph, "IDAdapterApply")
    assert f"{FILE_NAMES[adapter]} was made for a UNet with {made_for}, this checkpoint is {found}" in message
    assert "Load a checkpoint of the adapter's family, or an adapter that was made for this one" in message


def test_an_sd21_idadapter_on_sd15(server: ComfyServer, put: Callable[[str], Path]) -> None:
    """Their layers are alike; the width of the text differs, though not between the tiny checkpoints."""
    path = put("idadapter/wide_text.safetensors")
    save_adapter(tiny_idadapter(replace(CONFIGS["sd21"], context_width=96)), path)
    graph, _ = idadapter_graph(kind="sd15", adapter=path.name, id_prompt=False)
    message = refusal(server, graph, "IDAdapterApply")
    assert "wide_text.safetensors was made for a UNet with 7 attention sites, text width 96" in message
    assert "this checkpoint is TinySD15: a UNet with 7 attention sites, text width 64" in message
    assert "Load a checkpoint of the adapter's family" in message


def test_the_word_of_an_sd21_idadapter_in_an_sd15_prompt(server: ComfyServer) -> None:
    graph, _ = idadapter_graph(kind="sd15", adapter=FILE_NAMES["sd21"])
    message = refusal(server, graph, "IDAdapterPrompt")
    assert (
        "text encoders of widths h 64, this CLIP is that of a model with text encoders of widths l 64"
        in message
    )
    assert "Wire the CLIP of a checkpoint of the adapter's family" in message


@pytest.mark.parametrize(
    ("references", "rule"), [(17, "bigger than max of 16"), (-1, "smaller than min of 0")]
)
def test_references_beyond_the_limits(server: ComfyServer, references: int, rule: str) -> None:
    graph, nodes = idadapter_graph()
    graph.workflow[nodes["identity"].id]["inputs"]["references"] = references
    (error,) = server.run(graph.workflow).node_errors[nodes["identity"].id]
    assert f"Value {references} {rule}: references" in error


def test_more_references_than_photos_is_all_photos(server: ComfyServer) -> None:
    graph, nodes = idadapter_graph((PERSON, STRANGER))
    expected = picture(server.run(graph.workflow))
    graph.workflow[nodes["identity"].id]["inputs"]["references"] = 16
    assert np.array_equal(picture(server.run(graph.workflow)), expected)


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("a red hat", "a red hat, person is sks"),
        ("", "person is sks"),
        ("many desks", "many desks, person is sks"),
        ("sks reads, sks smiles", "sks reads, sks smiles"),
    ],
)
def test_a_prompt_without_the_identity_word_or_with_several(
    server: ComfyServer, text: str, encoded: str
) -> None:
    """No mistake of the user's: the word is added, and each of them is the person."""

    def image(photo: str) -> np.ndarray:
        graph, nodes = idadapter_graph((photo,), weight=0.0)
        graph.workflow[nodes["prompt"].id]["inputs"].update(text=text, class_word="person")
        shown = add_text(graph, nodes["prompt"], 1)
        result = server.run(graph.workflow)
        assert text_of(result.check(), shown.id) == encoded
        return picture(result)

    assert difference(image(PERSON), image(STRANGER)) > 0.5


def spoiled_idadapter(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """The tiny SDXL adapter with its weights changed, under the settings of the whole one; the file's name."""
    state = idadapter_state(CONFIGS["sdxl"])
    config = json.dumps(asdict(CONFIGS["sdxl"]))
    metadata = {"format": "idadapter", "format_version": "1", "kind": "adapter", "method": "idadapter"}
    change(state)
    save_file(state, path, metadata={**metadata, "config": config})
    return path.name


DELTA = "layers.deltas.3.to_k.weight"


def test_an_idadapter_with_a_reshaped_difference(server: ComfyServer, put: Callable[[str], Path]) -> None:
    """At load, not at sampling."""

    def reshape(state: dict[str, torch.Tensor]) -> None:
        state[DELTA] = state[DELTA][:, :100].contiguous()

    message = refused_adapter(server, spoiled_idadapter(put("idadapter/reshaped.safetensors"), reshape))
    assert "reshaped.safetensors: not a complete IDAdapter" in message
    assert "1 of another shape" in message
    assert "deltas.3.to_k.weight is (64, 100) instead of (64, 128)" in message
    assert "Download or export the file again" in message


def test_an_idadapter_with_missing_weights(server: ComfyServer, put: Callable[[str], Path]) -> None:
    def drop(state: dict[str, torch.Tensor]) -> None:
        del state[DELTA]

    message = refused_adapter(server, spoiled_idadapter(put("idadapter/incomplete.safetensors"), drop))
    assert "incomplete.safetensors: not a complete IDAdapter" in message
    assert "1 missing" in message
    assert "deltas.3.to_k.weight" in message


def test_an_idadapter_with_nothing_wrong(server: ComfyServer, put: Callable[[str], Path]) -> None:
    """Else the tests above would prove nothing."""
    graph = Graph()
    add_text(graph, add_adapter(graph, spoiled_idadapter(put("idadapter/whole.safetensors"), dict), NONE), 1)
    server.run(graph.workflow).check()


def test_an_idadapter_with_code(server: ComfyServer, put: Callable[[str], Path], tmp_path: Path) -> None:
    path, touched = put("idadapter/code.bin"), tmp_path / "touched"
    torch.save({**idadapter_state(CONFIGS["sd15"]), "more": Code(touched)}, path)
    message = refused_adapter(server, path.name)
    assert "code.bin: loading this pickle would run code, which is never done here" in message
    assert ".safetensors" in message
    assert not touched.exists()


@pytest.mark.parametrize(
    ("adapter", "text_branch", "named"),
    [
        (ADAPTER, FILE_NAMES["sdxl"], FILE_NAMES["sdxl"]),
        (FILE_NAMES["sdxl"], TEXT_BRANCH, FILE_NAMES["sdxl"]),
        (FILE_NAMES["sdxl"], FRESH_NAMES["sdxl"], FILE_NAMES["sdxl"]),
    ],
)
def test_an_idadapter_with_a_text_branch(
    server: ComfyServer, adapter: str, text_branch: str, named: str
) -> None:
    message = refused_adapter(server, adapter, text_branch)
    assert f"{named} is an IDAdapter file, which holds everything" in message
    assert "choose it as adapter and set text_branch to 'none'" in message


def test_an_idadapter_as_identity(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/identities/adapter.safetensors")
    shutil.copy(server.models_dir / "idadapter" / FILE_NAMES["sdxl"], path)
    message = refusal(server, load_identity_graph(path.name), "IDAdapterLoadIdentity")
    assert "this file holds an adapter, not an identity" in message


def test_an_identity_of_the_other_method(server: ComfyServer) -> None:
    graph, nodes = idadapter_graph(id_prompt=False)
    rewire(graph, nodes["apply"], adapter=add_adapter(graph))
    message = refusal(server, graph, "IDAdapterApply")
    assert "the identity was made with another adapter" in message
    assert "adapter_branch/pytorch_model.bin" in message
    assert "make the identity again from the photos with this adapter" in message


def test_the_word_in_a_clip_of_another_model(server: ComfyServer) -> None:
    graph, nodes = idadapter_graph()
    other = graph.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT_NAMES["sd15"])
    graph.workflow[nodes["prompt"].id]["inputs"]["clip"] = other[1]
    message = refusal(server, graph, "IDAdapterPrompt")
    assert "text encoders of widths l 64, g 64, this CLIP is that of a model with" in message
    assert "Wire the CLIP of a checkpoint" in message


def test_rescaling_with_nothing_to_rescale_is_warned_of(server: ComfyServer) -> None:
    """The gated layers are left alone by default, and this model has nothing else."""
    graph, nodes = idadapter_graph(seed=41)
    rescale = add_rescale(graph, nodes["apply"])
    rewire(graph, nodes["sampler"], model=rescale)
    log = server.run(graph.workflow).check().log
    assert "Normalized Identity Rescaling has nothing to rescale" in log
    assert "Switch `gated` on" in log
    graph.workflow[rescale.id]["inputs"]["gated"] = True
    assert "nothing to rescale" not in server.run(graph.workflow).check().log
