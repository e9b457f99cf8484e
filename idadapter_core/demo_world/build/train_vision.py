"""Trains a model with CLIP vision's architecture, for IDAdapter, to recognise people and factors in pictures of heads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...extra import require
from ...faces.align import square_crop
from ...files import replacing, write_safetensors
from ...stable_diffusion.pretrained import published_names
from ...stable_diffusion.vision import VisionEncoder, preprocess
from ...types import Face
from ..readers import READ_FACTORS
from .batches import Numbers, Pool
from .fitting import fit
from .measures import recognition
from .settings import TrainingSchedule
from .train_recognizers import MARGIN, SCALE

CONFIG: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "architectures": ["CLIPVisionModelWithProjection"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_channels": 3,
    "image_size": 112,
    "patch_size": 14,
    "projection_dim": 64,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
AROUND = 1.5  # side of the square, in sides of the face's box, as IDAdapter cuts heads out
BOX_JITTER = 0.06  # standard deviation of a box's edges, relative to its longer side
WEIGHTS, CONFIG_FILE = "model.safetensors", "config.json"


class _VisionWithHeads(nn.Module):
    """The model, with classifiers on its class token and on the mean of its patch tokens."""

    def __init__(self, people: int) -> None:
        super().__init__()
        transformers = require("transformers")
        self.model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CONFIG))
        width = CONFIG["hidden_size"]
        classes = sum(len(names) for names in READ_FACTORS.values())
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.factors = nn.ModuleList(nn.Linear(width, classes) for _ in range(2))
        self.identity = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.directions = nn.Parameter(torch.randn(people, width) * 0.05)

    def forward(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return logits of the classes of all factors (B, K) and an identity embedding (B, D), for class token and patches."""
        output = self.model(pixel_values=pixels, output_hidden_states=True)
        read = (output.last_hidden_state[:, 0], output.hidden_states[-2][:, 1:].mean(1))
        tokens = [norm(token) for norm, token in zip(self.norms, read, strict=True)]
        return [
            (factors(token), identity(token))
            for factors, identity, token in zip(self.factors, self.identity, tokens, strict=True)
        ]


def heads(
    pool: Pool, numbers: Numbers, rng: np.random.Generator | None = None
) -> list[npt.NDArray[np.uint8]]:
    """Cut squares (S, S, 3) around heads, as IDAdapter does; with `rng` around perturbed boxes."""
    cut = []
    for pixels, box in zip(pool.pixels(numbers), pool.boxes[numbers], strict=True):
        if rng is not None:
            box = box + rng.normal(0, BOX_JITTER, 4) * max(box[2] - box[0], box[3] - box[1])
        x1, y1, x2, y2 = (float(edge) for edge in box)
        face = Face(box=(x1, y1, x2, y2), landmarks=((0.0, 0.0),) * 5, score=1.0)
        cut.append(square_crop(pixels, face, AROUND))
    return cut


def train_vision(
    pool: Pool, schedule: TrainingSchedule, checkpoint: Path, *, seed: int, log: Callable[[str], None]
) -> nn.Module:
    """Train transformers' CLIPVisionModel on the pictures of a pool."""
    torch.manual_seed(seed)
    labels = {name: torch.from_numpy(pool.labels(name, classes)) for name, classes in READ_FACTORS.items()}
    counts = [len(classes) for classes in READ_FACTORS.values()]

    def loss(network: nn.Module, rng: np.random.Generator, step: int) -> Tensor:
        assert isinstance(network, _VisionWithHeads)
        numbers = rng.integers(len(pool), size=schedule.batch)
        pixels = preprocess(heads(pool, numbers, rng), CONFIG["image_size"])
        pixels = pixels * torch.from_numpy(rng.uniform(0.8, 1.2, (len(pixels), 1, 1, 1)).astype(np.float32))
        chosen, people = torch.from_numpy(numbers), torch.from_numpy(pool.people[numbers])
        total = torch.zeros(())
        with torch.autocast("cpu", torch.bfloat16):
            answers = network(pixels)
        for scores, identity in answers:
            for name, part in zip(READ_FACTORS, scores.float().split(counts, 1), strict=True):
                total = total + F.cross_entropy(part, labels[name][chosen])
            cosines = F.normalize(identity.float()) @ F.normalize(network.directions).T
            wanted = cosines - MARGIN * F.one_hot(people, cosines.shape[1])
            total = total + F.cross_entropy(SCALE * wanted, people)
        return total

    average = fit(
        _VisionWithHeads(int(pool.people.max()) + 1), loss, schedule, checkpoint, seed=seed, log=log
    )
    assert isinstance(average, _VisionWithHeads)
    model: nn.Module = average.model
    return model


def save_vision(model: nn.Module, folder: Path) -> None:
    """Write a folder of transformers, in half precision, with the published weight names, which ComfyUI reads, too."""
    state = {
        f"vision_model.{name}": value.half() for name, value in published_names(model, "vision_model").items()
    }
    # The projection is not used, but files of CLIP vision have one.
    state["visual_projection.weight"] = torch.eye(CONFIG["projection_dim"], CONFIG["hidden_size"]).half()
    kept = {name: value.contiguous() for name, value in state.items() if "position_ids" not in name}
    write_safetensors(kept, {"format": "pt"}, folder / WEIGHTS)
    with replacing(folder / CONFIG_FILE) as file:
        file.write_text(json.dumps(CONFIG, indent=1) + "\n", "utf-8", newline="\n")


@torch.no_grad()
def vision_scores(encoder: VisionEncoder, pool: Pool, batch: int = 64) -> dict[str, float]:
    """Measure how well the mean of the patch tokens, standardised over all pictures, separates people."""
    rows = []
    for start in range(0, len(pool), batch):
        numbers = np.arange(start, min(start + batch, len(pool)))
        patches, _ = encoder(preprocess(heads(pool, numbers), CONFIG["image_size"]))
        rows.append(patches.mean(1))
    embeddings = torch.cat(rows)
    embeddings = (embeddings - embeddings.mean(0)) / embeddings.std(0)
    return {f"photo_{name}": value for name, value in recognition(embeddings.numpy(), pool.people).items()}
