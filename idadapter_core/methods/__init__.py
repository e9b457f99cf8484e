"""The methods by name, each with the same parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..types import FaceFeatures, Identity
from . import idadapter, uniid

Config = uniid.UniIDConfig | idadapter.IDAdapterConfig


@dataclass(frozen=True)
class Method:
    """What a method is made of."""

    title: str  # for people
    config: type[Any]
    encoder: Callable[[Any], nn.Module]  # makes identities
    layers: Callable[[Any, Any], nn.Module]  # what acts in the UNet; (config, where its layers come from)
    initialise: Callable[
        [Any, Any, Any, int], None
    ]  # (encoder, layers, config, seed): the start of a training
    encode: Callable[..., Identity]  # (encoder, config, features, mix)
    require: Callable[
        [FaceFeatures, Any], None
    ]  # raises MismatchError where features lack what an adapter reads
    describe: Callable[[Any], list[str]]
    layers_prefix: str  # what stands before the names of the layers' weights in a file
    layers_head: str  # what the names of all layers' weights begin with in a file
    made_to_be_rescaled: (
        bool  # trained for identity alone, so that only rescaling at inference leaves the prompt a say
    )


METHODS = {
    uniid.METHOD: Method(
        title="UniID",
        config=uniid.UniIDConfig,
        encoder=uniid.UniIDEncoder,
        layers=lambda config, operations: uniid.SiteProjections(config),
        initialise=uniid.initialise,
        encode=uniid.encode,
        require=uniid.require_stages,
        describe=uniid.describe,
        layers_prefix="adapter_branch.",
        layers_head="adapter_branch.adapter_modules.",
        made_to_be_rescaled=True,
    ),
    idadapter.METHOD: Method(
        title="IDAdapter",
        config=idadapter.IDAdapterConfig,
        encoder=idadapter.IDAdapterEncoder,
        layers=idadapter.IDAdapterLayers,
        initialise=idadapter.initialise,
        encode=idadapter.encode,
        require=idadapter.require_vision,
        describe=idadapter.describe,
        layers_prefix="layers.",
        layers_head="layers.",
        made_to_be_rescaled=False,
    ),
}

__all__ = ["METHODS", "Config", "Method"]
