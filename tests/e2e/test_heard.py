"""What a graph leaves out reaches the client that queued it, on the right node, and goes when it is mended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.browser import Browser, find_chromium
from tests.harness.server import ComfyServer
from tests.harness.uniid_graph import NONE, add_attach, rewire, uniid_graph
from tests.harness.workflow import Graph, Node
from tests.tiny.files import ADAPTER_SD15, PERSON

pytestmark = pytest.mark.server

Nodes = dict[str, Node]


def graph_of(**options: bool) -> tuple[Graph, Nodes]:
    return uniid_graph((PERSON,), kind="sd15", adapter=ADAPTER_SD15, text_branch=NONE, **options)


def without_apply() -> tuple[Graph, Nodes]:
    graph, nodes = graph_of(rescale=False)
    rewire(graph, nodes["sampler"], model=nodes["checkpoint"])
    return graph, nodes


def attached_without_apply() -> tuple[Graph, Nodes]:
    graph, nodes = graph_of(rescale=False, id_prompt=False)
    nodes["attach"] = add_attach(graph, nodes["positive"], nodes["identity"])
    rewire(graph, nodes["sampler"], model=nodes["checkpoint"], positive=nodes["attach"])
    return graph, nodes


def prompt_as_negative() -> tuple[Graph, Nodes]:
    graph, nodes = graph_of()
    rewire(graph, nodes["sampler"], negative=nodes["prompt"], positive=nodes["positive"])
    return graph, nodes


CASES = {
    "apply forgotten": (without_apply, "prompt", "graph", "no Apply ID Adapter is on the model"),
    "attached, apply forgotten": (
        attached_without_apply,
        "attach",
        "graph",
        "no Apply ID Adapter is on the model",
    ),
    "rescaling forgotten": (
        lambda: graph_of(rescale=False),
        "apply",
        "run",
        "Normalized Identity Rescaling is not on this model",
    ),
    "wired to negative": (prompt_as_negative, "prompt", "run", "wired to a negative input"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_out_is_said_and_unsaid(server: ComfyServer, case: str) -> None:
    build, role, topic, sentence = CASES[case]
    graph, nodes = build()
    for _ in range(2):  # and again when ComfyUI takes the nodes from its cache
        graph.workflow[nodes["sampler"].id]["inputs"]["seed"] += 1
        told = server.run(graph.workflow).check().told
        (said,) = told[nodes[role].id, topic]
        assert sentence in said
    whole, whole_nodes = graph_of()
    told = server.run(whole.workflow).check().told
    assert {told[whole_nodes[role].id, topic] for role, topic in (("prompt", "graph"), ("apply", "run"))} == {
        ()
    }
    assert not any(told.values())


@pytest.fixture(scope="module")
def browser(server: ComfyServer) -> Iterator[Browser]:
    with Browser(server.url) as running:
        yield running
        running.use_renderer(False)  # the setting is the server's, and others look at it after us


# A choice as a hand makes it: the classic renderer goes through the widget, Nodes 2.0 through a list that opens on the page.
CHOOSE = """(async (node, name, chosen, nodes_2) => {
  if (!nodes_2) {
    const widget = node.widgets.find((candidate) => candidate.name === name);
    widget.setValue(chosen, { e: new MouseEvent('click'), node, canvas: window.app.canvas });
    return;
  }
  const press = (element) => {
    for (const kind of ['pointerdown', 'mousedown', 'pointerup', 'mouseup', 'click']) {
      const options = { bubbles: true, composed: true, button: 0, pointerId: 1, pointerType: 'mouse' };
      element.dispatchEvent(kind.startsWith('pointer') ? new PointerEvent(kind, options) : new MouseEvent(kind, options));
    }
  };
  const soon = async (find) => {
    for (let tries = 0; tries < 100; tries++) {
      const found = find();
      if (found) return found;
      await new Promise((done) => setTimeout(done, 50));
    }
    throw new Error(`${name} cannot be set to ${chosen}`);
  };
  const shown = `[data-node-id="${node.id}"] [role=combobox][aria-label="${name}"]`;
  press(await soon(() => document.querySelector(shown)));
  press(await soon(() => [...document.querySelectorAll('[role=option]')].find((option) => option.textContent.trim() === chosen)));
  await soon(() => !document.querySelector('[role=option]'));
})"""


@pytest.mark.browser
@pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium: install it or set CHROMIUM to its executable"
)
@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes_2"])
def test_choosing_the_wider_scope_chooses_limit(browser: Browser, nodes_2: bool) -> None:
    """The sensible mode for other packs, where it is chosen by hand; what was saved keeps its meaning."""
    browser.use_renderer(nodes_2)
    graph, nodes = graph_of()
    graph.workflow[nodes["rescale"].id]["inputs"]["scope"] = "every attention patch"
    browser.load_prompt(graph.workflow)
    node = f"window.app.rootGraph.getNodeById({nodes['rescale'].id})"

    def value(name: str) -> str:
        return str(browser.evaluate(f"{node}.widgets.find((w) => w.name === '{name}').value"))

    def choose(name: str, chosen: str) -> None:
        browser.evaluate(f"{CHOOSE}({node}, '{name}', '{chosen}', {str(nodes_2).lower()})")

    assert (value("scope"), value("mode")) == ("every attention patch", "normalized")
    browser.evaluate("window.app.loadGraphData(window.app.rootGraph.serialize()).then(() => undefined)")
    assert (value("scope"), value("mode")) == ("every attention patch", "normalized")
    choose("scope", "ID adapters")
    assert value("mode") == "normalized"
    choose("scope", "every attention patch")
    assert value("mode") == "limit"
    if nodes_2:  # and so it is shown
        shown = f"document.querySelector('[data-node-id=\"{nodes['rescale'].id}\"] [role=combobox][aria-label=mode]')"
        assert browser.evaluate(f"{shown}.textContent.trim()") == "limit"
    choose("mode", "normalized")
    assert value("mode") == "normalized"
    for mode in ("off", "limit"):
        choose("scope", "ID adapters")
        choose("mode", mode)
        choose("scope", "every attention patch")
        assert value("mode") == mode
