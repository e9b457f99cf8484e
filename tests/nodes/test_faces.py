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
from tests.harness.memory import PeakMemory
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
    from ComfyUI_IDAdapter.nodes.host.analyzer import LoadedAnalyzer

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
    from ComfyUI_IDAdapter.nodes.host.analyzer import LoadedAnalyzer

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


def extract_frames(analyzer: Any, frames: torch.Tensor) -> Any:
    return pack_nodes()["IDAdapterExtractFaces"].execute(frames, analyzer, "largest", 0, "error").result


@pytest.fixture(scope="module")
def package_analyzer(pack: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from ComfyUI_IDAdapter.idadapter_core.faces.detector import open_analyzer
    from ComfyUI_IDAdapter.nodes.host.analyzer import LoadedAnalyzer

    folder = write_package(tmp_path_factory.mktemp("package"))
    return LoadedAnalyzer(open_analyzer(folder, "cpu", recognition=True))


@pytest.mark.skipif(not PeakMemory.is_known(), reason="this system does not tell the peak of memory")
def test_a_video_takes_little_more_memory_than_its_frames(
    package_analyzer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 200 frames of 720p do, in small: `python -m benchmarks.memory video` is the whole of it."""
    from ComfyUI_IDAdapter.idadapter_core.faces import preview as previews

    count, few = 96, 17
    monkeypatch.setattr(previews, "GIVEN_PIXELS", 2**24 * count // 200, raising=False)
    frame = torch.from_numpy(synthesize(1280, 720, [MarkedFace(640, 360, 60)]))
    extract_frames(package_analyzer, frame.expand(few, -1, -1, -1).float() / 255)  # what is set up once
    with PeakMemory() as peak:
        frames = torch.empty(count, *frame.shape)
        frames[:] = frame
        frames.div_(255)
        features, crops, *_ = extract_frames(package_analyzer, frames)
    assert peak.bytes < 1.3 * frames.nbytes
    assert len(features) == len(crops) == count


@pytest.mark.parametrize("count", [1, 16, 17])
def test_masks_and_previews_of_many_photos_are_smaller_and_still_right(
    package_analyzer: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    from ComfyUI_IDAdapter.idadapter_core.faces import preview as previews

    monkeypatch.setattr(previews, "GIVEN_PIXELS", 100_000)
    height, width = 240, 320
    frame = torch.from_numpy(synthesize(width, height, [MarkedFace(200, 120, 50)])).float() / 255
    features, _, boxes, preview, _ = extract_frames(package_analyzer, frame.expand(count, -1, -1, -1))
    size = (height, width) if count <= 16 else (66, 89)
    assert tuple(boxes.shape) == (count, *size)
    assert tuple(preview.shape) == (count, *size, 3)
    assert boxes.dtype == preview.dtype == torch.float32
    assert 0 <= preview.min() < preview.max() <= 1
    rows, columns = (boxes[-1] == 1).nonzero(as_tuple=True)
    assert set(boxes.unique().tolist()) == {0, 1}
    x1, y1, x2, y2 = features.faces[-1].box
    found = [
        columns.min() / size[1],
        rows.min() / size[0],
        (columns.max() + 1) / size[1],
        (rows.max() + 1) / size[0],
    ]
    expected = [x1 / width, y1 / height, x2 / width, y2 / height]
    assert [float(edge) for edge in found] == pytest.approx(expected, abs=0.6 / min(size))
    green = (preview[-1] - torch.tensor([40, 220, 80]) / 255).abs().amax(-1) < 0.01
    drawn_rows, drawn_columns = green.nonzero(as_tuple=True)
    assert float(drawn_columns.min()) / size[1] == pytest.approx(x1 / width, abs=4 / size[1])
    assert float(drawn_rows.max()) / size[0] == pytest.approx(y2 / height, abs=4 / size[0])
