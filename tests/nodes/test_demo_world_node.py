"""Load Demo World gives everything that a graph needs, from the files of the pack."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from idadapter_core.adapter import build_adapter, initial_adapter, save_adapter
from idadapter_core.demo_world import Factors, Person, render, shipped
from idadapter_core.demo_world.autoencoder import Autoencoder, Shape, save_autoencoder
from idadapter_core.demo_world.base import LATENT_CHANNELS, TEXT_WIDTH, BaseModel, save_base
from idadapter_core.demo_world.build.detector import Detector
from idadapter_core.demo_world.build.make import RECOGNIZER_WIDTHS, write_package_file
from idadapter_core.demo_world.build.train_vision import CONFIG, save_vision
from idadapter_core.faces.align import align_face, square_crop
from idadapter_core.faces.features import crops_to_tensor
from idadapter_core.faces.iresnet import digest, load_iresnet
from idadapter_core.training.adapters import Wanted, fresh_config
from idadapter_core.types import Face
from tests.golden import recipe
from tests.harness.comfy import pack_nodes
from tests.nodes.sampling import node

NODE = "IDAdapterLoadDemoWorld"
METHODS = {
    "UniID": ("uniid", "uniid"),
    "IDAdapter": ("idadapter", "idadapter"),
    "IP-Adapter FaceID": ("ip_adapter", "faceid"),
}
"""Method and file, by the node's options."""
SLIM = Shape(LATENT_CHANNELS, (8, 8, 16, 16), (0, 1, 1, 1), (0, 1, 1, 1))


def _write_adapter(method: str, base: BaseModel, recognizer: str, path: Path) -> None:
    """An adapter of the demo world's sizes with random weights and open gates; UniID's text branch is left out."""
    wanted = Wanted(method, {"l": TEXT_WIDTH}, (128, 64), recognizer, RECOGNIZER_WIDTHS, "adapter", {})
    start = initial_adapter(fresh_config(base.unet, wanted), path.name)
    state = {
        name: recipe.weight(1, name, value.shape).reshape(value.shape)
        for name, value in start.state_dict().items()
    }
    save_adapter(build_adapter(method, start.config, state, path.name), path)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack's files, with untrained networks in place of those that take hours."""
    import transformers

    home = tmp_path_factory.mktemp("demo_world") / "assets"
    shutil.copytree(shipped.ASSETS, home)
    base = BaseModel()
    recipe.fill(base, 0, "demo.")
    save_base(base, home / shipped.BASE)
    torch.manual_seed(0)
    save_autoencoder(Autoencoder(SLIM), home / shipped.AUTOENCODER)
    save_vision(
        transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CONFIG)), home / shipped.CLIP_VISION
    )
    package = home / shipped.FACE_PACKAGES / "models" / shipped.FACE_PACKAGE
    write_package_file("detector", Detector(), package)
    name = digest(load_iresnet(package / shipped.RECOGNIZER_FILE, any_layers=True))
    (home / shipped.ADAPTERS).mkdir(exist_ok=True)
    for method, file in METHODS.values():
        _write_adapter(method, base, name, home / shipped.ADAPTERS / f"{file}.safetensors")
    return home


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
    assert adapter.adapter.method == METHODS[method][0]
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
    with pytest.raises(
        CheckpointError, match=r"base\.safetensors is missing in .*; get this project once more"
    ):
        load("UniID")


def test_a_replaced_file_is_loaded_again(load: Any, assets: Path) -> None:
    fingerprint = pack_nodes()[NODE].fingerprint_inputs
    before = fingerprint(adapter="UniID")
    assert fingerprint(adapter="UniID") == before
    file = assets / shipped.ADAPTERS / "uniid.safetensors"
    shutil.copy(file, assets / "copy")
    (assets / "copy").replace(file)
    assert fingerprint(adapter="UniID") != before
