"""The doctor's self-test, by the command, in a process that loads ComfyUI and the pack."""

from __future__ import annotations

import subprocess
import sys

from tests.harness.comfy import REPOSITORY, comfyui_path
from tests.harness.server import server_environment


def test_the_command_draws_a_person_and_says_ok() -> None:
    path = comfyui_path()
    assert path is not None
    command = [sys.executable, "-m", "idadapter_core", "doctor", "--self-test", "--comfyui", str(path)]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=server_environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "\n    ok: UniID draws a person of the demo world with likeness 0." in result.stdout
