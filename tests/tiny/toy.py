"""Everything that a tiny training needs, on disk, without ComfyUI: photos of drawn people and their index, a base model with a small
vocabulary, CLIP vision, a face network and a face package."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from idadapter_core.config import parse_config
from idadapter_core.data.index import write_index
from idadapter_core.data.rows import Row
from idadapter_core.faces.detector import open_analyzer
from idadapter_core.faces.iresnet import IResNet, save_iresnet
from idadapter_core.training.config import RunConfig
from tests.golden import recipe
from tests.tiny.bases import write_diffusers_base
from tests.tiny.face_package import write_package
from tests.tiny.people import write_people
from tests.tiny.vision import WIDTH, config_file, vision_state

SIZE = 128
PEOPLE, PHOTOS = 5, 4
TEST_PERSON = "person_04"


@dataclass(frozen=True)
class Toy:
    """Where things are."""

    folder: Path
    kind: str

    @property
    def index(self) -> Path:
        return self.folder / "index.parquet"

    def content(self, run: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
        """The sections of a small run with other settings over them."""
        content: dict[str, Any] = {
            "base": {
                "path": str(self.folder / "base"),
                "family": self.kind,
                "vision": str(self.folder / "vision" / "model.safetensors"),
                "recognizer": str(self.folder / "recognizer.safetensors"),
                "face_package": str(self.folder / "package"),
            },
            "data": {"index": str(self.index), "resolution": 64, "references": 2, "workers": 0},
            "train": {"steps": 4, "global_batch_size": 4, "learning_rate": 1e-4},
            "output": {"folder": str(run), "save_every": 100, "log_every": 1, "tensorboard": False},
        }
        for name, values in sections.items():
            content[name] = {**content.get(name, {}), **values}
        return content

    def config(self, run: Path, /, **sections: dict[str, Any]) -> RunConfig:
        return parse_config(RunConfig, self.content(run, **sections))


def write_toy(folder: Path, kind: str = "sd15") -> Toy:
    """Write all of it; the base is of that kind (see `tests/tiny/bases.py`)."""
    photos = write_people(folder / "photos", PEOPLE, PHOTOS, SIZE)
    write_package(folder / "package")
    write_diffusers_base(folder / "base", kind)
    write_vision(folder / "vision")
    network = IResNet((1, 1, 1, 1))
    recipe.fill(network, 0, "iresnet.")
    save_iresnet(network, folder / "recognizer.safetensors")
    _write_index(folder, photos)
    return Toy(folder, kind)


def write_vision(folder: Path) -> Path:
    """The tiny CLIP vision model with a config beside it, which tells its sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(vision_state(), folder / "model.safetensors")
    config = json.loads(config_file(WIDTH).read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "clip_vision_model"}))
    return folder / "model.safetensors"


def _write_index(folder: Path, photos: list[Path]) -> None:
    """What a scan would find; tests of the scan are elsewhere."""
    analyzer = open_analyzer(folder / "package", "cpu")
    rows = []
    for number, photo in enumerate(sorted(photos)):
        (face,) = analyzer.detect(np.asarray(Image.open(photo)))
        rows.append(
            Row(
                number=number,
                source=photo.relative_to(folder / "photos").as_posix(),
                sha256=hashlib.sha256(photo.read_bytes()).hexdigest(),
                width=SIZE,
                height=SIZE,
                identity=photo.parent.name,
                caption=photo.with_suffix(".txt").read_text(encoding="utf-8").strip(),
                class_noun="man" if face.sex == "M" else "woman",
                box=face.box,
                landmarks=face.landmarks,
                score=face.score,
                faces=1,
                split="test" if photo.parent.name == TEST_PERSON else "train",
            )
        )
    write_index(folder / "index.parquet", folder / "photos", rows, torch.zeros(len(rows), 512), {})
