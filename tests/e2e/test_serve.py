"""`python tasks.py serve`: one command from a clone to a picture of a person who does not exist."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.browser import Browser, find_chromium
from tests.harness.comfy import PINNED, REPOSITORY, comfyui_path

pytestmark = [
    pytest.mark.server,
    pytest.mark.browser,
    pytest.mark.skipif(
        find_chromium() is None, reason="no Chromium: install it or set CHROMIUM to its executable"
    ),
    pytest.mark.skipif(
        Path(sys.prefix).resolve() != (REPOSITORY / ".venv").resolve(),
        reason="runs in the set-up of tasks.py only: python tasks.py test",
    ),
]
SLOWEST = 120.0  # seconds until the page opens, or a picture is there


@pytest.fixture
def page(tmp_path: Path) -> Iterator[str]:
    """The address that the command tells."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = tmp_path / "output.txt"
    environment = {**os.environ, "CI": "true"}
    if comfyui_path() == PINNED:
        environment.pop("COMFYUI_PATH", None)  # `tasks.py` set it; found set, it would begin another set-up
    with output.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tasks.py"), "serve", "--port", str(port)],
            cwd=REPOSITORY,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + SLOWEST
        while "press Run" not in (text := output.read_text("utf-8")):
            assert process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.5)
        assert "==>" not in text, "the set-up begins anew, below the tests that run"
        yield next(
            word
            for line in text.splitlines()
            if "press Run" in line
            for word in line.split()
            if "://" in word
        )
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.mark.skipif(os.name == "nt", reason="ends the server by its process group")
def test_it_opens_at_a_graph_that_draws_a_person(page: str) -> None:
    server = page.partition("/?")[0]
    with Browser(page) as browser:
        deadline = time.monotonic() + SLOWEST
        while not [node for node in browser.nodes() if node.type == "IDAdapterPersonalize"]:
            assert time.monotonic() < deadline, "the graph is not open"
            time.sleep(0.5)
        assert browser.evaluate("window.app.rootGraph.extra.linearMode") is True
        assert browser.bad_nodes() == []
        browser.run()
        while not (history := json.loads(urllib.request.urlopen(f"{server}/history").read())):
            assert time.monotonic() < deadline, "no picture"
            time.sleep(0.5)
    (run,) = history.values()
    assert run["status"]["status_str"] == "success"
    assert [
        entry
        for node in run["outputs"].values()
        for entry in node.get("images", [])
        if entry["type"] == "output"
    ]
    shown = json.loads(urllib.request.urlopen(f"{server}/object_info/LoadImage").read())
    photos = shown["LoadImage"]["input"]["required"]["image"][0]
    assert {"person_1_photo_1.png", "person_8_photo_2.png"} <= set(photos)
