"""The losses of a step against their formulas, and training by them."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from idadapter_core.faces.align import TEMPLATE
from idadapter_core.stable_diffusion.vae import load_autoencoder
from idadapter_core.training.adapters import trainable
from idadapter_core.training.bundle import decode_face
from idadapter_core.training.config import RunConfig
from idadapter_core.training.identity_loss import align_faces, face_weights, identity_cosines
from idadapter_core.training.parts import Parts
from idadapter_core.training.samples import Batch
from tests.core.training.bundle.passes import (
    POINTS,
    TIMESTEPS,
    all_passed,
    fresh,
    gap,
    opened,
    passed,
    running,
)
from tests.golden import recipe
from tests.tiny.bases import diffusers_base
from tests.tiny.face_package import MarkedFace, synthesize

pytestmark = pytest.mark.usefixtures("one_thread")


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


@torch.no_grad()
def test_the_identity_loss_in_bfloat16_is_nearly_that_in_fp32(
    parts: Parts, configs: dict[str, RunConfig], batch: Batch
) -> None:
    found = []
    for precision in ("no", "bf16"):
        config = with_loss(configs["idadapter"], identity=0.7, mixed_precision=precision)
        with running(parts, config, opened(parts, config)) as bundle:
            found.append(passed(parts, bundle, batch)[0])
    exact, narrow = found
    assert torch.equal(exact["mse"], narrow["mse"]), "the noise error has its own precision"
    counted = exact["counts"]
    assert not torch.equal(exact["cosine"][counted], narrow["cosine"][counted]), "it is another precision"
    assert torch.allclose(exact["cosine"][counted], narrow["cosine"][counted], atol=0.02)


@torch.no_grad()
def test_the_identity_loss_of_latents_that_the_adapter_denoised(
    parts: Parts, configs: dict[str, RunConfig], batch: Batch
) -> None:
    """From heavy noise to less, each step from the prediction before it; L_id judges the last one, L_SD stays what it is."""
    steps = {"denoise_steps": 2, "denoise_from": (700, 800), "denoise_to": (100, 300)}
    config = with_loss(configs["idadapter"], identity=0.7, **steps)
    moved = dataclasses.replace(
        batch, denoising=torch.tensor([[0.0, 0.0], [0.5, 1.0], [1.0, 0.0], [0.25, 0.5]])
    )
    adapter, schedule = opened(parts, config), parts.base.schedule
    with running(parts, config, adapter) as bundle:
        losses, (first, *others) = all_passed(parts, bundle, moved)
    plain = with_loss(configs["idadapter"], identity=0.0)
    with running(parts, plain, opened(parts, plain)) as bundle:
        without, _ = passed(parts, bundle, moved)
    assert torch.equal(losses["mse"], without["mse"])
    begun, ended = [700, 750, 800, 725], [100, 300, 100, 200]
    half = [(begin + end) // 2 for begin, end in zip(begun, ended, strict=True)]
    assert [call.timesteps.tolist() for call in others] == [begun, half, ended]
    assert torch.equal(first.timesteps, torch.tensor(TIMESTEPS))
    for call, following in pairwise(others):
        expected = schedule.less_noise(call.noisy, call.prediction, call.timesteps, following.timesteps)
        assert torch.allclose(following.noisy, expected, atol=1e-5)
        assert torch.equal(following.states, first.states), "with the identity"
    clean = schedule.clean(others[-1].noisy, others[-1].prediction, others[-1].timesteps)
    assert losses["counts"].tolist() == [True, True, True, False]
    assert batch.embedding is not None
    aligned = [
        align_faces(*decode_face(parts.base.vae, clean[row], batch.landmarks[row])) for row in (0, 1, 2)
    ]
    cosines = identity_cosines(torch.cat(aligned), batch.embedding[:3, -1], parts.networks.recognizer)
    assert losses["cosine"][:3].tolist() == pytest.approx(cosines.tolist(), abs=1e-3)
    expected = losses["mse"].mean() + 0.7 * (1 - cosines).sum() / 4
    assert float(losses["loss"]) == pytest.approx(float(expected), rel=1e-4)


@torch.no_grad()
def test_the_face_can_count_more(parts: Parts, configs: dict[str, RunConfig], batch: Batch) -> None:
    config = with_loss(configs["uniid"], identity=0.0, face_weight=5.0)
    with running(parts, config, opened(parts, config)) as bundle:
        losses, call = passed(parts, bundle, batch)
    errors = (call.prediction - batch.noise).square().mean(1)
    weights = face_weights(batch.landmarks, *errors.shape[1:], parts.base.vae.factor, 5.0)
    assert torch.allclose(losses["mse"], errors.mean((1, 2))), "what is logged stays comparable"
    assert float(losses["loss"]) == pytest.approx(float((errors * weights).mean()), rel=1e-5)
    assert float(losses["loss"]) != pytest.approx(float(errors.mean()), rel=1e-3)


def test_weights_of_the_face_are_where_the_aligned_face_is() -> None:
    points = torch.tensor(TEMPLATE)[None] / 2 + torch.tensor([16.0, 32.0])  # a face of 56 px, moved
    (weights,) = face_weights(points, 16, 12, 8, 4.0)
    assert weights.shape == (16, 12)
    assert weights.mean().item() == pytest.approx(1)
    inside = weights == weights.max()
    expected = torch.zeros(16, 12, dtype=torch.bool)
    expected[4:11, 2:9] = True
    assert torch.equal(inside, expected)
    assert (weights.max() / weights.min()).item() == pytest.approx(4)
    turned = torch.stack([points[..., 1] - 16, 128 - points[..., 0]], -1)  # by a quarter
    (weights,) = face_weights(turned, 16, 12, 8, 4.0)
    assert (weights == weights.max()).sum() == expected.sum()


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

    def decode(self, latents: Tensor, *, in_bfloat16: bool = False) -> Tensor:
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


@pytest.mark.parametrize(("steps", "rise"), [(0, 0.1), (2, 0.06)])
def test_the_identity_term_alone_raises_the_cosine(
    parts: Parts, configs: dict[str, RunConfig], batch: Batch, steps: int, rise: float
) -> None:
    """From a fresh adapter whose gates are closed, by its own gradient, in 8 steps."""
    # Min-SNR with next to nothing as gamma takes L_SD away.
    moved = {"denoise_steps": steps, "denoise_to": (100, 300)}
    config = with_loss(configs["idadapter"], identity=1.0, snr_gamma=1e-9, **moved)
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
    assert cosines[-1] > cosines[0] + rise
    assert max(abs(value) for pair in adapter.layers.gates.openings().values() for value in pair) > 1e-3
