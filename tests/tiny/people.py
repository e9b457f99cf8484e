"""Synthetic photos of people, by which everything about training is tried: the tiny face package finds them and tells them apart.

    python -m tests.tiny.people photos --package face_package

writes a folder of photos per person, a caption beside each, and the tiny package that finds their faces.

A person is a pattern of coloured patches over the head, fixed to the face, and a tone of skin. Place, size, turn, roll, light,
background and noise differ from photo to photo. With 40 people of 6 photos (256 px) the tiny recogniser gives: photos of one
person agree by a cosine of 0.91 or more (0.98 on average), photos of two people by 0.39 or less (0.07 on average), the means of
two people by 0.37 or less. Photos below 128 px are too coarse for that.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from idadapter_core.faces.align import TEMPLATE_SIZE, similarity_transform
from tests.tiny.face_package import MarkedFace, paint, write_package

# The tiny package takes a face with more red than blue for a man's.
SKINS = {"man": (200, 165, 145), "woman": (148, 148, 178)}
BACKGROUNDS = {
    "grey": (110, 110, 110),
    "blue": (100, 112, 138),
    "green": (90, 130, 95),
    "brown": (124, 110, 100),
    "white": (205, 205, 200),
}
_PATTERN = 55.0  # largest change of a patch, per channel; more would look like one of the dots that the detector seeks
_NOISE = 5.0
_HEAD = (1.95, 2.05)  # half axes in eye distances: with hair, nearly all of an aligned crop


def write_people(
    folder: Path, people: int = 8, photos: int = 4, size: int = 256, seed: int = 0
) -> list[Path]:
    """Write `folder/person_00/0.png` and so on, with a caption in `0.txt`. Same bytes each time. Returns the photos.

    Men and women take turns. People of another seed are other people.
    """
    written = []
    for person in range(people):
        noun = "man" if person % 2 == 0 else "woman"
        home = folder / f"person_{person:02d}"
        home.mkdir(parents=True, exist_ok=True)
        for number in range(photos):
            rng = np.random.default_rng([seed, person, number])
            place = str(rng.choice(list(BACKGROUNDS)))
            photo = draw_person(seed * 100_003 + person, noun, size, rng, BACKGROUNDS[place])
            written.append(home / f"{number}.png")
            Image.fromarray(photo).save(written[-1])
            caption = f"a photo of a {noun} in front of a {place} wall"
            written[-1].with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    return written


def draw_person(
    identity: int, noun: str, size: int, rng: np.random.Generator, background: tuple[int, int, int]
) -> np.ndarray:
    """A photo (size, size, 3), RGB uint8, of a person at a random place, size, turn and roll."""
    face = MarkedFace(
        x=size * (0.5 + rng.uniform(-0.1, 0.1)),
        y=size * (0.5 + rng.uniform(-0.08, 0.08)),
        eye_distance=size * rng.uniform(0.13, 0.18),
        yaw=rng.uniform(-15, 15),
        roll=rng.uniform(-15, 15),
    )
    photo = np.empty((size, size, 3), np.float32)
    photo[:] = background
    return _finish(_with_head(photo, face, identity, SKINS[noun]), [face], rng)


def _with_head(photo: np.ndarray, face: MarkedFace, identity: int, skin: tuple[int, int, int]) -> np.ndarray:
    """The photo, float, with a head without dots. The pattern turns with the face, so an aligned crop always shows it alike."""
    pattern = np.random.default_rng(identity).uniform(-_PATTERN, _PATTERN, (7, 7, 3)).astype(np.float32)
    pattern -= pattern.mean(axis=(0, 1))
    patches = cv2.resize(pattern, (TEMPLATE_SIZE, TEMPLATE_SIZE), interpolation=cv2.INTER_NEAREST)
    to_crop = similarity_transform(face.landmarks)
    head = cv2.warpAffine(
        patches + np.asarray(skin, np.float32),
        to_crop,
        photo.shape[1::-1],
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    x, y = np.linalg.solve(to_crop[:, :2], TEMPLATE_SIZE / 2 - to_crop[:, 2])
    axes = tuple(int(share * face.eye_distance) for share in _HEAD)
    oval = cv2.ellipse(np.zeros(photo.shape[:2], np.uint8), (int(x), int(y)), axes, face.roll, 0, 360, 1, -1)
    return np.where(oval[..., None] > 0, head, photo)


def _finish(photo: np.ndarray, faces: list[MarkedFace], rng: np.random.Generator) -> np.ndarray:
    """Light and noise over a float photo, and the dots on top, which the detector needs as they are."""
    photo = photo * rng.uniform(0.9, 1.05) + rng.normal(0, _NOISE, photo.shape)
    finished = photo.clip(0, 255).astype(np.uint8)
    for face in faces:
        finished = paint(finished, face.landmarks)
    return finished


def write_bad(folder: Path, size: int = 256, seed: int = 0) -> dict[str, Path]:
    """One photo of each kind that a scan refuses, in a folder of their own; from the kind to the file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 7])
    wall = BACKGROUNDS["grey"]
    whole = draw_person(-1 % 2**32, "man", size, rng, wall)
    two = np.empty((size, size, 3), np.float32)
    two[:] = wall
    pair = [MarkedFace(size * x, size * 0.5, size * 0.12) for x in (0.27, 0.73)]
    for number, face in enumerate(pair):
        two = _with_head(two, face, 900 + number, SKINS["man"])
    pictures = {
        "corrupt": whole,
        "no_face": np.full((size, size, 3), wall, np.uint8),
        "two_faces": _finish(two, pair, rng),
        "tiny": cv2.resize(whole, (48, 48), interpolation=cv2.INTER_AREA),
        "noise": np.repeat(rng.integers(0, 256, (size, size, 1), dtype=np.uint8), 3, axis=2),
    }
    files = {kind: folder / f"{kind}.png" for kind in pictures}
    for kind, picture in pictures.items():
        Image.fromarray(picture).save(files[kind])
    content = files["corrupt"].read_bytes()
    files["corrupt"].write_bytes(content[: len(content) // 2])
    return files


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.tiny.people", description="Write synthetic photos of people."
    )
    parser.add_argument("folder", type=Path, help="gets a folder of photos per person")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--photos", type=int, default=4, help="of each person")
    parser.add_argument("--size", type=int, default=256, help="side of the square photos, pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other people")
    parser.add_argument(
        "--bad", action="store_true", help="add a folder with a photo of each kind that a scan refuses"
    )
    parser.add_argument("--package", type=Path, help="also write the tiny face package into this folder")
    options = parser.parse_args()
    count = len(write_people(options.folder, options.people, options.photos, options.size, options.seed))
    print(f"wrote {count} photos of {options.people} people to {options.folder}")
    if options.bad:
        print(f"wrote {len(write_bad(options.folder / 'bad', options.size))} bad photos")
    if options.package is not None:
        print(f"wrote the tiny face package to {write_package(options.package)}")


if __name__ == "__main__":
    main()
