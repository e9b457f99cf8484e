"""A training loop that can be resumed: an interrupted training ends with the same weights as one in a single run."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import TrainingError
from ...files import replacing
from .settings import TrainingSchedule

SEED_TAG = 1_212  # separates the random streams of trainings from others with the same seed
SAVE_EVERY = 120.0  # seconds
LOG_EVERY = 50  # steps
WARM_UP = 100  # steps
EMA = 0.999
CLIP = 1.0  # largest norm of the gradients

Loss = Callable[[nn.Module, np.random.Generator, int], Tensor]


def fit(
    network: nn.Module,
    loss: Loss,
    schedule: TrainingSchedule,
    checkpoint: Path,
    *,
    seed: int = 0,
    weight_decay: float = 0.02,
    log: Callable[[str], None] = lambda _: None,
    save_every: float = SAVE_EVERY,
) -> nn.Module:
    """Train `network` and return the moving average of its weights, in eval mode.

    All randomness comes from the generator passed to `loss(network, rng, step)`, a new one for each step, and from torch's generator, which
    is seeded from it. A step therefore does not depend on interruptions. An existing checkpoint is resumed. It may be from a shorter
    schedule, if its rate had not begun to fall.

    Args:
        checkpoint: file to resume from. It is written every `save_every` seconds and after the last step.

    Raises:
        TrainingError: the loss is not a finite number, or the checkpoint does not fit the network.
    """
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        _groups(network, weight_decay), lr=schedule.rate, betas=(0.9, 0.99), foreach=True
    )
    start = _restore(checkpoint, network, average, optimizer)
    clock = begun = time.monotonic()
    losses: list[Tensor] = []
    for step in range(start, schedule.steps):
        rng = np.random.default_rng([SEED_TAG, seed, step])
        torch.manual_seed(int(rng.integers(1 << 62)))
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, schedule)
        value = loss(network, rng, step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        _update_average(average, network, step)
        losses.append(value.detach())
        if (step + 1) % LOG_EVERY == 0 or step + 1 == schedule.steps:
            mean, seconds = torch.stack(losses).mean(), (time.monotonic() - begun) / (step + 1 - start)
            _report(log, step + 1, schedule, mean, seconds)
            losses.clear()
        if time.monotonic() - clock > save_every or step + 1 == schedule.steps:
            _save(checkpoint, step + 1, network, average, optimizer)
            clock = time.monotonic()
    return average.eval()


def rate_at(step: int, schedule: TrainingSchedule) -> float:
    """Learning rate of a step: a linear rise over the first steps, a constant part, and a linear fall to 0."""
    up = min(1.0, (step + 1) / min(WARM_UP, max(1, schedule.steps // 10)))
    left = (schedule.steps - step) / max(1.0, schedule.fall * schedule.steps)
    return schedule.rate * up * min(1.0, left)


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups for the optimiser. Biases and other vectors have no weight decay."""
    weights = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def _update_average(average: nn.Module, network: nn.Module, step: int) -> None:
    share = 1 - min(EMA, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), share)
    for mean, value in zip(average.buffers(), network.buffers(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, share)
        else:
            mean.copy_(value)


def _report(
    log: Callable[[str], None], step: int, schedule: TrainingSchedule, loss: Tensor, seconds: float
) -> None:
    if not math.isfinite(float(loss)):
        raise TrainingError(
            f"the loss is {float(loss)} at step {step}; lower the rate ({schedule.rate:g}) in settings.py, delete the checkpoint and "
            "start again."
        )
    log(
        f"step {step} of {schedule.steps}, loss {float(loss):.4f}, {schedule.batch / max(seconds, 1e-9):.1f} pictures a second"
    )


def _save(
    path: Path, step: int, network: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    content = {
        "step": step,
        "network": network.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with replacing(path) as file:
        torch.save(content, file)


def _restore(path: Path, network: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not path.is_file():
        return 0
    content = torch.load(path, map_location="cpu", weights_only=True)
    try:
        network.load_state_dict(content["network"])
        average.load_state_dict(content["average"])
        optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"{path} is of another network ({reason}); delete it to start again, or use the version of the code that wrote it."
        ) from error
    return int(content["step"])
