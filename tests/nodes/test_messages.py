"""What reaches the user beside the result: messages on nodes, short names of errors, and the files that photos come from."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import pickle
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from idadapter_core import errors as core_errors
from tests.harness.comfy import REPOSITORY, pack_nodes

SEND = "idadapter.messages"


class Server:
    """Stands for ComfyUI's server: notes what it is asked to send."""

    def __init__(self, client_id: str | None) -> None:
        self.client_id = client_id
        self.last_prompt_id = "running"
        self.sent: list[tuple[str, dict[str, Any], str | None]] = []

    def send_sync(self, event: str, data: dict[str, Any], client: str | None) -> None:
        self.sent.append((event, data, client))


def server_of(monkeypatch: pytest.MonkeyPatch, client_id: str | None) -> Server:
    server = Server(client_id)
    module = ModuleType("server")
    module.PromptServer = SimpleNamespace(instance=server)  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "server", module)
    return server


# --- messages ---


def test_messages_go_to_the_page_whose_prompt_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from ComfyUI_IDAdapter.nodes.host import messages

    server = server_of(monkeypatch, "page")
    messages.show("12:3", "Apply ID Adapter", "run", [messages.warning("mind this")])
    expected = {
        "node": "12:3",
        "topic": "run",
        "messages": [{"level": "warning", "text": "mind this"}],
        "prompt_id": "running",
    }
    assert server.sent == [(SEND, expected, "page")]


def test_messages_of_a_queued_prompt_are_not_taken_for_those_of_the_running_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ComfyUI_IDAdapter.nodes.host import messages

    server = server_of(monkeypatch, "page")
    messages.show("7", "ID Prompt", "graph", [], client="other page")
    ((_, data, client),) = server.sent
    assert (data["messages"], data["prompt_id"], client) == ([], None, "other page")


@pytest.mark.parametrize(("node_id", "client"), [("7", None), (None, "page")])
def test_without_a_page_or_a_node_a_warning_is_only_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, node_id: str | None, client: str | None
) -> None:
    """A message to nobody in particular would reach every open page, and be drawn on whatever has that id there."""
    from ComfyUI_IDAdapter.nodes.host import messages

    server = server_of(monkeypatch, client)
    messages.show(node_id, "Apply ID Adapter", "run", [messages.warning("mind this"), messages.info("fine")])
    assert server.sent == []
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "Apply ID Adapter: mind this"
    ]


def test_of_very_many_remarks_the_warnings_are_kept() -> None:
    from ComfyUI_IDAdapter.idadapter_core.types import Remark
    from ComfyUI_IDAdapter.nodes.host.messages import from_remarks

    remarks = [Remark(f"photo {i}", is_warning=i in (40, 90)) for i in range(100)]
    messages = from_remarks(remarks)
    assert [message.text for message in messages] == [
        *(f"photo {i}" for i in (*range(10), 40, 90)),
        "… and 88 more, in the report output.",
    ]
    assert [message.level for message in messages].count("warning") == 2
    assert len(from_remarks(remarks[:12])) == 12


# --- names of errors ---


@pytest.fixture
def pack_errors(pack: ModuleType) -> Any:
    pack_nodes()  # ComfyUI loads the pack
    from ComfyUI_IDAdapter.idadapter_core import errors

    return errors


NAMES = [
    name
    for name, thing in vars(core_errors).items()
    if isinstance(thing, type) and issubclass(thing, core_errors.IDAdapterError)
]


@pytest.mark.parametrize("name", NAMES)
def test_comfyui_shows_an_error_by_its_short_name(pack_errors: Any, name: str) -> None:
    from execution import full_type_name

    error = getattr(pack_errors, name)("mind this")
    error.detail = 7
    assert full_type_name(type(error)) == name
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert (other.args, other.detail) == (("mind this",), 7)
    assert getattr(core_errors, name).__module__ == "idadapter_core.errors", "the trainer's are as they were"


def fail() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError

    raise MismatchError("mind this")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_worker_process_can_raise_it(pack_errors: Any) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        with pytest.raises(pack_errors.MismatchError, match="mind this"):
            pool.submit(fail).result()


def test_the_extension_and_the_server_speak_of_the_same_things(pack: ModuleType) -> None:
    from ComfyUI_IDAdapter.nodes.host import messages

    errors, shown = (
        (REPOSITORY / "web" / "js" / name).read_text(encoding="utf-8")
        for name in ("errors.js", "messages.js")
    )
    listed = re.search(r"ERRORS = new Set\(\[(.*?)\]\)", errors, re.DOTALL)
    assert listed is not None
    assert sorted(re.findall(r'"(\w+)"', listed[1])) == sorted(NAMES)
    assert f'EVENT = "{messages.EVENT}"' in shown
    assert f'REPORT_KEY = "{messages.REPORT_KEY}"' in shown


# --- the files behind photos ---


@pytest.fixture
def photos(pack: ModuleType) -> Iterator[None]:
    import folder_paths

    folder = Path(folder_paths.get_input_directory())
    folder.mkdir(parents=True, exist_ok=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [Image.new("RGB", (64, 48), color) for color in ("red", "green", "blue")]
    files = {
        "wide.png": lambda path: frames[0].save(path),
        "upright.jpg": lambda path: frames[0].save(path, exif=turned),
        "three.webp": lambda path: frames[0].save(path, save_all=True, append_images=frames[1:]),
    }
    for name, write in files.items():
        write(folder / name)
    yield
    for name in files:
        (folder / name).unlink()


def load(name: str) -> dict[str, Any]:
    return {"class_type": "LoadImage", "inputs": {"image": name}}


PROMPT = {
    "1": load("wide.png"),
    "2": load("upright.jpg"),
    "3": load("three.webp"),
    "4": {"class_type": "ImageBatch", "inputs": {"image2": ["2", 0], "image1": ["1", 0]}},
    "5": {
        "class_type": "BatchImagesNode",
        "inputs": {"images.image10": ["4", 0], "images.image2": ["3", 0], "images.image1": ["2", 0]},
    },
    "6": {"class_type": "ImageScale", "inputs": {"image": ["1", 0], "width": 8}},
    "7": {"class_type": "ImageBatch", "inputs": {"image1": ["7", 0], "image2": ["1", 0]}},
    "8": load("absent.png"),
    "9": {"class_type": "IDAdapterEnrich", "inputs": {"image": ["4", 0], "count": 3}},
    "10": {"class_type": "IDAdapterEnrich", "inputs": {"image": ["4", 0], "count": 1}},
}
WIDE, UPRIGHT, FRAME = ("wide.png", 64, 48), ("upright.jpg", 48, 64), ("three.webp", 64, 48)


@pytest.mark.parametrize(
    ("source", "count", "expected"),
    [
        ("1", 1, [WIDE]),
        ("2", 1, [UPRIGHT]),
        ("4", 2, [WIDE, UPRIGHT]),
        ("5", 6, [UPRIGHT, FRAME, FRAME, FRAME, WIDE, UPRIGHT]),
        ("5", 5, []),  # not what arrived
        ("6", 1, []),  # changed on the way
        ("7", 2, []),  # wired in a circle
        ("8", 1, []),
        ("9", 3, [WIDE, UPRIGHT, None]),
        ("10", 2, [WIDE, UPRIGHT]),
        ("11", 1, []),
    ],
)
def test_photos_are_followed_to_their_files(
    photos: None, source: str, count: int, expected: list[tuple[str, int, int] | None]
) -> None:
    from ComfyUI_IDAdapter.nodes.host.origins import photo_origins

    prompt = {**PROMPT, "12:3": {"class_type": "IDAdapterExtractFaces", "inputs": {"image": [source, 0]}}}
    prompt["12:3"]["inputs"]["more_photos.photo_2"] = ["1", 0]
    found = photo_origins(_running(prompt, "12:3"), ["image"], count)
    assert [origin and (origin.file, origin.width, origin.height) for origin in found] == expected
    if expected:
        with_more = photo_origins(_running(prompt, "12:3"), ["image", "more_photos.photo_2"], count + 1)
        assert [origin and origin.file for origin in with_more[count:]] == ["wide.png"]
    assert photo_origins(_running(prompt, "99"), ["image"], count) == []
    assert photo_origins(None, ["image"], count) == []


def _running(prompt: dict[str, Any], node: str) -> SimpleNamespace:
    """The hidden inputs of a node in a running prompt."""
    from comfy_execution.graph import DynamicPrompt

    return SimpleNamespace(dynprompt=DynamicPrompt(prompt), unique_id=node)


def test_messages_of_a_prompt_that_a_program_queued_reach_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even that of the prompt which ran last."""
    from ComfyUI_IDAdapter.nodes.host import messages

    server = server_of(monkeypatch, "page")
    messages.show("7", "ID Prompt", "graph", [messages.warning("something is missing")], client=None)
    assert server.sent == []
