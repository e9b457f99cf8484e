"""The face nodes in ComfyUI: what can interrupt them, and which files they list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from idadapter_core.faces import iresnet
from tests.harness.comfy import pack_nodes
from tests.tiny.face_package import MarkedFace, synthesize, write_package
from tests.tiny.vision import PATCHES, WIDTH, tiny_clip_vision


@pytest.fixture
def interrupted(pack: ModuleType) -> Iterator[type[BaseException]]:
    """The user has pressed cancel; the exception that ends the run."""
    from comfy import model_management

    model_management.interrupt_current_processing()
    yield model_management.InterruptProcessingException
    model_management.interrupt_current_processing(False)


def test_a_photo_can_be_interrupted_before_it_is_done(
    interrupted: type[BaseException], tmp_path: Path
) -> None:
    from ComfyUI_IDAdapter.idadapter_core.faces.detector import open_analyzer
    from ComfyUI_IDAdapter.nodes.faces import LoadedAnalyzer

    analyzer = LoadedAnalyzer(open_analyzer(write_package(tmp_path), "cpu"))
    image = torch.from_numpy(synthesize())[None].float() / 255
    # Without a check inside the photo this would be the error that it shows no face.
    with pytest.raises(interrupted):
        pack_nodes()["IDAdapterExtractFaces"].execute(image, analyzer, "largest", 0, "error")


@pytest.mark.parametrize("suffix", iresnet._SUFFIXES)
def test_every_file_that_can_be_a_recogniser_is_listed(pack: ModuleType, suffix: str) -> None:
    nodes = pack_nodes()  # registers the folders
    from ComfyUI_IDAdapter.nodes.host import paths

    path = paths.folder_of(paths.RECOGNIZERS) / f"listed{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    try:
        options = recognizers(nodes["IDAdapterLoadFaceAnalyzer"])
    finally:
        path.unlink()
    assert path.name in options


def recognizers(node: Any) -> list[str]:
    (found,) = (entry.options for entry in node.define_schema().inputs if entry.id == "recognizer")
    return list(found)


def test_clip_vision_adds_tokens_of_each_head(pack: ModuleType, tmp_path: Path) -> None:
    from ComfyUI_IDAdapter.idadapter_core.faces.align import square_crop
    from ComfyUI_IDAdapter.idadapter_core.faces.detector import open_analyzer
    from ComfyUI_IDAdapter.nodes.faces import LoadedAnalyzer

    analyzer = LoadedAnalyzer(open_analyzer(write_package(tmp_path), "cpu", recognition=True))
    photo = synthesize(faces=[MarkedFace(180, 300, 60, identity=1), MarkedFace(450, 300, 90, identity=2)])
    image = torch.from_numpy(photo)[None].float() / 255
    clip_vision = tiny_clip_vision()

    def extract(clip: Any) -> Any:
        with torch.inference_mode():
            return (
                pack_nodes()["IDAdapterExtractFaces"]
                .execute(image, analyzer, "left to right", 1, "error", clip)
                .result[0]
            )

    plain, features = extract(None), extract(clip_vision)
    assert plain.patch_tokens is None
    assert plain.class_embedding is None
    assert torch.equal(plain.embedding, features.embedding)
    assert features.patch_tokens.shape == (1, PATCHES, WIDTH)
    assert features.class_embedding.shape == (1, WIDTH)
    head = square_crop(photo, features.faces[0])
    assert head.shape[0] == head.shape[1]
    with torch.inference_mode():
        expected = clip_vision.encode_image(torch.from_numpy(head)[None].float() / 255)
    assert torch.equal(features.patch_tokens, expected["penultimate_hidden_states"][:, 1:].float())
    assert torch.equal(features.class_embedding, expected["last_hidden_state"][:, 0].float())
