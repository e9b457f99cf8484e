"""The server's real frontend in headless Chromium, driven through the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import aiohttp
from PIL import Image

from tests.harness.workflow import Workflow

_T = TypeVar("_T")

_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)

# Toasts vanish after a while, so they are recorded as they appear.
_RECORD_TOASTS = """
window.__toasts = [];
new MutationObserver((changes) => {
  for (const change of changes) for (const node of change.addedNodes) {
    if (!(node instanceof HTMLElement)) continue;
    const toasts = node.matches('.p-toast-message') ? [node] : node.querySelectorAll('.p-toast-message');
    for (const toast of toasts) window.__toasts.push(toast);
  }
}).observe(document, {childList: true, subtree: true});
"""

# With a changed workflow, the frontend asks before the page is left; nobody would answer.
_LEAVE_UNASKED = "window.addEventListener('beforeunload', (event) => event.stopImmediatePropagation(), true);"

# Messages of the frontend itself: a missing style sheet, its start order, and model downloads for its first workflow, which a
# server without API nodes forbids.
_FRONTEND_NOISE = ("/user.css", "graph accessed before initialization", "Content Security Policy")

# All nodes of the workflow, including those inside subgraphs.
_LIST_NODES = """
(() => {
  const known = window.LiteGraph.registered_node_types;
  const root = window.app.rootGraph ?? window.app.graph;
  const graphs = [root, ...(root.subgraphs?.values() ?? [])];
  const subgraphs = new Set([...(root.subgraphs?.keys() ?? [])].map(String));
  return graphs.flatMap((graph) => graph.nodes.map((node) => ({
    id: String(node.id),
    type: node.type ?? '',
    title: node.title ?? '',
    known: node.type in known || subgraphs.has(node.type),
    has_errors: Boolean(node.has_errors),
  })));
})()
"""


_RUN = """
new Promise((done) => {
  const ends = ['execution_success', 'execution_error', 'execution_interrupted'];
  for (const end of ends) window.app.api.addEventListener(end, () => done(), {once: true});
  window.app.queuePrompt(0).then((accepted) => { if (!accepted) done(); });
})
"""

_PREVIOUS_TAB = """
new Promise((done) => {
  const load = window.app.loadGraphData;
  window.app.loadGraphData = async function (...parameters) {
    window.app.loadGraphData = load;
    await load.apply(this, parameters);
    done();
  };
  window.app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow');
})
"""

STALE_PANEL = 5.0  # seconds


class BrowserError(RuntimeError):
    """Chromium is missing or crashed, or JavaScript in the page threw an exception."""


@dataclass(frozen=True)
class GraphNode:
    """A node on the frontend's canvas."""

    id: str
    type: str
    title: str
    known: bool
    """Whether the frontend knows the type; otherwise it draws the node as missing."""
    has_errors: bool


@dataclass(frozen=True)
class Rect:
    """A rectangle in page pixels."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top

    def overlaps(self, other: Rect) -> bool:
        """Whether they share more than a border."""
        return (
            min(self.right, other.right) - max(self.left, other.left) > 1
            and min(self.bottom, other.bottom) - max(self.top, other.top) > 1
        )

    def contains(self, other: Rect) -> bool:
        return (
            self.left <= other.left + 1
            and self.top <= other.top + 1
            and other.right <= self.right + 1
            and other.bottom <= self.bottom + 1
        )


def find_chromium() -> str | None:
    """Path of Chromium: `CHROMIUM`, or `chromium` or `google-chrome` on the path; None if there is none."""
    named = os.environ.get("CHROMIUM")
    if named:
        return shutil.which(named)
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """A page with the frontend of the server at `url`. Use it as a context manager.

    Args:
        url: address of a `ComfyServer` (`server.url`).
        size: width and height of the page in pixels.
        timeout: seconds for loading the frontend, and for one command.
    """

    def __init__(self, url: str, size: tuple[int, int] = (1600, 1000), timeout: float = 90.0) -> None:
        self.url = url
        self.size = size
        self.timeout = timeout
        self.console_errors: list[str] = []
        """Console errors and uncaught exceptions since the page was opened, without the frontend's usual ones."""
        self._process: subprocess.Popen[bytes] | None = None
        self._session: aiohttp.ClientSession | None = None
        self._last_command = 0

    def __enter__(self) -> Browser:
        executable = find_chromium()
        if executable is None:
            raise BrowserError("No Chromium found. Install it, or set CHROMIUM to its executable.")
        self._profile = Path(tempfile.mkdtemp(prefix="chromium-"))
        self._loop = asyncio.new_event_loop()
        try:
            self._process = subprocess.Popen(
                [executable, *_OPTIONS, f"--user-data-dir={self._profile}", "about:blank"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "TMPDIR": str(self._profile)},
            )
            self._connect()
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def open(self) -> None:
        """Load or reload the frontend, and wait until it has drawn a workflow."""
        self.console_errors.clear()
        self._command("Page.navigate", url=self.url)
        opened = "Boolean(window.app?.isGraphReady && window.app.rootGraph.nodes.length)"
        self.wait_for(opened, "the frontend opened no workflow")

    def use_renderer(self, nodes_2: bool) -> None:
        """Draw nodes in HTML (Nodes 2.0) or on a canvas (classic), and reload the frontend."""
        value = json.dumps(nodes_2)
        self.evaluate(f"window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', {value})")
        self.open()
        if self.evaluate("Boolean(window.LiteGraph.vueNodesMode)") is not nodes_2:
            raise BrowserError("The frontend did not change its renderer.")

    def close(self) -> None:
        """Kill Chromium and all its processes."""
        if self._session is not None:
            self._loop.run_until_complete(self._session.close())
            self._session = None
        process, self._process = self._process, None
        if process is not None:
            try:
                if sys.platform == "win32":
                    process.terminate()
                else:
                    os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait(10)
        self._loop.close()
        shutil.rmtree(self._profile, ignore_errors=True)

    def evaluate(self, expression: str) -> Any:
        """Evaluate a JavaScript expression in the page and return its value as JSON; promises are awaited.

        Raises:
            BrowserError: the expression threw.
        """
        answer = self._command(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise BrowserError(_exception_text(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def load_workflow(self, workflow: dict[str, Any]) -> None:
        """Open a workflow in the frontend's own format, as if its file was dropped on the canvas, and fit it to the view."""
        self.evaluate(f"window.app.loadGraphData({json.dumps(workflow)}).then(() => undefined)")
        self._show_all()

    def load_prompt(self, workflow: Workflow, name: str = "workflow") -> None:
        """Open a workflow in API format; the frontend arranges the nodes."""
        arguments = f"{json.dumps(workflow)}, {json.dumps(name)}"
        self.evaluate(f"Promise.resolve(window.app.loadApiJson({arguments})).then(() => undefined)")
        self._show_all()

    def run(self) -> None:
        """Queue the open workflow with the Run button's command, and wait until it has ended in any way or was refused."""
        self.evaluate(_RUN)
        self.settle()

    def open_tab(self) -> str:
        """Path of the workflow in the active tab; every tab has one, saved or not."""
        return str(self.evaluate("window.app.extensionManager.workflow.activeWorkflow.path"))

    def show_tab(self, path: str) -> None:
        """Switch back, tab by tab, to the workflow with this path."""
        for _ in range(self.evaluate("window.app.extensionManager.workflow.openWorkflows.length")):
            if self.open_tab() == path:
                return self._show_all()
            self.evaluate(_PREVIOUS_TAB)
        raise BrowserError(f"No tab has the path {path}.")

    def receive(self, event: str, data: dict[str, Any]) -> None:
        """Pass a message to the frontend as if the server had sent it."""
        message = json.dumps(json.dumps({"type": event, "data": data}))
        self.evaluate(
            f"window.app.api.socket.dispatchEvent(new MessageEvent('message', {{data: {message}}}))"
        )
        self.settle()

    def show(self, node_id: str) -> None:
        """Centre a node of the open graph in the page, at full size."""
        self.evaluate(
            f"(() => {{ const canvas = window.app.canvas; canvas.ds.scale = 1;"
            f"canvas.centerOnNode(canvas.graph.getNodeById({node_id})); canvas.setDirty(true, true); }})()"
        )
        self.settle()

    def rect(self, element: str) -> Rect | None:
        """Position of an element on the page; None if it does not exist. `element` is a JavaScript expression."""
        found = self.evaluate(
            f"(() => {{ const box = ({element})?.getBoundingClientRect();"
            "return box && [box.left, box.top, box.right, box.bottom]; })()"
        )
        return None if found is None else Rect(*found)

    def serialize(self) -> dict[str, Any]:
        """The open workflow in the frontend's own format, as saved."""
        return dict(self.evaluate("window.app.rootGraph.serialize()"))

    def nodes(self) -> list[GraphNode]:
        """All nodes of the open workflow, including those inside subgraphs."""
        return [GraphNode(**node) for node in self.evaluate(_LIST_NODES)]

    def bad_nodes(self) -> list[GraphNode]:
        """The nodes that the frontend marks as missing or faulty."""
        return [node for node in self.nodes() if node.has_errors or not node.known]

    def graph_to_prompt(self) -> Workflow:
        """The open workflow in API format, as sent by the Run button."""
        return dict(self.evaluate("window.app.graphToPrompt().then((prompt) => prompt.output)"))

    def toasts(self) -> list[str]:
        """Texts of all notifications shown since the page was opened."""
        return list(self.evaluate("window.__toasts.map((toast) => toast.textContent.trim())"))

    def dialogs(self) -> list[str]:
        """Texts of the open dialogs, for example about missing nodes or models."""
        return list(
            self.evaluate(
                "[...document.querySelectorAll('[role=dialog]')].map((dialog) => dialog.innerText.trim())"
            )
        )

    def error_overlay(self) -> str:
        """Text of the panel with the number of errors in the open workflow; empty if there is no panel.

        On a busy machine the panel of the workflow that was open before may come late; it gets a moment to leave.
        """
        panel = "document.querySelector('[data-testid=error-overlay]')?.innerText ?? ''"
        deadline = time.monotonic() + STALE_PANEL
        while (text := str(self.evaluate(panel))) and time.monotonic() < deadline:
            time.sleep(0.2)
        return text

    def screenshot(self, path: Path) -> None:
        """Save the page as a PNG file."""
        path.write_bytes(self._capture())

    def picture(self) -> Image.Image:
        """Screenshot of the page."""
        return Image.open(io.BytesIO(self._capture())).convert("RGB")

    def _capture(self) -> bytes:
        return base64.b64decode(self._command("Page.captureScreenshot", format="png")["data"])

    def _connect(self) -> None:
        port_file = self._profile / "DevToolsActivePort"
        deadline = time.monotonic() + self.timeout
        while not (port_file.is_file() and port_file.read_text().strip()):
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BrowserError(f"Chromium did not start (exit status {self._process.poll()}).")
            time.sleep(0.1)
        port = port_file.read_text().splitlines()[0]

        async def connect() -> aiohttp.ClientWebSocketResponse:
            self._session = aiohttp.ClientSession()
            async with self._session.get(f"http://127.0.0.1:{port}/json/list") as response:
                targets = await response.json()
            address = next(target for target in targets if target["type"] == "page")["webSocketDebuggerUrl"]
            return await self._session.ws_connect(address, max_msg_size=0)

        self._socket = self._run(connect())
        for domain in ("Page", "Runtime", "Log"):
            self._command(f"{domain}.enable")
        width, height = self.size
        self._command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        for script in (_RECORD_TOASTS, _LEAVE_UNASKED):
            self._command("Page.addScriptToEvaluateOnNewDocument", source=script)

    def wait_for(self, condition: str, failure: str) -> None:
        """Wait until a JavaScript expression is true and the page is redrawn.

        Raises:
            BrowserError: with the text `failure`, if it does not become true.
        """
        deadline = time.monotonic() + self.timeout
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                raise BrowserError(f"{failure} within {self.timeout} s; console: {self.console_errors}")
            time.sleep(0.2)
        self.settle()

    def _show_all(self) -> None:
        self.settle()
        self.evaluate(
            "window.app.extensionManager.command.execute('Comfy.Canvas.FitView').then(() => undefined)"
        )
        self.settle()

    def settle(self) -> None:
        """Let the page redraw: three frames, and the tasks between them."""
        frame = "new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))"
        self.evaluate(f"{frame}.then(() => {frame}).then(() => {frame})")

    def _command(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._run(self._exchange(method, parameters))

    async def _exchange(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._last_command += 1
        await self._socket.send_json({"id": self._last_command, "method": method, "params": parameters})
        async for message in self._socket:
            answer = json.loads(message.data)
            if answer.get("id") == self._last_command:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])
            self._note(answer)
        raise BrowserError("Chromium closed the connection.")

    def _note(self, event: dict[str, Any]) -> None:
        """Record an event if it is about an error."""
        kind, parameters = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown":
            text = _exception_text(parameters["exceptionDetails"])
        elif kind == "Runtime.consoleAPICalled" and parameters["type"] == "error":
            text = " ".join(
                str(value.get("value", value.get("description", ""))) for value in parameters["args"]
            )
        elif kind == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            text = f"{parameters['entry']['text']} ({parameters['entry'].get('url', '')})"
        else:
            return
        if not any(noise in text for noise in _FRONTEND_NOISE):
            self.console_errors.append(text)

    def _run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return self._loop.run_until_complete(asyncio.wait_for(coroutine, self.timeout))


def _exception_text(details: dict[str, Any]) -> str:
    return str(details.get("exception", {}).get("description") or details["text"])
