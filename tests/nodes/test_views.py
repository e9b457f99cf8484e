"""A method that reads other views of a face adds them to its needs, and nothing else: features hold them."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from idadapter_core.methods.method import Needs
from tests.harness.comfy import pack_nodes
from tests.tiny.face_package import MarkedFace, synthesize, write_package
from tests.tiny.vision import WIDTH, config_file, tiny_clip_vision, vision_state


@pytest.fixture
def extracted(pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Any]:
    """A photo, a CLIP vision model, and the features of its two faces while a method reads two more views."""
    from ComfyUI_IDAdapter.idadapter_core.faces.detector import open_analyzer
    from ComfyUI_IDAdapter.idadapter_core.methods import METHODS
    from ComfyUI_IDAdapter.nodes.host.analyzer import LoadedAnalyzer

    toy = replace(METHODS["uniid"], name="toy", needs=lambda config: Needs(views=("aligned_224", "blank")))
    monkeypatch.setitem(METHODS, "toy", toy)
    analyzer = LoadedAnalyzer(open_analyzer(write_package(tmp_path), "cpu", recognition=True))
    photo = synthesize(faces=[MarkedFace(180, 300, 60, identity=1), MarkedFace(450, 300, 90, identity=2)])
    image, clip_vision = torch.from_numpy(photo)[None].float() / 255, tiny_clip_vision()
    node = pack_nodes()["IDAdapterExtractFaces"]
    with torch.inference_mode():
        features = node.execute(image, analyzer, "all", 0, "error", clip_vision).result[0]
    return photo, clip_vision, features


def test_what_was_seen_is_kept_as_long_as_the_photo(pack: ModuleType, tmp_path: Path) -> None:
    from ComfyUI_IDAdapter.idadapter_core.faces.detector import open_analyzer
    from ComfyUI_IDAdapter.nodes.host.analyzer import LoadedAnalyzer

    analyzer = LoadedAnalyzer(open_analyzer(write_package(tmp_path), "cpu", recognition=True))
    image = torch.from_numpy(synthesize(faces=[MarkedFace(300, 300, 90)]))[None].float() / 255
    clip_vision = tiny_clip_vision()

    def seen(image: Tensor) -> weakref.ref[Tensor]:
        with torch.inference_mode():
            node = pack_nodes()["IDAdapterExtractFaces"]
            features = node.execute(image, analyzer, "largest", 0, "error", clip_vision).result[0]
        return weakref.ref(features.patch_tokens)

    first = seen(image)
    gc.collect()
    assert first() is not None
    assert seen(image) is first, "the same, and not encoded again"
    del image
    gc.collect()
    assert first() is None


def test_features_are_keyed_by_network_and_view(extracted: tuple[Any, Any, Any]) -> None:
    _, clip_vision, features = extracted
    recogniser, vision = features.recognizer, features.vision
    assert vision
    assert vision != recogniser
    assert [tuple(key) for key in features.keys] == [
        (recogniser, "aligned"),
        (vision, "head"),
        (vision, "aligned_224"),
        (vision, "blank"),
    ]


def test_views_hold_the_states_of_what_was_shown(extracted: tuple[Any, Any, Any]) -> None:
    from ComfyUI_IDAdapter.idadapter_core.faces.align import align_face

    photo, clip_vision, features = extracted
    states = features.states("aligned_224")
    assert states.shape == (2, 17, WIDTH)
    for number, face in enumerate(features.faces):
        crop = align_face(photo, face.landmarks, 224)
        with torch.inference_mode():
            shown = clip_vision.encode_image(torch.from_numpy(crop)[None].float() / 255)
        assert torch.equal(states[number], shown["penultimate_hidden_states"][0].float())
    assert features.states("blank").shape == (1, 17, WIDTH)


def test_a_blank_picture_is_pixel_values_of_zero_in_both_hosts(
    extracted: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    """And an aligned crop is seen alike."""
    from safetensors.torch import save_file

    from idadapter_core.faces.views import VIEWS
    from idadapter_core.stable_diffusion.networks import encode_views
    from idadapter_core.stable_diffusion.vision import load_vision

    photo, _, features = extracted
    file = tmp_path / "vision.safetensors"
    save_file(vision_state(), file)
    (tmp_path / "config.json").write_bytes(config_file(WIDTH).read_bytes())
    vision = load_vision(file)
    faces = [(photo, face) for face in features.faces]
    found = encode_views(vision, [VIEWS["aligned_224"], VIEWS["blank"]], faces, "cpu")
    # ComfyUI keeps these weights in fp16, and pictures are resized by libraries of their own.
    for key, limit in zip(found, (1e-2, 1e-2), strict=True):
        assert (found[key] - features.states(key.view)).abs().max() < limit


def test_chosen_faces_keep_their_views(extracted: tuple[Any, Any, Any]) -> None:
    features = extracted[2]
    chosen = features.pick([1])
    assert torch.equal(chosen.states("aligned_224"), features.states("aligned_224")[1:])
    assert torch.equal(chosen.states("blank"), features.states("blank"))


def test_without_clip_vision_a_view_is_asked_for(extracted: tuple[Any, Any, Any]) -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError

    features = replace_views(extracted[2])
    with pytest.raises(MismatchError, match="Load CLIP Vision"):
        features.states("aligned_224")


def replace_views(features: Any) -> Any:
    return replace(features, views={})
