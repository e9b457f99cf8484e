"""The files that graphs need beside the checkpoints: adapters, LoRAs, CLIP vision, a face network, a face package and photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from idadapter_core.faces.iresnet import IResNet, save_iresnet
from tests.golden import recipe
from tests.tiny.idadapter import write_tiny_idadapters
from tests.tiny.lora import write_tiny_loras
from tests.tiny.uniid import write_tiny_adapters
from tests.tiny.vision import FILE_NAMES, NARROW_WIDTH, WIDTH, write_tiny_clip_vision

PACKAGE = "buffalo_l"
RECOGNIZER = "tiny_iresnet.safetensors"

CLIP_VISION = FILE_NAMES[WIDTH]
CLIP_VISION_NARROW = FILE_NAMES[NARROW_WIDTH]
"""Of another width than any adapter here reads."""

# As published, SDXL: two files of one name in two folders.
ADAPTER = "uniid_tiny/adapter_branch/pytorch_model.bin"
TEXT_BRANCH = "uniid_tiny/text_branch/pytorch_model.bin"
ADAPTER_SDXL = "uniid_tiny_sdxl.safetensors"
ADAPTER_SD15 = "uniid_tiny_sd15.safetensors"

ASTRONAUT = "astronaut.png"
PERSON = "person.png"
"""One person, alone in the photo; person_2.png to person_4.png show the same person at other places and sizes."""
PHOTOS = (PERSON, "person_2.png", "person_3.png", "person_4.png")
STRANGER = "stranger.png"
GROUP = "group.png"
"""Three people."""
EMPTY = "empty.png"
"""Nobody."""
CUT = "cut.png"
"""A face of which less than half is in the photo, all landmarks being there."""

# Eyes, nose and mouth corners of the astronaut, in pixels of scikit-image's 512 x 512 photo.
ASTRONAUT_LANDMARKS = np.array(
    [[203.0, 101.0], [247.0, 103.0], [223.0, 127.0], [204.0, 141.0], [245.0, 141.0]]
)


def bring_adapters(base: Path) -> None:
    """A `Writer`: the tiny adapters."""
    write_tiny_adapters(base / "models")


def bring_idadapters(base: Path) -> None:
    """A `Writer`: the tiny IDAdapters."""
    write_tiny_idadapters(base / "models")


def bring_loras(base: Path) -> None:
    """A `Writer`: a LoRA for each tiny checkpoint, which must be there already."""
    write_tiny_loras(base / "models")


def bring_clip_vision(base: Path) -> None:
    """A `Writer`: the tiny CLIP vision models."""
    write_tiny_clip_vision(base / "models")


def bring_recognizer(base: Path) -> None:
    """A `Writer`: a face network with one block for each stage."""
    folder = base / "models" / "idadapter" / "recognizers"
    folder.mkdir(parents=True, exist_ok=True)
    network = IResNet((1, 1, 1, 1))
    recipe.fill(network, 0, "iresnet.")
    save_iresnet(network, folder / RECOGNIZER)


def bring_face_package(base: Path) -> None:
    """A `Writer`: the tiny insightface package, where insightface's own users have theirs."""
    from tests.tiny.face_package import write_package

    write_package(base / "models" / "insightface" / "models" / PACKAGE)


def bring_photos(base: Path) -> None:
    """A `Writer`: the photos named above, into the input folder."""
    from tests.tiny.face_package import MarkedFace, synthesize

    man = (205, 160, 140)
    places = ((320, 300, 90), (250, 330, 120), (360, 280, 70), (300, 340, 140))
    pictures = {
        name: synthesize(faces=[MarkedFace(*place, identity=1, skin=man)])
        for name, place in zip(PHOTOS, places, strict=True)
    }
    pictures[STRANGER] = synthesize(faces=[MarkedFace(320, 300, 90, identity=2, skin=(120, 130, 190))])
    pictures[GROUP] = synthesize(
        faces=[MarkedFace(x, 300, size, identity=x) for x, size in ((130, 50), (320, 70), (520, 60))]
    )
    pictures[EMPTY] = synthesize()
    pictures[CUT] = synthesize(160, 150, [MarkedFace(80, 68, 100, identity=1)])
    pictures[ASTRONAUT] = astronaut()
    folder = base / "input"
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / name)


def astronaut() -> np.ndarray:
    """scikit-image's photo of Eileen Collins, RGB uint8, with the dots that the tiny detector takes for a face."""
    from skimage import data

    from tests.tiny.face_package import paint

    return paint(data.astronaut(), ASTRONAUT_LANDMARKS)
