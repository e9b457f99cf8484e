"""Reports, warnings, pictures and errors in the real frontend, as they look in both of its renderers.

SCREENSHOTS=1 in the environment saves what was looked at in output/screenshots.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image

from idadapter_core.faces.preview import CHOSEN_COLOR, LEFT_OUT_COLOR
from tests.harness.browser import Browser, Rect, find_chromium
from tests.harness.comfy import REPOSITORY
from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import NONE, add_attach, rewire, uniid_graph
from tests.harness.workflow import Graph, Node
from tests.tiny.face_package import MarkedFace, synthesize
from tests.tiny.files import ADAPTER_SD15, EMPTY, PERSON, PHOTOS

pytestmark = [
    pytest.mark.server,
    pytest.mark.browser,
    pytest.mark.skipif(
        find_chromium() is None, reason="no Chromium: install it or set CHROMIUM to its executable"
    ),
]

STRANGER = "somebody_else.png"
FIVE = (*PHOTOS[:2], STRANGER, PHOTOS[2], EMPTY)
WIDGET = "idadapter_messages"
EVENT = "idadapter.messages"
TOAST = "document.querySelector('.p-toast-message')"
# Those of the attempt before fade away for a moment.
ONE_TOAST = "document.querySelectorAll('.p-toast-message').length === 1"
OVERLAY = "document.querySelector('[data-testid=error-overlay]')"


@dataclass(frozen=True)
class Page:
    """A workflow that has run once: five photos, a stranger in the third, nobody in the last."""

    browser: Browser
    nodes_2: bool
    ids: dict[str, str]  # by the role of a node
    before: dict[str, Any]  # the workflow before the run
    prompt: dict[str, Any]  # as it was sent

    def node(self, role: str) -> str:
        """JavaScript of a node."""
        return f"window.app.rootGraph.getNodeById({self.ids[role]})"

    def element(self, role: str) -> str:
        """JavaScript of the element that holds a node's messages."""
        return f"{self.node(role)}.widgets.find((widget) => widget.name === '{WIDGET}')?.element"

    def messages(self, role: str, level: str = "") -> list[str]:
        """Texts of the messages on a node."""
        selector = f"p.{level}" if level else "p"
        lines = f"[...({self.element(role)}?.querySelectorAll('{selector}') ?? [])]"
        return list(self.browser.evaluate(f"{lines}.map((line) => line.textContent)"))

    def say(self, node: str, topic: str, *messages: tuple[str, str], prompt_id: str | None = None) -> None:
        entries = [{"level": level, "text": text} for level, text in messages]
        self.browser.receive(
            EVENT, {"node": node, "topic": topic, "messages": entries, "prompt_id": prompt_id}
        )

    def node_rect(self, role: str) -> Rect:
        """Where a node is on the page, without its title."""
        if self.nodes_2:
            rect = self.browser.rect(f"document.querySelector('[data-node-id=\"{self.ids[role]}\"]')")
        else:
            left, top, width, height = self.browser.evaluate(
                f"(() => {{ const node = {self.node(role)}, canvas = window.app.canvas;"
                "const box = canvas.canvas.getBoundingClientRect();"
                "const [x, y] = canvas.ds.convertOffsetToCanvas(node.pos);"
                "return [box.left + x, box.top + y, node.size[0], node.size[1]]; })()"
            )
            rect = Rect(left, top, left + width, top + height)
        assert rect is not None
        return rect

    def other_rects(self, role: str) -> list[Rect]:
        """Where the other widgets of a node are, and its picture."""
        if self.nodes_2:
            node = f"document.querySelector('[data-node-id=\"{self.ids[role]}\"]')"
            boxes = self.browser.evaluate(
                f"[...{node}.querySelectorAll('[data-testid=node-widget], img')]"
                f".filter((part) => !part.querySelector('.idadapter-messages'))"
                ".map((part) => part.getBoundingClientRect()).map((box) => [box.left, box.top, box.right, box.bottom])"
            )
            return [Rect(*box) for box in boxes]
        node = self.node_rect(role)
        spans = self.browser.evaluate(
            f"{self.node(role)}.widgets.filter((widget) => widget.name !== '{WIDGET}')"
            ".map((widget) => [widget.y, widget.y + (widget.computedHeight ?? 20)])"
        )
        return [Rect(node.left, node.top + top, node.right, node.top + bottom) for top, bottom in spans]


def graph_of(*photos: str) -> tuple[Graph, dict[str, Node]]:
    graph, nodes = uniid_graph(photos, kind="sd15", adapter=ADAPTER_SD15, text_branch=NONE)
    graph.workflow[nodes["faces"].id]["inputs"]["on_missing"] = "skip"
    return graph, nodes


def open_workflow(browser: Browser, graph: Graph) -> None:
    """With seeds that stay as they are: what changes a workflow is then us."""
    browser.load_prompt(graph.workflow)
    browser.evaluate(
        "window.app.rootGraph.nodes.flatMap((node) => node.widgets ?? [])"
        ".filter((widget) => widget.name === 'control_after_generate').forEach((widget) => { widget.value = 'fixed'; })"
    )


def keep_screenshot(page: Page, name: str) -> None:
    if os.environ.get("SCREENSHOTS"):
        folder = REPOSITORY / "output" / "screenshots"
        folder.mkdir(parents=True, exist_ok=True)
        page.browser.screenshot(folder / f"{name}_{'nodes_2' if page.nodes_2 else 'classic'}.png")


@pytest.fixture(scope="module")
def browser(server: ComfyServer) -> Iterator[Browser]:
    face = MarkedFace(320, 300, 90, identity=2, skin=(120, 130, 190))
    photo = synthesize(
        faces=[face], background=(250, 250, 250)
    )  # the tiny network looks at the background, too
    server.add_input_image(STRANGER, Image.fromarray(photo))
    with Browser(server.url, timeout=30) as running:
        yield running
        running.use_renderer(False)  # the setting is the server's, and others look at it after us


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes_2"])
def page(server: ComfyServer, browser: Browser, request: pytest.FixtureRequest) -> Page:
    browser.use_renderer(request.param)
    graph, nodes = graph_of(*FIVE)
    open_workflow(browser, graph)
    before, prompt = browser.serialize(), browser.graph_to_prompt()
    browser.run()
    ids = {role: node.id for role, node in nodes.items()}
    page = Page(browser, request.param, ids, before, prompt)
    for role in ("faces", "identity"):
        browser.show(page.ids[role])
        browser.wait_for(f"{picture_count(page, role)} > 0", "no picture in the node")
    return page


def picture_count(page: Page, role: str) -> str:
    """JavaScript of the number of pictures that a node shows and that are loaded."""
    if page.nodes_2:
        pictures = f"[...(document.querySelector('[data-node-id=\"{page.ids[role]}\"]')?.querySelectorAll('img') ?? [])]"
    else:
        pictures = f"({page.node(role)}.imgs ?? [])"
    return f"{pictures}.filter((picture) => picture.complete && picture.naturalWidth).length"


# --- reports and pictures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "report", "warnings"),
    [
        (
            "faces",
            "image 1 of 5 (person.png, 640x640): 1 face found",
            ["image 5 of 5 (empty.png, 640x640): left out"],
        ),
        ("identity", "used 3 of 4 photos", ["photo 3: left out, it disagrees with the others"]),
        ("prompt", 'Class word: "man", as the face package sees the photos.', []),
        ("adapter", "uniid_tiny_sd15.safetensors: UniID", []),
    ],
)
def test_the_report_is_on_the_node(page: Page, role: str, report: str, warnings: list[str]) -> None:
    browser = page.browser
    browser.show(page.ids[role])
    keep_screenshot(page, f"report_{role}")
    assert page.messages(role)[0].startswith(report)
    found = page.messages(role, "warning")
    assert [text.startswith(start) for text, start in zip(found, warnings, strict=True)] == [True] * len(
        warnings
    )
    text = browser.rect(page.element(role))
    assert text is not None
    assert text.width > 200
    assert text.height > 12 * len(page.messages(role))
    assert page.node_rect(role).contains(text)
    assert not any(text.overlaps(other) for other in page.other_rects(role))
    scrolled, visible = browser.evaluate(
        f"[{page.element(role)}.scrollWidth, {page.element(role)}.clientWidth]"
    )
    assert scrolled <= visible, "the text is wrapped"


def test_a_warning_looks_different(page: Page) -> None:
    page.browser.show(page.ids["identity"])
    style = "(line) => { const style = getComputedStyle(line); return [style.backgroundColor, style.borderLeftColor]; }"
    info, warning = (
        page.browser.evaluate(f"({style})({page.element('identity')}.querySelector('p.{level}'))")
        for level in ("info", "warning")
    )
    assert info[0] != warning[0]
    assert info[1] != warning[1]
    sign = f"getComputedStyle({page.element('identity')}.querySelector('p.warning'), '::before').content"
    assert "\u26a0" in page.browser.evaluate(sign)


def color_share(page: Page, role: str, color: tuple[int, int, int]) -> float:
    """Share of a node's pixels on the page that are nearly of a colour; pictures are drawn smaller than they are."""
    node = page.node_rect(role)
    pixels = np.asarray(page.browser.picture(), dtype=int)
    pixels = pixels[max(0, int(node.top)) : int(node.bottom), max(0, int(node.left)) : int(node.right)]
    return float((np.abs(pixels - np.array(color)).max(axis=-1) < 30).mean())


@pytest.mark.parametrize(("role", "count"), [("faces", 5), ("identity", 1)])
def test_the_picture_is_in_the_node_and_red_where_a_photo_was_left_out(
    page: Page, role: str, count: int
) -> None:
    page.browser.show(page.ids[role])
    page.browser.wait_for(f"{picture_count(page, role)} === {count}", f"not {count} pictures")
    assert color_share(page, role, CHOSEN_COLOR) > 0.001
    assert color_share(page, role, LEFT_OUT_COLOR) > 0.001


def test_a_node_without_a_photo_left_out_has_no_red_frame(page: Page) -> None:
    page.browser.show(page.ids["prompt"])
    assert color_share(page, "prompt", LEFT_OUT_COLOR) == 0


# --- messages that come later ----------------------------------------------------------------------------------------

LONG = (
    "4 model calls ran without the identity: another node called the UNet's blocks itself. Put Apply ID Adapter after that node, "
    "or switch the node off."
)


def test_a_message_is_shown_replaced_and_cleared(page: Page) -> None:
    browser, apply = page.browser, page.ids["apply"]
    browser.show(apply)
    size = browser.evaluate(f"[...{page.node('apply')}.size]")
    page.say(apply, "run", ("warning", LONG))
    page.say(apply, "graph", ("info", "found in the graph"))
    browser.show(apply)
    keep_screenshot(page, "event")
    assert page.messages("apply") == ["found in the graph", LONG]
    text = browser.rect(page.element("apply"))
    assert text is not None
    assert page.node_rect("apply").contains(text)
    assert not any(text.overlaps(other) for other in page.other_rects("apply"))
    page.say(apply, "run", ("warning", "something else"))
    assert page.messages("apply") == ["found in the graph", "something else"]
    page.say(apply, "run")
    page.say(apply, "graph")
    assert page.messages("apply") == []
    browser.settle()
    if (
        not page.nodes_2
    ):  # Nodes 2.0 measures its nodes when they come into sight, this one perhaps for the first time
        assert browser.evaluate(f"[...{page.node('apply')}.size]") == size


def test_a_report_stays_beside_what_comes_later(page: Page) -> None:
    report = page.messages("prompt")
    page.say(page.ids["prompt"], "graph", ("warning", "no Apply ID Adapter"))
    assert page.messages("prompt") == ["no Apply ID Adapter", *report]
    page.say(page.ids["prompt"], "graph")
    assert page.messages("prompt") == report


def test_messages_for_other_nodes_are_ignored(page: Page) -> None:
    """A node that is gone, one of another pack, and one in a subgraph that does not exist."""
    for node in ("999", page.ids["sampler"], f"{page.ids['sampler']}:3", "999:1"):
        page.say(node, "run", ("warning", "not for you"))
    shown = page.browser.evaluate("document.body.innerText.includes('not for you')")
    assert not shown
    assert page.messages("apply") == []
    assert page.browser.console_errors == []


def test_nothing_of_it_is_saved(page: Page) -> None:
    """Sizes of nodes with pictures are left to the frontend, which makes room for every picture."""
    page.say(page.ids["apply"], "run", ("warning", LONG))
    browser = page.browser
    for role in ("prompt", "apply", "identity"):
        browser.show(page.ids[role])
    after = browser.serialize()
    assert browser.graph_to_prompt() == page.prompt
    with_pictures = {"IDAdapterExtractFaces", "IDAdapterMixFeatures", "SaveImage", "LoadImage"}
    page.say(page.ids["apply"], "run")
    for old, new in zip(page.before["nodes"], after["nodes"], strict=True):
        sizes = old.pop("size"), new.pop("size")
        assert old == new
        if not page.nodes_2 and old["type"] not in with_pictures:
            assert sizes[0] == sizes[1], old["type"]
    assert after["links"] == page.before["links"]


def test_a_node_in_a_subgraph_is_found(page: Page) -> None:
    browser = page.browser
    original = browser.open_tab()
    browser.load_workflow(browser.serialize())  # a tab of its own
    inside = f"window.app.rootGraph.getNodeById({page.ids['apply']})"
    path = browser.evaluate(
        f"(() => {{ const made = window.app.rootGraph.convertToSubgraph(new Set([{inside}]));"
        "const host = made.node; return `${host.id}:${host.subgraph.nodes.find((n) => n.type === 'IDAdapterApply').id}`; })()"
    )
    host, inner = path.split(":")
    page.say(path, "run", ("warning", LONG))
    text = browser.evaluate(
        f"window.app.rootGraph.getNodeById({host}).subgraph.getNodeById({inner})"
        f".widgets.find((widget) => widget.name === '{WIDGET}')?.element.textContent"
    )
    assert text == LONG
    browser.show_tab(original)


def test_messages_follow_their_workflow(page: Page) -> None:
    """A copy of the workflow in another tab has the same node ids. The first one's messages wait until it is shown again."""
    browser, apply = page.browser, page.ids["apply"]
    browser.evaluate(
        "window.app.api.addEventListener('execution_start', ({detail}) => { window.__prompt = detail.prompt_id; })"
    )
    browser.run()
    prompt_id = browser.evaluate("window.__prompt")
    report, original = page.messages("prompt"), browser.open_tab()
    browser.load_workflow(browser.serialize())
    assert page.messages("prompt") == [], "the copy has not run"
    page.say(apply, "run", ("warning", LONG), prompt_id=prompt_id)
    assert page.messages("apply") == []
    browser.show_tab(original)
    assert page.messages("prompt") == report != []
    assert page.messages("apply") == [LONG]
    page.say(apply, "run")


# --- errors ----------------------------------------------------------------------------------------------------------


def free_of_comfyui(browser: Browser) -> None:
    """Assert that our toast covers nothing that ComfyUI shows of errors."""
    toast = browser.rect(TOAST)
    assert toast is not None
    assert toast.width > 300
    assert Rect(0, 0, *browser.size).contains(toast)
    for other in (OVERLAY, "document.querySelector('[data-testid=properties-panel]')"):
        rect = browser.rect(other)
        assert rect is None or not toast.overlaps(rect)


def toast_texts(browser: Browser) -> list[str]:
    """Title and sentence of each toast that is shown now."""
    return list(
        browser.evaluate(
            "[...document.querySelectorAll('.p-toast-message')].map((toast) =>"
            "toast.querySelector('.p-toast-summary').textContent + ': ' + toast.querySelector('.p-toast-detail').textContent)"
        )
    )


def test_an_error_is_said_whole_and_covers_nothing(page: Page) -> None:
    browser = page.browser
    graph, nodes = graph_of(PERSON, EMPTY)
    graph.workflow[nodes["faces"].id]["inputs"]["on_missing"] = "error"
    open_workflow(browser, graph)
    browser.evaluate(f"window.app.rootGraph.getNodeById({nodes['faces'].id}).title = 'My faces'")
    for _ in range(2):  # the same error again does not pile up
        browser.run()
        browser.wait_for(f"{TOAST} && {OVERLAY}", "no toast beside ComfyUI's own message")
    keep_screenshot(page, "error")
    (text,) = toast_texts(browser)
    assert text.startswith(
        "My faces: image 2 of 2 (empty.png, 640x640): no face found (looked at 640 to 128 px"
    )
    assert text.endswith("to leave this photo out")
    free_of_comfyui(browser)
    browser.evaluate("document.querySelector('[data-testid=error-overlay-see-errors]').click()")
    browser.wait_for("document.body.innerText.includes('NoFaceFoundError')", "no error in the panel")
    keep_screenshot(page, "error_panel")
    free_of_comfyui(browser)
    browser.evaluate(
        "document.querySelector('[data-testid=properties-panel] button[aria-label*=panel]')?.click()"
    )
    browser.evaluate(f"window.app.rootGraph.getNodeById({nodes['faces'].id}).widgets[2].value = 'skip'")
    browser.run()
    browser.wait_for(f"!{TOAST}", "the error outlived the run that mended it")


def test_our_error_in_another_packs_node_is_said_too(page: Page) -> None:
    graph, nodes = graph_of(PERSON)
    rewire(graph, nodes["rescale"], model=nodes["checkpoint"])
    rewire(graph, nodes["sampler"], positive=add_attach(graph, nodes["positive"], nodes["identity"]))
    open_workflow(page.browser, graph)
    page.browser.run()
    page.browser.wait_for(ONE_TOAST, "not one toast")
    (text,) = toast_texts(page.browser)
    assert text.startswith("KSampler: ")
    assert "Add one Apply ID Adapter" in text
    free_of_comfyui(page.browser)


def test_a_file_that_is_not_there_is_named(page: Page) -> None:
    graph, nodes = graph_of(PERSON)
    graph.workflow[nodes["adapter"].id]["inputs"]["adapter"] = "absent.safetensors"
    open_workflow(page.browser, graph)
    page.browser.run()
    page.browser.wait_for(ONE_TOAST, "not one toast")
    keep_screenshot(page, "refused")
    (text,) = toast_texts(page.browser)
    assert text.startswith('Load ID Adapter: adapter: "absent.safetensors" is not among the choices.')
    free_of_comfyui(page.browser)


# --- afterwards ------------------------------------------------------------------------------------------------------


def test_reports_come_back_after_the_page_was_loaded_anew(page: Page) -> None:
    """The server runs nothing again: all results are the cached ones of the first run."""
    browser = page.browser
    browser.open()
    open_workflow(browser, graph_of(*FIVE)[0])
    assert page.messages("identity") == []
    browser.run()
    assert page.messages("identity")[0] == "used 3 of 4 photos"
    assert page.messages("faces", "warning")[0].startswith("image 5 of 5 (empty.png, 640x640): left out")
    browser.show(page.ids["identity"])
    browser.wait_for(f"{picture_count(page, 'identity')} === 1", "no picture in the node")
