"""Several photos of a person through the nodes: enriched, described, mixed, and what the report says of them."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.harness.comfy import pack_nodes
from tests.nodes.sampling import adapter, face_features
from tests.tiny.face_package import MarkedFace, synthesize
from tests.tiny.files import PACKAGE, RECOGNIZER, bring_face_package, bring_recognizer

PLACES = ((320, 300, 90), (250, 330, 120), (360, 280, 70), (300, 340, 140))
SETTINGS = {"count": 4, "seed": 1, "flip": True, "rotation": 10.0, "colour": 0.15}


def execute(node_id: str, *arguments: Any, **inputs: Any) -> tuple[Any, ...]:
    """All outputs of one of the pack's nodes."""
    with torch.inference_mode():
        result: tuple[Any, ...] = pack_nodes()[node_id].execute(*arguments, **inputs).result
    return result


def image(*pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).float() / 255


def person(number: int = 0) -> np.ndarray:
    return synthesize(faces=[MarkedFace(*PLACES[number], identity=1)])


def stranger() -> np.ndarray:
    """Somebody else in front of a white wall: the tiny face network has not learnt to look past the background."""
    face = MarkedFace(320, 300, 90, identity=2, skin=(120, 130, 190))
    return synthesize(faces=[face], background=(250, 250, 250))


@pytest.fixture(scope="module")
def analyzer(pack: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The detector and the torch face network, as Load Face Analyzer gives them."""
    from ComfyUI_IDAdapter.idadapter_core.faces.detector import open_analyzer
    from ComfyUI_IDAdapter.nodes.host.analyzer import LoadedAnalyzer, load_recognizer

    base = tmp_path_factory.mktemp("faces")
    bring_face_package(base)
    bring_recognizer(base)
    network, _ = load_recognizer(base / "models" / "idadapter" / "recognizers" / RECOGNIZER)
    return LoadedAnalyzer(open_analyzer(base / "models" / "insightface" / "models" / PACKAGE, "cpu"), network)


def extract(analyzer: Any, *pictures: np.ndarray) -> Any:
    return execute("IDAdapterExtractFaces", image(*pictures), analyzer, "largest", 0, "error")[0]


@pytest.fixture(scope="module")
def five(analyzer: Any) -> Any:
    """Features of four photos of one person, the third of five being a stranger."""
    return extract(analyzer, person(0), person(1), stranger(), person(2), person(3))


def mix(features: Any, *arguments: Any, mode: str = "auto", references: int = 0, weights: str = "") -> Any:
    return execute("IDAdapterMixFeatures", adapter("sd15"), features, mode, references, weights, *arguments)


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.adapter_tokens, other.adapter_tokens) and all(
        torch.equal(tokens, other.text_tokens[name]) for name, tokens in one.text_tokens.items()
    )


# --- Mix Face Features ---


@pytest.mark.parametrize("arguments", [(), ("reject",)])
def test_a_stranger_is_left_out_named_and_logged(
    five: Any, arguments: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Also in prompts that were saved before there was a choice."""
    identity, report = mix(five, *arguments)
    lines = report.splitlines()
    assert lines[0] == "used 4 of 5 photos"
    assert lines[3].startswith("photo 3: left out, it disagrees with the others (cosine ")
    assert [line.partition(":")[0] for line in lines if "weight 0.25" in line] == [
        "photo 1",
        "photo 2",
        "photo 4",
        "photo 5",
    ]
    assert same(identity, mix(five.pick([0, 1, 3, 4]), *arguments)[0])
    assert not same(identity, mix(five, "keep")[0])
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert f"Mix Face Features: {lines[3]}" in [record.getMessage() for record in warnings]


@pytest.mark.parametrize(("weights", "outliers"), [("", "keep"), ("1, 1, 1, 1, 1", "reject")])
def test_a_stranger_can_be_kept(
    five: Any, weights: str, outliers: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, report = mix(five, outliers, weights=weights)
    lines = report.splitlines()
    assert lines[0] == "used 5 of 5 photos"
    assert lines[3].startswith("photo 3: disagrees with the others (cosine ")
    assert "kept with weight 0.2." in lines[3]
    assert lines[3] in caplog.text


def test_photos_of_one_person_need_no_warning(
    analyzer: Any, five: Any, caplog: pytest.LogCaptureFixture
) -> None:
    features = extract(analyzer, person(0), person(1), person(2), person(3))
    identity, report = mix(features)
    assert report.splitlines()[0] == "used 4 of 4 photos"
    assert "agree" not in report
    assert "Mix Face Features" not in caplog.text
    # Not bit for bit: the network's arithmetic depends a little on how many faces it is given at once.
    torch.testing.assert_close(identity.adapter_tokens, mix(five)[0].adapter_tokens, atol=1e-4, rtol=0)


def test_two_people_are_reported(analyzer: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, report = mix(extract(analyzer, person(), stranger()))
    last = report.splitlines()[-1]
    assert last.startswith("the two photos are hardly alike (cosine -0.")
    assert f"Mix Face Features: {last}" in caplog.text


def test_references_choose_photos_that_differ(analyzer: Any) -> None:
    """Two almost equal photos and one of a turned head: two references are one of the first and the last."""
    turned = synthesize(faces=[MarkedFace(320, 300, 90, yaw=25, identity=1)])
    features = extract(analyzer, person(0), person(1), turned)
    identity, report = mix(features, references=2)
    assert "left out, no more than 2 are wanted (references)" in report
    assert "photo 3: weight 0.5" in report
    kept = [i for i in range(3) if f"photo {i + 1}: weight" in report]
    assert same(identity, mix(features.pick(kept))[0])


def test_features_without_faces_on_record_are_mixed(pack: ModuleType) -> None:
    _, report = mix(face_features(0, 2))
    assert "face 2: weight 0.5" in report


def test_an_unknown_way_with_outliers_is_refused(five: Any) -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import InputError

    with pytest.raises(InputError, match="outliers must be one of reject, keep, got 'drop'"):
        mix(five, "drop")


# --- Enrich Photos ---


def test_few_photos_become_more() -> None:
    from ComfyUI_IDAdapter.idadapter_core.faces.enrich import enrich

    photos = image(person(0), person(1))
    (enriched,) = execute("IDAdapterEnrich", photos, **SETTINGS)
    assert enriched.shape == (4, 640, 640, 3)
    assert enriched.dtype == torch.float32
    assert torch.equal(enriched[:2], photos)
    expected = enrich([person(0), person(1)], 4, 1, flip=True, rotation=10.0, colour=0.15)
    assert torch.equal(enriched, image(*expected))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_batch_that_is_large_enough_passes_unchanged(count: int) -> None:
    photos = torch.rand(3, 40, 50, 3, generator=torch.Generator().manual_seed(0))
    (result,) = execute("IDAdapterEnrich", photos, **{**SETTINGS, "count": count})
    assert torch.equal(result, photos)


def test_a_photo_with_opacity_is_enriched_as_it_looks() -> None:
    photo = image(person())
    opaque = torch.cat([photo, torch.ones(1, 640, 640, 1)], dim=3)
    (expected,) = execute("IDAdapterEnrich", photo, **SETTINGS)
    assert torch.equal(execute("IDAdapterEnrich", opaque, **SETTINGS)[0], expected)


def test_a_broken_photo_is_refused_by_name() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import InputError

    photos = image(person(0), person(1))
    photos[1, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"image 2 of 2 .* NaN or infinite"):
        execute("IDAdapterEnrich", photos, **SETTINGS)


def test_enriched_photos_become_an_identity(analyzer: Any) -> None:
    settings = {**SETTINGS, "flip": False, "colour": 0.05}  # the tiny detector knows dots by their colour
    (photos,) = execute("IDAdapterEnrich", image(person()), **settings)
    features, _, _, _, report = execute("IDAdapterExtractFaces", photos, analyzer, "largest", 0, "error")
    assert len(features) == 4
    assert "image 4 of 4 (640x640): 1 face found" in report
    identity, report = mix(features)
    assert report.splitlines()[0] == "used 4 of 4 photos"
    assert not same(identity, mix(features.pick([0]))[0])
