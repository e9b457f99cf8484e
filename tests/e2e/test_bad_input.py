"""What a user reads in ComfyUI when something is wrong, and that nothing is lost by it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from idadapter_core import errors
from idadapter_core.adapter import load_adapter, save_adapter
from idadapter_core.identity import save_identity
from idadapter_core.types import Identity
from tests.harness.idadapter_graph import idadapter_graph
from tests.harness.results import difference, picture, text_of
from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import (
    FROM_PACKAGE,
    NONE,
    add_adapter,
    add_analyzer,
    add_extract,
    add_mix,
    add_photos,
    add_prompt,
    add_rescale,
    add_text,
    rewire,
    uniid_graph,
)
from tests.harness.workflow import Graph, Node
from tests.tiny.checkpoints import CHECKPOINT_NAMES
from tests.tiny.face_package import MarkedFace, synthesize
from tests.tiny.files import (
    ADAPTER,
    ADAPTER_SD15,
    ADAPTER_SDXL,
    CLIP_VISION_NARROW,
    CUT,
    EMPTY,
    GROUP,
    PACKAGE,
    PERSON,
    RECOGNIZER,
    STRANGER,
    TEXT_BRANCH,
)
from tests.tiny.idadapter import CONFIGS, FILE_NAMES, FRESH_NAMES, idadapter_state, tiny_idadapter
from tests.tiny.uniid import TINY_SDXL, tiny_adapter

pytestmark = pytest.mark.server

# Under their short names: ComfyUI puts the module's path before those of other packs.
ERRORS = {
    name
    for name, thing in vars(errors).items()
    if isinstance(thing, type) and issubclass(thing, errors.IDAdapterError)
}


def refusal(server: ComfyServer, graph: Graph, node_type: str) -> str:
    """The text of the error that stops this graph in a node of this type."""
    result = server.run(graph.workflow)
    assert result.error is not None, f"no error; {result.describe()}"
    assert result.error.node_type == node_type, result.describe()
    # A message of ours, not an exception of some library's.
    assert result.error.exception_type in ERRORS, result.error
    return result.error.message


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(server: ComfyServer) -> Iterator[None]:
    """No run leaves a file among the models, finished or not, unless its test takes care of it."""

    def files() -> set[Path]:
        return {path for path in server.models_dir.rglob("*") if path.is_file()}

    before = files()
    yield
    assert files() == before


@pytest.fixture
def put(server: ComfyServer) -> Iterator[Callable[[str], Path]]:
    """Paths for new files below models/, which are gone after the test."""
    made: list[Path] = []

    def path_of(name: str) -> Path:
        path = server.models_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made.append(path)
        return path

    yield path_of
    for path in made:
        path.unlink(missing_ok=True)


def extract_graph(image: Callable[[Graph], Node] | str, **extract: Any) -> tuple[Graph, Node]:
    """Features of a photo, shown as crops."""
    graph = Graph()
    photo = add_photos(graph, [image]) if isinstance(image, str) else image(graph)
    faces = add_extract(graph, photo, add_analyzer(graph), **extract)
    graph.add("PreviewImage", images=faces[1])
    return graph, faces


def refused_photo(server: ComfyServer, image: Callable[[Graph], Node] | str, **extract: Any) -> str:
    graph, _ = extract_graph(image, **extract)
    return refusal(server, graph, "IDAdapterExtractFaces")


# --- numbers ---


def test_numbers_that_are_none_from_the_prompt_and_from_another_node(server: ComfyServer) -> None:
    """ComfyUI's own limits let NaN through, and check nothing that comes over a link."""
    nan, far = float("nan"), 10**12
    graph, nodes = uniid_graph()
    enriched = graph.add(
        "IDAdapterEnrich", image=nodes["photos"], count=1, seed=0, flip=True, rotation=10.0, colour=0.1
    )
    rewire(graph, nodes["faces"], image=enriched)
    told = []
    for entry in list(graph.workflow.values()):
        if not entry["class_type"].startswith("IDAdapter"):
            continue
        info = server.object_info(entry["class_type"])["input"]
        for name, (kind, *_) in {**info["required"], **info.get("optional", {})}.items():
            if kind not in ("FLOAT", "INT"):
                continue
            given = entry["inputs"][name]
            sources: list[Any] = [nan, graph.add("PrimitiveFloat", value=nan)[0]]
            if kind == "INT":
                sources = [graph.add("PrimitiveInt", value=-far)[0]]
            for source in sources:
                entry["inputs"][name] = source
                message = refusal(server, graph, entry["class_type"])
                assert f": {name} must be a" in message, message
                assert f"got {nan if kind == 'FLOAT' else -far}" in message
            entry["inputs"][name] = given
            told.append(name)
    assert {
        "index",
        "references",
        "weight",
        "early_fraction",
        "token_weight",
        "count",
        "seed",
        "colour",
    } <= set(told)


# --- photos ---


def test_no_face(server: ComfyServer) -> None:
    message = refused_photo(server, EMPTY)
    assert f"image 1 of 1 ({EMPTY}, 640x640): no face found" in message
    assert "looked at 640 to 128 px, with a border around it" in message
    assert "upright" in message


def test_no_face_in_one_photo_of_several(server: ComfyServer) -> None:
    message = refused_photo(server, lambda graph: add_photos(graph, [PERSON, EMPTY, PERSON]))
    assert f"image 2 of 3 ({EMPTY}, 640x640): no face found" in message
    assert "on_missing" in message


def test_a_photo_without_a_face_can_be_skipped(server: ComfyServer) -> None:
    graph, faces = extract_graph(lambda graph: add_photos(graph, [PERSON, EMPTY, PERSON]), on_missing="skip")
    report = add_text(graph, faces, 4)
    result = server.run(graph.workflow).check()
    assert len(result.images) == 2
    assert f"image 2 of 3 ({EMPTY}, 640x640): skipped, no face found" in result.outputs[report.id]["text"][0]


def test_no_face_in_any_photo_cannot_be_skipped(server: ComfyServer) -> None:
    message = refused_photo(server, lambda graph: add_photos(graph, [EMPTY, EMPTY]), on_missing="skip")
    assert "no photo shows a usable face" in message
    assert "image 2 of 2" in message


def test_an_index_beyond_the_faces(server: ComfyServer) -> None:
    message = refused_photo(server, GROUP, index=3)
    assert f"image 1 of 1 ({GROUP}, 640x640): asked for face 4 (index 3, largest), found 3" in message
    assert "lower the index" in message


def test_several_faces_are_reported(server: ComfyServer) -> None:
    graph, faces = extract_graph(GROUP, index=2, select="left to right")
    report = add_text(graph, faces, 4)
    text = server.run(graph.workflow).check().outputs[report.id]["text"][0]
    assert "3 faces found" in text
    assert "warning: several faces; used index 2 of 0 to 2" in text


def test_a_face_that_is_mostly_outside_the_photo(server: ComfyServer) -> None:
    message = refused_photo(server, CUT)
    assert f"image 1 of 1 ({CUT}, 160x150)" in message
    assert "of the face lies inside the photo, at least 50% are needed" in message
    assert "shows the whole face" in message


def test_a_face_with_broken_landmarks_does_not_count(server: ComfyServer) -> None:
    nan = synthesize(faces=[MarkedFace(320, 300, 90, has_nan=True)])
    name = server.add_input_image("nan_landmarks.png", Image.fromarray(nan))
    assert f"image 1 of 1 ({name}, 640x640): no face found" in refused_photo(server, name)


def test_an_image_of_one_pixel(server: ComfyServer) -> None:
    name = server.add_input_image("pixel.png", Image.new("RGB", (1, 1)))
    message = refused_photo(server, name)
    assert "image 1 of 1 is 1x1" in message
    assert "between 32 and 32766 px" in message


def test_a_photo_of_8k(server: ComfyServer) -> None:
    big = Image.fromarray(synthesize(1920, 1080, [MarkedFace(960, 500, 150, identity=1)]))
    name = server.add_input_image("8k.jpg", big.resize((7680, 4320), Image.Resampling.NEAREST))
    graph, faces = extract_graph(name)
    report = add_text(graph, faces, 4)
    result = server.run(graph.workflow).check()
    assert f"image 1 of 1 ({name}, 7680x4320): 1 face found" in result.outputs[report.id]["text"][0]
    assert result.images[0].size == (112, 112)


def spoiled(kind: str) -> Callable[[Graph], Node]:
    return lambda graph: graph.add("TinySpoilImage", image=add_photos(graph, [PERSON]), kind=kind)


def test_an_image_with_nan(server: ComfyServer) -> None:
    message = refused_photo(server, spoiled("nan"))
    assert "image 1 of 1 (640x640): 1.2% of its values are NaN or infinite" in message
    assert "VAE" in message


@pytest.mark.parametrize(
    ("kind", "found"),
    [("two channels", "(640, 640, 2)"), ("no batch", "(640, 640, 3)"), ("0 to 255", "values up to 255")],
)
def test_an_image_of_another_form(server: ComfyServer, kind: str, found: str) -> None:
    message = refused_photo(server, spoiled(kind))
    assert found in message


def with_alpha(graph: Graph) -> Node:
    opaque = graph.add("SolidMask", value=0.0, width=640, height=640)
    return graph.add("JoinImageWithAlpha", image=add_photos(graph, [PERSON]), alpha=opaque)


def test_an_image_with_alpha_is_the_same_photo(server: ComfyServer) -> None:
    graph, _ = extract_graph(PERSON)
    expected = server.run(graph.workflow).check().images[0]
    graph, _ = extract_graph(with_alpha)
    crop = server.run(graph.workflow).check().images[0]
    assert np.array_equal(np.asarray(crop), np.asarray(expected))


def test_a_grey_image_is_looked_at(server: ComfyServer) -> None:
    # The tiny detector sees colours only, so it finds nobody; that it was asked is what counts.
    assert "image 1 of 1 (640x640): no face found" in refused_photo(server, spoiled("grey"))


# --- face packages and recognisers ---


@pytest.fixture
def package(server: ComfyServer) -> Iterator[Path]:
    """A copy of the package under another name, to be damaged."""
    root = server.models_dir / "insightface" / "models"
    copy = root / "copied"
    shutil.copytree(root / PACKAGE, copy)
    yield copy
    shutil.rmtree(copy)


def refused_package(server: ComfyServer, package: str, recognizer: str = FROM_PACKAGE) -> str:
    graph = Graph()
    graph.add("PreviewAny", source=add_analyzer(graph, package, recognizer))
    return refusal(server, graph, "IDAdapterLoadFaceAnalyzer")


def test_a_package_that_is_not_there_is_no_choice(server: ComfyServer) -> None:
    graph = Graph()
    graph.add("PreviewAny", source=add_analyzer(graph, "antelopev2"))
    result = server.run(graph.workflow)
    (error,) = result.node_errors["1"]
    assert "antelopev2" in error
    assert PACKAGE in error


def test_no_package_at_all(server: ComfyServer) -> None:
    root = server.models_dir / "insightface"
    hidden = server.base / "insightface"
    root.rename(hidden)
    try:
        (hint,) = server.object_info("IDAdapterLoadFaceAnalyzer")["input"]["required"]["package"][1][
            "options"
        ]
        assert "models/insightface" in hint
        message = refused_package(server, hint)
    finally:
        hidden.rename(root)
    assert (
        f"the face package 'buffalo_l' was not found. Searched: {root / 'models' / 'buffalo_l'}, " in message
    )
    assert "github.com/deepinsight/insightface" in message
    assert "non-commercial" in message


def test_a_package_without_a_detector(server: ComfyServer, package: Path) -> None:
    (package / "det_10g.onnx").unlink()
    message = refused_package(server, "copied")
    assert f"{package} has no face detector" in message
    assert "w600k_r50.onnx (recognition)" in message
    assert "buffalo_l.zip" in message


def test_a_package_without_a_recogniser(server: ComfyServer, package: Path) -> None:
    (package / "w600k_r50.onnx").unlink()
    message = refused_package(server, "copied")
    assert f"{package} has no recognition model" in message
    assert "det_10g.onnx (detection)" in message
    # With a recogniser of its own it does.
    graph, _ = extract_graph(PERSON)
    graph.workflow["2"]["inputs"]["package"] = "copied"
    server.run(graph.workflow).check()


def test_a_damaged_package(server: ComfyServer, package: Path) -> None:
    file = package / "det_10g.onnx"
    file.write_bytes(file.read_bytes()[:20_000])
    message = refused_package(server, "copied")
    assert f"{file} (20,000 bytes) is not a complete ONNX model" in message
    assert "Delete it and get the package again" in message


def test_a_package_file_that_is_something_else(server: ComfyServer, package: Path) -> None:
    file = package / "w600k_r50.onnx"
    file.write_text("<html>404 not found</html>")
    message = refused_package(server, "copied")
    assert f"{file} (26 bytes) is not a complete ONNX model" in message


def test_an_adapter_as_recogniser(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/recognizers/wrong.safetensors")
    shutil.copy(server.models_dir / "idadapter" / ADAPTER_SD15, path)
    message = refused_package(server, PACKAGE, path.name)
    assert "wrong.safetensors" in message


def test_a_truncated_recogniser(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/recognizers/half.safetensors")
    path.write_bytes((path.parent / RECOGNIZER).read_bytes()[:100_000])
    message = refused_package(server, PACKAGE, path.name)
    assert "half.safetensors" in message


def test_features_of_the_packages_own_recogniser(server: ComfyServer) -> None:
    graph, nodes = uniid_graph()
    graph.workflow[nodes["analyzer"].id]["inputs"]["recognizer"] = FROM_PACKAGE
    message = refusal(server, graph, "IDAdapterMixFeatures")
    assert "In Load Face Analyzer set `recognizer` from 'from package' to UniID's network" in message


# --- adapters ---


def refused_adapter(server: ComfyServer, adapter: str, text_branch: str = NONE) -> str:
    graph = Graph()
    graph.add("PreviewAny", source=add_adapter(graph, adapter, text_branch))
    return refusal(server, graph, "IDAdapterLoadAdapter")


def weights(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(2, 2) for name in names}


class Code:
    """Unpickled, it would touch a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


UNRELATED: dict[str, tuple[dict[str, torch.Tensor], str, str]] = {
    "checkpoint": (
        weights("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"),
        "this is a Stable Diffusion checkpoint",
        "Load Checkpoint",
    ),
    "lora": (
        weights("lora_unet_down_blocks_0.lora_up.weight", "lora_unet_down_blocks_0.lora_down.weight"),
        "this is a LoRA",
        "Load LoRA",
    ),
    "ip-adapter": (
        weights("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"),
        "this is an IP-Adapter or InstantID file",
        "nodes of those packs",
    ),
    "clip vision": (
        weights("vision_model.embeddings.class_embedding"),
        "this is a CLIP vision model",
        "Load CLIP Vision",
    ),
    "something": (weights("banana.weight"), "it holds no ID adapter", "choose a UniID or IDAdapter file"),
}


@pytest.mark.parametrize("kind", UNRELATED)
def test_an_unrelated_file(server: ComfyServer, put: Callable[[str], Path], kind: str) -> None:
    state, what, advice = UNRELATED[kind]
    path = put("idadapter/unrelated.safetensors")
    save_file(state, path)
    message = refused_adapter(server, path.name)
    assert "unrelated.safetensors" in message
    assert what in message
    assert advice in message


def test_the_checkpoint_itself(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/checkpoint.safetensors")
    shutil.copy(server.models_dir / "checkpoints" / CHECKPOINT_NAMES["sdxl"], path)
    message = refused_adapter(server, path.name)
    assert (
        "checkpoint.safetensors: this is a Stable Diffusion checkpoint: load it with Load Checkpoint"
        in message
    )


def test_the_face_network(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/face.safetensors")
    shutil.copy(server.models_dir / "idadapter" / "recognizers" / RECOGNIZER, path)
    message = refused_adapter(server, path.name)
    assert "face recognition network (iResNet)" in message
    assert "models/idadapter/recognizers" in message


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>", bytes(range(256)) * 40])
def test_a_file_that_holds_no_weights(
    server: ComfyServer, put: Callable[[str], Path], suffix: str, content: bytes
) -> None:
    path = put(f"idadapter/broken{suffix}")
    path.write_bytes(content)
    message = refused_adapter(server, path.name)
    assert f"broken{suffix}: cannot be read ({len(content):,} bytes)" in message
    assert "download it again" in message


@pytest.mark.parametrize("source", [ADAPTER, ADAPTER_SDXL, FILE_NAMES["sdxl"]])
def test_a_truncated_adapter(server: ComfyServer, put: Callable[[str], Path], source: str) -> None:
    whole = server.models_dir / "idadapter" / source
    path = put(f"idadapter/half{whole.suffix}")
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    message = refused_adapter(server, path.name)
    assert f"half{whole.suffix}: cannot be read" in message
    assert "truncated" in message
    assert "download it again" in message


def test_a_plain_pickle_with_code(server: ComfyServer, put: Callable[[str], Path], tmp_path: Path) -> None:
    path, touched = put("idadapter/code.bin"), tmp_path / "touched"
    path.write_bytes(pickle.dumps({"more": Code(touched)}))
    assert "code.bin: cannot be read" in refused_adapter(server, path.name)
    assert not touched.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_code(
    server: ComfyServer, put: Callable[[str], Path], tmp_path: Path, zipped: bool
) -> None:
    path, touched = put("idadapter/code.bin"), tmp_path / "touched"
    content = {"weights": torch.ones(2), "more": Code(touched)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refused_adapter(server, path.name)
    assert "code.bin: loading this pickle would run code, which is never done here" in message
    assert ".safetensors" in message
    assert not touched.exists()


def test_an_adapter_with_missing_weights(server: ComfyServer, put: Callable[[str], Path]) -> None:
    state = torch.load(server.models_dir / "idadapter" / ADAPTER, weights_only=True)
    dropped = next(key for key in state if key.endswith("proj_out.bias"))
    path = put("idadapter/incomplete.bin")
    torch.save({key: tensor for key, tensor in state.items() if key != dropped}, path)
    message = refused_adapter(server, path.name)
    assert "incomplete.bin" in message
    assert "1 missing" in message
    assert dropped in message


def test_an_adapter_for_another_model(server: ComfyServer) -> None:
    graph, _ = uniid_graph(kind="sd15", id_prompt=False)
    message = refusal(server, graph, "IDAdapterApply")
    assert "uniid_tiny" in message or "adapter_branch/pytorch_model.bin" in message
    assert "TinySD15" in message
    assert "11" in message
    assert "7" in message
    assert "Load a checkpoint of the adapter's family" in message


def test_an_adapter_without_its_text_branch(server: ComfyServer) -> None:
    graph, nodes = uniid_graph(text_branch=NONE)
    info = add_text(graph, nodes["adapter"], 1)
    result = server.run(graph.workflow).check()
    text = result.outputs[info.id]["text"][0]
    assert "no text branch" in text
    assert "as text_branch" in text
    assert "no text branch" in result.log


def test_a_text_branch_without_an_adapter(server: ComfyServer) -> None:
    graph, nodes = uniid_graph(adapter=TEXT_BRANCH, text_branch=NONE)
    info = add_text(graph, nodes["adapter"], 1)
    result = server.run(graph.workflow).check()
    text = result.outputs[info.id]["text"][0]
    assert "no adapter branch" in text
    assert "Choose the adapter branch's file as adapter" in text


def test_no_adapter_file_at_all(server: ComfyServer) -> None:
    folder = server.models_dir / "idadapter"
    hidden = server.base / "idadapter"
    folder.rename(hidden)
    folder.mkdir()
    try:
        (hint,) = server.object_info("IDAdapterLoadAdapter")["input"]["required"]["adapter"][1]["options"]
        assert "models/idadapter" in hint
        message = refused_adapter(server, hint)
    finally:
        folder.rmdir()
        hidden.rename(folder)
    assert f"there is no file yet in {folder}" in message
    assert "refresh the node list" in message


def test_the_text_branch_chosen_twice(server: ComfyServer) -> None:
    message = refused_adapter(server, TEXT_BRANCH, TEXT_BRANCH)
    assert (
        "is chosen twice, as adapter and as text_branch; it already holds a text branch, but no adapter branch"
        in message
    )
    assert "choose the file of the adapter branch as adapter, or set text_branch to 'none'" in message


def test_the_branches_exchanged(server: ComfyServer) -> None:
    message = refused_adapter(server, TEXT_BRANCH, ADAPTER)
    assert "the two branches are exchanged" in message
    assert "Exchange the two files" in message


def test_the_adapter_branch_chosen_as_text_branch(server: ComfyServer) -> None:
    message = refused_adapter(server, ADAPTER, ADAPTER)
    assert "is chosen twice, as adapter and as text_branch; it holds no text branch" in message
    assert "choose the file of the text branch as text_branch" in message


@pytest.fixture
def other_recogniser(put: Callable[[str], Path], tmp_path: Path) -> str:
    """An adapter whose file says that it was trained with a recogniser that is not the one used here."""
    adapter = tiny_adapter(TINY_SDXL, tmp_path)
    path = put("idadapter/other_recogniser.safetensors")
    save_adapter(replace(adapter, config=replace(adapter.config, recognizer="0123456789abcdef")), path)
    return path.name


def test_features_of_another_recogniser_than_the_adapters(server: ComfyServer, other_recogniser: str) -> None:
    graph, _ = uniid_graph(adapter=other_recogniser, text_branch=NONE)
    message = refusal(server, graph, "IDAdapterMixFeatures")
    assert "other_recogniser.safetensors was trained with another face recogniser" in message
    assert "0123456789abcdef" in message
    assert "Load Face Analyzer" in message


# --- identities ---


def write_identity(server: ComfyServer, path: Path, recognizer: str = "", **changes: Any) -> None:
    """An identity file as the SDXL adapter of two files would make one."""
    folder = server.models_dir / "idadapter"
    adapter = load_adapter(folder / ADAPTER, folder / TEXT_BRANCH)
    tokens = torch.zeros(1, adapter.config.adapter_tokens, adapter.config.context_width)
    text = {
        name: torch.ones(1, 4, width) for name, width in zip("lg", adapter.config.text_widths, strict=True)
    }
    values = {
        "adapter_tokens": tokens,
        "adapter_tokens_uncond": tokens,
        "text_tokens": text,
        "method": adapter.method,
        "adapter": adapter.digest,
        "recognizer": recognizer,
        **changes,
    }
    save_identity(Identity(**values), path)


def load_identity_graph(name: str, adapter: str = ADAPTER, text_branch: str = TEXT_BRANCH) -> Graph:
    graph, nodes = uniid_graph(adapter=adapter, text_branch=text_branch)
    loaded = graph.add("IDAdapterLoadIdentity", identity=name, adapter=nodes["adapter"])
    rewire(graph, nodes["apply"], identity=loaded)
    rewire(graph, nodes["prompt"], identity=loaded)
    return graph


def test_an_identity_of_another_recogniser(
    server: ComfyServer, put: Callable[[str], Path], other_recogniser: str
) -> None:
    path = put("idadapter/identities/other.safetensors")
    digest = load_adapter(server.models_dir / "idadapter" / other_recogniser).digest
    write_identity(server, path, recognizer="fedcba9876543210", adapter=digest)
    graph = load_identity_graph(path.name, other_recogniser, NONE)
    message = refusal(server, graph, "IDAdapterLoadIdentity")
    assert "other.safetensors was made with the face recogniser fedcba9876543210" in message
    assert "0123456789abcdef" in message
    assert "Make the identity again" in message


def test_an_identity_of_another_adapter(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/identities/foreign.safetensors")
    write_identity(server, path, adapter="00000000deadbeef")
    message = refusal(server, load_identity_graph(path.name), "IDAdapterLoadIdentity")
    assert "foreign.safetensors was made with another adapter (weights 00000000deadbeef)" in message
    assert "make the identity again" in message


def test_an_identity_of_another_adapter_at_apply(server: ComfyServer) -> None:
    graph, nodes = uniid_graph(id_prompt=False)
    rewire(graph, nodes["apply"], adapter=add_adapter(graph, ADAPTER_SD15, NONE))
    message = refusal(server, graph, "IDAdapterApply")
    assert "was made with another adapter" in message
    assert ADAPTER_SD15 in message


def test_a_truncated_identity(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/identities/half.safetensors")
    write_identity(server, path)
    path.write_bytes(path.read_bytes()[:-1000])
    message = refusal(server, load_identity_graph(path.name), "IDAdapterLoadIdentity")
    assert "half.safetensors: cannot be read" in message
    assert "truncated" in message


def test_an_adapter_as_identity(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/identities/adapter.safetensors")
    shutil.copy(server.models_dir / "idadapter" / ADAPTER_SD15, path)
    message = refusal(server, load_identity_graph(path.name), "IDAdapterLoadIdentity")
    assert "this file holds an adapter, not an identity" in message


def test_an_identity_as_adapter(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/identity.safetensors")
    write_identity(server, path)
    assert "this file holds an identity, not an adapter" in refused_adapter(server, path.name)


def test_a_foreign_file_as_identity(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/identities/lora.safetensors")
    save_file(weights("lora_unet_down_blocks_0.lora_up.weight"), path)
    message = refusal(server, load_identity_graph(path.name), "IDAdapterLoadIdentity")
    assert "lora.safetensors: not an identity file" in message
    assert "this is a LoRA" in message


def save_graph(name: str, photo: str = PERSON) -> Graph:
    graph = Graph()
    faces = add_extract(graph, add_photos(graph, [photo]), add_analyzer(graph))
    identity = add_mix(graph, add_adapter(graph), faces)
    graph.add("IDAdapterSaveIdentity", identity=identity, name=name)
    return graph


@pytest.mark.parametrize(
    "name",
    ["../x", "a/b", "", "  ", "C:\\x", "..", ".hidden", "a\nb", "nul?", "CON", "x" * 200, "名" * 100, "/x/y"],
)
def test_an_identity_name_that_is_no_file_name(server: ComfyServer, name: str) -> None:
    message = refusal(server, save_graph(name), "IDAdapterSaveIdentity")
    assert "must be a plain file name without folders" in message
    assert repr(name) in message
    assert "models/idadapter/identities" in message


def test_another_identity_is_not_overwritten(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/identities/taken.safetensors")
    server.run(save_graph("taken").workflow).check()
    content = path.read_bytes()
    server.run(save_graph("taken.safetensors").workflow).check()  # the same person again
    message = refusal(server, save_graph("taken", STRANGER), "IDAdapterSaveIdentity")
    assert "taken.safetensors already holds another identity and is not overwritten" in message
    assert "Choose another name" in message
    assert path.read_bytes() == content


# --- IDAdapter ---


def test_a_clip_vision_model_of_another_width(server: ComfyServer) -> None:
    graph, _ = idadapter_graph(clip_vision=CLIP_VISION_NARROW)
    message = refusal(server, graph, "IDAdapterMixFeatures")
    assert "was trained with a CLIP vision model of width 64 with 16 patches" in message
    assert (
        "`clip_vision` of Extract Face Features is a CLIP vision model of width 32 with 16 patches" in message
    )
    assert "Choose the one that the adapter was trained with in Load CLIP Vision" in message


def test_no_clip_vision_model_at_all(server: ComfyServer) -> None:
    graph, _ = idadapter_graph(clip_vision=None)
    message = refusal(server, graph, "IDAdapterMixFeatures")
    assert "hold no CLIP vision features, which IDAdapter reads" in message
    assert (
        "Add Load CLIP Vision with the model the adapter was trained with (a CLIP vision model of width 64"
        in message
    )
    assert "wire it to `clip_vision` of Extract Face Features" in message


@pytest.mark.parametrize(
    ("adapter", "kind", "made_for", "found"),
    [
        ("sd15", "sdxl", "7 attention sites, text width 64", "TinySDXL: a UNet with 11 attention sites"),
        ("sdxl", "sd21", "11 attention sites, text width 128", "TinySD21: a UNet with 7 attention sites"),
    ],
)
def test_an_idadapter_for_another_model(
    server: ComfyServer, adapter: str, kind: str, made_for: str, found: str
) -> None:
    graph, _ = idadapter_graph(kind=kind, adapter=FILE_NAMES[adapter], id_prompt=False)
    message = refusal(server, graph, "IDAdapterApply")
    assert f"{FILE_NAMES[adapter]} was made for a UNet with {made_for}, this checkpoint is {found}" in message
    assert "Load a checkpoint of the adapter's family, or an adapter that was made for this one" in message


def test_an_sd21_idadapter_on_sd15(server: ComfyServer, put: Callable[[str], Path]) -> None:
    """Their layers are alike; the width of the text differs, though not between the tiny checkpoints."""
    path = put("idadapter/wide_text.safetensors")
    save_adapter(tiny_idadapter(replace(CONFIGS["sd21"], context_width=96)), path)
    graph, _ = idadapter_graph(kind="sd15", adapter=path.name, id_prompt=False)
    message = refusal(server, graph, "IDAdapterApply")
    assert "wide_text.safetensors was made for a UNet with 7 attention sites, text width 96" in message
    assert "this checkpoint is TinySD15: a UNet with 7 attention sites, text width 64" in message
    assert "Load a checkpoint of the adapter's family" in message


def test_the_word_of_an_sd21_idadapter_in_an_sd15_prompt(server: ComfyServer) -> None:
    graph, _ = idadapter_graph(kind="sd15", adapter=FILE_NAMES["sd21"])
    message = refusal(server, graph, "IDAdapterPrompt")
    assert (
        "text encoders of widths h 64, this CLIP is that of a model with text encoders of widths l 64"
        in message
    )
    assert "Wire the CLIP of a checkpoint of the adapter's family" in message


@pytest.mark.parametrize(
    ("references", "rule"), [(17, "bigger than max of 16"), (-1, "smaller than min of 0")]
)
def test_references_beyond_the_limits(server: ComfyServer, references: int, rule: str) -> None:
    graph, nodes = idadapter_graph()
    graph.workflow[nodes["identity"].id]["inputs"]["references"] = references
    (error,) = server.run(graph.workflow).node_errors[nodes["identity"].id]
    assert f"Value {references} {rule}: references" in error


def test_more_references_than_photos_is_all_photos(server: ComfyServer) -> None:
    graph, nodes = idadapter_graph((PERSON, STRANGER))
    expected = picture(server.run(graph.workflow))
    graph.workflow[nodes["identity"].id]["inputs"]["references"] = 16
    assert np.array_equal(picture(server.run(graph.workflow)), expected)


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("a red hat", "a red hat, person is sks"),
        ("", "person is sks"),
        ("many desks", "many desks, person is sks"),
        ("sks reads, sks smiles", "sks reads, sks smiles"),
    ],
)
def test_a_prompt_without_the_identity_word_or_with_several(
    server: ComfyServer, text: str, encoded: str
) -> None:
    """No mistake of the user's: the word is added, and each of them is the person."""

    def image(photo: str) -> np.ndarray:
        graph, nodes = idadapter_graph((photo,), weight=0.0)
        graph.workflow[nodes["prompt"].id]["inputs"].update(text=text, class_word="person")
        shown = add_text(graph, nodes["prompt"], 1)
        result = server.run(graph.workflow)
        assert text_of(result.check(), shown.id) == encoded
        return picture(result)

    assert difference(image(PERSON), image(STRANGER)) > 0.5


def spoiled_idadapter(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """The tiny SDXL adapter with its weights changed, under the settings of the whole one; the file's name."""
    state = idadapter_state(CONFIGS["sdxl"])
    config = json.dumps(asdict(CONFIGS["sdxl"]))
    metadata = {"format": "idadapter", "format_version": "1", "kind": "adapter", "method": "idadapter"}
    change(state)
    save_file(state, path, metadata={**metadata, "config": config})
    return path.name


DELTA = "layers.deltas.3.to_k.weight"


def test_an_idadapter_with_a_reshaped_difference(server: ComfyServer, put: Callable[[str], Path]) -> None:
    """At load, not at sampling."""

    def reshape(state: dict[str, torch.Tensor]) -> None:
        state[DELTA] = state[DELTA][:, :100].contiguous()

    message = refused_adapter(server, spoiled_idadapter(put("idadapter/reshaped.safetensors"), reshape))
    assert "reshaped.safetensors: not a complete IDAdapter" in message
    assert "1 of another shape" in message
    assert "deltas.3.to_k.weight is (64, 100) instead of (64, 128)" in message
    assert "Download or export the file again" in message


def test_an_idadapter_with_missing_weights(server: ComfyServer, put: Callable[[str], Path]) -> None:
    def drop(state: dict[str, torch.Tensor]) -> None:
        del state[DELTA]

    message = refused_adapter(server, spoiled_idadapter(put("idadapter/incomplete.safetensors"), drop))
    assert "incomplete.safetensors: not a complete IDAdapter" in message
    assert "1 missing" in message
    assert "deltas.3.to_k.weight" in message


def test_an_idadapter_with_nothing_wrong(server: ComfyServer, put: Callable[[str], Path]) -> None:
    """Else the tests above would prove nothing."""
    graph = Graph()
    add_text(graph, add_adapter(graph, spoiled_idadapter(put("idadapter/whole.safetensors"), dict), NONE), 1)
    server.run(graph.workflow).check()


def test_an_idadapter_with_code(server: ComfyServer, put: Callable[[str], Path], tmp_path: Path) -> None:
    path, touched = put("idadapter/code.bin"), tmp_path / "touched"
    torch.save({**idadapter_state(CONFIGS["sd15"]), "more": Code(touched)}, path)
    message = refused_adapter(server, path.name)
    assert "code.bin: loading this pickle would run code, which is never done here" in message
    assert ".safetensors" in message
    assert not touched.exists()


@pytest.mark.parametrize(
    ("adapter", "text_branch", "named"),
    [
        (ADAPTER, FILE_NAMES["sdxl"], FILE_NAMES["sdxl"]),
        (FILE_NAMES["sdxl"], TEXT_BRANCH, FILE_NAMES["sdxl"]),
        (FILE_NAMES["sdxl"], FRESH_NAMES["sdxl"], FILE_NAMES["sdxl"]),
    ],
)
def test_an_idadapter_with_a_text_branch(
    server: ComfyServer, adapter: str, text_branch: str, named: str
) -> None:
    message = refused_adapter(server, adapter, text_branch)
    assert f"{named} is an IDAdapter file, which holds everything" in message
    assert "choose it as adapter and set text_branch to 'none'" in message


def test_an_idadapter_as_identity(server: ComfyServer, put: Callable[[str], Path]) -> None:
    path = put("idadapter/identities/adapter.safetensors")
    shutil.copy(server.models_dir / "idadapter" / FILE_NAMES["sdxl"], path)
    message = refusal(server, load_identity_graph(path.name), "IDAdapterLoadIdentity")
    assert "this file holds an adapter, not an identity" in message


def test_an_identity_of_the_other_method(server: ComfyServer) -> None:
    graph, nodes = idadapter_graph(id_prompt=False)
    rewire(graph, nodes["apply"], adapter=add_adapter(graph))
    message = refusal(server, graph, "IDAdapterApply")
    assert "the identity was made with another adapter" in message
    assert "adapter_branch/pytorch_model.bin" in message
    assert "make the identity again from the photos with this adapter" in message


def test_the_word_in_a_clip_of_another_model(server: ComfyServer) -> None:
    graph, nodes = idadapter_graph()
    other = graph.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT_NAMES["sd15"])
    graph.workflow[nodes["prompt"].id]["inputs"]["clip"] = other[1]
    message = refusal(server, graph, "IDAdapterPrompt")
    assert "text encoders of widths l 64, g 64, this CLIP is that of a model with" in message
    assert "Wire the CLIP of a checkpoint" in message


def test_rescaling_with_nothing_to_rescale_is_warned_of(server: ComfyServer) -> None:
    """The gated layers are left alone by default, and this model has nothing else."""
    graph, nodes = idadapter_graph(seed=41)
    rescale = add_rescale(graph, nodes["apply"])
    rewire(graph, nodes["sampler"], model=rescale)
    log = server.run(graph.workflow).check().log
    assert "Normalized Identity Rescaling has nothing to rescale" in log
    assert "Switch `gated` on" in log
    graph.workflow[rescale.id]["inputs"]["gated"] = True
    assert "nothing to rescale" not in server.run(graph.workflow).check().log


# --- values ---


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("1, a", ["numbers separated by commas", "'1, a'"]),
        ("1, 2, 3", ["3 weights were given for 2 faces", "one number per face"]),
        ("0, 0", ["all weights are 0", "at least one face"]),
        ("1, -1", ["at least 0", "-1"]),
        ("1, nan", ["finite", "nan"]),
        ("1, inf", ["finite", "inf"]),
    ],
)
@pytest.mark.parametrize("build", [uniid_graph, idadapter_graph])
def test_weights_that_cannot_be(
    server: ComfyServer, build: Callable[..., Any], weights: str, words: list[str]
) -> None:
    graph, nodes = build((PERSON, STRANGER))
    graph.workflow[nodes["identity"].id]["inputs"]["weights"] = weights
    message = refusal(server, graph, "IDAdapterMixFeatures")
    assert all(word in message for word in words), message


def test_learned_mixing_with_uniid(server: ComfyServer) -> None:
    graph, nodes = uniid_graph()
    graph.workflow[nodes["identity"].id]["inputs"]["mode"] = "learned"
    message = refusal(server, graph, "IDAdapterMixFeatures")
    assert "UniID has no learned mixing" in message
    assert "concatenate or mean" in message


def test_a_window_that_ends_before_it_starts(server: ComfyServer) -> None:
    graph, nodes = uniid_graph()
    graph.workflow[nodes["apply"].id]["inputs"].update(start_percent=0.8, end_percent=0.2)
    message = refusal(server, graph, "IDAdapterApply")
    assert "start_percent (0.8) lies after end_percent (0.2)" in message
    assert "exchange them" in message


def with_mask(mask: Callable[[Graph], Node]) -> Graph:
    graph, nodes = uniid_graph(id_prompt=False)
    rewire(graph, nodes["apply"], attn_mask=mask(graph))
    return graph


@pytest.mark.parametrize("size", [(64, 64), (1000, 333), (7, 5), (1, 1)])
def test_a_mask_of_another_size(server: ComfyServer, size: tuple[int, int]) -> None:
    width, height = size
    white = with_mask(lambda graph: graph.add("SolidMask", value=1.0, width=width, height=height))
    image = np.asarray(server.run(white.workflow).check().images[0], dtype=np.int16)
    without, _ = uniid_graph(id_prompt=False)
    expected = np.asarray(server.run(without.workflow).check().images[0], dtype=np.int16)
    assert np.abs(image - expected).max() <= 1


@pytest.mark.parametrize(
    ("kind", "words"), [("nan", "not finite numbers"), ("four dimensions", "(1, 1, 8, 8)")]
)
def test_a_broken_mask(server: ComfyServer, kind: str, words: str) -> None:
    def broken(graph: Graph) -> Node:
        mask = graph.add("SolidMask", value=1.0, width=8, height=8)
        return graph.add("TinySpoilMask", mask=mask, kind=kind)

    message = refusal(server, with_mask(broken), "IDAdapterApply")
    assert "attn_mask" in message
    assert words in message


def test_a_prompt_of_300_tokens(server: ComfyServer) -> None:
    def image(text: str) -> np.ndarray:
        graph, nodes = uniid_graph()
        rewire(
            graph, nodes["sampler"], positive=add_prompt(graph, nodes["checkpoint"], nodes["identity"], text)
        )
        return np.asarray(server.run(graph.workflow).check().images[0], dtype=np.int16)

    long = "a <class word> " + "very " * 297
    # The last word counts, so nothing was cut off.
    assert np.abs(image(long + "red") - image(long + "blue")).mean() > 0.01


def test_a_clip_of_another_model(server: ComfyServer) -> None:
    graph, nodes = uniid_graph()
    other = graph.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT_NAMES["sd15"])
    graph.workflow[nodes["prompt"].id]["inputs"]["clip"] = other[1]
    message = refusal(server, graph, "IDAdapterPrompt")
    assert "l 64, g 64" in message
    assert "this CLIP is that of a model with text encoders of widths l 64." in message
    assert "Wire the CLIP of a checkpoint" in message


def test_an_identity_attached_for_which_no_adapter_is_applied(server: ComfyServer) -> None:
    graph, nodes = uniid_graph()
    attached = graph.add(
        "IDAdapterAttach", conditioning=nodes["positive"], identity=nodes["identity"], role="positive"
    )
    rewire(graph, nodes["rescale"], model=nodes["checkpoint"])
    rewire(graph, nodes["sampler"], positive=attached)
    message = refusal(server, graph, "KSampler")
    assert "adapters applied: none" in message
    assert "Add one Apply ID Adapter" in message


def test_two_identities_attached_to_one_application(server: ComfyServer) -> None:
    graph, nodes = uniid_graph()
    text = nodes["positive"]
    for _ in range(2):
        text = graph.add("IDAdapterAttach", conditioning=text, identity=nodes["identity"], role="positive")
    rewire(graph, nodes["sampler"], positive=text)
    message = refusal(server, graph, "KSampler")
    assert "no Apply ID Adapter is left on this model" in message
    assert "Add one Apply ID Adapter" in message


def test_the_server_goes_on_working(server: ComfyServer) -> None:
    graph, nodes = uniid_graph()
    expected = server.run(graph.workflow).check().images[0].tobytes()
    graph.workflow[nodes["photos"].id]["inputs"]["image"] = EMPTY
    refusal(server, graph, "IDAdapterExtractFaces")
    graph.workflow[nodes["photos"].id]["inputs"]["image"] = PERSON
    server.free()
    assert server.run(graph.workflow).check().images[0].tobytes() == expected
