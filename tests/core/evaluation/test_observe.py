"""What the judging models see, what is kept of it, and what they refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from idadapter_core.errors import ConfigError, RecognizerError
from idadapter_core.evaluation.observe import ClipJudge, Observation, Observer
from idadapter_core.evaluation.people import choose_people
from idadapter_core.faces.iresnet import IResNet, save_iresnet
from tests.core.evaluation.world import configure, index_of
from tests.golden import recipe
from tests.tiny.face_package import MarkedFace, synthesize

LARGE, SMALL = MarkedFace(60, 64, 26, identity=1), MarkedFace(130, 60, 16, identity=2)


def test_of_several_faces_the_largest_counts(observer: Observer) -> None:
    both = observer.observe(synthesize(160, 128, [SMALL, LARGE]))
    alone = observer.observe(synthesize(160, 128, [LARGE]))
    assert (both.faces, alone.faces) == (2, 1)
    assert both.embedding is not None
    assert alone.embedding is not None
    assert both.embedding @ alone.embedding > 0.95
    assert np.linalg.norm(both.embedding) == pytest.approx(1)
    assert 0.1 < (both.face_fraction or 0) < 0.6


def test_a_picture_without_a_face(observer: Observer) -> None:
    observation = observer.observe(np.full((64, 64, 3), 90, np.uint8))
    assert not observation.has_face
    assert (observation.faces, observation.box, observation.expression, observation.face_fraction) == (
        0,
        None,
        None,
        None,
    )
    assert observation.clip is not None


def test_what_was_seen_is_kept_whole(observer: Observer) -> None:
    for observation in (
        observer.observe(synthesize(128, 128, [LARGE])),
        observer.observe(np.zeros((64, 64, 3), np.uint8)),
    ):
        again = Observation.of(observation.arrays())
        for name in ("width", "height", "faces", "box", "expression"):
            assert getattr(again, name) == getattr(observation, name)
        for name in ("landmarks", "embedding", "second", "clip"):
            np.testing.assert_array_equal(getattr(again, name), getattr(observation, name))


def test_clip_sees_the_middle_square_of_any_size(world: Path) -> None:
    clip = ClipJudge(world / "clip")
    square = synthesize(96, 96, [MarkedFace(48, 48, 20)])
    wide = np.concatenate([np.zeros_like(square), square, np.zeros_like(square)], axis=1)
    assert clip.of_picture(square) @ clip.of_picture(wide) > 0.999
    assert clip.of_picture(square) @ clip.of_picture(255 - square) < 0.999
    long = clip.of_text("a photo of a man " * 50)
    assert long.shape == clip.of_picture(square).shape
    assert np.linalg.norm(long) == pytest.approx(1, abs=1e-5)
    assert not np.array_equal(clip.of_text("a man"), clip.of_text("a cat"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda name, tensor: None if name.startswith("text_model.") else tensor, r"missing \(text_model"),
        (
            lambda name, tensor: tensor[:-1] if name == "visual_projection.weight" else tensor,
            "mismatched .visual_projection.weight is .15, 32. instead of .16, 32.",
        ),
    ],
    ids=["half", "other sizes"],
)
def test_a_clip_that_is_not_whole_judges_nothing(
    world: Path, tmp_path: Path, damage: Callable[[str, Tensor], Tensor | None], message: str
) -> None:
    """Its random weights would give numbers, too."""
    shutil.copytree(world / "clip", tmp_path / "clip")
    (path,) = (tmp_path / "clip").glob("*.safetensors")
    damaged = {name: damage(name, tensor) for name, tensor in load_file(path).items()}
    save_file({name: tensor.contiguous() for name, tensor in damaged.items() if tensor is not None}, path)
    with pytest.raises(ConfigError, match=f"metrics.clip: .*not the weights of this CLIPModel: .*{message}"):
        ClipJudge(tmp_path / "clip")


def test_clip_embeds_as_transformers_does(world: Path) -> None:
    import torch
    import transformers

    model = transformers.CLIPModel.from_pretrained(world / "clip").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(world / "clip")
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = torch.tensor((picture / 255 - mean) / std).permute(2, 0, 1)[None].float()
    tokens = tokenizer(["a photo of a man"], return_tensors="pt")
    with torch.no_grad():
        whole = model(pixel_values=pixels, **tokens)
    clip = ClipJudge(world / "clip")
    assert whole.image_embeds[0].numpy() @ clip.of_picture(picture) == pytest.approx(1, abs=1e-5)
    assert whole.text_embeds[0].numpy() @ clip.of_text("a photo of a man") == pytest.approx(1, abs=1e-5)


def test_a_torch_network_as_second_recogniser(world: Path, tmp_path: Path) -> None:
    network = IResNet((1, 1, 1, 1))
    recipe.fill(network, 0, "iresnet.")
    save_iresnet(network, tmp_path / "face.safetensors")
    metrics = {"second": str(tmp_path / "face.safetensors"), "clip": ""}
    observer = Observer(configure(world, tmp_path, metrics=metrics, expression={"path": ""}), "cpu")
    observation = observer.observe(synthesize(128, 128, [LARGE]))
    assert observation.second is not None
    assert observation.second.shape == (512,)
    assert observation.expression is observation.clip is None


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"metrics": {"second": "{world}/package"}}, ConfigError, "same recogniser as that of metrics.faces"),
        ({"metrics": {"second": "{world}/nothing.pth"}}, RecognizerError, "not found"),
        ({"metrics": {"clip": "{world}/package"}}, ConfigError, "no folder of a transformers CLIPModel"),
        ({"expression": {"path": "{world}/nothing.onnx"}}, ConfigError, "no such file"),
        (
            {"expression": {"path": "{world}/clip/config.json"}},
            ConfigError,
            "cannot be opened as an ONNX model",
        ),
        ({"expression": {"size": 64}}, ConfigError, "does not take a picture of expression.size 64"),
        ({"expression": {"classes": list("abcde")}}, ConfigError, "names 5 classes, but .* gives 4 scores"),
    ],
)
def test_judges_that_cannot_be_used(
    world: Path, tmp_path: Path, sections: dict[str, dict[str, Any]], error: type[Exception], message: str
) -> None:
    filled = {
        name: {
            key: value.replace("{world}", str(world)) if isinstance(value, str) else value
            for key, value in values.items()
        }
        for name, values in sections.items()
    }
    if "metrics" not in filled or "clip" not in filled["metrics"]:
        filled.setdefault("metrics", {})["clip"] = ""
    with pytest.raises(error, match=message):
        Observer(configure(world, tmp_path, **filled), "cpu")


def test_more_people_are_added_to_those_there_were(world: Path) -> None:
    index = index_of(world)
    chosen = [
        choose_people(index, configure(world, world, data={"identities": n}).data, lambda photo: True)
        for n in (2, 3)
    ]
    assert [p.name for p in chosen[1]][:2] == [p.name for p in chosen[0]]
    assert all(len(p.references) == 2 and p.other is not None for p in chosen[1])
    (person, *_) = chosen[0]
    assert {photo.row.identity for photo in (*person.references, person.other) if photo} == {person.name}
    more = choose_people(
        index, configure(world, world, data={"identities": 2, "references": 3}).data, lambda photo: True
    )
    assert more[0].references[:2] == person.references
    assert more[0].other is None


def test_photos_without_a_face_for_the_judges_are_left_out(world: Path) -> None:
    index, settings = index_of(world), configure(world, world).data
    bad = {row.sha256 for row in index.rows if row.source.endswith("/1.png")}
    chosen = choose_people(index, settings, lambda photo: photo.row.sha256 not in bad)
    assert all(p.other is None for p in chosen)
    assert not {photo.row.sha256 for p in chosen for photo in p.references} & bad
    with pytest.raises(
        ConfigError, match="nobody of 3 people in the split 'test' .* has 2 photos with a face"
    ):
        choose_people(index, settings, lambda photo: False)
    with pytest.raises(ConfigError, match="nobody of 0 people in the split 'train'"):
        choose_people(index, configure(world, world, data={"split": "train"}).data, lambda photo: True)
