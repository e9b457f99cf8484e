"""A small world to evaluate in: drawn people, judging models that really run, and a generator that draws instead of diffusing."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

from idadapter_core.config import parse_config
from idadapter_core.data.index import Index
from idadapter_core.data.rows import Row
from idadapter_core.evaluation.config import EvaluationConfig, RunEntry
from idadapter_core.evaluation.generate import Drawing, recipe_of
from idadapter_core.faces.images import Image
from tests.harness.shim import run_shim
from tests.tiny.bases import write_tokenizer
from tests.tiny.face_package import write_package
from tests.tiny.people import BACKGROUNDS, draw_person, write_people

SIZE = 96
CLASSES = ["Neutral", "Happy"]
HAPPY, PLAIN, LEFT = "a laughing <class word>", "a photo of a <class word>", "a <class word> looking left"
PROMPTS = [
    {"text": PLAIN, "group": "plain"},
    {"text": HAPPY, "group": "expression", "asks": "happy"},
    {"text": LEFT, "group": "pose", "asks": "left"},
]


def write_world(folder: Path, people: int = 3, photos: int = 3) -> Path:
    """Photos, and all judging models."""
    write_people(folder / "photos", people, photos, 128)
    write_package(folder / "package")
    write_package(folder / "second", seed=1)
    write_clip(folder / "clip")
    write_expressions(folder / "expressions.onnx")
    return folder


def index_of(folder: Path) -> Index:
    """The index of a world's photos, as far as an evaluation reads it."""
    rows = []
    for path in sorted((folder / "photos").glob("*/*.png")):
        number = int(path.parent.name[-2:])
        rows.append(
            Row(
                number=len(rows),
                source=path.relative_to(folder).as_posix(),
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                identity=path.parent.name,
                class_noun="woman" if number % 2 else "man",
                split="test",
            )
        )
    return Index(folder / "index.parquet", folder, tuple(rows), {}, "digest of the index")


def configure(folder: Path, output: Path, *runs: str, **sections: Any) -> EvaluationConfig:
    """An evaluation of runs by their names, with all judging models; `sections` change it."""
    content: dict[str, Any] = {
        "data": {"index": str(folder / "index.parquet"), "identities": 0, "references": 2},
        "runs": [{"name": name, "path": str(folder / f"{name}.safetensors")} for name in runs],
        "prompts": PROMPTS,
        "sampling": {"groups": [], "size": SIZE},
        "metrics": {
            "faces": str(folder / "package"),
            "second": str(folder / "second"),
            "clip": str(folder / "clip"),
        },
        "expression": {"path": str(folder / "expressions.onnx"), "size": 32, "classes": CLASSES},
        "output": {"folder": str(output)},
    }
    for name, values in sections.items():
        content[name] = {**content[name], **values} if isinstance(content.get(name), dict) else values
    return parse_config(EvaluationConfig, content)


class Painter:
    """Draws the person ("same"), always somebody else ("stranger"), or a person in every other picture only ("half").

    It follows the prompts that ask for happiness and for a head turned left; the base model draws somebody, who does not."""

    def __init__(self, config: EvaluationConfig, index: Index | None = None) -> None:
        self.config = config
        self.drawn: list[Drawing] = []
        self.trained_with = ""

    def recipe(self, drawing: Drawing) -> dict[str, Any]:
        name = "" if drawing.run is None else drawing.run.path
        return recipe_of(drawing, self.config.sampling, {"painter": "1", "adapter": name})

    def recognizer(self, run: RunEntry) -> str:
        return self.trained_with

    def generate(self, drawing: Drawing) -> Image:
        self.drawn.append(drawing)
        identity = int(drawing.person.name[-2:])
        run = "" if drawing.run is None else drawing.run.name
        rng = np.random.default_rng([identity, drawing.seed, len(drawing.prompt.text)])
        if run == "half" and drawing.prompt.text != PLAIN:
            return np.full((SIZE, SIZE, 3), 90, np.uint8)
        if run in ("", "stranger"):
            identity = 5000 + int(rng.integers(1000))
        noun = "woman" if run and drawing.prompt.asks == "happy" else "man"  # the colour that means happy
        for _ in range(50):
            turned = np.random.default_rng(rng.integers(1 << 30))
            state = np.random.default_rng(turned.integers(1 << 30))
            picture = draw_person(identity, noun, SIZE, state, BACKGROUNDS["grey"])
            if drawing.prompt.asks != "left" or _nose_is_left(picture):
                return picture
        raise AssertionError("no head turned left was drawn")


def _nose_is_left(picture: Image) -> bool:
    """Whether the blue dot is well to the left of the middle of the two eyes' dots."""
    pixels = picture.astype(int)
    nose = (pixels[..., 2] > 200) & (pixels[..., 0] < 60) & (pixels[..., 1] < 60)
    left = (pixels[..., 0] > 200) & (pixels[..., 1] > 200) & (pixels[..., 2] < 60)
    right = (pixels[..., 1] > 200) & (pixels[..., 0] < 60) & (pixels[..., 2] < 60)
    x = [float(np.nonzero(mask)[1].mean()) for mask in (nose, left, right)]
    return x[0] < (x[1] + x[2]) / 2 - 0.22 * (x[2] - x[1])


def with_prompts(config: EvaluationConfig, **texts: str) -> EvaluationConfig:
    """The configuration with other words for some of its prompts, by their group."""
    return replace(config, prompts=tuple(replace(p, text=texts.get(p.group, p.text)) for p in config.prompts))


def write_clip(folder: Path) -> Path:
    """A CLIPModel with random weights and a tokenizer of bytes."""
    run_shim()
    import transformers

    size = write_tokenizer(folder)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**small, "vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1}
    config = transformers.CLIPConfig(
        text_config=text,
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def write_expressions(path: Path) -> Path:
    """A classifier that takes a head with more blue than red for happy, with two scores behind its classes."""
    weights = np.array([[1, -1, 0, 0], [0, 0, 0, 0], [-1, 1, 0, 0]], np.float32)
    nodes = [
        helper.make_node("GlobalAveragePool", ["data"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "expressions",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path
