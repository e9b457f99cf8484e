"""The demo: UniID from a photo to a picture, in a real ComfyUI server without a screen.

`python tasks.py demo` runs it after setting everything up; `python -m tests.demo` alone needs COMFYUI_PATH.

The photo is real, the workflow and every step of it too. The trained weights, which nobody may pass on, are replaced by
tiny networks with random weights, so the pictures are patterns, not people.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tests.harness.comfy import REPOSITORY
from tests.harness.runs import RunResult
from tests.harness.server import ComfyServer, ServerError, bring_tiny_checkpoints
from tests.harness.uniid_graph import add_text, uniid_graph
from tests.harness.workflow import Graph, add_text_to_image
from tests.tiny.checkpoints import CHECKPOINT_NAMES
from tests.tiny.files import (
    ADAPTER,
    ASTRONAUT,
    PACKAGE,
    RECOGNIZER,
    TEXT_BRANCH,
    bring_adapters,
    bring_clip_vision,
    bring_face_package,
    bring_photos,
    bring_recognizer,
)

OUTPUT = REPOSITORY / "output" / "demo"
PROMPT = "portrait photo of a <class word> in a space suit"
CLASS_WORD = "woman"
NEGATIVE = "blurry, low quality"


@dataclass(frozen=True)
class Check:
    """One thing the demo must show."""

    claim: str
    measured: str
    holds: bool

    def __str__(self) -> str:
        return f"  {'ok  ' if self.holds else 'FAIL'}  {self.claim}: {self.measured}"


@dataclass(frozen=True)
class Pictures:
    """What the runs gave."""

    photo: Image.Image  # with the detector's boxes
    crop: Image.Image
    plain: Image.Image
    identity: Image.Image
    strength_zero: Image.Image
    again: Image.Image  # the identity picture once more, nothing from the cache


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run UniID's workflow in a real ComfyUI server.")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels (default 256)")
    parser.add_argument("--steps", type=int, default=8, help="sampling steps (default 8)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the pictures")
    options = parser.parse_args(arguments)
    writers = [
        bring_tiny_checkpoints,
        bring_adapters,
        bring_clip_vision,
        bring_recognizer,
        bring_face_package,
        bring_photos,
    ]
    print("Writing tiny models and starting ComfyUI ...", flush=True)
    try:
        with ComfyServer(writers=writers) as server:
            return show(server, options.size, options.steps, options.output)
    except (ServerError, AssertionError) as error:
        print(f"\nThe demo failed:\n{error}")
        return 1


def show(server: ComfyServer, size: int, steps: int, folder: Path) -> int:
    """Run the workflows, write the pictures and print what happened; the exit status."""
    system = json.loads(server.get("/system_stats"))["system"]
    ours = [node for node in server.object_info() if node.startswith("IDAdapter")]
    print(
        f"ComfyUI {system['comfyui_version']}, Python {system['python_version'].split()[0]}, PyTorch "
        f"{system['pytorch_version']}, on the CPU: up after {server.boot_seconds:.1f} s with {len(ours)} nodes of this pack.",
        flush=True,
    )
    settings = {"size": size, "steps": steps, "negative": NEGATIVE, "cfg": 5.0, "seed": 12}
    plain = run_plain(server, settings)
    result, pictures, texts = run_identity(server, settings, plain)
    checks = judge(pictures)
    paths = write(pictures, folder)
    describe(texts, result, settings, checks, paths)
    return 0 if all(check.holds for check in checks) else 1


def run_plain(server: ComfyServer, settings: dict[str, Any]) -> Image.Image:
    """The picture of the model alone."""
    graph = Graph()
    prompt = PROMPT.replace("<class word>", CLASS_WORD)
    add_text_to_image(graph, CHECKPOINT_NAMES["sdxl"], prompt=prompt, **settings)
    return server.run(graph.workflow, timeout=600).check().images[0]


def run_identity(
    server: ComfyServer, settings: dict[str, Any], plain: Image.Image
) -> tuple[RunResult, Pictures, dict[str, str]]:
    """The pictures with the identity, and the texts that the nodes gave."""
    graph, nodes = uniid_graph((ASTRONAUT,), prompt=PROMPT.replace("<class word>", CLASS_WORD), **settings)
    graph.workflow[nodes["prompt"].id]["inputs"].update(text=PROMPT, class_word=CLASS_WORD)
    shown = {
        "crop": graph.add("PreviewImage", images=nodes["faces"][1]),
        "photo": graph.add("PreviewImage", images=nodes["faces"][3]),
    }
    texts = {
        "faces": add_text(graph, nodes["faces"], 4),
        "adapter": add_text(graph, nodes["adapter"], 1),
        "prompt": add_text(graph, nodes["prompt"], 1),
    }
    result = server.run(graph.workflow, timeout=600).check()
    save = nodes["save"].id

    # The same wiring at strength 0, with the plain prompt.
    sampler = graph.workflow[nodes["sampler"].id]["inputs"]
    with_identity = dict(sampler)
    sampler["positive"] = nodes["positive"][0]
    graph.workflow[nodes["apply"].id]["inputs"]["weight"] = 0.0
    zero = server.run(graph.workflow, timeout=600).check()

    sampler.update(with_identity)
    graph.workflow[nodes["apply"].id]["inputs"]["weight"] = 1.0
    server.free()
    again = server.run(graph.workflow, timeout=600).check()
    pictures = Pictures(
        photo=result.images_by_node[shown["photo"].id][0],
        crop=result.images_by_node[shown["crop"].id][0],
        plain=plain,
        identity=result.images_by_node[save][0],
        strength_zero=zero.images_by_node[save][0],
        again=again.images_by_node[save][0],
    )
    return result, pictures, {name: "".join(result.outputs[node.id]["text"]) for name, node in texts.items()}


def difference(one: Image.Image, other: Image.Image) -> np.ndarray:
    """Absolute differences of all channels, in levels of 255."""
    left, right = (np.asarray(image.convert("RGB"), dtype=np.int16) for image in (one, other))
    return np.abs(left - right)


def amplified(pictures: Pictures) -> Image.Image:
    """What the identity changed, four times as strong as it is."""
    changed = 4 * difference(pictures.identity, pictures.plain)
    return Image.fromarray(changed.clip(0, 255).astype(np.uint8))


def judge(pictures: Pictures) -> list[Check]:
    """What must hold of the pictures for the demo to succeed."""
    changed = difference(pictures.identity, pictures.plain)
    zero = difference(pictures.strength_zero, pictures.plain)
    again = difference(pictures.again, pictures.identity)
    contrast = float(np.asarray(pictures.identity).std())
    return [
        Check(
            "the identity changes the picture",
            f"{changed.mean():.1f} of 255 levels on average",
            bool(changed.mean() > 1),
        ),
        Check("strength 0 is exactly the plain model", f"largest difference {zero.max()}", not zero.any()),
        Check(
            "the same seed gives the same picture, computed anew",
            f"largest difference {again.max()}",
            not again.any(),
        ),
        Check(
            "the picture is neither black nor flat",
            f"standard deviation {contrast:.0f} levels",
            contrast > 10,
        ),
    ]


def write(pictures: Pictures, folder: Path) -> list[Path]:
    """Save the pictures and a sheet with all of them; the sheet is the last path."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        "1_photo.png": (pictures.photo, "photo, with the face found"),
        "2_crop.png": (pictures.crop, "face as the network sees it"),
        "3_plain.png": (pictures.plain, "plain model"),
        "4_identity.png": (pictures.identity, "with the identity"),
        "5_difference.png": (amplified(pictures), "their difference, 4 times"),
    }
    for name, (image, _) in named.items():
        image.save(folder / name)
    sheet = contact_sheet(list(named.values()))
    sheet.save(folder / "sheet.png")
    return [folder / name for name in (*named, "sheet.png")]


def contact_sheet(
    pictures: Sequence[tuple[Image.Image, str]], side: int = 320, margin: int = 16
) -> Image.Image:
    """Pictures of any sizes side by side, each with its caption."""
    font = ImageFont.load_default(size=18)
    caption = 32
    width = len(pictures) * (side + margin) + margin
    sheet = Image.new("RGB", (width, side + caption + 2 * margin), "white")
    draw = ImageDraw.Draw(sheet)
    for position, (image, text) in enumerate(pictures):
        x = margin + position * (side + margin)
        sheet.paste(image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (x, margin))
        draw.text((x, margin + side + 8), text, fill="black", font=font)
    return sheet


def describe(
    texts: dict[str, str],
    result: RunResult,
    settings: dict[str, Any],
    checks: Sequence[Check],
    paths: Sequence[Path],
) -> None:
    """Print what happened."""
    print(
        f"""
What ran
  photo       {ASTRONAUT}: Eileen Collins, NASA, from scikit-image
  checkpoint  {CHECKPOINT_NAMES["sdxl"]} (SDXL's architecture, small)
  face        package {PACKAGE} (small models in insightface's format), network {RECOGNIZER}
  adapter     {ADAPTER}
              {TEXT_BRANCH}

Adapter
{indent(texts["adapter"])}

Faces
{indent(texts["faces"])}

Prompt
  {texts["prompt"]}
  {settings["size"]}x{settings["size"]} px, {settings["steps"]} steps, seed {settings["seed"]}; the whole workflow took \
{result.seconds:.1f} s on this CPU

Checks
"""
        + "\n".join(str(check) for check in checks)
    )
    print(f"\nPictures in {paths[0].parent}\n  {', '.join(path.name for path in paths)}")
    print(
        """
What this shows, and what not
  Server, workflow, nodes and photo are real. All networks are small and have random weights, as stand-ins for the trained
  ones: the pictures are patterns, and whom they show cannot be judged. The stand-in for the face detector finds five
  coloured dots, which were painted onto the astronaut's eyes, nose and mouth; sex and age above are made up by another.

For real pictures: README.md lists the model files, where they come from and where they belong. Then open
  workflows/uniid_sdxl.json in ComfyUI, put your photo into Load Image, and run."""
    )


def indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
