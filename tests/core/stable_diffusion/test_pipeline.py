"""Pictures outside ComfyUI: who is in them, how strongly, at which step; features of photos; the grids of a run.

That they are ComfyUI's pictures is tested in `tests/e2e`. Longer than 450 lines, because all its tests share the parts of one tiny
training, which take seconds to make.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from idadapter_core.adapter import Adapter
from idadapter_core.data.references import features_of
from idadapter_core.errors import InputError, MismatchError
from idadapter_core.faces.detector import open_analyzer
from idadapter_core.faces.features import extract_features
from idadapter_core.schedule import RescaleSchedule
from idadapter_core.stable_diffusion.inject.text import insert_tokens
from idadapter_core.stable_diffusion.pipeline import ImageRequest, Pipeline, Strengths, to_levels
from idadapter_core.stable_diffusion.text import LENGTH
from idadapter_core.training.bundle import Bundle
from idadapter_core.training.config import RunConfig
from idadapter_core.training.grids import sample_grid
from idadapter_core.training.parts import Parts, load_parts, prepare_adapter
from idadapter_core.types import FaceFeatures, Identity, Mix
from tests.tiny.acting import acting
from tests.tiny.diffusers_unet import traces
from tests.tiny.toy import Toy

KINDS: dict[str, dict[str, Any]] = {
    "idadapter": {"settings": {"mixer_depth": 1}},
    "zeros": {"settings": {"mixer_depth": 1, "unconditional": "zeros"}},
    "uniid": {"method": "uniid", "settings": {"adapter_depth": 1}},
    "uniid text": {"method": "uniid", "branch": "text", "settings": {"text_depth": 1}},
}
PROMPT = "a photo of a man"
STEPS = 3


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def configs(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    folder = tmp_path_factory.mktemp("run")
    return {name: toy.config(folder, adapter=section) for name, section in KINDS.items()}


@pytest.fixture(scope="module")
def parts(configs: dict[str, RunConfig]) -> Parts:
    return load_parts(configs["idadapter"])


@pytest.fixture(scope="module")
def adapters(parts: Parts, configs: dict[str, RunConfig]) -> dict[str, Adapter]:
    return {name: acting(prepare_adapter(config, parts)) for name, config in configs.items()}


@pytest.fixture(scope="module")
def identities(parts: Parts, adapters: dict[str, Adapter]) -> dict[str, Identity]:
    features = features_of(parts.index, parts.train_rows[:2], parts.networks, parts.recognizer_digest, "cpu")
    return {name: adapter.encode(features) for name, adapter in adapters.items()}


def draw(
    parts: Parts, adapter: Adapter | None, identity: Identity | None = None, **settings: Any
) -> tuple[Tensor, list[dict[str, Any]]]:
    """A picture, and for each call of the UNet the text it read, and the adapter's setting."""
    pipeline = Pipeline(parts.base, adapter)
    calls: list[dict[str, Any]] = []

    def note(unet: Any, args: Any, kwargs: Any) -> None:
        setting = None if pipeline.injected is None else pipeline.injected.setting
        calls.append({"states": kwargs["encoder_hidden_states"], "setting": setting})

    handle = parts.base.unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        given = {"prompt": PROMPT, "steps": STEPS, "cfg": 3.0, "width": 64, "height": 64, **settings}
        return pipeline.generate(identity=identity, **given), calls
    finally:
        handle.remove()
        pipeline.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_images_of_a_batch_are_those_generated_one_by_one(
    kind: str, cfg: float, parts: Parts, adapters: dict[str, Adapter]
) -> None:
    """Several people, prompts and seeds at once; rescaled where the method can be."""
    adapter = adapters[kind]
    people = [adapter.encode(_features(parts, number, 1)) for number in range(3)]
    strengths = Strengths(0.7) if adapter.kind.name == "idadapter" else Strengths(0.7, 1.0, RescaleSchedule())
    requests = [
        ImageRequest(text, person, seed)
        for text, person, seed in zip(("a cat", PROMPT, "a photo"), people, (4, 5, 4), strict=True)
    ]
    settings = {"steps": STEPS, "cfg": cfg, "width": 64, "height": 64, "strengths": strengths}
    with contextlib.closing(Pipeline(parts.base, adapter)) as pipeline:
        together = pipeline.generate_batch(requests, **settings)
        for request, picture in zip(requests, together, strict=True):
            alone = pipeline.generate(
                request.prompt, identity=request.identity, seed=request.seed, **settings
            )
            assert gap(picture, alone) < 5e-4
        swapped = pipeline.generate(PROMPT, identity=people[0], seed=5, **settings)
        assert gap(swapped, together[1]) > 2e-3, "the people look alike"


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_in_half_precision_draw_nearly_the_same(
    kind: str, parts: Parts, adapters: dict[str, Adapter], identities: dict[str, Identity]
) -> None:
    """As in an exported file; the base is in single precision."""
    halved = copy.deepcopy(adapters[kind])
    halved.layers.half()
    whole, plain = draw(parts, adapters[kind], identities[kind])[0], draw(parts, None)[0]
    assert gap(draw(parts, halved, identities[kind])[0], whole) < 0.1 * gap(plain, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_in_bfloat16_draws_nearly_the_same(
    kind: str, parts: Parts, adapters: dict[str, Adapter], identities: dict[str, Identity]
) -> None:
    """Whether the adapter's file is in half or in single precision."""
    whole, plain = draw(parts, adapters[kind], identities[kind])[0], draw(parts, None)[0]
    rough = copy.deepcopy(parts)
    rough.base.unet.to(torch.bfloat16)
    for dtype in (torch.float16, torch.float32):
        adapter = copy.deepcopy(adapters[kind])
        adapter.layers.to(dtype)
        assert gap(draw(rough, adapter, identities[kind])[0], whole) < 0.5 * gap(plain, whole)


def test_batches_that_cannot_be(parts: Parts, adapters: dict[str, Adapter]) -> None:
    adapter, other = adapters["idadapter"], adapters["zeros"]
    both = _features(parts, 0, 2)
    equal, unequal = (adapter.encode(both, Mix(weights=weights)) for weights in ((1.0, 1.0), (1.0, 0.2)))
    single = adapter.encode(_features(parts, 0, 1))
    cases: list[tuple[list[Identity | None], str]] = [
        ([], "requests is empty"),
        ([equal, None], "some images of a batch have an identity and others have none"),
        ([equal, unequal], "different numbers or weights of photos; generate their images apart"),
        ([equal, single], "different numbers or weights of photos; generate their images apart"),
    ]
    with contextlib.closing(Pipeline(parts.base, adapter)) as pipeline:
        for identities, message in cases:
            with pytest.raises(InputError, match=message):
                pipeline.generate_batch([ImageRequest(PROMPT, identity) for identity in identities])
        with pytest.raises(MismatchError):
            pipeline.generate_batch([ImageRequest(PROMPT, equal), ImageRequest(PROMPT, other.encode(both))])


def _features(parts: Parts, first: int, count: int) -> FaceFeatures:
    rows = parts.train_rows[first : first + count]
    return features_of(parts.index, rows, parts.networks, parts.recognizer_digest, "cpu")


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.fixture(scope="module")
def plain(parts: Parts) -> Tensor:
    """The picture of the base alone."""
    return draw(parts, None)[0]


# ------------------------------------------------------------------------------------------------ nobody


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_identity_it_is_the_base(
    parts: Parts, adapters: dict[str, Adapter], identities: dict[str, Identity], plain: Tensor, kind: str
) -> None:
    """Even with an adapter in the UNet; and an identity that does not act is none."""
    assert plain.shape == (3, 64, 64)
    assert 0 <= plain.min() < plain.max() <= 1
    assert gap(draw(parts, adapters[kind])[0], plain) == 0
    nothing = Strengths(adapter=0.0, text=0.0)
    assert gap(draw(parts, adapters[kind], identities[kind], strengths=nothing)[0], plain) == 0
    assert gap(draw(parts, adapters[kind], identities[kind])[0], plain) > 0.01


def test_the_same_seed_gives_the_same_picture(
    parts: Parts, adapters: dict[str, Adapter], identities: dict[str, Identity]
) -> None:
    pictures = [draw(parts, adapters["uniid"], identities["uniid"], seed=seed)[0] for seed in (1, 1, 2)]
    assert gap(pictures[0], pictures[1]) == 0
    assert gap(pictures[0], pictures[2]) > 0.01


def test_the_unet_is_left_as_it_was(parts: Parts, adapters: dict[str, Adapter]) -> None:
    """By a pipeline that put the adapter in. One that found it there leaves it there."""
    before = traces(parts.base.unet)
    owner = Pipeline(parts.base, adapters["uniid"])
    guest = Pipeline(parts.base, adapters["uniid"], owner.injected)
    during = traces(parts.base.unet)
    assert during != before
    guest.close()
    assert traces(parts.base.unet) == during
    owner.close()
    assert traces(parts.base.unet) == before


# ------------------------------------------------------------------------------------------------ somebody


@pytest.mark.parametrize("kind", KINDS)
def test_without_guidance_there_is_one_row(
    parts: Parts, adapters: dict[str, Adapter], identities: dict[str, Identity], kind: str
) -> None:
    pictures = []
    for negative in ("", "a cat"):
        picture, calls = draw(parts, adapters[kind], identities[kind], cfg=1.0, negative=negative)
        assert [len(call["states"]) for call in calls] == [1] * STEPS
        pictures.append(picture)
    assert gap(*pictures) == 0
    assert gap(pictures[0], draw(parts, None, cfg=1.0)[0]) > 0.01


def test_idadapter_in_the_rows(
    parts: Parts, adapters: dict[str, Adapter], identities: dict[str, Identity]
) -> None:
    """The negative row skips the gates and has an ordinary prompt; the positive one has E_r and the word."""
    identity = identities["idadapter"]
    _, calls = draw(
        parts, adapters["idadapter"], identity, strengths=Strengths(adapter=0.6), negative="a cat"
    )
    text = parts.base.text
    word = text.encode(["a photo of a man, man is sks"], identity.text_tokens).states
    assert identity.class_word == "man"
    for call in calls:
        assert gap(call["states"], torch.cat([text.encode(["a cat"]).states, word])) < 1e-5
        (group,) = call["setting"].groups
        assert group.kept.tolist() == [1]
        assert call["setting"].strength == 0.6
        assert torch.equal(group.tokens, identity.adapter_tokens)
    _, calls = draw(parts, adapters["idadapter"], identity, strengths=Strengths(text=0.0))
    assert gap(calls[0]["states"], text.encode(["", PROMPT]).states) < 1e-5


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a <class word> of a cat", "a man of a cat, man is sks"),
        ("sks of a cat", "sks of a cat"),
        ("desks of a cat.", "desks of a cat, man is sks"),
    ],
)
def test_the_identity_word(
    parts: Parts,
    adapters: dict[str, Adapter],
    identities: dict[str, Identity],
    prompt: str,
    expected: str,
) -> None:
    """Is added where it is missing, as ID Prompt does."""
    identity = identities["idadapter"]
    _, calls = draw(parts, adapters["idadapter"], identity, prompt=prompt, steps=1)
    assert gap(calls[0]["states"][1:], parts.base.text.encode([expected], identity.text_tokens).states) < 1e-5


def test_idadapter_with_tokens_for_negative_rows(parts: Parts, adapters: dict[str, Adapter]) -> None:
    """One photo of the two that it was trained with is as good as that photo twice, in the negative rows, too."""
    adapter = adapters["zeros"]
    features = features_of(parts.index, parts.train_rows[:1], parts.networks, parts.recognizer_digest, "cpu")
    once, twice = adapter.encode(features), adapter.encode(features.pick([0, 0]))
    assert once.adapter_bias is not None
    assert once.adapter_tokens.shape != twice.adapter_tokens.shape  # type: ignore[union-attr]
    pictures = [draw(parts, adapter, identity)[0] for identity in (once, twice)]
    assert gap(*pictures) < 1e-4
    (_, calls) = draw(parts, adapter, twice)
    shown, zeroed = calls[0]["setting"].groups
    assert (shown.kept.tolist(), zeroed.kept.tolist()) == ([1], [0])
    assert torch.equal(zeroed.tokens, twice.adapter_tokens_uncond)  # type: ignore[arg-type]
    stranger = features_of(parts.index, parts.test_rows[:1], parts.networks, parts.recognizer_digest, "cpu")
    assert gap(draw(parts, adapter, adapter.encode(stranger))[0], pictures[0]) > 1e-3


def test_uniid_in_the_rows(
    parts: Parts, adapters: dict[str, Adapter], identities: dict[str, Identity]
) -> None:
    """Tokens of zeroed features in the negative row. Text tokens at a name's length, in the positive row alone."""
    identity = identities["uniid"]
    _, calls = draw(parts, adapters["uniid"], identity, strengths=Strengths(adapter=0.6))
    for call in calls:
        shown, zeroed = call["setting"].groups
        assert (shown.kept.tolist(), zeroed.kept.tolist()) == ([1], [0])
        assert torch.equal(shown.tokens, identity.adapter_tokens)  # type: ignore[arg-type]
        assert torch.equal(zeroed.tokens, identity.adapter_tokens_uncond)  # type: ignore[arg-type]
        assert call["setting"].strength == 0.6
        assert not call["setting"].rescale
    identity = identities["uniid text"]
    _, calls = draw(parts, adapters["uniid text"], identity, strengths=Strengths(text=0.5))
    norms = parts.base.text.reference_norms(3)["l"]
    for call in calls:
        assert call["setting"] is None
        assert call["states"][1, 1:4].norm(dim=-1).tolist() == pytest.approx((0.5 * norms).tolist(), rel=1e-4)
        directions = identity.text_tokens["l"][0] / identity.text_tokens["l"][0].norm(dim=-1, keepdim=True)
        assert gap(call["states"][1, 1:4], directions * norms[:, None] * 0.5) < 1e-4
        own = parts.base.text.encode([PROMPT]).states[0]
        assert gap(call["states"][1, 4:], own[1:-3]) < 1e-5
        assert gap(call["states"][0], parts.base.text.encode([""]).states[0]) < 1e-5


def test_uniid_rescaling_acts_step_by_step(
    parts: Parts, adapters: dict[str, Adapter], identities: dict[str, Identity]
) -> None:
    """Each step has its own scales, which weight and token weight multiply."""
    schedule = RescaleSchedule(0.5, 1.5, 0.0, 2.0, early_fraction=0.5)
    _, calls = draw(
        parts,
        adapters["uniid"],
        identities["uniid"],
        steps=4,
        strengths=Strengths(adapter=0.8, rescale=schedule),
    )
    assert [call["setting"].strength for call in calls] == pytest.approx([0.4, 0.4, 1.2, 1.2])
    assert all(call["setting"].rescale for call in calls)
    _, calls = draw(
        parts,
        adapters["uniid text"],
        identities["uniid text"],
        steps=4,
        strengths=Strengths(text=0.7, rescale=schedule),
    )
    norms = parts.base.text.reference_norms(3)["l"]
    plain = parts.base.text.encode([PROMPT]).states
    # A scale of 0 leaves the tokens their places, as the nodes do.
    assert gap(calls[0]["states"][1:], insert_tokens(plain, torch.zeros(1, 3, 64))) < 1e-5
    for call in calls[2:]:
        assert call["states"][1, 1:4].norm(dim=-1).tolist() == pytest.approx((1.4 * norms).tolist(), rel=1e-4)


def test_both_branches_of_uniid_together(
    parts: Parts, adapters: dict[str, Adapter], identities: dict[str, Identity], tmp_path: Path
) -> None:
    """Each adds to the other: four different pictures."""
    from idadapter_core.adapter import load_adapter, save_adapter

    for name in ("uniid", "uniid text"):
        save_adapter(adapters[name], tmp_path / f"{name}.safetensors")
    adapter = load_adapter(tmp_path / "uniid.safetensors", tmp_path / "uniid text.safetensors")
    features = features_of(parts.index, parts.train_rows[:1], parts.networks, parts.recognizer_digest, "cpu")
    identity = adapter.encode(features)
    pictures = [
        draw(parts, adapter, identity, strengths=Strengths(adapter=a, text=t))[0]
        for a, t in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
    ]
    for number, one in enumerate(pictures):
        assert all(gap(one, other) > 0.005 for other in pictures[:number])


def test_refusals(parts: Parts, adapters: dict[str, Adapter], identities: dict[str, Identity]) -> None:
    with pytest.raises(InputError, match="no adapter"):
        draw(parts, None, identities["uniid"])
    with pytest.raises(MismatchError, match="another adapter"):
        draw(parts, adapters["idadapter"], identities["uniid"])
    for wrong in (Strengths(text=0.5), Strengths(rescale=RescaleSchedule())):
        with pytest.raises(InputError, match="text 0 or 1 and without rescaling"):
            draw(parts, adapters["idadapter"], identities["idadapter"], strengths=wrong)
    long = " ".join(["man"] * (LENGTH - 4))
    draw(parts, None, prompt=long, steps=1)
    with pytest.raises(InputError, match="too long for 3 identity tokens"):
        draw(parts, adapters["uniid text"], identities["uniid text"], prompt=long)


# ------------------------------------------------------------------------------------------------ features and grids


def test_features_are_those_of_the_face_nodes(toy: Toy, parts: Parts) -> None:
    """Found, aligned and recognised anew: crops, embeddings, stages, facts about the faces."""
    rows = parts.train_rows[3:6]
    analyzer = open_analyzer(toy.folder / "package", "cpu")
    photos = [parts.index.load(row) for row in rows]
    expected = extract_features(photos, analyzer, parts.networks.recognizer).features
    found = features_of(parts.index, rows, parts.networks, parts.recognizer_digest, "cpu")
    assert found.recognizer == parts.recognizer_digest
    assert found.crops is not None
    assert expected.crops is not None
    assert torch.equal(found.crops, expected.crops)
    assert gap(found.embedding, expected.embedding) < 1e-4
    assert len(found.stages) == 4
    assert all(gap(*pair) < 1e-4 for pair in zip(found.stages, expected.stages, strict=True))
    assert found.class_word == expected.class_word != ""
    for one, other in zip(found.faces, expected.faces, strict=True):
        assert (one.box, one.landmarks, one.score, one.sex) == (
            other.box,
            other.landmarks,
            other.score,
            other.sex,
        )
    assert found.patch_tokens is not None
    assert found.patch_tokens.shape == (3, 16, 64)


@pytest.mark.parametrize("kind", ["idadapter", "uniid", "uniid text"])
def test_grids(toy: Toy, parts: Parts, adapters: dict[str, Adapter], tmp_path: Path, kind: str) -> None:
    """A row for each test person with a face and the pictures, and one of the base alone; the same ones each time."""
    output = {"sample_people": 2, "sample_steps": 2, "sample_cfg": 2.0, "prompts": [PROMPT, "a <class word>"]}
    config = toy.config(tmp_path, adapter=KINDS[kind], output=output)
    bundle = Bundle(parts.base, adapters[kind], parts.networks, config)
    try:
        grid = sample_grid(bundle, adapters[kind], parts, config, tmp_path, 7)
        again = sample_grid(bundle, adapters[kind], parts, config, tmp_path, 8)
        people = dataclasses.replace(parts, test_rows=[])
        of_training = sample_grid(bundle, adapters[kind], people, config, tmp_path, 9)
    finally:
        if bundle.injected is not None:
            bundle.injected.eject()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples" / "step-00000007.png")), grid)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"step-0000000{number}.png" for number in (7, 8, 9)
    ]
    assert np.array_equal(grid, again)
    # There is one test person, but two of training: a row more, pictures of 64 pixels under a name.
    row = of_training.shape[0] - grid.shape[0]
    titles = grid.shape[0] + 4 - 2 * row
    assert grid.shape[1] == of_training.shape[1] == 3 * 64 + 8
    assert row > 68 + 8
    for column in range(3):
        assert grid[:titles, column * 68 : column * 68 + 64].min() < 64, "a column has no title"
    names = [grid[titles + n * row : titles + (n + 1) * row - 68] for n in range(2)]
    assert all(name.min() < 64 for name in names)
    assert not np.array_equal(*names)
    first, base = (titles + (n + 1) * row - 68 for n in range(2))
    alone, _ = draw(parts, None, steps=2, cfg=2.0)
    levels = (alone.movedim(0, -1) * 255).round().byte().numpy()
    assert np.array_equal(grid[base : base + 64, 68:132], levels)
    assert (grid[base:, :64] == 255).all()
    assert np.abs(grid[first : first + 64, 68:132].astype(int) - levels).max() > 3
    crop = features_of(parts.index, parts.test_rows[:1], parts.networks, "", "cpu").crops
    assert crop is not None
    face = np.asarray(
        Image.fromarray(((crop[0].movedim(0, -1) + 1) * 127.5).round().byte().numpy()).resize((64, 64))
    )
    assert np.abs(grid[first : first + 64, :64].astype(int) - face).mean() < 5


def test_a_grid_stands_whatever_is_in_it(
    toy: Toy,
    parts: Parts,
    adapters: dict[str, Adapter],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Pictures that are not finite, names in other scripts, words wider than their column: none of it ends a training."""
    nothing = torch.full((3, 64, 64), torch.nan)
    monkeypatch.setattr(Pipeline, "generate", lambda *args, **settings: nothing)
    person = [dataclasses.replace(row, identity="\u5f20\u4f1f Zo\u00eb") for row in parts.test_rows]
    prompts = ["x" * 60, " ".join(["word"] * 40), ""]
    config = toy.config(tmp_path, adapter=KINDS["idadapter"], output={"prompts": prompts, "sample_people": 1})
    bundle = Bundle(parts.base, adapters["idadapter"], parts.networks, config)
    try:
        grid = sample_grid(
            bundle, adapters["idadapter"], dataclasses.replace(parts, test_rows=person), config, tmp_path, 1
        )
    finally:
        if bundle.injected is not None:
            bundle.injected.eject()
    assert "not finite" in caplog.text
    assert "bf16" not in caplog.text  # which is not in use
    with pytest.raises(InputError, match='set sampling.precision = "no", for this model may not stand bf16'):
        to_levels(nothing, "bf16", "sampling.precision")
    assert grid.shape[1] == 4 * 64 + 12
    head = grid[: grid.shape[0] // 4]
    assert (head[:, 132:136] == 255).all(), "a title reaches into the next column"
    assert (grid[-64:] == 255).all()
