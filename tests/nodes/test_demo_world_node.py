"""Load Demo World gives everything that a graph needs, from the files of the pack."""

from __future__ import annotations

import re
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

NODE = "IDAdapterLoadDemoWorld"
SHIPPED = shipped.ASSETS


@pytest.fixture
def load() -> Any:
    with torch.inference_mode():
        yield lambda title: pack_nodes()[NODE].execute(title).result


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped files, which the node reads."""
    from ComfyUI_IDAdapter.idadapter_core.demo_world import shipped as in_pack
    from ComfyUI_IDAdapter.nodes import demo_world

    copy = tmp_path / "assets"
    shutil.copytree(SHIPPED, copy)
    for module in (in_pack, demo_world):
        monkeypatch.setattr(module, "ASSETS", copy)
    return copy


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


@pytest.mark.parametrize("method", shipped.METHODS)
def test_a_person_is_drawn(method: str, load: Any) -> None:
    import nodes as comfy_nodes

    model, clip, vae, clip_vision, analyzer, adapter = load(shipped.METHODS[method])
    assert adapter.adapter.method == {"faceid": "ip_adapter"}.get(method, method)
    positive, negative = (
        comfy_nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a photo of a woman", "")
    )

    def draw(applied: Any) -> Tensor:
        empty = {"samples": torch.zeros(1, 4, 16, 16)}
        drawn = comfy_nodes.KSampler().sample(applied, 3, 2, 3.0, "lcm", "simple", positive, negative, empty)[
            0
        ]
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
    assert (changed - plain).abs().max() > 1e-2
    assert torch.equal(same, plain)


def test_an_unknown_method_is_refused(load: Any) -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import InputError

    with pytest.raises(InputError, match="has adapters of UniID, IDAdapter, IP-Adapter FaceID, got 'PuLID'"):
        load("PuLID")


FILES = (
    shipped.BASE,
    shipped.AUTOENCODER,
    shipped.VISION_CONFIG,
    shipped.VISION_WEIGHTS,
    *(
        f"{shipped.PACKAGE}/{name}"
        for name in (shipped.DETECTOR_FILE, shipped.RECOGNIZER_FILE, shipped.SEX_AND_AGE_FILE)
    ),
    shipped.adapter_file("uniid"),
)
"""All that the node reads for UniID."""


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, load: Any, assets: Path) -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import IDAdapterError

    (assets / name).unlink()
    with pytest.raises(IDAdapterError, match=re.escape(Path(name).name)):
        load("UniID")


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(name: str, load: Any, assets: Path) -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import IDAdapterError

    (assets / name).write_bytes(b"no file of ours")
    with pytest.raises(IDAdapterError, match=re.escape(Path(name).name)):
        load("UniID")


@pytest.mark.parametrize("name", FILES)
def test_a_replaced_file_is_loaded_again(name: str, assets: Path) -> None:
    fingerprint = pack_nodes()[NODE].fingerprint_inputs
    before = fingerprint(adapter="UniID")
    assert fingerprint(adapter="UniID") == before
    assert fingerprint(adapter=None) == before, "it may be linked"
    shutil.copy(assets / name, assets / "copy")
    (assets / "copy").replace(assets / name)
    assert fingerprint(adapter="UniID") != before


def test_photos_of_a_person_are_drawn() -> None:
    photos, sex = pack_nodes()["IDAdapterDemoPerson"].execute(3, 2, 128).result
    assert photos.shape == (2, 128, 128, 3)
    assert photos.dtype is torch.float32
    assert 0 <= float(photos.min()) < 0.2
    assert 0.8 < float(photos.max()) <= 1
    assert sex in ("woman", "man")
