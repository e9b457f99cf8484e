"""Files that are replaced, overwritten or deleted while ComfyUI runs: noticed when a prompt is queued, and harmless until then."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.harness.comfy import pack_nodes
from tests.tiny.face_package import MarkedFace, synthesize, write_package
from tests.tiny.files import bring_recognizer
from tests.tiny.idadapter import CONFIGS, tiny_idadapter

Change = Callable[[Path], None]


def replace(path: Path) -> None:
    """Another file of the same size and time takes its place, as `mv`, `cp -p` after a deletion or a download does it."""
    facts = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    other.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)


def overwrite(path: Path) -> None:
    """Other bytes in the same file, within the same second."""
    facts = path.stat()
    with path.open("r+b") as file:
        file.write(b"other")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))


def delete(path: Path) -> None:
    path.unlink()


CHANGES: list[Change] = [replace, overwrite, delete]


@pytest.fixture(params=CHANGES, ids=lambda change: change.__name__)
def change(request: pytest.FixtureRequest) -> Change:
    change: Change = request.param
    return change


@pytest.fixture
def models(pack: ModuleType) -> Iterator[Callable[[str, str], Path]]:
    """Puts a file into a folder of the pack: (folder, name below it) to path. They are gone after the test."""
    pack_nodes()  # registers the folders
    from ComfyUI_IDAdapter.nodes.host import paths

    made: list[Path] = []

    def put(folder: str, name: str) -> Path:
        path = (paths.insightface_roots() if folder == "insightface" else [paths.folder_of(folder)])[0] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(64))
        made.append(path)
        return path

    yield put
    for path in made:
        path.unlink(missing_ok=True)


CHOICES = {
    "adapter": ("IDAdapterLoadAdapter", "idadapter", "a.safetensors", {"adapter": "a.safetensors", "text_branch": "none"}),
    "text branch": ("IDAdapterLoadAdapter", "idadapter", "b.bin", {"adapter": "none", "text_branch": "b.bin"}),
    "detector": (
        "IDAdapterLoadFaceAnalyzer",
        "insightface",
        "models/pack/det.onnx",
        {"package": "pack", "recognizer": "from package", "provider": "cpu"},
    ),
    "manifest": (
        "IDAdapterLoadFaceAnalyzer",
        "insightface",
        "models/pack/manifest.json",
        {"package": "pack", "recognizer": "from package", "provider": "cpu"},
    ),
    "recogniser": (
        "IDAdapterLoadFaceAnalyzer",
        "idadapter_recognizers",
        "r.pth",
        {"package": "none", "recognizer": "r.pth", "provider": "cpu"},
    ),
    "identity": ("IDAdapterLoadIdentity", "idadapter_identities", "p.safetensors", {"identity": "p.safetensors", "adapter": None}),
}  # fmt: skip


@pytest.mark.parametrize("what", CHOICES)
@pytest.mark.parametrize("linked", [False, True], ids=["chosen", "linked"])
def test_a_file_that_changed_is_noticed(
    models: Callable[[str, str], Path], change: Change, what: str, linked: bool
) -> None:
    node_id, folder, name, inputs = CHOICES[what]
    if linked:  # ComfyUI gives no value while another node has not run
        inputs = dict.fromkeys(inputs)
    path = models(folder, name)
    fingerprint = pack_nodes()[node_id].fingerprint_inputs
    before = fingerprint(**inputs)
    assert fingerprint(**inputs) == before
    change(path)
    assert fingerprint(**inputs) != before


def test_the_fingerprint_of_a_saved_identity(pack: ModuleType, models: Callable[[str, str], Path]) -> None:
    from ComfyUI_IDAdapter.nodes.host import paths

    node = pack_nodes()["IDAdapterSaveIdentity"]
    from ComfyUI_IDAdapter.idadapter_core.types import Identity

    identity = Identity(torch.ones(1, 2, 3), None, method="uniid", adapter="a", recognizer="r")
    path = models(paths.IDENTITIES, "saved.safetensors")
    path.unlink()

    missing = node.fingerprint_inputs(name="saved")
    assert node.fingerprint_inputs(name="saved") != missing, "a missing file is to be written at any time"
    begun = node.fingerprint_inputs(name="saved")
    node.execute(identity, "saved")
    assert node.fingerprint_inputs(name="saved") == begun, "what comes after the node ran again for nothing"
    node.execute(identity, "saved")
    assert node.fingerprint_inputs(name="saved") == begun
    replace(path)
    assert node.fingerprint_inputs(name="saved") not in (begun, missing)
    path.unlink()
    assert node.fingerprint_inputs(name="saved") not in (begun, missing)


def test_a_saved_identity_of_before_gets_what_pictures_are_compared_with(
    pack: ModuleType, models: Callable[[str, str], Path]
) -> None:
    """The same identity saved again under its name; another one is still refused."""
    from ComfyUI_IDAdapter.idadapter_core.errors import InputError
    from ComfyUI_IDAdapter.idadapter_core.identity import load_identity
    from ComfyUI_IDAdapter.idadapter_core.types import Identity
    from ComfyUI_IDAdapter.nodes.host import paths

    node = pack_nodes()["IDAdapterSaveIdentity"]
    path = models(paths.IDENTITIES, "before.safetensors")
    path.unlink()

    def identity(value: float, embedding: torch.Tensor | None) -> Identity:
        tokens = torch.full((1, 2, 3), value)
        return Identity(tokens, None, method="uniid", adapter="a", recognizer="r", embedding=embedding)

    direction = torch.nn.functional.normalize(torch.ones(1, 8), dim=1)
    node.execute(identity(1.0, None), "before")
    with pytest.raises(InputError, match="not overwritten"):
        node.execute(identity(2.0, direction), "before")
    said = node.execute(identity(1.0, direction), "before").ui["idadapter"][0]["text"]
    assert "Identity Report" in said
    found = load_identity(path).embedding
    assert found is not None
    torch.testing.assert_close(found, direction)
    node.execute(identity(1.0, None), "before")
    assert load_identity(path).embedding is not None, "what is known is not lost"


def test_a_copy_that_comfyui_builds_anew_from_another_file_is_refused(
    pack: ModuleType, tmp_path: Path
) -> None:
    """As for a second device, long after the file was loaded."""
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError
    from ComfyUI_IDAdapter.nodes.adapter import load
    from ComfyUI_IDAdapter.nodes.host.analyzer import load_recognizer

    from idadapter_core.adapter import save_adapter

    path = tmp_path / "adapter.safetensors"
    save_adapter(tiny_idadapter(CONFIGS["sd15"]), path)
    loaded = load(path, None)
    save_adapter(tiny_idadapter(CONFIGS["sd15"], seed=1), path)
    patchers = [loaded.patcher, loaded.gates]

    bring_recognizer(tmp_path)
    (network,) = (tmp_path / "models" / "idadapter" / "recognizers").iterdir()
    patchers.append(load_recognizer(network)[0])
    from idadapter_core.faces.iresnet import load_iresnet, save_iresnet

    other = load_iresnet(network)
    with torch.no_grad():
        other.fc.bias.add_(1)
    save_iresnet(other, network, torch.float32)
    for patcher in patchers:
        rebuild, arguments = patcher.cached_patcher_init
        with pytest.raises(MismatchError, match="has been replaced since it was loaded"):
            rebuild(*arguments)


def test_a_face_package_may_be_cut_short_while_it_is_open(tmp_path: Path) -> None:
    from idadapter_core.faces.detector import open_analyzer

    photo = synthesize(faces=[MarkedFace(300, 300, 60)])
    crop = photo[:112, :112]
    analyzer = open_analyzer(write_package(tmp_path), "cpu", recognition=True)
    expected: Any = analyzer.detect(photo), analyzer.embed(crop)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    assert analyzer.detect(photo) == expected[0]
    assert (analyzer.embed(crop) == expected[1]).all()
