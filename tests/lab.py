"""A place to try training in, without real photos or weights: drawn people, tiny random models, and configurations that use them.

    python tasks.py lab make FOLDER        writes it all
    python tasks.py lab picture FOLDER     a picture by ComfyUI with the adapter in FOLDER/models/idadapter

docs/training.md goes through it command by command, and a test follows that page.

Everything runs as with real models: the base is a checkpoint that ComfyUI loads, faces are found by an insightface package. But
the networks are small and random, so pictures are patterns, and nothing is learned but what a random network can be taught.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from idadapter_core.config import config_toml, parse_config
from idadapter_core.evaluation.config import EvaluationConfig
from idadapter_core.training.config import RunConfig, with_method_defaults
from tests.harness.comfy import comfyui_path, import_comfy
from tests.harness.idadapter_graph import idadapter_graph
from tests.harness.results import picture
from tests.harness.server import ComfyServer, Writer
from tests.tiny.bases import write_tiny_base
from tests.tiny.checkpoints import CHECKPOINT_NAMES, write_tiny_checkpoints
from tests.tiny.files import PACKAGE, RECOGNIZER, bring_face_package, bring_recognizer
from tests.tiny.people import write_bad, write_people
from tests.tiny.toy import write_vision

KIND = "sd15"
VISION = "lab_clip_vision.safetensors"
TRAINED = "my_idadapter.safetensors"
PEOPLE, PHOTOS, SIZE = 8, 4, 256
RESOLUTION = 64
PROMPT = "a photo of a man, man is sks"


@dataclass(frozen=True)
class Lab:
    """Where things are."""

    folder: Path

    @property
    def models(self) -> Path:
        """As ComfyUI's models folder."""
        return self.folder / "models"

    @property
    def trained(self) -> Path:
        return self.models / "idadapter" / TRAINED

    def base(self) -> dict[str, Any]:
        """The section of that name."""
        comfyui = comfyui_path()
        assert comfyui is not None
        return {
            "path": str(self.models / "checkpoints" / CHECKPOINT_NAMES[KIND]),
            "family": KIND,
            "config": str(self.folder / "base"),
            "tokenizer": str(comfyui / "comfy" / "sd1_tokenizer"),
            "vision": str(self.folder / "vision" / "model.safetensors"),
            "recognizer": str(self.models / "idadapter" / "recognizers" / RECOGNIZER),
            "face_package": str(self.models / "insightface" / "models" / PACKAGE),
        }

    def run(self, name: str, **sections: dict[str, Any]) -> RunConfig:
        content: dict[str, Any] = {
            "base": self.base(),
            "data": {
                "index": str(self.folder / "index.parquet"),
                "cache": str(self.folder / "cache"),
                "resolution": RESOLUTION,
                "references": 2,
                "max_bad_share": 0.2,  # one photo of each bad kind is there on purpose
                "workers": 1,
            },
            "train": {"steps": 40, "global_batch_size": 4, "ema_decay": 0.9},
            "output": {
                "folder": str(self.folder / "runs" / name),
                "save_every": 20,
                "log_every": 5,
                "validate_every": 20,
                "validate_samples": 16,
                "sample_every": 20,
                "sample_steps": 4,
            },
        }
        for section, values in sections.items():
            content[section] = {**content.get(section, {}), **values}
        return parse_config(RunConfig, with_method_defaults(content))


def write_lab(folder: Path) -> Lab:
    """Photos, models and configurations. Needs ComfyUI, whose own code writes the checkpoint."""
    comfyui = comfyui_path()
    assert comfyui is not None, "no ComfyUI: set COMFYUI_PATH to its folder, or use tasks.py"
    import_comfy(comfyui)
    lab = Lab(folder.absolute())
    write_people(lab.folder / "photos", PEOPLE, PHOTOS, SIZE)
    write_bad(lab.folder / "photos" / "bad", SIZE)
    write_tiny_checkpoints(lab.models)
    write_tiny_base(lab.folder / "base", KIND)
    bring_face_package(lab.folder)
    bring_recognizer(lab.folder)
    # In fp16, as published: ComfyUI rounds CLIP vision to it.
    vision = write_vision(lab.folder / "vision")
    save_file({name: t.half() for name, t in load_file(vision).items()}, vision)
    bring_vision(lab)(lab.folder)
    uniid = {"method": "uniid", "branch": "adapter"}
    configs = {
        # Weights as small as these learn in 40 steps from a large learning rate alone.
        "idadapter": lab.run("idadapter", train={"learning_rate": 1e-2}),
        "uniid_adapter": lab.run("uniid_adapter", adapter=uniid),
        "uniid_text": lab.run("uniid_text", adapter={**uniid, "branch": "text"}),
    }
    for name, config in configs.items():
        (lab.folder / f"{name}.toml").write_text(config_toml(config), encoding="utf-8")
    (lab.folder / "eval.toml").write_text(config_toml(_evaluation(lab)), encoding="utf-8")
    return lab


def bring_vision(lab: Lab) -> Writer:
    """What puts the lab's CLIP vision model into the models folder of a base directory."""

    def write(base: Path) -> None:
        target = base / "models" / "clip_vision" / VISION
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((lab.folder / "vision" / "model.safetensors").read_bytes())

    return write


def _evaluation(lab: Lab) -> EvaluationConfig:
    content = {
        "base": lab.base(),
        "data": {"index": str(lab.folder / "index.parquet"), "identities": 2, "references": 2},
        "runs": [
            {
                "name": "mine",
                "path": str(lab.trained),
                "scales": [0.5, 1.0],
                "log": str(lab.folder / "runs" / "idadapter"),
            }
        ],
        "sampling": {"groups": ["plain", "scene"], "steps": 4, "cfg": 3.0, "size": RESOLUTION},
        "metrics": {"faces": lab.base()["face_package"], "second": lab.base()["recognizer"]},
        "output": {"folder": str(lab.folder / "evaluation")},
    }
    return parse_config(EvaluationConfig, content)


def draw(server: ComfyServer, photos: Sequence[str], adapter: str, **settings: Any) -> Any:
    """IDAdapter's workflow with an adapter of the lab: the graph and its nodes by role."""
    graph, nodes = idadapter_graph(photos, kind=KIND, adapter=adapter, clip_vision=VISION, **settings)
    graph.workflow[nodes["analyzer"].id]["inputs"]["recognizer"] = RECOGNIZER
    return graph, nodes


def picture_of(lab: Lab) -> Path:
    """Start ComfyUI with the lab's models, draw the first person with the trained adapter, and save the picture."""
    from PIL import Image

    if not lab.trained.is_file():
        raise SystemExit(f"{lab.trained} is not there yet; export an adapter to it first")

    def bring(base: Path) -> None:
        (base / "models").rmdir()
        (base / "models").symlink_to(lab.models, target_is_directory=True)

    with ComfyServer(writers=[bring]) as server:
        photos = sorted((lab.folder / "photos" / "person_00").glob("*.png"))[:2]
        names = [server.add_input_image(photo.name, Image.open(photo)) for photo in photos]
        graph, _ = draw(server, names, TRAINED, prompt=PROMPT, size=RESOLUTION, steps=4)
        pixels = picture(server.run(graph.workflow))
    path = lab.folder / "picture.png"
    Image.fromarray(pixels.astype("uint8")).save(path)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tasks.py lab", description="A place to try training in.")
    parser.add_argument(
        "command", choices=("make", "picture"), help="write it all, or draw with what was trained in it"
    )
    parser.add_argument("folder", type=Path, help="of the lab")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)  # ComfyUI warns of what a lab does not use
    if options.command == "make":
        if (
            options.folder.is_dir()
            and any(options.folder.iterdir())
            and not (options.folder / "eval.toml").is_file()
        ):
            parser.error(f"{options.folder} has files of something else; name a new folder")
        lab = write_lab(options.folder)
        print(
            f"Photos, tiny models and configurations are in {lab.folder}. docs/training.md says how to go on."
        )
    else:
        print(f"wrote {picture_of(Lab(options.folder.absolute()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
