"""Memory for loading a file and for processing a video, relative to the size of the file and of the video.

    python -m benchmarks.memory load [--megabytes 500] [--repeats 5]
    COMFYUI_PATH=... python -m benchmarks.memory video [--frames 200] [--width 1280] [--height 720]

`load` reads a .safetensors file as memory-mapped views ("mapped"), as copies of these views ("copied"), and as the pack does ("in
memory"), each in a separate process; the values are then read once, as the check for broken weights does. Times are medians, with
the file in the page cache. `video` runs Extract Face Features on a batch of frames with a face each. The peak is that of resident
memory beyond the process's memory before; Linux only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.harness.memory import PeakMemory

LIMIT = 1.3  # relative to the video, including the video
MODES = ("mapped", "copied", "in memory")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure peaks of memory.")
    commands = parser.add_subparsers(dest="command", required=True)
    load = commands.add_parser("load")
    load.add_argument("--megabytes", type=int, default=500)
    load.add_argument("--repeats", type=int, default=5)
    load.add_argument("--one", nargs=2, metavar=("MODE", "FILE"), help=argparse.SUPPRESS)
    video = commands.add_parser("video")
    video.add_argument("--frames", type=int, default=200)
    video.add_argument("--width", type=int, default=1280)
    video.add_argument("--height", type=int, default=720)
    options = parser.parse_args()
    if options.command == "video":
        return watch(options.frames, options.width, options.height)
    if options.one:
        print(json.dumps(load_once(options.one[0], Path(options.one[1]))))
        return 0
    return compare(options.megabytes, options.repeats)


def load_once(mode: str, path: Path) -> dict[str, float]:
    """Seconds of one load, and its peak relative to the file."""
    from idadapter_core.files import read_safetensors

    read_safetensors(path, mapped=True)  # imports and one-time setup of the libraries
    start = time.perf_counter()
    with PeakMemory() as peak:
        tensors, _ = read_safetensors(path, mapped=mode != "in memory")
        if mode == "copied":
            tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        loaded = time.perf_counter() - start
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    return {
        "load": loaded,
        "load and read": time.perf_counter() - start,
        "peak": peak.bytes / path.stat().st_size,
    }


def compare(megabytes: int, repeats: int) -> int:
    import torch
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.safetensors"
        side = 1024  # 2 MiB of fp16 each
        save_file({f"w{i}": torch.randn(side, side).half() for i in range(megabytes // 2)}, path)
        results: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
        for _ in range(repeats):
            for mode in MODES:
                command = [sys.executable, "-m", "benchmarks.memory", "load", "--one", mode, str(path)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results[mode].append(json.loads(done.stdout))
    median = {
        mode: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for mode, runs in results.items()
    }
    reference = median["mapped"]["load and read"]
    print(f"{'':12}{'load':>10}{'load and read':>16}{'against mapped':>16}{'peak / file':>14}")
    for mode, row in median.items():
        print(
            f"{mode:12}{row['load']:9.2f}s{row['load and read']:15.2f}s{row['load and read'] / reference:16.2f}{row['peak']:14.2f}"
        )
    return 0


def watch(frames: int, width: int, height: int) -> int:
    import torch

    from tests.harness.comfy import load_pack, pack_nodes
    from tests.tiny.face_package import MarkedFace, synthesize, write_package

    load_pack()
    node = pack_nodes()["IDAdapterExtractFaces"]
    from ComfyUI_IDAdapter.idadapter_core.faces.detector import open_analyzer
    from ComfyUI_IDAdapter.nodes.faces import LoadedAnalyzer

    with tempfile.TemporaryDirectory() as folder:
        analyzer = LoadedAnalyzer(open_analyzer(write_package(Path(folder)), "cpu", recognition=True))
        frame = torch.from_numpy(synthesize(width, height, [MarkedFace(width / 2, height / 2, 60)]))
        node.execute(frame[None].float() / 255, analyzer, "largest", 0, "error")  # one-time setup
        with PeakMemory() as peak:
            batch = torch.empty(frames, height, width, 3)
            batch[:] = frame
            batch.div_(255)
            faces, crops, boxes, preview, _ = node.execute(batch, analyzer, "largest", 0, "error").result
    ratio = peak.bytes / batch.nbytes
    print(
        f"{frames} frames of {width}x{height}: {batch.nbytes / 2**20:.0f} MiB; preview {tuple(preview.shape)}"
    )
    print(f"peak of resident memory: {ratio:.3f} times the frames (limit {LIMIT})")
    assert len(faces) == len(crops) == len(boxes) == frames
    return int(ratio >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
