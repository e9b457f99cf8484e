"""A step's forward pass: what acts where, that it is what acts at inference, and the two losses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idadapter_core.adapter import Adapter
from idadapter_core.data.references import Photo, features_of, photo_tensors
from idadapter_core.faces.align import TEMPLATE
from idadapter_core.mechanisms.text import with_identity_clause
from idadapter_core.stable_diffusion.inject import inject
from idadapter_core.stable_diffusion.inject.text import insert_tokens
from idadapter_core.stable_diffusion.text import LENGTH
from idadapter_core.stable_diffusion.vae import load_autoencoder
from idadapter_core.training import bundle as bundles
from idadapter_core.training.adapters import trainable
from idadapter_core.training.bundle import Bundle, decode_face
from idadapter_core.training.config import RunConfig
from idadapter_core.training.identity_loss import align_faces, identity_cosines
from idadapter_core.training.parts import Parts, load_parts, prepare_adapter
from idadapter_core.training.samples import Batch, Samples, join
from tests.golden import recipe
from tests.tiny.acting import acting
from tests.tiny.bases import diffusers_base
from tests.tiny.face_package import MarkedFace, synthesize
from tests.tiny.toy import Toy

KINDS: dict[str, dict[str, Any]] = {
    "idadapter": {"adapter": {"settings": {"mixer_depth": 1}}},
    "zeros": {"adapter": {"settings": {"mixer_depth": 1, "unconditional": "zeros"}}},
    "uniid": {"adapter": {"method": "uniid", "settings": {"adapter_depth": 1}}},
    "uniid text": {"adapter": {"method": "uniid", "branch": "text", "settings": {"text_depth": 1}}},
}
ROWS = (0, 5, 9, 14)  # one photo of each person
TIMESTEPS = (5, 600, 250, 100)
KEPT = (True, True, True, False)
POINTS = torch.tensor(TEMPLATE, dtype=torch.float32)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Of all runs here: what they load differs in nothing but the detector, which is there."""
    loss = {"gate": "detector"}
    return load_parts(toy.config(tmp_path_factory.mktemp("run"), loss=loss))


@pytest.fixture(scope="module")
def configs(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    folder = tmp_path_factory.mktemp("run")
    off = {"loss": {"identity": 0.0}}
    return {name: toy.config(folder, **off, **sections) for name, sections in KINDS.items()}


@pytest.fixture(scope="module")
def batch(parts: Parts, configs: dict[str, RunConfig]) -> Batch:
    """Four photos of four people with the features for IDAdapter; the identity of the last one is dropped."""
    return batch_of(parts, configs["idadapter"])


@pytest.fixture(scope="module")
def faces(parts: Parts, configs: dict[str, RunConfig]) -> Batch:
    """The same photos with the features for UniID."""
    return batch_of(parts, configs["uniid"])


def batch_of(parts: Parts, config: RunConfig) -> Batch:
    vision = parts.networks.vision
    assert vision is not None
    samples = Samples(parts.index, parts.train_rows, config, 1000, None, vision.preprocess)
    drawn = join([samples.sample(0, number) for number in ROWS])
    return completed(
        parts,
        config,
        dataclasses.replace(
            drawn,
            timesteps=torch.tensor(TIMESTEPS),
            identity=torch.tensor(KEPT),
            prompts=("a photo of a man", "a cat", "", "a photo of a man"),
        ),
    )


def completed(parts: Parts, config: RunConfig, batch: Batch) -> Batch:
    """With latents and features, so that no test computes them again."""
    assert batch.pictures is not None
    with running(parts, config, fresh(parts, config)) as bundle:
        moments = parts.base.vae.moments(batch.pictures)
        return dataclasses.replace(bundle.complete(batch), moments=moments)


def fresh(parts: Parts, config: RunConfig) -> Adapter:
    return prepare_adapter(config, parts)


def opened(parts: Parts, config: RunConfig) -> Adapter:
    """One that acts, with gradients."""
    adapter = acting(fresh(parts, config))
    trainable(adapter)
    return adapter


@contextmanager
def running(parts: Parts, config: RunConfig, adapter: Adapter) -> Iterator[Bundle]:
    bundle = Bundle(parts.base, adapter, parts.networks, config)
    try:
        yield bundle
    finally:
        if bundle.injected is not None:
            bundle.injected.eject()


@dataclasses.dataclass
class Call:
    """What the UNet was called with and what it gave."""

    noisy: Tensor
    states: Tensor
    more: dict[str, Any]
    prediction: Tensor


def passed(parts: Parts, bundle: Bundle, batch: Batch) -> tuple[dict[str, Tensor], Call]:
    """Losses of a batch, and the call of the UNet behind them."""
    calls: list[Call] = []

    def note(unet: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(Call(args[0], kwargs["encoder_hidden_states"], kwargs, output.sample))

    handle = parts.base.unet.register_forward_hook(note, with_kwargs=True)
    try:
        losses = bundle(batch)
    finally:
        handle.remove()
    (call,) = calls
    return losses, call


@torch.no_grad()
def alone(unet: Any, call: Call, states: Tensor | None = None) -> Tensor:
    """What another UNet gives for the same latents and timesteps."""
    given = {"encoder_hidden_states": call.states if states is None else states}
    given["added_cond_kwargs"] = call.more.get("added_cond_kwargs")
    prediction: Tensor = unet(call.noisy, torch.tensor(TIMESTEPS), **given).sample
    return prediction


def features(parts: Parts, *numbers: int) -> Any:
    rows = [parts.train_rows[number] for number in numbers]
    return features_of(parts.index, rows, parts.networks, parts.recognizer_digest, "cpu")


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


# ------------------------------------------------------------------------------------------------ who is in the picture


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_fresh_adapter_is_the_base(
    parts: Parts, configs: dict[str, RunConfig], batch: Batch, faces: Batch, kind: str
) -> None:
    """In the UNet. In the text the identity is there from the start, where the method has it."""
    given = faces if "uniid" in kind else batch
    with running(parts, configs[kind], fresh(parts, configs[kind])) as bundle:
        losses, call = passed(parts, bundle, given)
        with_adapter, base = bundle.measure(given)
    plain = parts.base.text.encode(list(given.prompts)).states
    assert gap(call.prediction, alone(parts.base.unet, call)) < 1e-5
    same_text = [gap(row, own) < 1e-5 for row, own in zip(call.states, plain, strict=True)]
    expected = {"uniid": [True] * 4, "uniid text": [False] * 4}
    assert same_text == expected.get(kind, [not keep for keep in KEPT])
    target = given.noise
    assert torch.allclose(losses["mse"], (call.prediction - target).square().mean((1, 2, 3)))
    assert torch.allclose(with_adapter, losses["mse"])
    expected_base = (alone(parts.base.unet, call, plain) - target).square().mean((1, 2, 3))
    assert torch.allclose(base, expected_base, atol=1e-6)


@torch.no_grad()
def test_idadapter_where_the_identity_is_dropped(
    parts: Parts, configs: dict[str, RunConfig], batch: Batch
) -> None:
    """Exactly the UNet with the trained K/V weights: no gates, no word."""
    adapter = opened(parts, configs["idadapter"])
    merged = copy.deepcopy(parts.base.unet)
    for name, module in merged.named_modules():
        if name.endswith(".attn2"):
            site = next(s for s in _sites(merged) if s.diffusers_module == name)
            delta = adapter.layers.deltas[str(site.index)]
            module.to_k.weight.add_(delta.to_k.weight)
            module.to_v.weight.add_(delta.to_v.weight)
    with running(parts, configs["idadapter"], adapter) as bundle:
        _, call = passed(parts, bundle, batch)
        _, base = bundle.measure(batch)
    plain = parts.base.text.encode(list(batch.prompts)).states
    expected = alone(merged, call, plain)
    assert gap(call.prediction[3], expected[3]) < 1e-4
    assert min(gap(call.prediction[row], expected[row]) for row in range(3)) > 0.01
    untouched = alone(parts.base.unet, call, plain)
    assert gap(untouched, expected) > 0.01
    assert torch.allclose(base, (untouched - batch.noise).square().mean((1, 2, 3)), atol=1e-5)


def _sites(unet: Any) -> Any:
    from idadapter_core.sites import attention_sites

    return attention_sites(unet.state_dict())


@pytest.mark.parametrize("kind", ["uniid", "zeros"])
@torch.no_grad()
def test_tokens_of_zeroed_features_where_the_identity_is_dropped(
    parts: Parts, configs: dict[str, RunConfig], batch: Batch, faces: Batch, kind: str
) -> None:
    """Those that negative prompts have at inference."""
    adapter = opened(parts, configs[kind])
    given = faces if kind == "uniid" else batch
    with running(parts, configs[kind], adapter) as bundle:
        _, call = passed(parts, bundle, given)
    identity = adapter.encode(features(parts, 0))
    assert identity.adapter_tokens_uncond is not None
    states = parts.base.text.encode(list(given.prompts)).states
    with inject(parts.base.unet, adapter) as injected, injected.identity(identity.adapter_tokens_uncond):
        expected = alone(parts.base.unet, call, states)
    assert gap(call.prediction[3], expected[3]) < 1e-4
    assert min(gap(call.prediction[row], expected[row]) for row in range(3)) > 0.01
    assert gap(expected, alone(parts.base.unet, call, states)) > 0.01


@torch.no_grad()
def test_uniid_text_tokens_of_zeroed_features(
    parts: Parts, configs: dict[str, RunConfig], faces: Batch
) -> None:
    adapter = opened(parts, configs["uniid text"])
    with running(parts, configs["uniid text"], adapter) as bundle:
        _, call = passed(parts, bundle, faces)
    zeros = tuple(torch.zeros_like(stage[:1]) for stage in faces.stages)
    text, _ = adapter.encoder(torch.zeros(1, 512), zeros)
    plain = parts.base.text.encode(list(faces.prompts[3:])).states
    assert gap(call.states[3:], insert_tokens(plain, text["l"])) < 1e-5


# ------------------------------------------------------------------------------------------------ as at inference


@pytest.mark.parametrize("numbers", [(1, 2), (6, 6)])
@torch.no_grad()
def test_idadapter_learns_from_what_it_is_given_at_inference(
    parts: Parts, configs: dict[str, RunConfig], batch: Batch, numbers: tuple[int, int]
) -> None:
    """Of the same N photos: E_r and the identity word in the text."""
    config = configs["idadapter"]
    vision = parts.networks.vision
    assert vision is not None
    photos = [parts.train_rows[number] for number in numbers]
    tensors = [
        photo_tensors(parts.index.load(row), Photo(row), vision.preprocess) for row in (*photos, photos[0])
    ]
    given = dataclasses.replace(
        batch,
        crops=torch.stack([t["crops"] for t in tensors]).expand(4, -1, -1, -1, -1),
        heads=torch.stack([t["heads"] for t in tensors[:2]]).expand(4, -1, -1, -1, -1),
        embedding=None,
        patch_tokens=None,
        class_embedding=None,
        class_nouns=("woman",) * 4,
    )
    adapter = opened(parts, config)
    with running(parts, config, adapter) as bundle:
        _, call = passed(parts, bundle, given)
        assert bundle.injected is not None
        tokens = bundle.injected.setting.groups[0].tokens
    identity = adapter.encode(features(parts, *numbers))
    assert tokens is not None
    assert identity.adapter_tokens is not None
    assert identity.adapter_bias is None
    assert gap(tokens[0], identity.adapter_tokens[0]) < 1e-4
    prompts = ["a photo of a man, woman is sks", "a cat, woman is sks", "woman is sks"]
    expected = parts.base.text.encode(prompts, identity.text_tokens).states
    assert gap(call.states[:3], expected) < 1e-4
    stranger = adapter.encode(features(parts, 9, 10))
    assert gap(parts.base.text.encode(prompts, stranger.text_tokens).states, expected) > 0.01


@torch.no_grad()
def test_uniid_learns_from_what_it_is_given_at_inference(
    parts: Parts, configs: dict[str, RunConfig], faces: Batch
) -> None:
    """Adapter tokens; and text tokens right behind BOS, as long as they come out: rescaling is for inference."""
    for kind in ("uniid", "uniid text"):
        adapter = opened(parts, configs[kind])
        with running(parts, configs[kind], adapter) as bundle:
            _, call = passed(parts, bundle, faces)
            tokens = None if bundle.injected is None else bundle.injected.setting.groups[0].tokens
        plain = parts.base.text.encode(list(faces.prompts)).states
        for row, number in enumerate(ROWS[:3]):
            identity = adapter.encode(features(parts, number))
            if kind == "uniid":
                assert tokens is not None
                assert identity.adapter_tokens is not None
                assert gap(tokens[row], identity.adapter_tokens[0]) < 1e-4
                assert gap(call.states[row], plain[row]) < 1e-5
            else:
                assert tokens is None
                expected = insert_tokens(plain[row : row + 1], identity.text_tokens["l"])
                assert gap(call.states[row : row + 1], expected) < 1e-4
                assert gap(call.states[row], plain[row]) > 0.1


@torch.no_grad()
def test_a_caption_that_is_too_long_loses_its_end(
    parts: Parts, configs: dict[str, RunConfig], batch: Batch, faces: Batch
) -> None:
    """Not the identity clause, nor the run."""
    caption = "a photo of a man " * 40
    for kind, given in (("idadapter", batch), ("uniid text", faces)):
        adapter = opened(parts, configs[kind])
        with running(parts, configs[kind], adapter) as bundle:
            _, call = passed(parts, bundle, dataclasses.replace(given, prompts=(caption,) * 4))
        if kind == "idadapter":
            identity = bundle.encoder.word(given.class_embedding[0].mean(0, keepdim=True))  # type: ignore[index,operator,union-attr]
            noun = given.class_nouns[0]
            words = caption.split()
            fitting = [
                prompt
                for count in range(LENGTH)
                if parts.base.text.length(prompt := with_identity_clause(" ".join(words[:count]), noun))
                <= LENGTH - 2
            ]
            expected = parts.base.text.encode(fitting[-1:], identity).states
            assert len(fitting) > 10
        else:
            text, _ = adapter.encoder(given.embedding[:1, -1], tuple(s[:1] for s in given.stages))  # type: ignore[index]
            count = text["l"].shape[1]
            shorter = " ".join(caption.split()[: LENGTH - 2 - count])
            assert parts.base.text.length(shorter) == LENGTH - 2 - count
            expected = insert_tokens(parts.base.text.encode([shorter]).states, text["l"])
        assert gap(call.states[:1], expected) < 1e-4


def test_shortened_prompts(parts: Parts) -> None:
    text = parts.base.text
    assert text.shortened("a photo of a cat", 70) == "a photo of a cat"
    assert text.shortened("a photo of a cat", 71) == "a photo of a"
    assert text.shortened("a photo of a cat ", 75) == ""
    letters = "x" * 300  # no word to cut at
    assert text.shortened(letters, 5) == "x" * 70
    words = ["man", "of", "a", "catx,"] * 30  # the last one is three tokens
    for spare in range(6):
        short = text.shortened(" ".join(words), spare)
        count = len(short.split())
        assert short == " ".join(words[:count])
        assert text.length(short) <= LENGTH - 2 - spare < text.length(" ".join(words[: count + 1]))


@torch.no_grad()
def test_each_prompt_is_encoded_once(
    parts: Parts, configs: dict[str, RunConfig], faces: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode = parts.base.text.encode

    def note(prompts: Any, *args: Any) -> Any:
        encoded.extend(prompts)
        return encode(prompts, *args)

    monkeypatch.setattr(parts.base.text, "encode", note)
    with running(parts, configs["uniid"], fresh(parts, configs["uniid"])) as bundle:
        first = passed(parts, bundle, faces)[1].states
        assert sorted(encoded) == ["", "a cat", "a photo of a man"]
        assert gap(passed(parts, bundle, faces)[1].states, first) == 0
        assert len(encoded) == 3
        monkeypatch.setattr(bundles, "_KEPT_PROMPTS", 2)
        other = dataclasses.replace(faces, prompts=("a cat", "a man", "", "a photo of a man"))
        states = passed(parts, bundle, other)[1].states
        assert gap(states[[0, 2, 3]], first[[1, 2, 3]]) < 1e-5
        assert gap(states[1], first[1]) > 0.1


# ------------------------------------------------------------------------------------------------ the losses


def with_loss(config: RunConfig, **values: Any) -> RunConfig:
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, **values))


@torch.no_grad()
def test_the_loss_is_the_formula(parts: Parts, configs: dict[str, RunConfig], batch: Batch) -> None:
    """L = L_SD + lambda * F * (1 - cos) as a mean over all rows, F by noise level where the identity is not dropped."""
    config = with_loss(configs["idadapter"], identity=0.7)
    with running(parts, config, opened(parts, config)) as bundle:
        losses, call = passed(parts, bundle, batch)
    alpha = parts.base.schedule.alphas_cumprod[list(TIMESTEPS)].reshape(4, 1, 1, 1)
    assert (alpha.flatten() >= 0.5).tolist() == [True, False, True, True]
    clean = ((call.noisy - (1 - alpha).sqrt() * call.prediction) / alpha.sqrt()).clamp(-10, 10)
    assert losses["counts"].tolist() == [True, False, True, False]
    assert batch.embedding is not None
    aligned = [align_faces(*decode_face(parts.base.vae, clean[row], batch.landmarks[row])) for row in (0, 2)]
    cosines = identity_cosines(torch.cat(aligned), batch.embedding[[0, 2], -1], parts.networks.recognizer)
    assert losses["cosine"][[0, 2]].tolist() == pytest.approx(cosines.tolist(), abs=1e-3)
    assert losses["cosine"][[1, 3]].isnan().all()
    mse = (call.prediction - batch.noise).square().mean((1, 2, 3))
    assert torch.allclose(losses["mse"], mse)
    expected = mse.mean() + 0.7 * (1 - cosines).sum() / 4
    assert float(losses["loss"]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("identity", [0.0, 0.7])
@torch.no_grad()
def test_it_makes_no_difference_how_a_batch_is_divided(
    parts: Parts, configs: dict[str, RunConfig], batch: Batch, identity: float
) -> None:
    """The mean of the halves is the whole, also where L_id counts in one half alone."""
    config = with_loss(configs["idadapter"], identity=identity)
    with running(parts, config, opened(parts, config)) as bundle:
        whole = bundle(batch)["loss"]
        halves = [bundle(part(batch, rows))["loss"] for rows in ([0, 2], [1, 3])]
    assert float(sum(halves) / 2) == pytest.approx(float(whole), rel=1e-3)


def part(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch."""
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    chosen = {
        name: value[rows]
        if isinstance(value, Tensor)
        else tuple(stage[rows] for stage in value)
        if name == "stages"
        else tuple(value[row] for row in rows)
        for name, value in values.items()
        if value is not None
    }
    return Batch(**chosen)


@torch.no_grad()
def test_min_snr_weighs_the_denoising_error(
    parts: Parts, configs: dict[str, RunConfig], faces: Batch
) -> None:
    config = with_loss(configs["uniid"], snr_gamma=5.0)
    with running(parts, config, opened(parts, config)) as bundle:
        losses = bundle(faces)
    alpha = parts.base.schedule.alphas_cumprod[list(TIMESTEPS)]
    snr = alpha / (1 - alpha)
    assert (snr > 5).tolist() == [True, False, False, True]
    expected = (losses["mse"] * snr.clamp(max=5) / snr).mean()
    assert float(losses["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(expected) < 0.9 * float(losses["mse"].mean())


class Album:
    """A decoder that gives pictures of its own, a new one for each new latents, and lets a trace of the latents through."""

    factor, digest = 8, ""

    def __init__(self, *pictures: np.ndarray):
        stacked = np.stack(pictures).astype(np.float32)
        self.pictures = torch.from_numpy(stacked / 127.5 - 1).movedim(-1, 1)
        self.known: list[Tensor] = []

    def decode(self, latents: Tensor) -> Tensor:
        found = [number for number, known in enumerate(self.known) if torch.equal(known, latents)]
        if not found:
            found = [len(self.known)]
            self.known.append(latents.detach())
        return self.pictures[found] + 1e-4 * F.interpolate(latents[:, :3], scale_factor=8.0)


FACE = MarkedFace(34, 36, 16, roll=20)


WALL = synthesize(64, 64)


def showing(parts: Parts, *pictures: np.ndarray) -> Parts:
    """With a base that predicts these pictures."""
    return dataclasses.replace(parts, base=dataclasses.replace(parts.base, vae=Album(*pictures)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gate", "align", "counts"),
    [
        ("detector", "detector", [True, False, False, False]),
        ("detector", "target", [True, False, False, False]),
        ("noise", "detector", [True, False, True, False]),
    ],
)
def test_the_detector_as_gate_and_for_alignment(
    parts: Parts, configs: dict[str, RunConfig], batch: Batch, gate: str, align: str, counts: list[bool]
) -> None:
    """F is 1 where it finds a face. Where it finds none and noise decides, the target's landmarks serve."""
    config = with_loss(configs["idadapter"], identity=1.0, gate=gate, align=align)
    pictures = (synthesize(64, 64, [FACE]), WALL, WALL)
    album = showing(parts, *pictures)
    with running(album, config, opened(album, config)) as bundle:
        losses, _ = passed(album, bundle, batch)
    assert losses["counts"].tolist() == counts
    assert parts.networks.detector is not None
    found = torch.tensor(parts.networks.detector.detect(pictures[0])[0].landmarks)
    assert gap(found, torch.tensor(FACE.landmarks)) < 1.5
    target = batch.landmarks[0]
    assert gap(found, target) > 3

    def cosine(row: int, points: Tensor) -> float:
        assert batch.embedding is not None
        image = torch.from_numpy(pictures[row].astype(np.float32) / 127.5 - 1).movedim(-1, 0)
        face = align_faces(image[None], points[None])
        return float(identity_cosines(face, batch.embedding[row, -1:], parts.networks.recognizer))

    right, wrong = (found, target) if align == "detector" else (target, found)
    assert float(losses["cosine"][0]) == pytest.approx(cosine(0, right), abs=5e-3)
    assert abs(cosine(0, right) - cosine(0, wrong)) > 0.05
    if counts[2]:
        assert float(losses["cosine"][2]) == pytest.approx(cosine(2, batch.landmarks[2]), abs=5e-3)
    expected = losses["mse"].mean() + (1 - losses["cosine"][losses["counts"]]).sum() / 4
    assert float(losses["loss"].detach()) == pytest.approx(float(expected), rel=1e-4)


def test_no_face_at_all(parts: Parts, configs: dict[str, RunConfig], batch: Batch) -> None:
    """No L_id, but a loss that can be differentiated."""
    config = with_loss(configs["idadapter"], identity=1.0, gate="detector", align="detector")
    walls = showing(parts, WALL, WALL, WALL)
    adapter = opened(walls, config)
    with running(walls, config, adapter) as bundle:
        losses = bundle(batch)
        losses["loss"].backward()
    assert not losses["counts"].any()
    assert float(losses["loss"].detach()) == pytest.approx(float(losses["mse"].mean()), rel=1e-6)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trainable(adapter).values())


# ------------------------------------------------------------------------------------------------ decoding faces


@pytest.fixture(scope="module")
def taesd() -> Any:
    """A decoder without attention or norms, so that far pixels do not matter."""
    return load_autoencoder(diffusers_base("sd15", "tiny") / "vae", "sd15", {})


def spot(scale: float, x: float, y: float) -> Tensor:
    """Landmarks of a face: scale of the template and the middle."""
    return (POINTS - 56) * scale + torch.tensor([x, y])


@pytest.mark.parametrize(
    ("where", "side"),
    [((0.6, 150, 160), 192), ((0.5, 60, 300), 128), ((0.6, 10, 315), 192), ((6.0, 160, 160), 320)],
)
@torch.no_grad()
def test_a_window_gives_the_face_of_the_whole_picture(
    taesd: Any, where: tuple[float, float, float], side: int
) -> None:
    """In the middle, at an edge, in a corner, larger than the picture. Up to what the few pixels at the window's rim miss."""
    latents, points = recipe.value(0, "latents", (4, 40, 40)), spot(*where)
    image, inside = decode_face(taesd, latents, points)
    expected = align_faces(taesd.decode(latents[None]), points[None])
    found = align_faces(image, inside)
    assert image.shape == (1, 3, side, side)
    assert float((found - expected).abs().mean()) < 0.02 * float(expected.std())


def test_what_lies_outside_the_window_has_no_gradient(taesd: Any) -> None:
    latents = recipe.value(0, "latents", (4, 40, 40)).requires_grad_()
    align_faces(*decode_face(taesd, latents, spot(0.5, 100, 220))).square().sum().backward()
    assert latents.grad is not None
    touched = latents.grad.abs().sum(0) > 0
    rows, columns = touched.any(1).nonzero(), touched.any(0).nonzero()
    assert rows.max() - rows.min() < 16
    assert columns.max() - columns.min() < 16
    # The window is where the face is: 220 / 8 and 100 / 8.
    assert float(rows.float().mean()) == pytest.approx(27.5, abs=1.5)
    assert float(columns.float().mean()) == pytest.approx(12.5, abs=1.5)


# ------------------------------------------------------------------------------------------------ learning from L_id alone


def test_the_identity_term_alone_raises_the_cosine(
    parts: Parts, configs: dict[str, RunConfig], batch: Batch
) -> None:
    """From a fresh adapter whose gates are closed, by its own gradient: by 0.1 in 8 steps."""
    # Min-SNR with next to nothing as gamma takes L_SD away.
    config = with_loss(configs["idadapter"], identity=1.0, snr_gamma=1e-9)
    adapter = fresh(parts, config)
    parameters = list(trainable(adapter).values())
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    cosines = []
    with running(parts, config, adapter) as bundle:
        for _ in range(9):
            losses = bundle(batch)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            cosines.append(float(losses["cosine"][losses["counts"]].mean()))
    assert cosines[-1] > cosines[0] + 0.1
    assert max(abs(value) for pair in adapter.layers.gates.openings().values() for value in pair) > 1e-3


# ------------------------------------------------------------------------------------------------ SDXL


@pytest.fixture(scope="module")
def sdxl(toy_sdxl: Toy, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return load_parts(toy_sdxl.config(tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize("kind", ["idadapter", "uniid", "uniid text"])
def test_sdxl(sdxl: Parts, toy_sdxl: Toy, tmp_path: Any, kind: str) -> None:
    """Both encoders hold the identity; pooled text and sizes go with the states; everything learns."""
    config = toy_sdxl.config(tmp_path, loss={"identity": 0.0}, **KINDS[kind])
    given = batch_of(sdxl, config)
    adapter = opened(sdxl, config)
    with running(sdxl, config, adapter) as bundle:
        losses, call = passed(sdxl, bundle, given)
        losses["loss"].backward()
    added = call.more["added_cond_kwargs"]
    assert torch.equal(added["time_ids"], given.sizes)
    plain = sdxl.base.text.encode(list(given.prompts))
    assert plain.pooled is not None
    same_pooled = [gap(one, own) < 1e-5 for one, own in zip(added["text_embeds"], plain.pooled, strict=True)]
    assert same_pooled == ([not keep for keep in KEPT] if kind == "idadapter" else [True] * 4)
    width = sdxl.base.text.widths["l"]
    for states in (slice(0, width), slice(width, None)):
        changed = [
            gap(one[:, states], own[:, states]) > 0.01
            for one, own in zip(call.states, plain.states, strict=True)
        ]
        assert changed == {"idadapter": list(KEPT), "uniid": [False] * 4, "uniid text": [True] * 4}[kind]
    without = [name for name, p in trainable(adapter).items() if p.grad is None or not p.grad.any()]
    assert not without
