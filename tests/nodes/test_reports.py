"""The report and the picture that each node gives with its result."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from idadapter_core.faces.preview import CHOSEN_COLOR, LEFT_OUT_COLOR, OTHER_COLOR
from tests.harness.comfy import pack_nodes
from tests.nodes.sampling import adapter, face_features, person
from tests.tiny.checkpoints import tiny_clip
from tests.tiny.face_package import MarkedFace, synthesize, write_package
from tests.tiny.uniid import TINY_SD15, tiny_adapter


def run(node_id: str, *arguments: Any) -> dict[str, Any]:
    """UI output of a node."""
    with torch.inference_mode():
        shown: dict[str, Any] = pack_nodes()[node_id].execute(*arguments).ui
    return shown


def texts(ui: dict[str, Any], level: str | None = None) -> list[str]:
    return [entry["text"] for entry in ui["idadapter"] if level in (None, entry["level"])]


def pictures(ui: dict[str, Any]) -> list[np.ndarray]:
    import folder_paths

    folder = Path(folder_paths.get_temp_directory())
    assert {entry["type"] for entry in ui["images"]} == {"temp"}
    return [np.asarray(Image.open(folder / entry["filename"])) for entry in ui["images"]]


def has(picture: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((picture == np.array(color)).all(axis=-1).any())


@pytest.fixture(scope="module")
def analyzer(pack: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from ComfyUI_IDAdapter.idadapter_core.faces.detector import open_analyzer
    from ComfyUI_IDAdapter.nodes.host.analyzer import LoadedAnalyzer

    package = write_package(tmp_path_factory.mktemp("faces"))
    return LoadedAnalyzer(open_analyzer(package, "cpu", recognition=True))


def extract(analyzer: Any, *photos: np.ndarray, on_missing: str = "skip") -> dict[str, Any]:
    image = torch.from_numpy(np.stack(photos)).float() / 255
    return run("IDAdapterExtractFaces", image, analyzer, "largest", 0, on_missing)


ONE = synthesize(faces=[MarkedFace(320, 300, 90, identity=1)])
GROUP = synthesize(
    faces=[MarkedFace(x, 300, size, identity=x) for x, size in ((130, 50), (320, 70), (520, 60))]
)
NOBODY = synthesize()


def test_extract_shows_the_chosen_the_others_and_the_photo_that_was_left_out(analyzer: Any) -> None:
    ui = extract(analyzer, ONE, GROUP, NOBODY)
    assert [text.partition(" of 3")[0] for text in texts(ui)] == ["image 1", "image 2", "image 2", "image 3"]
    several, absent = texts(ui, "warning")
    assert "several faces; used index 0 of 0 to 2" in several
    assert "left out, no face found" in absent
    one, group, nobody = pictures(ui)
    assert [has(picture, CHOSEN_COLOR) for picture in (one, group, nobody)] == [True, True, False]
    assert [has(picture, OTHER_COLOR) for picture in (one, group, nobody)] == [False, True, False]
    assert [has(picture, LEFT_OUT_COLOR) for picture in (one, group, nobody)] == [False, False, True]


def test_the_picture_of_a_video_stays_small(analyzer: Any) -> None:
    """Of a hundred frames eight are shown, the one that was left out among them."""
    large = synthesize(1600, 900, [MarkedFace(800, 450, 120)])
    nobody = np.full_like(large, 90)
    ui = extract(analyzer, *[large] * 19, nobody)
    shown = pictures(ui)
    assert len(shown) == 8
    assert {max(picture.shape) for picture in shown} == {768}
    assert [has(picture, LEFT_OUT_COLOR) for picture in shown] == [False] * 7 + [True]
    assert len(texts(ui)) == 13
    assert len(texts(ui, "warning")) == 1


def mix(features: Any, outliers: str = "reject", weights: str = "") -> dict[str, Any]:
    return run("IDAdapterMixFeatures", adapter("sd15"), features, "auto", 0, weights, outliers)


def features(likeness: list[int]) -> Any:
    """Faces of which those with the same number are one person."""
    known = face_features(0, len(likeness))
    embedding = (
        torch.eye(known.embedding.shape[1])[likeness]
        + 0.1 * torch.eye(known.embedding.shape[1])[100 : 100 + len(likeness)]
    )
    return replace(known, embedding=embedding, crops=torch.zeros(len(likeness), 3, 112, 112))


def test_mix_shows_who_was_left_out(caplog: pytest.LogCaptureFixture) -> None:
    ui = mix(features([1, 1, 2, 1]))
    assert texts(ui)[0] == "used 3 of 4 faces"
    (warning,) = texts(ui, "warning")
    assert warning.startswith("face 3: left out, it disagrees with the others")
    assert f"Mix Face Features: {warning}" in caplog.text
    (sheet,) = pictures(ui)
    upper, lower = np.split(sheet, 2)
    quarters = [*np.split(upper, 2, axis=1), *np.split(lower, 2, axis=1)]
    assert [has(part, LEFT_OUT_COLOR) for part in quarters] == [False, False, True, False]
    assert [has(part, CHOSEN_COLOR) for part in quarters] == [True, True, False, True]
    kept = mix(features([1, 1, 2, 1]), "keep")
    assert not has(*pictures(kept), LEFT_OUT_COLOR)


def test_mix_warns_of_two_people_with_their_likeness() -> None:
    (warning,) = texts(mix(features([1, 2])), "warning")
    assert "the two faces are hardly alike (cosine 0.00" in warning
    assert texts(mix(features([1, 1])), "warning") == []


def test_features_without_crops_have_no_picture() -> None:
    assert "images" not in mix(replace(features([1, 1]), crops=None))


@pytest.mark.parametrize(
    ("seen", "class_word", "text", "expected"),
    [
        (
            "woman",
            "auto",
            "a <class word>",
            ['Class word: "woman", as the face package sees the photos.', 'Encoded: "a woman"'],
        ),
        (
            "",
            "auto",
            "a <class word>",
            ['Class word: "person", because the photos do not tell more.', 'Encoded: "a person"'],
        ),
        ("woman", "girl", "a <class word>", ['Class word: "girl", as chosen.', 'Encoded: "a girl"']),
        ("woman", "auto", "a cat", ['Encoded: "a cat"']),
    ],
)
def test_id_prompt_says_the_noun_and_the_text(
    seen: str, class_word: str, text: str, expected: list[str]
) -> None:
    identity = replace(person("sd15"), class_word=seen)
    ui = run("IDAdapterPrompt", tiny_clip("sd15"), identity, text, class_word, 1.0)
    assert texts(ui) == expected
    assert texts(ui, "warning") == []


def test_id_prompt_warns_where_there_is_no_text_branch(caplog: pytest.LogCaptureFixture) -> None:
    ui = run("IDAdapterPrompt", tiny_clip("sd15"), person("sd15", text=False), "a cat", "auto", 1.0)
    (warning,) = texts(ui, "warning")
    assert "no text branch" in warning
    assert f"ID Prompt: {warning}" in caplog.text


def test_enrich_says_how_many() -> None:
    image = torch.from_numpy(ONE)[None].float() / 255
    assert texts(run("IDAdapterEnrich", image, 4, 1, True, 5.0, 0.1)) == [
        "1 given, 3 made of them: 4 photos."
    ]
    assert "pass unchanged" in texts(run("IDAdapterEnrich", image, 1, 1, True, 5.0, 0.1))[0]


def test_save_and_load_say_where_and_what() -> None:
    from ComfyUI_IDAdapter.nodes.host import paths

    with torch.inference_mode():
        identity = replace(adapter("sd15").encode(features([1]), pack_mix()), class_word="man")
    file = paths.folder_of(paths.IDENTITIES) / "reported.safetensors"
    try:
        (saved,) = texts(run("IDAdapterSaveIdentity", identity, "reported"))
        assert "reported.safetensors" in saved
        assert str(file.parent) in saved
        (again,) = texts(run("IDAdapterSaveIdentity", identity, "reported"))
        assert "holds this identity already" in again
        (loaded,) = texts(run("IDAdapterLoadIdentity", "reported.safetensors", adapter("sd15")))
        assert loaded == "reported.safetensors: an identity for UniID, seen as a man."
    finally:
        file.unlink(missing_ok=True)


def pack_mix() -> Any:
    from ComfyUI_IDAdapter.idadapter_core import Mix

    return Mix()


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("adapter_branch", None, ["it has no text branch"]),
        ("text_branch", None, ["it has no adapter branch"]),
        ("adapter_branch", "text_branch", []),
    ],
)
def test_load_id_adapter_warns_of_a_single_branch(
    pack: ModuleType, first: str, second: str | None, expected: list[str]
) -> None:
    pack_nodes()  # registers the folders
    from ComfyUI_IDAdapter.nodes.host import paths

    folder = paths.folder_of(paths.ADAPTERS) / "reported"
    try:
        tiny_adapter(TINY_SD15, folder)
        names = [f"reported/{branch}/pytorch_model.bin" if branch else "none" for branch in (first, second)]
        ui = run("IDAdapterLoadAdapter", *names)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert "UniID" in texts(ui)[0]
    warnings = texts(ui, "warning")
    assert len(warnings) == len(expected)
    assert all(start in warning for start, warning in zip(expected, warnings, strict=True))
    assert not any(text.startswith("Note: ") for text in texts(ui))


def test_reports_are_sent_again_with_every_run(pack: ModuleType) -> None:
    """ComfyUI sends cached UI output of a node that is no output node only where the node asks for it."""
    silent = {
        "IDAdapterLoadFaceAnalyzer",
        "IDAdapterLoadDemoWorld",
        "IDAdapterDemoPerson",
        "IDAdapterApply",
        "IDAdapterRescale",
        "IDAdapterAttach",
    }
    asking = {node_id for node_id, node in pack_nodes().items() if node.HAS_INTERMEDIATE_OUTPUT}
    assert asking >= set(pack_nodes()) - silent


def test_a_report_does_not_need_a_log(caplog: pytest.LogCaptureFixture, pack: ModuleType) -> None:
    from ComfyUI_IDAdapter.nodes.host.messages import report_ui, warning

    with caplog.at_level(logging.WARNING):
        assert report_ui([warning("mind this")]) == {"idadapter": [{"level": "warning", "text": "mind this"}]}
    assert caplog.records == []
