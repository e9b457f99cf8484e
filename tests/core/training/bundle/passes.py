"""Shared by the tests of a forward pass: batches, adapters and calls of the UNet."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from idadapter_core.adapter import Adapter
from idadapter_core.data.references import features_of
from idadapter_core.faces.align import TEMPLATE
from idadapter_core.training.adapters import trainable
from idadapter_core.training.bundle import Bundle
from idadapter_core.training.config import RunConfig
from idadapter_core.training.parts import Parts, prepare_adapter
from idadapter_core.training.samples import Batch, Samples, join
from tests.tiny.acting import acting

KINDS: dict[str, dict[str, Any]] = {
    "idadapter": {"adapter": {"settings": {"mixer_depth": 1}}},
    "zeros": {"adapter": {"settings": {"mixer_depth": 1, "unconditional": "zeros"}}},
    "uniid": {"adapter": {"method": "uniid", "settings": {"adapter_depth": 1}}},
    "uniid text": {"adapter": {"method": "uniid", "branch": "text", "settings": {"text_depth": 1}}},
}
ROWS = (0, 5, 9, 14)  # one photo of each person
TIMESTEPS = (5, 600, 250, 100)
KEPT = (True, True, True, False)
POINTS = torch.tensor(TEMPLATE, dtype=torch.float32)


def batch_of(parts: Parts, config: RunConfig) -> Batch:
    vision = parts.networks.vision
    assert vision is not None
    samples = Samples(parts.index, parts.train_rows, config, 1000, None, vision.preprocess)
    drawn = join([samples.sample(0, number) for number in ROWS])
    return completed(
        parts,
        config,
        dataclasses.replace(
            drawn,
            timesteps=torch.tensor(TIMESTEPS),
            identity=torch.tensor(KEPT),
            prompts=("a photo of a man", "a cat", "", "a photo of a man"),
        ),
    )


def completed(parts: Parts, config: RunConfig, batch: Batch) -> Batch:
    """With latents and features, so that no test computes them again."""
    assert batch.pictures is not None
    with running(parts, config, fresh(parts, config)) as bundle:
        moments = parts.base.vae.moments(batch.pictures)
        return dataclasses.replace(bundle.complete(batch), moments=moments)


def fresh(parts: Parts, config: RunConfig) -> Adapter:
    return prepare_adapter(config, parts)


def opened(parts: Parts, config: RunConfig) -> Adapter:
    """One that acts, with gradients."""
    adapter = acting(fresh(parts, config))
    trainable(adapter)
    return adapter


@contextmanager
def running(parts: Parts, config: RunConfig, adapter: Adapter) -> Iterator[Bundle]:
    bundle = Bundle(parts.base, adapter, parts.networks, config)
    try:
        yield bundle
    finally:
        if bundle.injected is not None:
            bundle.injected.eject()


@dataclasses.dataclass
class Call:
    """What the UNet was called with and what it gave."""

    noisy: Tensor
    timesteps: Tensor
    states: Tensor
    more: dict[str, Any]
    prediction: Tensor


def passed(parts: Parts, bundle: Bundle, batch: Batch) -> tuple[dict[str, Tensor], Call]:
    """Losses of a batch, and the call of the UNet behind them."""
    losses, (call,) = all_passed(parts, bundle, batch)
    return losses, call


def all_passed(parts: Parts, bundle: Bundle, batch: Batch) -> tuple[dict[str, Tensor], list[Call]]:
    """Losses of a batch, and all calls of the UNet behind them."""
    calls: list[Call] = []

    def note(unet: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(Call(args[0], args[1], kwargs["encoder_hidden_states"], kwargs, output.sample))

    handle = parts.base.unet.register_forward_hook(note, with_kwargs=True)
    try:
        losses = bundle(batch)
    finally:
        handle.remove()
    return losses, calls


@torch.no_grad()
def alone(unet: Any, call: Call, states: Tensor | None = None) -> Tensor:
    """What another UNet gives for the same latents and timesteps."""
    given = {"encoder_hidden_states": call.states if states is None else states}
    given["added_cond_kwargs"] = call.more.get("added_cond_kwargs")
    prediction: Tensor = unet(call.noisy, torch.tensor(TIMESTEPS), **given).sample
    return prediction


def features(parts: Parts, *numbers: int) -> Any:
    rows = [parts.train_rows[number] for number in numbers]
    return features_of(parts.index, rows, parts.networks, parts.recognizer_digest, "cpu")


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())
