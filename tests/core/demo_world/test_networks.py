"""The demo world's networks: what they compute, and that their files are what other programs read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from idadapter_core.demo_world.autoencoder import Autoencoder, Shape, load_autoencoder, save_autoencoder
from idadapter_core.demo_world.build import detector as detection
from idadapter_core.demo_world.build.batches import Pool
from idadapter_core.demo_world.build.detector import (
    SIZES,
    STRIDES,
    Detector,
    Scene,
    detection_loss,
    make_scene,
    scene_tensor,
    targets,
)
from idadapter_core.demo_world.build.pictures import draw_pictures, open_pictures
from idadapter_core.demo_world.build.settings import Group, Settings
from idadapter_core.demo_world.build.sex_and_age import SIDE, SexAndAge, squares
from idadapter_core.demo_world.build.train_readers import SHIFT, augmented
from idadapter_core.demo_world.build.train_recognizers import aligned_crops, varied_crops
from idadapter_core.demo_world.readers import READ_FACTORS, Reader, load_reader, save_reader
from idadapter_core.demo_world.second_recognizer import (
    SecondRecognizer,
    load_second_recognizer,
    save_second_recognizer,
)
from idadapter_core.demo_world.shipped import shipped
from idadapter_core.errors import CheckpointError, InputError

SLIM = Shape(4, (8, 8, 16, 16), (0, 1, 1, 1), (0, 1, 2, 1))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    folder = tmp_path_factory.mktemp("pictures")
    draw_pictures(folder, Settings("s", 128, {"few": Group(3, 2, "test", 0)}))
    return Pool([open_pictures(folder, "few")])


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield


def _filled(network: nn.Module) -> nn.Module:
    """With statistics that are not those of a fresh network, in eval mode."""
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return network.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------ autoencoder
def test_autoencoder_file_gives_the_same_network(tmp_path: Path) -> None:
    net = Autoencoder(SLIM).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.half().float())  # what the file can hold
    save_autoencoder(net, tmp_path / "a.safetensors")
    loaded = load_autoencoder(tmp_path / "a.safetensors")
    assert loaded.shape == SLIM
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("sides", [(32, 32), (16, 40)])
def test_autoencoder_makes_an_eighth_and_goes_back(sides: tuple[int, int]) -> None:
    net = Autoencoder(SLIM)
    height, width = sides
    latents = net.encode(torch.rand(2, 3, height, width) * 2 - 1)
    assert latents.shape == (2, 4, height // 8, width // 8)
    assert net.decode(latents).shape == (2, 3, height, width)


def test_the_trainer_reads_the_file(tmp_path: Path) -> None:
    from idadapter_core.stable_diffusion.vae import load_autoencoder as load_trained

    save_autoencoder(Autoencoder(SLIM), tmp_path / "a.safetensors")
    ours, theirs = (
        load_autoencoder(tmp_path / "a.safetensors"),
        load_trained(tmp_path / "a.safetensors", "sd15", {}),
    )
    pictures = torch.rand(2, 3, 16, 24) * 2 - 1
    latents = ours.encode(pictures)
    mean, deviation = theirs.moments(pictures).chunk(2, 1)
    torch.testing.assert_close(mean, latents, atol=1e-5, rtol=1e-4)
    assert not deviation.any()
    torch.testing.assert_close(theirs.decode(latents), ours.decode(latents), atol=1e-5, rtol=1e-4)


def test_other_files_are_no_autoencoders(tmp_path: Path) -> None:
    save_reader(Reader(), tmp_path / "r.safetensors")
    with pytest.raises(CheckpointError, match=r"r\.safetensors is not an autoencoder of the demo world"):
        load_autoencoder(tmp_path / "r.safetensors")


# --------------------------------------------------------------------------------------------------------- networks
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[..., None], Callable[[Path], nn.Module], int]] = {
    "reader": (Reader, save_reader, load_reader, 128),
    "second recogniser": (SecondRecognizer, save_second_recognizer, load_second_recognizer, 112),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network_files(name: str, tmp_path: Path) -> None:
    make, save, load, side = NETWORKS[name]
    network = _filled(make())
    save(network, tmp_path / "n.safetensors")
    loaded = load(tmp_path / "n.safetensors")
    assert not loaded.training
    pictures = torch.rand(2, 3, side, side) * 2 - 1
    first, second = network(pictures), loaded(pictures)
    if isinstance(first, dict):
        first, second = (torch.cat(list(found.values()), 1) for found in (first, second))
    torch.testing.assert_close(first, second, atol=0.02, rtol=0.02)
    other = next(kind for kind in NETWORKS if kind != name)
    with pytest.raises(
        CheckpointError, match=rf"is not a {other} of the demo world, but {name}; get the file again"
    ):
        NETWORKS[other][2](tmp_path / "n.safetensors")


def test_a_reader_names_a_class_of_each_factor() -> None:
    read = Reader().eval().read(torch.rand(2, 3, 128, 128) * 2 - 1)
    assert list(read) == list(READ_FACTORS)
    assert all(len(values) == 2 and set(values) <= set(READ_FACTORS[name]) for name, values in read.items())


def test_second_recogniser_refuses_other_sizes() -> None:
    with pytest.raises(InputError, match=r"\(B, 3, 112, 112\), got \(1, 3, 128, 128\)"):
        SecondRecognizer()(torch.zeros(1, 3, 128, 128))


def test_missing_files_of_the_package_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.onnx is missing .*demo-world build"):
        shipped("nothing.onnx")


# ---------------------------------------------------------------------------------------------------------- detector
def _one_face(side: int = 320, size: float = 100) -> Scene:
    box = np.array([[120, 90, 120 + size, 90 + 1.2 * size]], np.float32)
    places = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]])
    points = (box[:, None, :2] + places[None] * (box[:, None, 2:] - box[:, None, :2])).astype(np.float32)
    return Scene(np.zeros((side, side, 3), np.uint8), box, points)


@pytest.mark.parametrize(("size", "level"), [(30, 0), (100, 1), (170, 2)])
def test_targets_say_where_the_face_is(size: float, level: int) -> None:
    """Read as insightface reads a detector's outputs, they are box and landmarks again."""
    scene = _one_face(size=size)
    found = 0
    for number, stride in enumerate(STRIDES):
        wanted = targets(scene, number)
        anchors, rows, columns = np.nonzero(wanted[:, 0] == 1)
        found += len(anchors)
        if number != level:
            continue
        assert len(anchors)
        assert set(anchors) == {int(size * 1.2 >= SIZES[level][1])}
        for anchor, row, column in zip(anchors, rows, columns, strict=True):
            at = np.array([column, row]) * stride
            said = wanted[anchor, 1:15, row, column] * stride
            np.testing.assert_allclose(
                np.concatenate([at - said[:2], at + said[2:4]]), scene.boxes[0], atol=1e-3
            )
            np.testing.assert_allclose(at + said[4:].reshape(5, 2), scene.landmarks[0], atol=1e-3)
            assert np.abs(at - (scene.boxes[0, :2] + scene.boxes[0, 2:]) / 2).max() <= max(
                0.22 * size * 1.2, stride
            )
    if size >= 100:
        assert (targets(scene, 0)[:, 0] == 0).all(), "parts of a face are none to a stride for small faces"
    assert found, "some stride answers for every face"


def test_perfect_answers_cost_nothing() -> None:
    scene = _one_face()
    wanted = [torch.from_numpy(targets(scene, level))[None] for level in range(3)]
    maps = []
    for goal in wanted:
        answer = goal[:, :, :15].clone()
        answer[:, :, 0] = torch.where(goal[:, :, 0] == 1, 20.0, -20.0)
        maps.append(answer.flatten(1, 2))
    assert detection_loss(maps, wanted) < 1e-6
    maps[1][0, 1] += 0.5  # a side of the first anchor's boxes
    maps[1][0, 16] += 0.5
    assert detection_loss(maps, wanted) > 1e-3


def test_a_scene_without_a_face_that_a_stride_is_for_still_teaches() -> None:
    scene = _one_face(640, size=620)
    scene.boxes[:, 3] += 100
    wanted = [torch.from_numpy(targets(scene, level))[None] for level in range(3)]
    assert not any((goal[:, :, 0] == 1).any() for goal in wanted)
    maps = [torch.zeros(1, 30, *goal.shape[3:]) for goal in wanted]
    assert 0 < float(detection_loss(maps, wanted)) < 1e6


def test_scenes_know_where_their_faces_are(pool: Pool) -> None:
    """The pixels around a landmark are those of the picture that was pasted, mirrored or not."""
    rng = np.random.default_rng(0)
    mirrored = set()
    for _ in range(8):
        number = int(rng.integers(len(pool)))
        picture, box, points = detection._copy(pool, number, 256, rng)
        assert picture.shape == (256, 256, 3)
        original = pool.landmarks[number] * 2 + 0.5
        is_mirrored = not np.allclose(points, original, atol=1e-3)
        mirrored.add(is_mirrored)
        if is_mirrored:
            original = original[[1, 0, 2, 4, 3]] * [-1, 1] + [255, 0]
        np.testing.assert_allclose(points, original, atol=1e-3)
        assert (box[:2] < points.min(0)).all()
        assert (points.max(0) < box[2:]).all()
    assert mirrored == {True, False}
    scene = make_scene(pool, rng, 320)
    assert scene.pixels.shape == (320, 320, 3)
    assert len(scene.boxes) == len(scene.landmarks) >= 1


# -------------------------------------------------------------------------------------------------- what is trained on
def test_varied_crops_stay_crops_of_the_same_person(pool: Pool) -> None:
    numbers = np.arange(len(pool))
    exact = aligned_crops(pool.pixels(numbers), pool.landmarks)
    varied = varied_crops(pool, numbers, np.random.default_rng(0))
    assert exact.shape == varied.shape == (6, 3, 112, 112)
    assert varied.abs().max() <= 1
    gray, other = (x.mean(1).flatten(1) for x in (exact, varied))
    either_way = torch.stack([other, varied.flip(3).mean(1).flatten(1)])
    rows = [torch.corrcoef(torch.stack([gray[k], *either_way[:, k]]))[0, 1:].max() for k in range(6)]
    assert min(rows) > 0.6
    assert torch.equal(varied, varied_crops(pool, numbers, np.random.default_rng(0)))


def test_disturbed_pictures_show_the_same() -> None:
    x = torch.linspace(-1, 1, 64).expand(2, 3, 64, 64)
    other = augmented(x, np.random.default_rng(0))
    assert other.shape == x.shape
    assert (other - x).abs().median() < 2 * SHIFT / 64 + 0.1
    assert not torch.equal(other, x)


def test_squares_are_those_insightface_cuts(pool: Pool) -> None:
    from insightface.utils import face_align

    box = pool.boxes[0]
    middle, side = (box[:2] + box[2:]) / 2, max(box[2:] - box[:2])
    theirs, _ = face_align.transform(pool.pixels(np.array([0]))[0], middle, SIDE, SIDE / (side * 1.5), 0)
    ours = squares(pool.pixels(np.array([0])), box[None])[0].permute(1, 2, 0) * 128 + 127.5
    assert np.abs(ours.numpy() - theirs).max() <= 1


# -------------------------------------------------------------------------------------------------------- the package
@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, nn.Module]]:
    """A root of packages with one of untrained networks, and these."""
    from idadapter_core.demo_world.build.make import PACKAGE, RECOGNIZER_LAYERS, write_package_file
    from idadapter_core.demo_world.shipped import FACE_PACKAGES
    from idadapter_core.faces.iresnet import IResNet

    root = tmp_path_factory.mktemp("package")
    torch.manual_seed(0)
    networks = {
        "detector": _filled(Detector()),
        "recognizer": _filled(IResNet(RECOGNIZER_LAYERS, (8, 8, 8, 8))),
        "sex_and_age": _filled(SexAndAge()),
    }
    for name, network in networks.items():
        write_package_file(name, network, root / PACKAGE)
    return root / FACE_PACKAGES, networks


def test_real_insightface_opens_the_package(package: tuple[Path, dict[str, nn.Module]]) -> None:
    from insightface.app import FaceAnalysis

    root, _ = package
    app = FaceAnalysis("demo_world", root=str(root), providers=["CPUExecutionProvider"])
    app.prepare(0, det_size=(128, 128))
    assert sorted(app.models) == ["detection", "genderage", "recognition"]
    assert app.models["recognition"].input_mean == 127.5
    assert app.models["detection"].use_kps
    assert isinstance(app.get(np.zeros((100, 80, 3), np.uint8)), list)


def _session(package: tuple[Path, dict[str, nn.Module]], name: str) -> Callable[[Tensor], list[np.ndarray]]:
    path = next(package[0].rglob(f"{name}.onnx"))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: list(session.run(None, {session.get_inputs()[0].name: x.numpy()}))


def test_detector_file_computes_what_the_network_does(package: tuple[Path, dict[str, nn.Module]]) -> None:
    run = _session(package, "detector")
    for height, width in ((64, 64), (96, 160)):
        x = torch.rand(1, 3, height, width) * 2 - 1
        outputs = run(x)
        maps = package[1]["detector"](x)
        for level, stride in enumerate(STRIDES):
            rows = maps[level].permute(0, 2, 3, 1).reshape(-1, 15)
            assert len(rows) == 2 * (height // stride) * (width // stride)
            score, box, points = outputs[level], outputs[level + 3], outputs[level + 6]
            np.testing.assert_allclose(score, rows[:, :1].sigmoid(), atol=2e-3)
            np.testing.assert_allclose(box, rows[:, 1:5], atol=5e-2, rtol=2e-2)
            np.testing.assert_allclose(points, rows[:, 5:], atol=5e-2, rtol=2e-2)


@pytest.mark.parametrize(("name", "side"), [("recognizer", 112), ("sex_and_age", SIDE)])
def test_other_files_compute_what_the_networks_do(
    package: tuple[Path, dict[str, nn.Module]], name: str, side: int
) -> None:
    x = torch.rand(3, 3, side, side) * 2 - 1
    result = package[1][name](x)
    wanted = result[0] if isinstance(result, tuple) else result
    np.testing.assert_allclose(_session(package, name)(x)[0], wanted, atol=2e-2 * float(wanted.abs().max()))


def test_recogniser_file_is_an_iresnet_with_stages(package: tuple[Path, dict[str, nn.Module]]) -> None:
    from idadapter_core.faces.iresnet import IResNet, load_iresnet

    loaded = load_iresnet(next(package[0].rglob("recognizer.onnx")), any_layers=True)
    trained = package[1]["recognizer"]
    assert isinstance(trained, IResNet)
    assert (loaded.layers, loaded.widths) == (trained.layers, trained.widths)
    x = torch.rand(2, 3, 112, 112) * 2 - 1
    with torch.no_grad():
        for one, other in zip(loaded(x)[1], trained(x)[1], strict=True):
            torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


def test_files_are_the_same_each_time(package: tuple[Path, dict[str, nn.Module]], tmp_path: Path) -> None:
    from idadapter_core.demo_world.build.make import write_package_file

    write_package_file("sex_and_age", package[1]["sex_and_age"], tmp_path)
    assert (tmp_path / "sex_and_age.onnx").read_bytes() == next(
        package[0].rglob("sex_and_age.onnx")
    ).read_bytes()


def test_scene_tensor_is_what_insightface_feeds() -> None:
    scene = _one_face(64)
    scene.pixels[0, 0] = (255, 0, 128)
    assert scene_tensor([scene])[0, :, 0, 0].tolist() == pytest.approx([127.5 / 128, -127.5 / 128, 0.5 / 128])
