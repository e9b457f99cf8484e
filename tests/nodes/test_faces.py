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
from tests.tiny.face_package import synthesize, write_package


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
