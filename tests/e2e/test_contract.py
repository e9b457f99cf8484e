"""What users and saved workflows rely on: node ids, inputs, outputs, texts and help pages.

tests/e2e/object_info.json is the public interface as the server tells it to the frontend. A change of it breaks saved
workflows, unless something migrates them; additions at the end are safe.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness.comfy import REPOSITORY
from tests.harness.server import PACK_NAME, ComfyServer

pytestmark = pytest.mark.server

SNAPSHOT = Path(__file__).with_name("object_info.json")
TEXTS = REPOSITORY / "locales" / "en" / "nodeDefs.json"
NODES = (
    "IDAdapterLoadFaceAnalyzer",
    "IDAdapterExtractFaces",
    "IDAdapterEnrich",
    "IDAdapterLoadAdapter",
    "IDAdapterMixFeatures",
    "IDAdapterApply",
    "IDAdapterRescale",
    "IDAdapterPrompt",
    "IDAdapterAttach",
    "IDAdapterSaveIdentity",
    "IDAdapterLoadIdentity",
    "IDAdapterLoadDemoWorld",
    "IDAdapterDemoPerson",
    "IDAdapterDoctor",
    "IDAdapterReport",
    "IDAdapterMergeIdentities",
    "IDAdapterFaceMasks",
    "IDAdapterPersonalize",
)
# Their choices are the user's files.
FILE_LISTS = {
    ("IDAdapterLoadFaceAnalyzer", "package"),
    ("IDAdapterLoadFaceAnalyzer", "recognizer"),
    ("IDAdapterLoadAdapter", "adapter"),
    ("IDAdapterLoadAdapter", "text_branch"),
    ("IDAdapterLoadIdentity", "identity"),
    ("IDAdapterPersonalize", "adapter"),
    ("IDAdapterPersonalize", "text_branch"),
    ("IDAdapterPersonalize", "package"),
    ("IDAdapterPersonalize", "recognizer"),
    ("IDAdapterPersonalize", "vision"),
}


@pytest.fixture(scope="module")
def infos(server: ComfyServer) -> dict[str, dict[str, Any]]:
    """What the server tells about each node of the pack."""
    everything = server.object_info()
    return {
        name: info
        for name, info in everything.items()
        if info["python_module"] == f"custom_nodes.{PACK_NAME}"
    }


def inputs_of(info: dict[str, Any]) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Inputs in order, without those that the server fills in: name to (required or optional, type, options)."""
    found = {}
    for group in ("required", "optional"):
        for name in info["input_order"].get(group, []):
            kind, *options = info["input"][group][name]
            found[name] = (group, kind, options[0] if options else {})
    return found


def interface(infos: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All that a saved workflow depends on; nothing that is only text."""
    described = {}
    for name in sorted(infos):
        info = infos[name]
        inputs = []
        for field, (group, kind, options) in inputs_of(info).items():
            dropped = {"tooltip", "display_name"} | ({"options"} if (name, field) in FILE_LISTS else set())
            kept = {key: value for key, value in sorted(options.items()) if key not in dropped}
            inputs.append({"name": field, "group": group, "type": kind, **kept})
        described[name] = {
            "inputs": inputs,
            "outputs": list(map(list, zip(info["output_name"], info["output"], strict=True))),
            "output_node": info["output_node"],
            "category": info["category"],
        }
    return described


def test_the_interface_is_the_published_one(infos: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    found = interface(infos)
    actual = tmp_path / SNAPSHOT.name
    actual.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    expected = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    assert found == expected, f"the interface has changed; as it is now: {actual}"


def test_every_node_is_there(infos: dict[str, dict[str, Any]]) -> None:
    assert set(infos) == set(NODES)


@pytest.mark.parametrize("name", NODES)
def test_every_input_and_output_has_a_tooltip(infos: dict[str, dict[str, Any]], name: str) -> None:
    info = infos[name]
    silent = [field for field, (_, _, options) in inputs_of(info).items() if not options.get("tooltip")]
    assert silent == []
    assert len(info["output_tooltips"]) == len(info["output"]) > 0
    assert all(info["output_tooltips"])


@pytest.mark.parametrize("name", NODES)
def test_every_node_explains_itself(infos: dict[str, dict[str, Any]], name: str) -> None:
    info = infos[name]
    assert info["description"].endswith(".")
    assert info["display_name"] != name
    assert info["category"] == "IDAdapter"


@pytest.mark.parametrize("name", NODES)
def test_every_node_has_a_help_page(server: ComfyServer, infos: dict[str, dict[str, Any]], name: str) -> None:
    page = REPOSITORY / "web" / "docs" / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    assert server.get(f"/extensions/{PACK_NAME}/docs/{name}.md").decode("utf-8") == text
    missing = [field for field in inputs_of(infos[name]) if f"`{field}`" not in text]
    assert missing == [], "inputs that the page does not mention"


def test_the_translated_texts_belong_to_nodes_and_sockets_that_exist(
    server: ComfyServer, infos: dict[str, dict[str, Any]]
) -> None:
    if not TEXTS.is_file():
        pytest.skip("no locales/en/nodeDefs.json")
    texts = json.loads(TEXTS.read_text(encoding="utf-8"))
    assert set(texts) <= set(infos)
    for name, entry in texts.items():
        assert set(entry.get("inputs", {})) <= set(inputs_of(infos[name])), name
        slots = {str(slot) for slot in range(len(infos[name]["output"]))}
        assert set(entry.get("outputs", {})) <= slots, name
    served = json.loads(server.get("/i18n"))["en"]["nodeDefs"]
    assert all(served[name] == entry for name, entry in texts.items())
