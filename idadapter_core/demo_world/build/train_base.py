"""Trains the base model on latents and captions, and measures how well it follows prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention_cpu import AttentionInFloat32
from .. import FACTORS, SEXES, Factors, Person, caption
from ..autoencoder import Autoencoder
from ..base import BaseModel
from ..readers import READ_FACTORS, Reader
from ..words import words
from .batches import Pool, as_tensor, face_weights
from .fitting import fit
from .settings import TrainingSchedule
from .train_latent_reader import CLASSES, LatentReader

NO_CAPTION = 0.1  # probability of an empty caption, for guidance
OMITTED_FACTOR = 0.1  # probability that a factor is not named
IDENTITY_WORD = 0.1  # probability of an identity word, which has no meaning yet
UNKNOWN_WORD = 0.08  # probability of an unknown word, which must do no harm
SEED_TAG = 1_213
CELL = 8  # pixels along a side of a latent
FEATURES_FROM = 2600  # step from which faces, and the noise levels of expressions, count more
EXPRESSIONS_FROM, EXPRESSION_WEIGHT = (
    4000,
    0.02,
)  # step from which the latent reader's error counts, and its weight
FADE_FROM, FADE_WEIGHT = (
    6000,
    0.005,
)  # later weight: expressions are learned, and teeth are tinted for the reader's sake
FINISH_FROM = 7000  # step from which it counts no more, so that the tint goes
FACE_LEVELS = (150, 650)  # timesteps where noise begins to hide an expression, and where it is lost
READABLE = 700  # timestep from which on no expression can be read


@torch.no_grad()
def encode_pictures(network: Autoencoder, pool: Pool, batch: int = 32) -> Tensor:
    """Return the latents (N, C, h, w) of all pictures of a pool."""
    starts = range(0, len(pool), batch)
    numbers = (np.arange(start, min(start + batch, len(pool))) for start in starts)
    return torch.cat([network.encode(as_tensor(pool.pixels(some))) for some in numbers])


def train_base(
    pool: Pool,
    latents: npt.NDArray[np.float16],
    text: nn.Module,
    reader: LatentReader,
    schedule: TrainingSchedule,
    checkpoint: Path,
    *,
    seed: int,
    log: Callable[[str], None],
) -> BaseModel:
    """Train a base model on the latents (N, C, h, w) and captions of a pool.

    Scenes and heads are learned first. Expressions are small, and from step `FEATURES_FROM` on errors near eyes, nose and mouth have more
    weight, and half of the timesteps come from `FACE_LEVELS`. From step `EXPRESSIONS_FROM` on the expression that the caption names must
    also be readable in the predicted picture, until step `FINISH_FROM`.

    Args:
        text: trained text encoder to start with.
        reader: trained network that reads expressions in latents.
    """
    torch.manual_seed(seed)
    facts = [fact for part in pool.sets for fact in part.facts]
    head = face_weights(pool.boxes, latents.shape[-1], CELL)
    features = face_weights(pool.boxes, latents.shape[-1], CELL, pool.landmarks)
    people = {seed: Person.sample(seed) for seed in {fact.person for fact in facts}}
    expressions = torch.from_numpy(pool.labels("expression", CLASSES))

    def loss(network: nn.Module, rng: np.random.Generator, step: int) -> Tensor:
        assert isinstance(network, BaseModel)
        numbers = rng.integers(len(pool), size=schedule.batch)
        captions = [
            varied_rows(people[facts[number].person], facts[number].factors, rng) for number in numbers
        ]
        clean = torch.from_numpy(latents[numbers].astype(np.float32))
        noise = torch.randn_like(clean)
        levels, weights = rng.integers(network.schedule.steps, size=schedule.batch), head
        if step >= FEATURES_FROM:
            levels[::2], weights = rng.integers(*FACE_LEVELS, size=len(levels[::2])), features
        timesteps = torch.from_numpy(levels)
        noisy = network.schedule.add_noise(clean, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16), AttentionInFloat32():
            found = network(noisy, timesteps, network.states(torch.tensor([rows for rows, _ in captions])))
        error = (found.float() - network.schedule.target(clean, noise, timesteps)).square().mean(1)
        total = (error * weights[numbers]).mean()
        is_named = torch.tensor(["expression" in named for _, named in captions])
        judged = is_named & (timesteps < READABLE)
        if not EXPRESSIONS_FROM <= step < FINISH_FROM or not judged.any():
            return total
        predicted = network.schedule.clean(noisy, found.float(), timesteps)
        weight = EXPRESSION_WEIGHT if step < FADE_FROM else FADE_WEIGHT
        return total + weight * _misread(reader, predicted[judged], expressions[numbers][judged])

    base = BaseModel()
    base.text.load_state_dict(text.state_dict())
    average = fit(base, loss, schedule, checkpoint, seed=seed, log=log)
    assert isinstance(average, BaseModel)
    return average


def _misread(reader: LatentReader, latents: Tensor, expressions: Tensor) -> Tensor:
    """Error of the expressions (B,) that a reader sees in latents (B, C, h, w)."""
    with torch.autocast("cpu", torch.bfloat16):
        read = reader(latents)
    return F.cross_entropy(read.float(), expressions)


def varied_rows(
    person: Person, factors: Factors, rng: np.random.Generator
) -> tuple[list[int], tuple[str, ...]]:
    """Draw a random variant of a picture's caption: in other words, without some factors, or empty.

    Returns:
        77 rows of the table, and the names of the factors in it.
    """
    chances = rng.random(len(FACTORS) + 3)
    wording = int(rng.integers(1 << 31))
    if chances[-1] < NO_CAPTION:
        return words().rows(""), ()
    mention = [name for name, chance in zip(FACTORS, chances, strict=False) if chance >= OMITTED_FACTOR]
    word = "sks" if chances[-2] < IDENTITY_WORD else None
    text = caption(person, factors, mention=mention, word=word, wording=wording)
    unknown_before = (int(rng.integers(len(text.split()))),) if chances[-3] < UNKNOWN_WORD else ()
    return words().rows(text, unknown_before), tuple(mention)


def prompts_to_judge(count: int, seed: int) -> tuple[list[str], dict[str, list[str]]]:
    """Return prompts that name every factor, and the named classes of each factor."""
    rng = np.random.default_rng([SEED_TAG, seed])
    people = {sex: next(p for p in map(Person.sample, range(1, 1000)) if p.sex == sex) for sex in SEXES}
    prompts: list[str] = []
    truth: dict[str, list[str]] = {factor: [] for factor in READ_FACTORS}
    for _ in range(count):
        sex = SEXES[int(rng.random() < 0.5)]
        factors = Factors.sample(rng)
        prompts.append(caption(people[sex], factors))
        for factor, values in truth.items():
            values.append(sex if factor == "sex" else str(getattr(factors, factor)))
    return prompts, truth


@torch.no_grad()
def base_scores(
    base: BaseModel, autoencoder: Autoencoder, reader: Reader, count: int, batch: int = 40
) -> tuple[dict[str, float], npt.NDArray[np.uint8]]:
    """Draw pictures of prompts, and compare the reader's classes with those of the prompts.

    Returns:
        The share of agreeing pictures by factor, and the pictures (count, H, W, 3), uint8.
    """
    prompts, truth = prompts_to_judge(count, 0)
    pictures = torch.cat(
        [
            autoencoder.decode(base.draw(prompts[start : start + batch], seed=start)).clamp(-1, 1)
            for start in range(0, count, batch)
        ]
    )
    read = reader.read(pictures)
    scores = {
        factor: round(
            float(np.mean([one == other for one, other in zip(read[factor], values, strict=True)])), 3
        )
        for factor, values in truth.items()
    }
    pixels = ((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return scores, pixels
