"""Pictures: the same on every run, and nothing changes but what should."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import idadapter_core.demo_world as world
from idadapter_core.demo_world import BACKGROUNDS, EXPRESSIONS, STYLES, Factors, Person, Pictures, render
from idadapter_core.demo_world.factors import ACCESSORIES
from idadapter_core.demo_world.identity import HAIR_STYLES
from idadapter_core.demo_world.raster import depth_map, rasterize
from idadapter_core.errors import InputError

from . import known_pictures
from .conftest import SIZE, picture, plain


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.fixture(scope="module")
def drawn() -> Pictures:
    """Each style, accessory, background and expression at least once, of four people."""
    rng = np.random.default_rng(5)
    factors = [
        Factors.sample(
            rng,
            style=STYLES[k % len(STYLES)],
            accessory=ACCESSORIES[k % len(ACCESSORIES)],
            background=BACKGROUNDS[k % len(BACKGROUNDS)],
            expression=list(EXPRESSIONS)[k % len(EXPRESSIONS)],
        )
        for k in range(8)
    ]
    return render([Person.sample(k // 2) for k in range(8)], factors, SIZE, backend="numpy")


def test_pictures_come_with_all_that_is_known(drawn: Pictures) -> None:
    assert drawn.pixels.shape == (8, SIZE, SIZE, 3)
    assert drawn.pixels.dtype == np.uint8
    assert drawn.masks.shape == (8, SIZE, SIZE)
    assert drawn.landmarks.shape == (8, 5, 2)
    assert drawn.boxes.shape == (8, 4)
    assert len(drawn.captions) == len(drawn.people) == len(drawn.factors) == len(drawn) == 8


def test_a_picture_does_not_depend_on_its_batch(drawn: Pictures) -> None:
    for k in (7, 2, 4):
        alone = render([drawn.people[k]], [drawn.factors[k]], SIZE, backend="numpy")
        assert np.array_equal(alone.pixels[0], drawn.pixels[k])
        assert np.array_equal(alone.landmarks[0], drawn.landmarks[k])
        assert np.array_equal(alone.masks[0], drawn.masks[k])
        assert alone.captions[0] == drawn.captions[k]


def test_numba_draws_the_same_pixels(drawn: Pictures) -> None:
    pytest.importorskip("numba", reason="numba is not installed: nothing to compare")
    faster = render(drawn.people, drawn.factors, SIZE, backend="numba")
    assert np.array_equal(faster.pixels, drawn.pixels)
    assert np.array_equal(faster.landmarks, drawn.landmarks)


def test_landmarks_lie_on_the_face(drawn: Pictures) -> None:
    for landmarks, box, mask in zip(drawn.landmarks, drawn.boxes, drawn.masks, strict=True):
        left, right, nose, mouth_left, mouth_right = landmarks
        assert left[0] < right[0]
        assert mouth_left[0] < mouth_right[0]
        assert max(left[1], right[1]) < nose[1] < min(mouth_left[1], mouth_right[1])
        assert (landmarks > box[:2]).all()
        assert (landmarks < box[2:]).all()
        for x, y in np.rint(landmarks).astype(int):
            assert mask[y, x] == 255


def test_a_mirrored_turn_mirrors_the_landmarks(person: Person) -> None:
    even = replace(person, asymmetry=(0.0,) * len(person.asymmetry))
    pairs = [plain(yaw=20.0, roll=6.0), plain(yaw=-20.0, roll=-6.0)]
    right, left = render([even, even], pairs, SIZE, backend="numpy").landmarks
    mirrored = right[[1, 0, 2, 4, 3]] * [-1, 1] + [SIZE - 1, 0]
    assert np.abs(mirrored - left).max() < 0.05
    assert right[2, 0] > right[:2, 0].mean() + 2  # the nose goes to where the head looks
    assert np.abs(right - left).max() > 3


def test_the_turn_goes_the_way_that_the_words_say(person: Person) -> None:
    turned = render([person] * 3, [plain(yaw=yaw) for yaw in (-25.0, 0.0, 25.0)], SIZE, backend="numpy")
    off = turned.landmarks[:, 2, 0] - turned.landmarks[:, :2, 0].mean(1)
    assert off[0] < off[1] - 2 < off[2] - 4
    assert [factors.direction for factors in turned.factors] == ["left", "ahead", "right"]


def test_another_background_leaves_the_person_alone(person: Person) -> None:
    here = picture(person, plain())
    for name in ("snow", "city_night"):
        there = picture(person, plain(background=name, background_seed=3))
        inside, outside = here.masks[0] == 255, here.masks[0] == 0
        assert difference(here.pixels[0][inside], there.pixels[0][inside]) <= 1
        assert (here.pixels[0][outside] != there.pixels[0][outside]).any(-1).mean() > 0.9


def test_another_person_leaves_the_background_alone() -> None:
    one, other = (picture(Person.sample(seed), plain(background="brick")) for seed in (0, 1))
    outside = (one.masks[0] == 0) & (other.masks[0] == 0)
    assert outside.mean() > 0.15
    assert difference(one.pixels[0][outside], other.pixels[0][outside]) <= 1
    both = (one.masks[0] == 255) & (other.masks[0] == 255)
    assert (one.pixels[0][both] != other.pixels[0][both]).any(-1).mean() > 0.5


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"expression": "angry"}, "face"),
        ({"expression": "surprised"}, "face"),
        ({"clothes": "yellow"}, "clothes"),
        ({"collar": "v"}, "clothes"),
    ],
)
def test_a_factor_changes_its_own_place_alone(person: Person, change: dict[str, str], where: str) -> None:
    before, after = (
        picture(person, plain(collar="round")),
        picture(person, plain(**{"collar": "round", **change})),
    )
    changed = (np.abs(before.pixels[0].astype(int) - after.pixels[0]) > 8).any(-1)
    chin = int(before.boxes[0, 3])
    rows = np.flatnonzero(changed.any(1))
    assert changed.sum() > 12
    if where == "clothes":
        assert rows.min() >= chin - 3
    else:
        hairline, sides = int(before.landmarks[0, 0, 1]) - 8, before.boxes[0, [0, 2]].astype(int)
        assert changed[hairline : chin + 8, sides[0] : sides[1]].sum() > 0.8 * changed.sum()


def test_every_class_looks_different(person: Person) -> None:
    for name, classes in (
        ("style", STYLES),
        ("background", BACKGROUNDS),
        ("accessory", ACCESSORIES),
        ("expression", EXPRESSIONS),
    ):
        pictures = render(
            [person] * len(classes), [plain(**{name: value}) for value in classes], SIZE, backend="numpy"
        ).pixels
        for k, one in enumerate(pictures):
            for other in pictures[k + 1 :]:
                assert (np.abs(one.astype(int) - other) > 8).any(-1).sum() > 15, name


def test_every_way_to_wear_hair_is_drawn(person: Person) -> None:
    looks = [
        replace(person, look=replace(person.look, hair=replace(person.look.hair, style=style)))
        for style in HAIR_STYLES
    ]
    pictures = render(looks, [plain()] * len(looks), SIZE, backend="numpy").pixels
    assert len({part.tobytes() for part in pictures}) == len(HAIR_STYLES)


def test_dark_skin_can_be_seen_at_night() -> None:
    for seed in range(3):
        base = Person.sample(seed)
        dark = replace(base, look=replace(base.look, tone=5.5, hair=replace(base.look.hair, style="short")))
        night = picture(dark, plain(style="night", light=replace(plain().light, azimuth=40.0)))
        x0, y0, x1, y1 = night.boxes[0].astype(int)
        face = night.pixels[0][y0 + 12 : y1 - 4, x0 + 6 : x1 - 6].astype(float).mean(-1)
        assert face.mean() > 45
        assert np.percentile(face, 95) - np.percentile(face, 5) > 25


def test_known_pictures_are_drawn_again() -> None:
    """The pixels of every run; on a platform whose sines differ in their last bits, means of squares within one level."""
    known = json.loads(known_pictures.FILE.read_text(encoding="utf-8"))
    drawn = known_pictures.draw()
    assert list(known) == list(drawn)
    for name, pixels in drawn.items():
        if known[name]["sha256"] != hashlib.sha256(pixels.tobytes()).hexdigest():
            assert difference(known_pictures.coarse(pixels), np.array(known[name]["coarse"])) <= 1, name


def test_the_coarse_copies_notice_a_change(person: Person) -> None:
    before, after = (picture(person, plain(expression=name)).pixels[0] for name in ("neutral", "smiling"))
    assert difference(known_pictures.coarse(before), known_pictures.coarse(after)) > 1


def test_a_simpler_processor_draws_nearly_the_same_pixels() -> None:
    features = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    if not features:
        pytest.skip("numpy uses no optional instructions on this processor")
    code = "import sys; from tests.core.demo_world import known_pictures; sys.stdout.buffer.write(known_pictures.packed())"
    root = Path(world.__file__).parents[2]
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(features), "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, check=True
    )
    here = np.frombuffer(known_pictures.packed(), np.uint8).astype(int)
    there = np.frombuffer(done.stdout, np.uint8).astype(int)
    assert (np.abs(here - there) > 1).mean() < 0.001


def test_imports_are_numpy_and_the_standard_library() -> None:
    allowed = {"numpy", "numba", "PIL", "anny", "__future__"} | set(sys.stdlib_module_names)
    shared = {"errors", "program"}
    folder = Path(world.__file__).parent
    networks = {
        "autoencoder.py",
        "base.py",
        "digests.py",
        "readers.py",
        "second_recognizer.py",
        "shipped.py",
        "world.py",
    }
    for path in (path for path in folder.glob("*.py") if path.name not in networks):
        for name, level in _imports(path):
            if level == 0:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"
            elif level == 2:
                assert name.split(".")[0] in shared, f"{path.name} imports {name} of the core"


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def test_what_cannot_be_drawn_is_refused(person: Person) -> None:
    with pytest.raises(InputError, match="got 1 people and 2 factors; repeat a person"):
        render([person], [plain(), plain()])
    with pytest.raises(InputError, match="got 0 people and 0 factors"):
        render([], [])
    for size in (31, 1025, 64.5):
        with pytest.raises(InputError, match=rf"within 32..1024 pixels, got {size}"):
            render([person], [plain()], size)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no renderer 'cuda'; choose one of: numpy, numba"):
        render([person], [plain()], SIZE, backend="cuda")


def two_triangles() -> tuple[np.ndarray, np.ndarray]:
    points = np.array([[1, 1, 0], [9, 1, 0], [1, 9, 0], [1, 1, 1], [5, 1, 1], [1, 5, 1]], np.float32)
    return points, np.array([[0, 1, 2], [3, 4, 5]], np.int32)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_the_nearest_triangle_is_seen(backend: str) -> None:
    if backend == "numba":
        pytest.importorskip("numba", reason="numba is not installed")
    points, triangles = two_triangles()
    seen = rasterize(points, triangles, 12, backend=backend)
    at = {(int(p) % 12, int(p) // 12): int(c) for p, c in zip(seen.pixel, seen.corners[:, 0], strict=True)}
    assert at[2, 2] == at[5, 1] == 3  # the nearer one, its corners included
    assert at[6, 1] == at[9, 1] == at[1, 9] == at[5, 5] == 0
    assert (6, 5) not in at
    assert len(at) == 45  # whole places with x + y <= 10, 1 <= x, y
    assert np.allclose(
        seen.interpolate(points[:, :2]), np.stack([seen.pixel % 12, seen.pixel // 12], 1), atol=1e-5
    )
    assert depth_map(points, triangles, 12, backend=backend)[1, 1] == 1
    assert len(rasterize(points, triangles, 12, cull=True, backend=backend)) == 0  # both show their back
    assert len(rasterize(points, triangles[:, ::-1].copy(), 12, cull=True, backend=backend)) == 45


def test_both_rasterisers_agree_on_random_triangles() -> None:
    pytest.importorskip("numba", reason="numba is not installed: nothing to compare")
    rng = np.random.default_rng(0)
    points = (rng.random((300, 3)) * [80, 80, 1] - [8, 8, 0]).astype(np.float32)
    points[:, 2] = np.round(points[:, 2], 1)  # many equal depths: the first triangle wins
    triangles = rng.integers(0, 300, (400, 3)).astype(np.int32)
    one, other = (rasterize(points, triangles, 64, backend=name) for name in ("numpy", "numba"))
    for name in ("pixel", "corners", "weights", "depth"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
