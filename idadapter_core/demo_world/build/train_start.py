"""Trains the start of UniID's adapter branch: an encoder whose tokens tell people apart, and new layers that change nothing.

The branch sees the inner maps of the recogniser, not its embedding. In a training with the base model alone it learns late who is who: the
person is a small part of the noise error, and the encoder drifts before its tokens are of use. So it first learns from the recogniser itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapter import Adapter, build_adapter, initial_adapter
from ...faces.iresnet import EMBEDDING_WIDTH, IResNet
from ...methods import METHODS
from ...methods.common import draw_usual, resized_shallow
from ...stable_diffusion.inject import transformer_blocks
from ..base import TEXT_WIDTH, BaseModel
from .batches import Numbers, Pool
from .fitting import fit
from .settings import TrainingSchedule
from .train_recognizers import aligned_crops

METHOD = METHODS["uniid"]
TOKENS, WIDTH, DEPTH = 8, 128, 3
_PART = 64  # photos that the recogniser reads at once


class Teller(nn.Module):
    """An encoder, with a layer that reads the person's embedding in its tokens."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.read = nn.Linear(TOKENS * TEXT_WIDTH, EMBEDDING_WIDTH)

    def forward(self, stages: tuple[Tensor, ...]) -> Tensor:
        """Stage maps of B photos -> embeddings (B, 512) of any length."""
        _, tokens = self.encoder(stages[0].new_zeros(len(stages[0]), EMBEDDING_WIDTH), stages)
        embedding: Tensor = self.read(tokens.flatten(1))
        return embedding


class Photos:
    """The recogniser's maps of photos, those of the first three stages as small as UniID reads them, and people's mean embeddings."""

    def __init__(self, pool: Pool, recognizer: IResNet) -> None:
        numbers = pool.where(style="photo")
        maps: list[list[Tensor]] = [[] for _ in recognizer.widths]
        directions = []
        side = METHOD.needs(METHOD.config()).shallow_side
        with torch.no_grad():
            for start in range(0, len(numbers), _PART):
                some = numbers[start : start + _PART]
                embedding, stages = recognizer(aligned_crops(pool.pixels(some), pool.landmarks[some]))
                directions.append(F.normalize(embedding))
                for kept, stage in zip(maps, resized_shallow(stages, side), strict=True):
                    kept.append(stage.half())
        self._maps = [torch.cat(kept) for kept in maps]
        _, people = np.unique(pool.people[numbers], return_inverse=True)
        self._people = torch.from_numpy(people)
        sums = torch.zeros(int(people.max()) + 1, EMBEDDING_WIDTH)
        self._means = F.normalize(sums.index_add_(0, self._people, torch.cat(directions)))

    def __len__(self) -> int:
        return len(self._people)

    def stages(self, numbers: Numbers) -> tuple[Tensor, ...]:
        return tuple(stage[numbers].float() for stage in self._maps)

    def means(self, numbers: Numbers) -> Tensor:
        return self._means[self._people[numbers]]


def train_start(
    pool: Pool,
    base: BaseModel,
    recognizer: IResNet,
    recognizer_digest: str,
    schedule: TrainingSchedule,
    checkpoint: Path,
    *,
    seed: int,
    log: Callable[[str], None],
) -> Adapter:
    """Train the tokens to hold each person's mean embedding, and return them with K of random weights and V of zeros.

    K is not the UNet's own, as published: with it the noise error of own and of another person's features at timestep 900 was .0097 apart
    after 100 steps of the trainer, with random weights .0149.
    """
    adapter = initial_adapter(_config(base, recognizer, recognizer_digest), "the start of UniID", seed)
    generator = torch.Generator().manual_seed(seed)
    encoder: Any = adapter.encoder.float().train()
    layers: Any = adapter.layers.float()
    with torch.no_grad():
        draw_usual(encoder.adapter_branch.adapter_resampler.proj_out, generator)
        draw_usual(layers, generator)
        for number in layers.adapter_modules:
            layers.pair(int(number)).to_v_ip.weight.zero_()
    photos = Photos(pool, recognizer)
    torch.manual_seed(seed)
    teller = Teller(encoder.requires_grad_(True))

    def loss(network: nn.Module, rng: np.random.Generator, step: int) -> Tensor:
        numbers = rng.integers(len(photos), size=schedule.batch)
        with torch.autocast("cpu", torch.bfloat16):
            read = network(photos.stages(numbers))
        return 1 - F.cosine_similarity(read.float(), photos.means(numbers)).mean()

    average = fit(teller, loss, schedule, checkpoint, seed=seed, log=log)
    assert isinstance(average, Teller)
    encoder.load_state_dict(average.encoder.state_dict())
    state = {name: tensor.detach() for name, tensor in adapter.state_dict().items()}
    return build_adapter(METHOD.name, adapter.config, state, adapter.name)


def _config(base: BaseModel, recognizer: IResNet, recognizer_digest: str) -> Any:
    blocks = transformer_blocks(base.unet).values()
    return METHOD.config(
        text_widths=(),
        adapter_tokens=TOKENS,
        adapter_width=WIDTH,
        adapter_depth=DEPTH,
        context_width=TEXT_WIDTH,
        site_widths=tuple(block.attn2.to_k.out_features for block in blocks),
        stage_widths=recognizer.widths,
        recognizer=recognizer_digest,
    )
