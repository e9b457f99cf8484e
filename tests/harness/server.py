"""A real ComfyUI server on the CPU, driven over HTTP and its websocket as the frontend drives it."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
from PIL import Image

from tests.harness.comfy import REPOSITORY, comfyui_path
from tests.harness.runs import RunResult, collect, follow, read_validation
from tests.harness.shim import shim_path
from tests.harness.workflow import Graph, Workflow

PACK_NAME = "ComfyUI-IDAdapter"
TINY_PACK = REPOSITORY / "tests" / "tiny" / "tiny_pack"

Writer = Callable[[Path], object]
"""Called with the server's base directory before the start, to write files below its models/ or input/."""

# Keep the frontend's own windows closed, so that screenshots show the workflow.
_FRONTEND_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Minimap.Visible": False,
}


class ServerError(RuntimeError):
    """The server did not start, died, or did not answer in time; the message ends with the tail of its log."""


class ComfyServer:
    """A ComfyUI server in a temporary base directory, with the pack and the tiny-model pack as custom nodes.

    Use it as a context manager. The server has its own process group, which is always killed at the end of the context.

    Args:
        comfyui: folder of ComfyUI; default: `comfyui_path()`.
        writers: called with the base directory before the start, to write models and input files.
        options: further command line options of ComfyUI.
        boot_timeout: seconds until the server must answer.
    """

    def __init__(
        self,
        comfyui: Path | None = None,
        writers: Iterable[Writer] = (),
        options: Iterable[str] = (),
        boot_timeout: float = 180.0,
    ) -> None:
        path = comfyui or comfyui_path()
        if path is None:
            raise ServerError("No ComfyUI found. Set COMFYUI_PATH to its folder.")
        self.comfyui = path
        self.boot_timeout = boot_timeout
        self.boot_seconds = 0.0
        self._writers = tuple(writers)
        self._options = tuple(options)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ComfyServer:
        self.base = Path(tempfile.mkdtemp(prefix="comfyui-server-"))
        try:
            self._prepare()
            self._start()
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

    @property
    def models_dir(self) -> Path:
        return self.base / "models"

    @property
    def input_dir(self) -> Path:
        return self.base / "input"

    @property
    def output_dir(self) -> Path:
        return self.base / "output"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log(self, start: int = 0) -> str:
        """The server's output so far, without its first `start` bytes."""
        return self._log_path.read_bytes()[start:].decode("utf-8", "replace")

    def close(self) -> None:
        """Kill the server and all its child processes, and remove the base directory."""
        process, self._process = self._process, None
        if process is not None:
            _signal_group(process, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                pass
            # Again, for children that outlive the server.
            _signal_group(process, getattr(signal, "SIGKILL", signal.SIGTERM))
            process.wait(10)
        shutil.rmtree(self.base, ignore_errors=True)

    def run(
        self,
        workflow: Workflow,
        timeout: float = 120.0,
        on_message: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> RunResult:
        """Queue a workflow in API format and wait for its end.

        Refusals, node errors and interruptions are part of the result, not exceptions: assert on them, or call
        `result.check()`. `on_message` is called with each message while the workflow runs.

        Raises:
            ServerError: the run took longer than `timeout` seconds, or the server died.
        """
        start = time.monotonic()
        log_start = self._log_path.stat().st_size
        try:
            result = asyncio.run(asyncio.wait_for(self._run(workflow, on_message), timeout))
        except asyncio.TimeoutError:
            self.interrupt()
            raise ServerError(f"The workflow did not end within {timeout} s.\n{self._log_tail()}") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ServerError(f"The connection to the server broke: {error!r}\n{self._log_tail()}") from error
        result.seconds = time.monotonic() - start
        result.log = self.log(log_start)
        return result

    def interrupt(self) -> None:
        """Interrupt the running workflow, as the frontend's cancel button does."""
        self._request("POST", "/interrupt", {})

    def queue(self) -> dict[str, Any]:
        """Running and pending prompts: `{"queue_running": [...], "queue_pending": [...]}`."""
        return self._request("GET", "/queue")

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """The server's descriptions of all nodes by id, or of one node (empty if unknown)."""
        if node is None:
            return self._request("GET", "/object_info")
        return self._request("GET", f"/object_info/{node}").get(node, {})

    def get(self, path: str) -> bytes:
        """Body of a GET request.

        Raises:
            aiohttp.ClientResponseError: the server answered with an error status.
        """
        return asyncio.run(self._get(path))

    def free(self) -> None:
        """Make the server unload all models and drop cached results before the next run."""
        self._request("POST", "/free", {"unload_models": True, "free_memory": True})
        # The server handles the request when idle or after a run: make sure that it does so before the next one.
        graph = Graph()
        graph.add("PreviewAny", source=graph.add("PrimitiveInt", value=0))
        self.run(graph.workflow).check()

    def clear_history(self) -> None:
        """Drop the record of all runs. The frontend lists them, and cannot read one whose values were NaN."""
        self._request("POST", "/history", {"clear": True})

    def add_input_image(self, name: str, image: Image.Image) -> str:
        """Put an image into the input folder; `LoadImage` takes the returned name."""
        image.save(self.input_dir / name)
        return name

    def _prepare(self) -> None:
        user = self.base / "user" / "default"
        # The frontend requests these user files at each start, and logs an error for each missing one.
        for folder in ("custom_nodes", "models", "input", "output", user / "workflows", user / "subgraphs"):
            (self.base / folder).mkdir(parents=True)
        (user / "user.css").touch()
        (user / "comfy.templates.json").write_text("{}", encoding="utf-8")
        (user / "comfy.settings.json").write_text(json.dumps(_FRONTEND_SETTINGS), encoding="utf-8")
        for name, target in ((PACK_NAME, REPOSITORY), (TINY_PACK.name, TINY_PACK)):
            (self.base / "custom_nodes" / name).symlink_to(target, target_is_directory=True)
        for writer in self._writers:
            writer(self.base)

    def _start(self) -> None:
        self.port = _free_port()
        self._log_path = self.base / "server.log"
        command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-auto-launch", "--disable-api-nodes", *self._options]
        began = time.monotonic()
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.comfyui,
                env=server_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        while time.monotonic() - began < self.boot_timeout:
            if self._process.poll() is not None:
                raise ServerError(f"The server exited with {self._process.returncode}.\n{self._log_tail()}")
            try:
                self._request("GET", "/system_stats")
            except (aiohttp.ClientError, ConnectionError):
                time.sleep(0.2)
                continue
            self.boot_seconds = time.monotonic() - began
            return
        raise ServerError(f"The server did not answer within {self.boot_timeout} s.\n{self._log_tail()}")

    def _log_tail(self) -> str:
        return "\n".join(self.log().splitlines()[-40:])

    def _request(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        async def request() -> dict[str, Any]:
            async with aiohttp.ClientSession(raise_for_status=True) as session:
                async with session.request(method, self.url + path, json=body) as response:
                    text = await response.text()
                    return dict(json.loads(text)) if text else {}

        return _run_anywhere(request)

    async def _get(self, path: str) -> bytes:
        async with aiohttp.ClientSession(raise_for_status=True) as session:
            async with session.get(self.url + path) as response:
                return await response.read()

    async def _run(
        self, workflow: Workflow, on_message: Callable[[str, dict[str, Any]], None] | None
    ) -> RunResult:
        client_id = uuid.uuid4().hex
        result = RunResult()
        async with aiohttp.ClientSession(self.url) as session:
            # Connect before queueing: the server reports a run only to the client with this id.
            async with session.ws_connect("/ws", params={"clientId": client_id}, max_msg_size=0) as socket:
                request = {"prompt": workflow, "client_id": client_id}
                async with session.post("/prompt", json=request) as response:
                    if response.status not in (200, 400):
                        raise ServerError(f"/prompt: {response.status}\n{await response.text()}")
                    answer = await response.json()
                read_validation(result, answer)
                if not result.prompt_id:
                    return result
                await follow(socket, result, on_message)
            await collect(session, result)
        return result


def server_environment() -> dict[str, str]:
    """Environment of a process that runs ComfyUI: this one's, with the shim on the Python path if needed."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    # Tiny models gain nothing from threads, and on a busy machine synchronising threads costs tenfold.
    environment.setdefault("OMP_NUM_THREADS", "1")
    shim = shim_path()
    if shim is not None:
        inherited = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(shim), *([inherited] if inherited else [])])
    return environment


def bring_tiny_checkpoints(base: Path) -> None:
    """A `Writer`: makes the tiny checkpoints in a separate process, so that ComfyUI is not imported here."""
    command = [sys.executable, "-m", "tests.tiny.checkpoints"]
    command += ["--comfyui", str(comfyui_path()), "--models", str(base / "models")]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=server_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ServerError(f"Writing the tiny checkpoints failed:\n{done.stdout}")


def _run_anywhere(request: Callable[[], Any]) -> Any:
    """Run a coroutine to its end, even from within `on_message`, where an event loop is already running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(request())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, request()).result()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    if sys.platform == "win32":
        process.terminate()
        return
    try:
        os.killpg(process.pid, number)  # start_new_session made the process the leader of its group
    except ProcessLookupError:
        pass


def _die_with_parent() -> None:
    """Make Linux kill this process when its parent dies without cleaning up."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
