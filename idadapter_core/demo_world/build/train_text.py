"""Trains the text encoder to classify the factors that a caption names, before the training of the base model.

A new text encoder learns little from a diffusion model, most of whose error is noise. Captions alone train it in minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import FACTORS, Factors, Person, caption
from ..base import TEXT_WIDTH, new_text_encoder
from ..readers import READ_FACTORS
from ..shipped import load_network, save_network
from ..words import words
from .fitting import fit
from .settings import TrainingSchedule

END_ROW = 1  # row of the end token in the small table
SEED_TAG = 1_214
KIND = "caption reader"
PEOPLE = 20  # only their sex is named


class CaptionReader(nn.Module):
    """A text encoder with a linear classifier for each factor on its state at the end of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.text = new_text_encoder()
        self.heads = nn.ModuleDict(
            {name: nn.Linear(TEXT_WIDTH, len(named)) for name, named in READ_FACTORS.items()}
        )

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        """Maps captions, as rows (B, L) of the small table, to logits (B, K) of the K classes of each factor."""
        ends = (rows == END_ROW).int().argmax(1)
        longest = int(ends.max()) + 1  # later tokens have no effect on the state at the end
        states: Tensor = self.text(input_ids=rows[:, :longest]).last_hidden_state
        last = states[torch.arange(len(rows)), ends]
        return {name: head(last) for name, head in self.heads.items()}


def random_captions(rng: np.random.Generator, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return captions of random factors as rows (count, 77), and the class (count,) of each factor, -1 where it is not named."""
    texts: list[list[int]] = []
    named: dict[str, list[int]] = {name: [] for name in READ_FACTORS}
    people = [Person.sample(seed) for seed in range(PEOPLE)]
    for _ in range(count):
        person, factors = people[int(rng.integers(PEOPLE))], Factors.sample(rng)
        mention = [name for name in FACTORS if rng.random() < 0.8]
        wording = int(rng.integers(1 << 31))
        texts.append(words().rows(caption(person, factors, mention=mention, wording=wording)))
        for name, classes in READ_FACTORS.items():
            value = person.sex if name == "sex" else str(getattr(factors, name))
            is_named = name == "sex" or (name in mention and (name, value) != ("accessory", "none"))
            named[name].append(classes.index(value) if is_named else -1)
    return torch.tensor(texts), {name: torch.tensor(values) for name, values in named.items()}


def train_text_encoder(
    schedule: TrainingSchedule, checkpoint: Path, *, seed: int, log: Callable[[str], None]
) -> CaptionReader:
    """Train a caption reader on random captions, new ones for each step."""
    torch.manual_seed(seed)

    def loss(network: nn.Module, rng: np.random.Generator, step: int) -> Tensor:
        rows, named = random_captions(rng, schedule.batch)
        found = network(rows)
        return torch.stack(
            [
                F.cross_entropy(found[name], classes, ignore_index=-1, reduction="sum")
                for name, classes in named.items()
            ]
        ).sum() / len(rows)

    reader = fit(CaptionReader(), loss, schedule, checkpoint, seed=seed, log=log)
    assert isinstance(reader, CaptionReader)
    return reader


@torch.no_grad()
def text_scores(reader: CaptionReader, count: int = 512) -> dict[str, float]:
    """Return the accuracy for the named classes of each factor, on `count` captions of another seed."""
    rows, named = random_captions(np.random.default_rng(SEED_TAG), count)
    found = reader(rows)
    return {
        name: round(float((found[name].argmax(1) == classes)[classes >= 0].float().mean()), 3)
        for name, classes in named.items()
    }


def save_caption_reader(reader: CaptionReader, path: Path) -> None:
    """Write the network in half precision."""
    save_network(reader, KIND, path)


def load_caption_reader(path: Path) -> CaptionReader:
    """Load the network, in float32 and eval mode.

    Raises:
        CheckpointError: the file is missing, damaged or of another network.
    """
    return load_network(CaptionReader(), KIND, path)
