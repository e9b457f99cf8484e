"""A face detector with SCRFD's outputs (arXiv:2105.04714): scores, boxes and five landmarks at three strides, two anchors each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Pool
from .fitting import fit
from .settings import TrainingSchedule

STRIDES = (8, 16, 32)
# Longer sides of faces in pixels, by stride: the first anchor is for the first to the second value, the other for the second to the third.
SIZES = ((10, 28, 60), (40, 80, 170), (120, 280, 700))
WIDTHS = (8, 16, 32, 64, 96)
KINDS = {"score": 1, "bbox": 4, "kps": 10}
# Distances from a face's center, relative to its longer side, within which cells are positive, and within which negative ones do not
# matter. Cells farther away would give wrong boxes, too far from the right one to be suppressed.
CENTRE, AROUND = 0.22, 0.30
SIZE_MARGIN = 1.3
CANVAS, LARGE_CANVAS = 320, 640
LARGE_EVERY = 2  # batches
MIRRORED = (1, 0, 2, 4, 3)  # order of the landmarks in a mirrored picture
INITIAL_LOGIT = -4.6  # of all scores; 1 %


def _conv(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()
    )


def _head(width: int) -> nn.Sequential:
    channels = sum(KINDS.values())
    last = nn.Conv2d(32, 2 * channels, 1)
    assert last.bias is not None
    with torch.no_grad():
        last.bias.zero_()
        last.bias[[0, channels]] = INITIAL_LOGIT
    return nn.Sequential(_conv(width, 32), last)


class Detector(nn.Module):
    """Maps pictures (B, 3, H, W), RGB, (pixel - 127.5) / 128, with sides divisible by 32, to maps (B, 30, H/s, W/s) for each stride s.

    The channels are those of the first anchor, then of the second: a score (logit); the distances from the cell's upper left pixel outwards
    to the face's left, top, right and bottom; the offsets (x, y) of the landmarks from that pixel. Distances and offsets are in strides.
    """

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d, e = WIDTHS
        self.stem = nn.Sequential(_conv(3, a, 2), _conv(a, b, 2))
        self.stages = nn.ModuleList(
            [
                nn.Sequential(_conv(b, c, 2), _conv(c, c)),
                nn.Sequential(_conv(c, d, 2), _conv(d, d), _conv(d, d)),
                nn.Sequential(_conv(d, e, 2), *(_conv(e, e) for _ in range(5))),
            ]
        )
        self.heads = nn.ModuleList(_head(width) for width in (c, d, e))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        hidden = self.stem(pictures)
        maps = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            hidden = stage(hidden)
            maps.append(head(hidden))
        return maps


class Exported(nn.Module):
    """The nine outputs that insightface expects: scores (cells · 2, 1), boxes (…, 4) and landmarks (…, 10), each for all strides."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        width = sum(KINDS.values())
        rows = [maps.permute(0, 2, 3, 1).reshape(-1, width) for maps in self.detector(pictures)]
        scores = [part[:, :1].sigmoid() for part in rows]
        return (*scores, *(part[:, 1:5] for part in rows), *(part[:, 5:] for part in rows))


def output_names() -> list[str]:
    return [f"{kind}_{stride}" for kind in KINDS for stride in STRIDES]


# -------------------------------------------------------------------------------------------------------- pictures
@dataclass(frozen=True, eq=False)
class Scene:
    """A picture with several faces."""

    pixels: npt.NDArray[np.uint8]  # (H, W, 3)
    boxes: npt.NDArray[np.float32]  # (F, 4)
    landmarks: npt.NDArray[np.float32]  # (F, 5, 2)


def make_scene(pool: Pool, rng: np.random.Generator, side: int) -> Scene:
    """Compose a scene of `side` × `side` pixels from pictures of the pool, at random sizes and places.

    It has one picture that fills it, or a few that do not overlap.
    """
    canvas = _ground(rng, side)
    boxes: list[npt.NDArray[np.float32]] = []
    points: list[npt.NDArray[np.float32]] = []
    taken: list[tuple[int, int, int]] = []
    # Small scenes train small faces, large ones the input size that insightface uses first.
    whole = rng.random() < (0.3 if side < LARGE_CANVAS else 0.75)
    for _ in range(1 if whole else int(rng.integers(1, 7))):
        number = int(rng.integers(len(pool)))
        extent = round(
            side * (rng.uniform(0.9, 1.5) if whole else np.exp(rng.uniform(np.log(0.12), np.log(0.7))))
        )
        left, top = (int(rng.integers(min(0, side - extent), max(1, side - extent + 1))) for _ in range(2))
        if any(left < x + s and x < left + extent and top < y + s and y < top + extent for x, y, s in taken):
            continue
        taken.append((left, top, extent))
        picture, box, landmarks = _copy(pool, number, extent, rng)
        _paste(canvas, picture, left, top)
        boxes.append(box + np.array([left, top, left, top], np.float32))
        points.append(landmarks + np.array([left, top], np.float32))
    return Scene(canvas, np.stack(boxes), np.stack(points))


def _ground(rng: np.random.Generator, side: int) -> npt.NDArray[np.uint8]:
    """Return a background (side, side, 3) without faces: random patches of colour, from a single one to one per pixel."""
    rows, columns = (int(np.exp(rng.uniform(0, np.log(side)))) for _ in range(2))
    cells = rng.integers(0, 256, (rows, columns, 3)).astype(np.uint8)
    way = cv2.INTER_NEAREST if rng.random() < 0.5 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(cells, (side, side), interpolation=way), np.uint8)


def _copy(
    pool: Pool, number: int, extent: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return a picture scaled to `extent` pixels, mirrored at random and with random brightness, its box (4,) and landmarks (5, 2)."""
    pixels = pool.pixels(np.array([number]))[0]
    scale = extent / pixels.shape[0]
    box, landmarks = (pool.boxes[number] + 0.5) * scale - 0.5, (pool.landmarks[number] + 0.5) * scale - 0.5
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    picture = cv2.resize(pixels, (extent, extent), interpolation=way)
    if rng.random() < 0.5:
        picture = picture[:, ::-1]
        box = np.array([extent - 1 - box[2], box[1], extent - 1 - box[0], box[3]])
        landmarks = landmarks[list(MIRRORED)]
        landmarks[:, 0] = extent - 1 - landmarks[:, 0]
    gain, lift = rng.uniform(0.7, 1.3), rng.uniform(-30, 30)
    bright = np.clip(picture * gain + lift, 0, 255).astype(np.uint8)
    return bright, box.astype(np.float32), landmarks.astype(np.float32)


def _paste(canvas: npt.NDArray[np.uint8], picture: npt.NDArray[np.uint8], left: int, top: int) -> None:
    side, extent = canvas.shape[0], picture.shape[0]
    x1, y1 = max(0, left), max(0, top)
    x2, y2 = min(side, left + extent), min(side, top + extent)
    canvas[y1:y2, x1:x2] = picture[y1 - top : y2 - top, x1 - left : x2 - left]


# ----------------------------------------------------------------------------------------------------------- targets
def targets(scene: Scene, level: int) -> npt.NDArray[np.float32]:
    """Return the targets (2, 16, h, w) of the cells of a stride, for both anchors.

    The channels: score (1, 0, or -1 where it does not matter); box (4), landmarks (10) and the longer side of the face, in strides.
    """
    stride, (low, middle, high) = STRIDES[level], SIZES[level]
    cells = scene.pixels.shape[0] // stride
    wanted = np.zeros((2, 2 + sum(KINDS.values()) - 1, cells, cells), np.float32)
    at = np.arange(cells, dtype=np.float32) * stride
    for box, points in zip(scene.boxes, scene.landmarks, strict=True):
        size = float(max(box[2] - box[0], box[3] - box[1]))
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        distance = np.maximum(np.abs(at[None] - x), np.abs(at[:, None] - y))
        # A stride for other sizes must reject the face, except where its sizes almost fit.
        if low / SIZE_MARGIN <= size < high * SIZE_MARGIN:
            wanted[:, 0][:, distance < max(AROUND * size, stride)] = -1
        if not low <= size < high:
            continue
        rows, columns = np.nonzero(distance <= max(CENTRE * size, 0.51 * stride))
        anchor = int(size >= middle)
        wanted[anchor, 0, rows, columns] = 1
        here = np.stack([at[columns], at[rows]], 1)  # (M, 2)
        sides = np.concatenate([here - box[:2], box[2:] - here], 1)
        ways = (points[None] - here[:, None]).reshape(len(here), -1)
        wanted[anchor, 1:15, rows, columns] = np.concatenate([sides, ways], 1) / stride
        wanted[anchor, 15, rows, columns] = size / stride
    return wanted


def detection_loss(maps: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Focal loss of the scores, plus smooth L1 losses of boxes and landmarks relative to the face's size.

    Crops are aligned by the landmarks, so their errors count down to a smaller size than those of the boxes.
    """
    scores, answers, places, goals = [], [], [], []
    for found, goal in zip(maps, wanted, strict=True):
        rows = (
            found.float()
            .reshape(found.shape[0], 2, -1, *found.shape[2:])
            .permute(0, 1, 3, 4, 2)
            .flatten(0, 3)
        )
        want = goal.permute(0, 1, 3, 4, 2).flatten(0, 3)
        scores.append(rows[:, 0])
        answers.append(want[:, 0])
        chosen = want[:, 0] == 1
        places.append(rows[chosen, 1:])
        goals.append(want[chosen, 1:])
    score, answer = torch.cat(scores), torch.cat(answers)
    score, answer = score[answer >= 0], answer[answer >= 0]
    chance = torch.where(answer == 1, score.sigmoid(), 1 - score.sigmoid())
    entropy = F.binary_cross_entropy_with_logits(score, answer, reduction="none")
    count = answer.sum().clamp(min=1)
    focal = 0.5 * ((1 - chance) ** 2 * entropy).sum() / count
    place, goal = torch.cat(places), torch.cat(goals)
    off = (place - goal[:, :14]) / goal[:, 14:]
    boxes, points = off[:, :4], off[:, 4:]
    return focal + 2 * _smooth_l1(boxes, 0.05) + 6 * _smooth_l1(points, 0.01)


def _smooth_l1(errors: Tensor, beta: float) -> Tensor:
    zeros = torch.zeros_like(errors)
    # Not the mean: a batch may have no positive cell.
    return F.smooth_l1_loss(errors, zeros, beta=beta, reduction="sum") / max(errors.numel(), 1)


def scene_tensor(scenes: list[Scene]) -> Tensor:
    """Convert scenes of one size to the input of the network (B, 3, H, W)."""
    stacked = torch.from_numpy(np.stack([scene.pixels for scene in scenes])).permute(0, 3, 1, 2)
    return (stacked.float() - 127.5) / 128


def train_detector(
    pool: Pool, schedule: TrainingSchedule, checkpoint: Path, *, seed: int, log: Callable[[str], None]
) -> Detector:
    """Train a detector on the pictures of a pool."""
    torch.manual_seed(seed)

    def loss(network: nn.Module, rng: np.random.Generator, step: int) -> Tensor:
        network.train()
        large = step % LARGE_EVERY == LARGE_EVERY - 1
        side, count = (LARGE_CANVAS, max(1, schedule.batch // 4)) if large else (CANVAS, schedule.batch)
        scenes = [make_scene(pool, rng, side) for _ in range(count)]
        wanted = [
            torch.from_numpy(np.stack([targets(scene, level) for scene in scenes]))
            for level in range(len(STRIDES))
        ]
        pictures = scene_tensor(scenes).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            maps = network(pictures)
        return detection_loss(maps, wanted)

    detector = Detector().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = fit(detector, loss, schedule, checkpoint, seed=seed, log=log)
    assert isinstance(average, Detector)
    return average


# ---------------------------------------------------------------------------------------------------------- measures
def detection_scores(
    detect: Callable[[npt.NDArray[np.uint8]], Any], pool: Pool, numbers: npt.NDArray[np.int64]
) -> dict[str, float]:
    """Measure a detector on some pictures of a pool.

    Args:
        detect: returns the faces (`Face`) of a picture (H, W, 3), best first.

    Returns:
        The share of pictures with a face found, that with exactly one, and 1 minus the mean error of the landmarks relative to the distance
        of the eyes.
    """
    found, misses, alone = 0, [], 0
    for number in numbers:
        faces = detect(pool.pixels(np.array([number]))[0])
        alone += len(faces) == 1
        if not faces:
            continue
        found += 1
        truth = pool.landmarks[number]
        distance = np.linalg.norm(np.asarray(faces[0].landmarks) - truth, axis=1).mean()
        misses.append(distance / np.linalg.norm(truth[1] - truth[0]))
    return {
        "found": round(found / len(numbers), 4),
        "alone": round(alone / len(numbers), 4),
        "landmarks": round(1 - float(np.mean(misses)), 4) if misses else 0.0,
    }
