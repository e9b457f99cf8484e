"""The measurements on a GPU, at tiny sizes on the CPU: every part measures what its table promises, and none loses the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from benchmarks import models
from benchmarks.on_gpu import detector, processes, subjects, table
from benchmarks.on_gpu.__main__ import main
from benchmarks.on_gpu.parts import MACHINE, PARTS, TINY, Part, named

STEP = {"model", "ms per step", "added ms", "added %"}
COLUMNS = {
    "machine": {"device", "torch", "ComfyUI", "commit", "sizes"},
    "steps": {*STEP, "once per run, ms"},
    "waits": {"model", "waits per step", "scalars per step", "launches per step"},
    "parity": {"case", "largest difference", "relative difference"},
    "networks": {"network", "on", "ms"},
    "memory": {"model", "peak allocated, GB", "peak of the device, GB", "added, MB", "dynamic VRAM"},
    "dynamic": {"model", "peak allocated, GB", "peak of the device, GB", "added, MB", "dynamic VRAM"},
    "training": {"run", "ms per step", "share of L_id, %", "samples that count, %", "peak allocated, GB"},
    "compiled": STEP,
}


@pytest.fixture(scope="module", autouse=True)
def _no_model_stays() -> Iterator[None]:
    yield
    subjects.unet.cache_clear()
    subjects.adapter.cache_clear()


def rows_of(name: str, **changes: Any) -> list[dict[str, Any]]:
    """What a part measures at tiny sizes in this process."""
    rows: list[dict[str, Any]] = []
    (part,) = (part for part in PARTS if part.name == name)
    part.run(replace(TINY, **changes), rows.append)
    json.dumps(rows)
    return rows


@pytest.mark.parametrize("name", [part.name for part in PARTS])
def test_every_part_fills_its_table(name: str) -> None:
    rows = rows_of(name, repeats=1)
    assert rows
    for row in rows:
        assert row.keys() >= COLUMNS[name]
    if "model" in COLUMNS[name]:
        assert [row["model"].split(",")[0].split(" (")[0] for row in rows] == ["plain", "UniID", "IDAdapter"]
    if name == "parity":
        assert all(row["largest difference"] == 0 for row in rows)
    if (
        name == "waits"
    ):  # the host asks for one number in each step in which an identity acts: the noise level
        plain, *ours = (row["scalars per step"] for row in rows)
        assert ours == [plain + 1] * 2
    if name == "training":
        assert 0 < rows[0]["samples that count, %"] < 100


def test_sdxl_is_sampled_too() -> None:
    """Tiny sizes are SD1.5's; the real measurements give SDXL its pooled text and picture sizes."""
    assert [row["ms per step"] > 0 for row in rows_of("steps", family="sdxl", steps=2)] == [True] * 3


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_models_have_all_weights_with_dynamic_vram(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's layers are then made without weights."""
    import comfy.memory_management

    expected = models.unet(family, torch.float32, tiny=True).model.diffusion_model.state_dict()
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    dynamic = models.unet(family, torch.float32, tiny=True)
    found = dynamic.model.diffusion_model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(
        tensor.isfinite().all() and tensor.any() for name, tensor in found.items() if "bias" not in name
    )


# ------------------------------------------------------------------------------------------------ the detector


def test_the_detector_is_as_large_as_the_published_one(tmp_path: Path) -> None:
    """SCRFD-10G is named after its 10 G multiplications with addition on 640 x 480 pixels."""
    import onnx

    side = 640
    model = onnx.load(detector.write_detector(tmp_path / "detector.onnx", side))
    kernels = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*onnx.shape_inference.infer_shapes(model).graph.value_info, *model.graph.output)
    }
    products = sum(
        int(np.prod(kernels[node.input[1]])) * int(np.prod(shapes[node.output[0]][2:]))
        for node in model.graph.node
        if node.op_type == "Conv"
    )
    assert 9e9 < products * 480 / 640 < 11e9


def test_the_detector_runs(tmp_path: Path) -> None:
    file = detector.write_detector(tmp_path / "detector.onnx", 64, divide=8)
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"input": np.ones((1, 3, 64, 64), np.float32)})
    assert [output.shape[2] for output in found] == [8] * 3 + [4] * 3 + [2] * 3
    assert all(np.isfinite(output).all() for output in found)


# ------------------------------------------------------------------------------------------------ the processes

WRITES = "import json, sys; f = open(sys.argv[1], 'w'); say = lambda **e: print(json.dumps(e), file=f, flush=True);"
PROGRAMS = {
    "good": "say(row={'a': 1}); say(done=True)",
    "raises": "say(row={'a': 2}); say(error='ValueError: no such thing'); sys.exit(1)",
    "crashes": "say(row={'a': 3}); print('out of memory', flush=True); import os; os._exit(9)",
    "hangs": "say(row={'a': 4}); import time; time.sleep(600)",
    "cut off": "say(row={'a': 5}); f.write('{\"row\": {'); f.flush(); sys.exit(3)",
    "silent": "sys.exit(0)",
}


def run_programs(names: list[str], output: Path, budget: float = 60) -> dict[str, Any]:
    parts = [Part(name, name, "nothing:here", 3 if name == "hangs" else 30) for name in names]
    return processes.run_all(
        parts,
        lambda part, lines: [sys.executable, "-c", WRITES + PROGRAMS[part.name], str(lines)],
        output,
        budget,
        say=lambda _: None,
    )


def test_one_part_does_not_lose_the_others(tmp_path: Path) -> None:
    output = tmp_path / "new" / "results.json"
    found = run_programs([*PROGRAMS], output)
    assert {name: (part["status"], [row["a"] for row in part["rows"]]) for name, part in found.items()} == {
        "good": ("ok", [1]),
        "raises": ("failed", [2]),
        "crashes": ("failed", [3]),
        "hangs": ("timeout", [4]),
        "cut off": ("failed", [5]),
        "silent": ("failed", []),
    }
    assert found["raises"]["error"] == "ValueError: no such thing"
    assert found["crashes"]["error"] == "its process ended with code 9: out of memory"
    assert json.loads(output.read_text()) == found


def test_no_part_begins_after_the_time_for_all(tmp_path: Path) -> None:
    found = run_programs(["good", "good"], tmp_path / "results.json", budget=0)
    assert found["good"] == {"status": "not run", "error": "the 0 s for all parts were used up", "rows": []}


def test_nothing_is_measured_on_the_wrong_machine(tmp_path: Path) -> None:
    def command(part: Part, lines: Path) -> list[str]:
        assert part is MACHINE
        return [sys.executable, "-c", WRITES + PROGRAMS["raises"], str(lines)]

    found = processes.run_all(PARTS, command, tmp_path / "results.json", 60, say=lambda _: None)
    assert [*found] == ["machine"]


def test_a_part_writes_its_rows_and_why_it_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "lines"
    missing = Part("missing", "", "nothing_here:at_all", 1)
    assert processes.measure(missing, TINY, lines) == 1
    assert "ModuleNotFoundError" in json.loads(lines.read_text())["error"]
    assert "Traceback" in capsys.readouterr().err


def test_the_command_line_measures_a_part_in_a_process(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    assert main([str(output), "--tiny", "--only", "machine"]) == 0
    (row,) = json.loads(output.read_text())["machine"]["rows"]
    assert row["sizes"] == "tiny"


def test_parts_by_name() -> None:
    assert [part.name for part in named(["waits"])] == ["machine", "waits"]
    assert named([]) is PARTS
    with pytest.raises(ValueError, match="no part is called speed; there are machine, steps"):
        named(["speed"])


# ------------------------------------------------------------------------------------------------ the tables

MEASURED = {
    "machine": {"status": "ok", "rows": [{"device": "GPU | 1", "sizes": "real"}]},
    "steps": {
        "status": "ok",
        "rows": [{"model": "plain", "ms": 123.456}, {"model": "ours", "ms": 1.5, "added %": 2e-5}],
    },
    "waits": {"status": "timeout", "error": "it took longer than its 60 s", "rows": [{"model": "plain"}]},
    "memory": {"status": "failed", "error": "OSError: no\nmore of it", "rows": []},
}


def test_tables_are_written_into_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{table.BEGIN}\nold\n{table.END}\n\nafter\n", encoding="utf-8")
    results = tmp_path / "results.json"
    results.write_text(json.dumps(MEASURED), encoding="utf-8")
    for _ in range(2):  # a second time changes nothing
        assert main(["--table", str(results), "--page", str(page)]) == 0
        text = page.read_text(encoding="utf-8")
        assert text.startswith("# Before\n")
        assert text.endswith(f"{table.END}\n\nafter\n")
        assert "old" not in text
        assert "| GPU \\| 1 | real |" in text
        assert (
            "| model | ms | added % |\n| --- | --- | --- |\n| plain | 123 |  |\n| ours | 1.50 | 2.0e-05 |"
            in text
        )
        assert "This table is incomplete: it took longer than its 60 s." in text
        assert "This table is not measured: OSError: no." in text
        assert "Detector" not in text


@pytest.mark.parametrize(
    ("content", "page_text", "message"),
    [
        (MEASURED, "no marks", "has no place for the tables"),
        ({**MEASURED, "machine": {"rows": [{"sizes": "tiny"}]}}, table.BEGIN + table.END, "without --tiny"),
        ({}, table.BEGIN + table.END, "without --tiny"),
    ],
)
def test_tables_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, page_text: str, message: str
) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(page_text, encoding="utf-8")
    results.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["--table", str(results), "--page", str(page)])
    assert message in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == page_text
