"""Import time of the pack, excluding modules that ComfyUI has already imported.

    COMFYUI_PATH=... python -m benchmarks.import_time [--repeats 7]

Each measurement is a separate process. It first imports the parts of ComfyUI that the server has loaded before it loads
custom nodes; then it imports, timed, either the whole pack or, for comparison, a pack with one empty node. The two kinds
alternate, so that other load affects both equally.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.harness.comfy import REPOSITORY, comfyui_path
from tests.harness.server import server_environment

LIMIT = 0.5  # seconds

EMPTY_PACK = """
from comfy_api.latest import ComfyExtension, io


class Nothing(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Nothing", inputs=[], outputs=[])

    @classmethod
    def execute(cls):
        return io.NodeOutput()


class Extension(ComfyExtension):
    async def get_node_list(self):
        return [Nothing]


async def comfy_entrypoint():
    return Extension()
"""

PROGRAM = """
import asyncio, importlib.util, json, sys, time
from pathlib import Path
from tests.harness.comfy import import_comfy

import_comfy()
import comfy.ldm.modules.attention, comfy.model_management, comfy.model_patcher, comfy.sd, comfy_api.latest
import execution, folder_paths, nodes, server

before = set(sys.modules)
start = time.perf_counter()
file = Path(sys.argv[1]) / "__init__.py"
spec = importlib.util.spec_from_file_location("measured_pack", file)
module = importlib.util.module_from_spec(spec)
sys.modules["measured_pack"] = module
spec.loader.exec_module(module)


async def schemas():
    extension = await module.comfy_entrypoint()
    await extension.on_load()
    return [node.GET_SCHEMA() for node in await extension.get_node_list()]


count = len(asyncio.run(schemas()))
seconds = time.perf_counter() - start
packages = sorted({name.partition(".")[0] for name in set(sys.modules) - before} - {"measured_pack"})
print(json.dumps({"seconds": seconds, "nodes": count, "packages": packages}))
"""


def measure(folder: Path) -> dict[str, object]:
    """Import the pack in `folder` in a new process. Returns seconds, nodes, and the newly imported packages."""
    environment = {**server_environment(), "COMFYUI_PATH": str(comfyui_path())}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the import of the pack.")
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "__init__.py").write_text(EMPTY_PACK, encoding="utf-8")
        measure(REPOSITORY)  # compiles the bytecode
        pairs = [(measure(REPOSITORY), measure(Path(folder))) for _ in range(repeats)]
    pack, empty = ([float(str(entry["seconds"])) for entry in side] for side in zip(*pairs, strict=True))
    first = pairs[0][0]
    print(
        f"{'':22}{'median':>10}{'lowest':>10}{'highest':>10}   (ms, {repeats} processes each, taking turns)"
    )
    for name, seconds in ((f"this pack, {first['nodes']} nodes", pack), ("a pack with one node", empty)):
        values = (statistics.median(seconds), min(seconds), max(seconds))
        print(f"{name:22}" + "".join(f"{1000 * value:10.1f}" for value in values))
    print(f"new packages in the process: {first['packages']}")
    return 0 if statistics.median(pack) < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
