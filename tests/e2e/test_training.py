"""From a folder of photos to a picture in ComfyUI: the page docs/training.md as it is written, and the trainer's own sampler against
the real server."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from idadapter_core.adapter import load_adapter
from idadapter_core.cli import export, train
from idadapter_core.data.index import read_index
from idadapter_core.data.references import features_of
from idadapter_core.logs import read_log
from idadapter_core.methods import METHODS
from idadapter_core.schedule import RescaleSchedule
from idadapter_core.stable_diffusion.base import load_base
from idadapter_core.stable_diffusion.config import BaseConfig
from idadapter_core.stable_diffusion.networks import load_networks
from idadapter_core.stable_diffusion.pipeline import Pipeline, Strengths
from tests.harness.comfy import REPOSITORY
from tests.harness.results import picture
from tests.harness.server import ComfyServer, server_environment
from tests.harness.uniid_graph import uniid_graph
from tests.lab import KIND, RESOLUTION, TRAINED, Lab, bring_vision, draw, write_lab

pytestmark = pytest.mark.server

PAGE = REPOSITORY / "docs" / "training.md"
FOLDER = "output/lab"  # where the page puts everything
PYTHON = "python tasks.py python"
TEXT = "portrait photo of a <class word>"  # of ID Prompt in the graphs
SAMPLING = {"seed": 5, "steps": 4, "cfg": 3.0}


def commands() -> list[str]:
    """The commands of the page's walk-through, without their comments."""
    page = PAGE.read_text(encoding="utf-8")
    part = page[page.index("<!-- walk-through -->") : page.index("<!-- end of the walk-through -->")]
    blocks = re.findall(r"```sh\n(.*?)```", part, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def lab(comfy: None, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return write_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def walked(lab: Lab) -> Lab:
    """The lab after all commands of the page between the first, which makes it, and the last, which starts ComfyUI."""
    first, *middle, last = commands()
    assert first == f"python tasks.py lab make {FOLDER}"
    assert last == f"python tasks.py lab picture {FOLDER}"
    for command in middle:
        assert command.startswith(PYTHON), command
        words = shlex.split(command.removeprefix(PYTHON).replace(FOLDER, str(lab.folder)))
        done = subprocess.run(
            [sys.executable, *words],
            cwd=REPOSITORY,
            env={**server_environment(), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return lab


@pytest.fixture(scope="module")
def photos(server: ComfyServer, lab: Lab) -> list[str]:
    """Two photos of the first person, among the server's inputs."""
    bring_vision(lab)(server.base)
    files = sorted((lab.folder / "photos" / "person_00").glob("*.png"))[:2]
    return [server.add_input_image(f"lab_{file.name}", Image.open(file)) for file in files]


@pytest.fixture(scope="module")
def base(lab: Lab) -> Any:
    return load_base(BaseConfig(**lab.base()))


def identity_of(lab: Lab, method: str, adapter: Any) -> Any:
    index = read_index(lab.folder / "index.parquet")
    rows = [row for row in index.rows if row.identity == "person_00"][:2]
    needs = METHODS[method].needs(adapter.config)
    networks, digest = load_networks(BaseConfig(**lab.base()), needs, needs_detector=False)
    return adapter.encode(features_of(index, rows, networks, digest, "cpu"))


def from_server(server: ComfyServer, graph: Any, nodes: dict[str, Any], base: Any) -> np.ndarray:
    """The picture in 0..1 of a graph's latents, decoded without rounding to 256 levels."""
    sampler = graph.workflow[nodes["sampler"].id]["inputs"]
    sampler.update(SAMPLING, scheduler="simple")
    graph.add("SaveLatent", samples=nodes["sampler"], filename_prefix="trained")
    saved = picture(server.run(graph.workflow))
    newest = max((server.output_dir).rglob("trained*.latent"), key=lambda path: path.stat().st_mtime)
    latents = load_file(newest)["latent_tensor"] * 0.18215
    decoded = ((base.vae.decode(latents)[0] + 1) / 2).clamp(0, 1).detach().movedim(0, -1).numpy()
    # What the nodes decode and save is the same picture, in levels: ComfyUI rounds down.
    assert np.abs(saved - decoded * 255).max() < 1.01
    return np.asarray(decoded)


def from_trainer(base: Any, adapter: Any, identity: Any, **options: Any) -> np.ndarray:
    pipeline = Pipeline(base, adapter)
    try:
        drawn = pipeline.generate(
            TEXT,
            identity=identity,
            negative="blurry",
            width=RESOLUTION,
            height=RESOLUTION,
            **SAMPLING,
            **options,
        )
    finally:
        pipeline.close()
    return drawn.movedim(0, -1).numpy()


def test_the_page_leads_to_an_adapter(walked: Lab) -> None:
    run = walked.folder / "runs" / "idadapter"
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert facts["processes"] == 1  # the last part was resumed by one
    measured = [line["validation"] for line in read_log(run) if "validation" in line]
    assert measured[-1]["loss"] < measured[0]["loss"]
    assert measured[-1]["people"] == "test"
    adapter = load_adapter(walked.trained)
    assert any(abs(gate) > 1e-3 for pair in adapter.mechanisms.openings.values() for gate in pair)
    report = (walked.folder / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert "mine" in report
    assert (walked.folder / "evaluation" / "per_image.csv").is_file()


def test_comfyui_draws_what_the_trainer_draws(
    server: ComfyServer, walked: Lab, photos: list[str], base: Any
) -> None:
    """IDAdapter, trained and exported by the page's commands."""
    target = server.models_dir / "idadapter" / TRAINED
    target.write_bytes(walked.trained.read_bytes())
    graph, nodes = draw(server, photos, TRAINED, negative="blurry", size=RESOLUTION)
    by_server = from_server(server, graph, nodes, base)
    adapter = load_adapter(walked.trained)
    identity = identity_of(walked, "idadapter", adapter)
    by_trainer = from_trainer(base, adapter, identity)
    without = from_trainer(base, adapter, identity, strengths=Strengths(adapter=0.0, text=0.0))
    assert np.abs(by_server - by_trainer).max() < 1e-3
    assert np.abs(by_trainer - without).max() > 0.05


@pytest.fixture(scope="module")
def uniid(walked: Lab) -> Path:
    """Both branches, trained apart and exported as one file."""
    for branch in ("adapter", "text"):
        config = str(walked.folder / f"uniid_{branch}.toml")
        settings = ["--set", "train.steps=4", "--set", "data.cache=''", "--set", "output.validate_every=0"]
        settings += ["--set", "output.sample_every=0", "--set", "data.workers=0"]
        assert train.main(["--config", config, *settings]) == 0
    output = walked.folder / "uniid.safetensors"
    runs = [str(walked.folder / "runs" / f"uniid_{branch}") for branch in ("adapter", "text")]
    assert export.main([runs[0], str(output), "--text-branch", runs[1]]) == 0
    return output


@pytest.mark.parametrize("rescale", [False, True])
def test_comfyui_draws_what_the_trainer_draws_uniid(
    server: ComfyServer, walked: Lab, uniid: Path, photos: list[str], base: Any, rescale: bool
) -> None:
    (server.models_dir / "idadapter" / "uniid_trained.safetensors").write_bytes(uniid.read_bytes())
    graph, nodes = uniid_graph(
        photos,
        kind=KIND,
        adapter="uniid_trained.safetensors",
        text_branch="none",
        rescale=rescale,
        negative="blurry",
        size=RESOLUTION,
    )
    by_server = from_server(server, graph, nodes, base)
    adapter = load_adapter(uniid)
    identity = identity_of(walked, "uniid", adapter)
    by_trainer = from_trainer(
        base, adapter, identity, strengths=Strengths(rescale=RescaleSchedule() if rescale else None)
    )
    without = from_trainer(base, adapter, identity, strengths=Strengths(adapter=0.0, text=0.0))
    assert np.abs(by_server - by_trainer).max() < 1e-3
    assert np.abs(by_trainer - without).max() > 0.05
