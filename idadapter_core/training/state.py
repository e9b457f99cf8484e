"""Training state saved in checkpoints: trained weights, their average and the optimiser."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..adapter import Adapter, save_adapter
from ..config import config_toml
from ..errors import CheckpointError
from ..files import write_file
from .adapters import trainable
from .checkpoints import ADAPTER, EMA, OPTIMIZER, Checkpoint, load_optimizer
from .config import RunConfig

CONFIG = "config.toml"


@dataclass
class Progress:
    """Progress of a run."""

    step: int = 0  # steps done
    position: int = 0  # of the next sample, in the sequence of all epochs
    saved: int = -1  # step of the last checkpoint; -1: none


class State:
    """Trained parameters, their average and the optimiser, on the training device.

    Args:
        parameters: the adapter's trained parameters, by name.
    """

    def __init__(self, config: RunConfig, adapter: Adapter, parameters: Mapping[str, nn.Parameter]) -> None:
        self._config = config
        self.adapter, self.parameters = adapter, parameters
        groups = _groups(config, adapter, parameters)
        self._scales = [scale for scale, _ in groups]
        self.optimizer = torch.optim.AdamW(
            [{"params": some} for _, some in groups],
            lr=config.train.learning_rate,
            betas=config.train.betas,
            weight_decay=config.train.weight_decay,
            fused=True,
        )
        self._trained = nn.ParameterList(parameters.values())
        self._averaging: AveragedModel | None = None
        self._average: dict[str, Tensor] = {}
        if config.train.ema_decay:
            self._averaging = AveragedModel(self._trained)
            self._averaging.update_parameters(self._trained)  # the average starts from the initial weights
            averaged = self._averaging.parameters()
            self._average = {name: p.detach() for name, p in zip(parameters, averaged, strict=True)}

    def update(self, step: int) -> None:
        """Update the weights from their gradients, then the average. `step` updates were done before."""
        for group, scale in zip(self.optimizer.param_groups, self._scales, strict=True):
            group["lr"] = learning_rate(self._config, step) * scale
        self.optimizer.step()
        if self._averaging is not None:
            # Rises from 0.1, so that the average soon forgets the initial weights.
            decay = min(self._config.train.ema_decay, (1 + step) / (10 + step))
            self._averaging.multi_avg_fn = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            self._averaging.update_parameters(self._trained)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Context manager: swap in the averaged weights, if any."""
        _exchange(self._average, self.parameters)
        try:
            yield
        finally:
            _exchange(self._average, self.parameters)

    def broken(self) -> list[str]:
        """Names of weights that are not finite."""
        kept = (self.parameters, self._average)
        return [name for weights in kept for name, t in weights.items() if not t.isfinite().all()]

    def write(self, folder: Path) -> None:
        """Write the checkpoint's files."""
        save_adapter(self.adapter, folder / ADAPTER)
        if self._average:
            save_adapter(self.adapter, folder / EMA, weights=self._average)
        torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)
        write_file(folder / CONFIG, config_toml(self._config).encode())

    def load(self, start: Checkpoint, read: Callable[[Path], Adapter]) -> None:
        """Load the optimiser state and the averaged weights from a checkpoint. The adapter already holds the trained weights.

        Args:
            read: loads an adapter from a file, on the CPU.
        """
        try:
            load_optimizer(self.optimizer, start.path / OPTIMIZER)
        except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{start.path}: the optimiser's state cannot be read ({error}). Remove this checkpoint to go on from the one before."
            ) from error
        for group in self.optimizer.param_groups:  # the current settings, not the saved ones
            group.update(betas=self._config.train.betas, weight_decay=self._config.train.weight_decay)
        if self._average and (start.path / EMA).is_file():
            averaged = trainable(read(start.path / EMA))
            with torch.no_grad():
                for name, tensor in self._average.items():
                    tensor.copy_(averaged[name])


def _groups(
    config: RunConfig, adapter: Adapter, parameters: Mapping[str, nn.Parameter]
) -> list[tuple[float, list[nn.Parameter]]]:
    """Parameters by learning rate, each with that rate over `train.learning_rate`."""
    train = config.train
    if not train.encoder_learning_rate:
        return [(1.0, list(parameters.values()))]
    own = {name for name, _ in adapter.encoder.named_parameters()}
    encoder = [parameter for name, parameter in parameters.items() if name in own]
    layers = [parameter for name, parameter in parameters.items() if name not in own]
    groups = [(train.encoder_learning_rate / train.learning_rate, encoder), (1.0, layers)]
    return [(scale, some) for scale, some in groups if some]


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate of the update after `step` updates, but for that of the encoder, which is in proportion."""
    train = config.train
    if step < train.lr_warmup_steps:
        return train.learning_rate * (step + 1) / train.lr_warmup_steps
    if train.lr_scheduler == "constant":
        return train.learning_rate
    done = (step - train.lr_warmup_steps) / max(train.steps - train.lr_warmup_steps, 1)
    return train.learning_rate * 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))


@torch.no_grad()
def _exchange(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Swap the values of each pair of tensors, one pair at a time."""
    for name, tensor in one.items():
        values = tensor.clone()
        tensor.copy_(other[name])
        other[name].copy_(values)


__all__ = ["CONFIG", "Progress", "State", "learning_rate"]
