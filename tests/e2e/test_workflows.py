"""The example workflows open in the real frontend, and run once tiny models stand for the real ones."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.harness.browser import Browser, GraphNode, find_chromium
from tests.harness.comfy import REPOSITORY
from tests.harness.server import PACK_NAME, ComfyServer
from tests.harness.uniid_graph import uniid_graph
from tests.harness.workflow import Workflow
from tests.tiny.checkpoints import CHECKPOINT_NAMES
from tests.tiny.files import ADAPTER, CLIP_VISION, PACKAGE, PERSON, PHOTOS, RECOGNIZER, TEXT_BRANCH
from tests.tiny.idadapter import FILE_NAMES

IDENTITY = "person of a workflow.safetensors"
WORKFLOWS = {path.stem: path for path in sorted((REPOSITORY / "workflows").glob("*.json"))}
LARGE = ("demo_world", "four_photos_one_person", "idadapter_sd15", "idadapter_sdxl", "uniid_sdxl")
TITLE_HEIGHT = 30
# What nodes grow by, in pixels, when they show their report and picture: of four photos, with a warning.
REPORTS = {
    "IDAdapterExtractFaces": 430,
    "IDAdapterMixFeatures": 340,
    "IDAdapterLoadAdapter": 170,
    "IDAdapterPrompt": 90,
    "IDAdapterApply": 90,
    "IDAdapterPersonalize": 380,
}

# Inputs that name a file: the folder it belongs into, and the tiny file that stands for it.
Stand = tuple[str, str]
EVERYWHERE: dict[tuple[str, str], Stand] = {
    ("LoadImage", "image"): ("input", PERSON),
    ("CLIPVisionLoader", "clip_name"): ("models/clip_vision", CLIP_VISION),
    ("IDAdapterLoadFaceAnalyzer", "package"): ("models/insightface/models", PACKAGE),
}


def checkpoint(kind: str) -> dict[tuple[str, str], Stand]:
    return {("CheckpointLoaderSimple", "ckpt_name"): ("models/checkpoints", CHECKPOINT_NAMES[kind])}


def idadapter(kind: str) -> dict[tuple[str, str], Stand]:
    return {("IDAdapterLoadAdapter", "adapter"): ("models/idadapter", FILE_NAMES[kind]), **checkpoint(kind)}


FACE_IDENTITY: dict[tuple[str, str], Stand] = {
    ("IDAdapterPersonalize", "adapter"): ("models/idadapter", ADAPTER),
    ("IDAdapterPersonalize", "text_branch"): ("models/idadapter", TEXT_BRANCH),
    ("IDAdapterPersonalize", "package"): ("models/insightface/models", PACKAGE),
    ("IDAdapterPersonalize", "recognizer"): ("models/idadapter/recognizers", RECOGNIZER),
    **checkpoint("sdxl"),
}
UNIID: dict[tuple[str, str], Stand] = {
    ("IDAdapterLoadAdapter", "adapter"): ("models/idadapter", ADAPTER),
    ("IDAdapterLoadAdapter", "text_branch"): ("models/idadapter", TEXT_BRANCH),
    **checkpoint("sdxl"),
}
FILES: dict[str, dict[tuple[str, str], Stand]] = {
    "one_photo": FACE_IDENTITY,
    "several_photos": FACE_IDENTITY,
    "saved_identity": {
        **UNIID,
        ("IDAdapterLoadIdentity", "identity"): ("models/idadapter/identities", IDENTITY),
    },
    "demo_world_app": {},
    "uniid_sdxl": {
        **UNIID,
        ("IDAdapterLoadFaceAnalyzer", "recognizer"): ("models/idadapter/recognizers", RECOGNIZER),
    },
    "idadapter_sd15": idadapter("sd15"),
    "idadapter_sdxl": idadapter("sdxl"),
    "four_photos_one_person": idadapter("sd15"),
    "demo_world": {},
}
# Kept small, so that a run takes seconds on a CPU.
SMALL = {"EmptyLatentImage": {"width": 64, "height": 64}, "KSampler": {"steps": 4}}

pytestmark = pytest.mark.parametrize("name", WORKFLOWS)
needs_browser = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium: install it or set CHROMIUM to its executable"
)


@dataclass(frozen=True)
class Opened:
    """What the frontend made of a workflow."""

    nodes_without_files: list[GraphNode]
    """While the user has none of the files that the workflow names."""
    bad_nodes: list[GraphNode]
    complaints: list[str]
    prompt: Workflow


def read(name: str) -> dict[str, Any]:
    workflow: dict[str, Any] = json.loads(WORKFLOWS[name].read_text(encoding="utf-8"))
    return workflow


def named_files(name: str, prompt: Workflow) -> list[tuple[dict[str, Any], str, str, str]]:
    """The inputs of each node, the name of one that names a file, the file's folder and its stand-in."""
    photos = iter(PHOTOS)
    return [
        (node["inputs"], field, folder, next(photos) if class_type == "LoadImage" else stand_in)
        for node in prompt.values()
        for (class_type, field), (folder, stand_in) in {**EVERYWHERE, **FILES[name]}.items()
        if node["class_type"] == class_type
    ]


@pytest.fixture(scope="module")
def opened(server: ComfyServer) -> dict[str, Opened]:
    """Every workflow, opened without and with the files that it names (empty ones: the frontend only lists them)."""
    with Browser(server.url) as browser:
        result = {}
        for name in WORKFLOWS:
            browser.load_workflow(read(name))
            nodes, prompt = browser.nodes(), browser.graph_to_prompt()
            missing = [
                path
                for inputs, field, folder, _ in named_files(name, prompt)
                if inputs[field] != "auto" and not (path := server.base / folder / inputs[field]).exists()
            ]
            try:
                for path in missing:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.touch()
                browser.open()
                browser.load_workflow(read(name))
                complaints = [*browser.toasts(), *browser.dialogs(), *browser.console_errors]
                complaints += filter(None, [browser.error_overlay()])
                result[name] = Opened(nodes, browser.bad_nodes(), complaints, prompt)
            finally:
                for path in missing:
                    path.unlink(missing_ok=True)
    return result


@pytest.mark.server
@pytest.mark.browser
@needs_browser
def test_every_type_is_known_even_without_the_files(opened: dict[str, Opened], name: str) -> None:
    nodes = opened[name].nodes_without_files
    assert len(nodes) == len(read(name)["nodes"])
    assert [node for node in nodes if not node.known] == []


@pytest.mark.server
@pytest.mark.browser
@needs_browser
def test_it_opens_without_a_complaint_once_the_files_are_there(opened: dict[str, Opened], name: str) -> None:
    assert opened[name].bad_nodes == []
    assert opened[name].complaints == []


@pytest.fixture(scope="module")
def saved_identity(server: ComfyServer) -> Iterator[None]:
    """The identity that a workflow loads."""
    graph, nodes = uniid_graph((PERSON,))
    graph.add("IDAdapterSaveIdentity", identity=nodes["identity"], name=IDENTITY.removesuffix(".safetensors"))
    server.run(graph.workflow).check()
    yield
    (server.base / "models" / "idadapter" / "identities" / IDENTITY).unlink()


@pytest.mark.server
@pytest.mark.browser
@needs_browser
@pytest.mark.usefixtures("saved_identity")
def test_it_runs_to_a_picture(server: ComfyServer, opened: dict[str, Opened], name: str) -> None:
    prompt: Workflow = json.loads(json.dumps(opened[name].prompt))
    for inputs, field, _, stand_in in named_files(name, prompt):
        inputs[field] = stand_in
    for node in prompt.values():
        node["inputs"] |= SMALL.get(node["class_type"], {})
    result = server.run(prompt).check()
    ran = {node_id.partition(".")[0] for node_id in result.executed_nodes}  # parts of a node as the node
    assert ran | set(result.cached_nodes) == set(prompt)
    saved = [node_id for node_id, node in prompt.items() if node["class_type"] == "SaveImage"]
    for node_id in saved:
        (image,) = result.images_by_node[node_id]
        assert image.format == "PNG"
        assert image.size == ((512, 512) if name == "demo_world_app" else (64, 64))
        # Neither black, as a NaN would leave it, nor clipped flat.
        assert np.asarray(image, dtype=np.float32).std() > 10
    assert saved


@pytest.mark.server
def test_the_server_offers_it_as_a_template(server: ComfyServer, name: str) -> None:
    assert name in json.loads(server.get("/workflow_templates"))[PACK_NAME]
    assert json.loads(server.get(f"/api/workflow_templates/{PACK_NAME}/{name}.json")) == read(name)


def test_no_node_covers_another_even_with_its_report(name: str) -> None:
    boxes = [
        (
            node["id"],
            *node["pos"],
            node["pos"][0] + node["size"][0],
            node["pos"][1] + node["size"][1] + REPORTS.get(node["type"], 0),
        )
        for node in read(name)["nodes"]
    ]
    overlapping = [
        (a, b)
        for (a, left, top, right, bottom), (
            b,
            other_left,
            other_top,
            other_right,
            other_bottom,
        ) in combinations(boxes, 2)
        if left < other_right
        and other_left < right
        and top - TITLE_HEIGHT < other_bottom
        and other_top - TITLE_HEIGHT < bottom
    ]
    assert overlapping == []


def test_it_explains_itself(name: str) -> None:
    """Every node but the notes stands in a group, and every group holds a note."""
    workflow = read(name)
    notes = {node["id"] for node in workflow["nodes"] if node["type"] in ("Note", "MarkdownNote")}
    members = []
    for group in workflow["groups"]:
        left, top, width, height = group["bounding"]
        inside = {
            node["id"]
            for node in workflow["nodes"]
            if left <= node["pos"][0] <= left + width and top <= node["pos"][1] <= top + height
        }
        assert inside & notes, f"group {group['title']} has no note"
        members.append(inside)
    assert {node["id"] for node in workflow["nodes"]} - set().union(*members) <= notes


@pytest.mark.server
def test_it_has_a_card(server: ComfyServer, name: str) -> None:
    data = server.get(f"/api/workflow_templates/{PACK_NAME}/{name}.jpg")
    with Image.open(io.BytesIO(data)) as card:
        assert card.size == (384, 384)
        assert np.asarray(card).std() > 30, "a picture, and no plain colour"


def test_its_notes_can_be_read_in_both_renderers(name: str) -> None:
    """Nodes 2.0 draws code in a note blue on blue."""
    texts = [node["widgets_values"][0] for node in read(name)["nodes"] if node["type"] == "MarkdownNote"]
    assert [text for text in texts if "`" in text] == []


def test_it_fits_a_screen(name: str) -> None:
    if name in LARGE:
        return
    for group in read(name)["groups"]:
        left, top, width, height = group["bounding"]
        assert left >= 0
        assert top >= 0
        assert left + width <= 2000
        assert top + height <= 1100


def test_every_node_names_its_pack_and_every_public_file_its_address(name: str) -> None:
    """ComfyUI offers to install the one and to download the other."""
    for node in read(name)["nodes"]:
        properties = node["properties"]
        assert properties["cnr_id"] == (
            "comfyui-idadapter" if node["type"].startswith("IDAdapter") else "comfy-core"
        )
        assert properties["ver"]
        if node["type"] in ("CheckpointLoaderSimple", "CLIPVisionLoader"):
            (file,) = properties["models"]
            assert file["name"] == node["widgets_values"][0]
            assert file["url"].startswith("https://huggingface.co/")
            assert file["url"].endswith(".safetensors")
            assert file["directory"] == (
                "clip_vision" if node["type"] == "CLIPVisionLoader" else "checkpoints"
            )


def test_an_app_names_widgets_that_exist(name: str) -> None:
    workflow = read(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    linear = workflow["extra"].get("linearData", {"inputs": [], "outputs": []})
    for number, widget in linear["inputs"]:
        assert widget in [entry.get("widget", {}).get("name") for entry in nodes[number]["inputs"]], widget
    assert all(nodes[number]["type"] == "SaveImage" for number in linear["outputs"])
    assert bool(linear["outputs"]) == (name not in LARGE)
