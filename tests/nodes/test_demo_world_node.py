"""Load Demo World gives everything that a graph needs, from the files of the pack."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from idadapter_core.demo_world import Factors, Person, render, shipped
from idadapter_core.faces.align import align_face, square_crop
from idadapter_core.faces.features import crops_to_tensor
from idadapter_core.types import Face
from tests.harness.comfy import pack_nodes
from tests.nodes.sampling import node
from tests.tiny.demo_world import write_demo_world

NODE = "IDAdapterLoadDemoWorld"
METHODS = {"UniID": "uniid", "IDAdapter": "idadapter", "IP-Adapter FaceID": "ip_adapter"}
"""By the node's options."""


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_world(tmp_path_factory.mktemp("demo_world") / "assets")


@pytest.fixture
def load(assets: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from ComfyUI_IDAdapter.idadapter_core.demo_world import shipped as in_pack
    from ComfyUI_IDAdapter.nodes import demo_world

    for module in (in_pack, demo_world):
        monkeypatch.setattr(module, "ASSETS", assets)
    with torch.inference_mode():
        yield lambda method: pack_nodes()[NODE].execute(method).result


def _features(analyzer: Any, clip_vision: Any) -> Any:
    """Features of a rendered face at the landmarks that the renderer knows."""
    from ComfyUI_IDAdapter.idadapter_core.types import FaceFeatures
    from ComfyUI_IDAdapter.nodes.host.vision import encode_heads

    pictures = render([Person.sample(3)], [Factors.sample(np.random.default_rng(0), style="photo")])
    landmarks = tuple((float(x), float(y)) for x, y in pictures.landmarks[0])
    face = Face(box=tuple(map(float, pictures.boxes[0])), landmarks=landmarks, score=1.0)
    embedding, stages = analyzer.recognize(crops_to_tensor([align_face(pictures.pixels[0], landmarks)]))
    patches, classes = encode_heads(clip_vision, [square_crop(pictures.pixels[0], face)])
    return FaceFeatures(
        embedding, tuple(stages), patches, classes, recognizer=analyzer.recognizer_digest, faces=(face,)
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_person_is_drawn(method: str, load: Any) -> None:
    import nodes as comfy_nodes

    model, clip, vae, clip_vision, analyzer, adapter = load(method)
    assert adapter.adapter.method == METHODS[method]
    positive, negative = (
        comfy_nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a photo of a woman", "")
    )

    def draw(applied: Any) -> Tensor:
        empty = {"samples": torch.zeros(1, 4, 16, 16)}
        drawn = comfy_nodes.KSampler().sample(
            applied, 3, 2, 3.0, "euler", "simple", positive, negative, empty
        )[0]
        picture: Tensor = comfy_nodes.VAEDecode().decode(vae, drawn)[0]
        return picture

    plain = draw(model)
    assert plain.shape == (1, 128, 128, 3)
    identity = node(
        "IDAdapterMixFeatures", adapter, _features(analyzer, clip_vision), "auto", 0, "", "reject"
    )
    changed, same = (
        draw(node("IDAdapterApply", model, adapter, identity, weight, 0.0, 1.0, None))
        for weight in (1.0, 0.0)
    )
    assert (changed - plain).abs().max() > 1e-3
    assert torch.equal(same, plain)


def test_missing_files_are_named(
    load: Any, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ComfyUI_IDAdapter.idadapter_core.demo_world import shipped as in_pack
    from ComfyUI_IDAdapter.idadapter_core.errors import CheckpointError

    monkeypatch.setattr(in_pack, "ASSETS", tmp_path)
    with pytest.raises(CheckpointError, match=r"base\.safetensors is missing in .*; get this project again"):
        load("UniID")


def test_a_replaced_file_is_loaded_again(load: Any, assets: Path) -> None:
    fingerprint = pack_nodes()[NODE].fingerprint_inputs
    before = fingerprint(adapter="UniID")
    assert fingerprint(adapter="UniID") == before
    file = assets / shipped.ADAPTERS / "uniid.safetensors"
    shutil.copy(file, assets / "copy")
    (assets / "copy").replace(file)
    assert fingerprint(adapter="UniID") != before
