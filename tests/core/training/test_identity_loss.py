"""L_id: the alignment it differentiates through, its gate, and that descending it brings the person nearer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from idadapter_core.faces.align import TEMPLATE, align_face, similarity_transform
from idadapter_core.faces.iresnet import IResNet
from idadapter_core.training.identity_loss import align_faces, identity_cosines, similarity
from tests.golden import recipe
from tests.tiny.face_package import MarkedFace, synthesize

POINTS = torch.tensor(TEMPLATE, dtype=torch.float32)


def landmarks(scale: float = 2.0, angle: float = 0.3, x: float = 150.0, y: float = 120.0) -> Tensor:
    """Five points of a face that lies scaled, turned and shifted in a picture."""
    turn = torch.tensor(
        [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], dtype=torch.float32
    )
    return (POINTS - 56) @ turn.T * scale + torch.tensor([x, y])


def picture(size: int = 300) -> Tensor:
    """A smooth picture (1, 3, size, size) in -1..1."""
    noise = recipe.value(2, "picture", (1, 3, 12, 12)).tanh()
    return F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=True).clamp(-1, 1)


@pytest.fixture(scope="module")
def recognizer() -> IResNet:
    network = IResNet((1, 1, 1, 1))
    recipe.fill(network, 0, "iresnet.")
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("angle", [-1.2, 0.0, 0.4, 3.0])
@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_the_transform_is_found_exactly_where_there_is_one(scale: float, angle: float) -> None:
    source = landmarks(scale, angle)[None]
    matrix = similarity(source, POINTS[None])
    mapped = source @ matrix[0, :, :2].T + matrix[0, :, 2]
    torch.testing.assert_close(mapped[0], POINTS, atol=2e-4, rtol=1e-4)


def test_the_transform_is_that_of_the_analyzer() -> None:
    points = landmarks() + recipe.value(1, "jitter", (5, 2))
    expected = similarity_transform([tuple(point) for point in points.tolist()])
    found = similarity(points[None].double(), POINTS[None].double())[0]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.8])
@pytest.mark.parametrize("jitter", [0.0, 8.0])
def test_the_crop_is_that_of_the_analyzer(scale: float, jitter: float) -> None:
    """Up to the analyzer's rounding to whole levels; also where a face has not the template's shape."""
    points = landmarks(scale) + jitter * scale * recipe.value(1, "jitter", (5, 2))
    image = picture()
    levels = ((image[0].movedim(0, -1) + 1) * 127.5).round().to(torch.uint8).numpy()
    expected = align_face(levels, [tuple(point) for point in points.tolist()])
    found = ((align_faces(image, points[None])[0].movedim(0, -1) + 1) * 127.5).numpy()
    assert np.abs(found - expected).mean() < 1.0


def test_a_large_face_is_that_of_the_picture_averaged_down() -> None:
    """As the analyzer sees the smaller picture, in which the landmarks lie where they did."""
    points = landmarks(4.5, x=350.0, y=330.0) + 20 * recipe.value(1, "jitter", (5, 2))
    image = picture(700)
    small = F.avg_pool2d(image, 4)
    levels = ((small[0].movedim(0, -1) + 1) * 127.5).round().to(torch.uint8).numpy()
    expected = align_face(levels, [tuple(point) for point in ((points + 0.5) / 4 - 0.5).tolist()])
    found = ((align_faces(image, points[None])[0].movedim(0, -1) + 1) * 127.5).numpy()
    assert np.abs(found - expected).mean() < 1.0


def test_outside_the_picture_it_is_black() -> None:
    crop = align_faces(torch.ones(1, 3, 200, 200), landmarks(x=0.0, y=0.0)[None])
    assert crop[0, :, :20, :20].max() == -1
    assert crop[0, :, -20:, -20:].min() > 0.99


def test_every_pixel_of_a_large_face_has_a_gradient() -> None:
    """Sampled at 112 points a side without averaging, most pixels of a face of 600 would not count."""
    image = picture(700).requires_grad_()
    align_faces(image, landmarks(6.0, 0.0, 350.0, 350.0)[None]).square().sum().backward()
    assert image.grad is not None
    inside = image.grad[0, :, 150:550, 150:550].abs().sum(0)
    assert (inside > 0).float().mean() > 0.95


def test_descending_it_raises_the_cosine(recognizer: IResNet) -> None:
    """The gradient goes through the alignment and points the right way."""
    person = torch.from_numpy(synthesize(faces=[MarkedFace(320, 300, 90, identity=1)])).float() / 127.5 - 1
    points = landmarks(1.5, 0.1)[None]
    wanted, _ = recognizer(align_faces(person.movedim(-1, 0)[None], points + 150))
    image = picture().requires_grad_()
    before = identity_cosines(align_faces(image, points), wanted, recognizer)
    optimizer = torch.optim.Adam([image], lr=0.02)
    for _ in range(12):
        optimizer.zero_grad()
        loss = 1 - identity_cosines(align_faces(image, points), wanted, recognizer)
        loss.sum().backward()
        optimizer.step()
    after = identity_cosines(align_faces(image, points), wanted, recognizer)
    assert after > before + 0.05
