"""The published files of IP-Adapter FaceID and Portrait, LoRA included, recognised by keys and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ...errors import CheckpointError, InputError
from ...published import ADAPTERS, BUFFALO_L, RESEARCH_ONLY, SD15_OR_SDXL, PublishedFile
from ..method import Files, Layout, State
from .config import FaceIDConfig

ENCODER, LAYERS = "image_proj.", "ip_adapter."
# Prefixes in training dumps, which use the names of the model's modules.
_OTHER_NAMES = {"image_proj_model.": ENCODER, "adapter_modules.": LAYERS}
_KEYS = re.compile(
    r"^(?:image_proj\.(?:proj\.[02]\.(?:weight|bias)|norm\.(?:weight|bias))"
    r"|ip_adapter\.\d+\.(?:to_[kv]_ip|to_(?:q|k|v|out)_lora\.(?:up|down))\.weight)$"
)
_PAIR = re.compile(r"^ip_adapter\.(\d+)\.to_k_ip\.weight$")


def published_state(state: Mapping[str, Tensor], source: str) -> State:
    """Return the weights under the published names; empty if the file holds another adapter of that family, or none."""
    named: State = {}
    for key, tensor in state.items():
        name = key.removeprefix("module.")
        for other, own in _OTHER_NAMES.items():
            if name.startswith(other):
                name = own + name.removeprefix(other)
        if name.startswith((ENCODER, LAYERS)):
            named[name] = tensor
    is_faceid = "image_proj.proj.2.weight" in named and "image_proj.norm.weight" in named
    # FaceID-Plus, Full-Face and InstantID have additional keys.
    return named if is_faceid and all(map(_KEYS.match, named)) else {}


def published_config(state: State, source: str) -> FaceIDConfig:
    """Derive the sizes of an adapter from its shapes.

    Raises:
        CheckpointError: a tensor that determines a size is missing or has an impossible shape; names it.
    """

    def shape(key: str) -> tuple[int, int]:
        found = tuple(state[key].shape) if key in state else ()
        if len(found) != 2 or 0 in found:
            raise CheckpointError(
                f"{source}: this looks like an IP-Adapter FaceID, but {key} is {'missing' if key not in state else found}. The file "
                "is incomplete; download it again."
            )
        return found[0], found[1]

    numbers = sorted(int(match[1]) for key in state if (match := _PAIR.match(key)))
    if not numbers or numbers != list(range(1, 2 * len(numbers), 2)):
        raise CheckpointError(
            f"{source}: this looks like an IP-Adapter FaceID, but its layers must be numbered 1, 3, 5, … without a gap, they are "
            f"{numbers[:8]}. The file is incomplete; download it again."
        )
    pairs = [shape(f"{LAYERS}{number}.to_k_ip.weight") for number in numbers]
    context = pairs[0][1]
    hidden, embedding = shape(f"{ENCODER}proj.0.weight")
    rank = shape(f"{LAYERS}0.to_q_lora.down.weight")[0] if f"{LAYERS}0.to_q_lora.down.weight" in state else 0
    try:
        return FaceIDConfig(
            tokens=shape(f"{ENCODER}proj.2.weight")[0] // context,
            embedding_width=embedding,
            hidden_width=hidden,
            context_width=context,
            site_widths=tuple(width for width, _ in pairs),
            lora_rank=rank,
        )
    except InputError as error:
        raise CheckpointError(f"{source}: no IP-Adapter FaceID of a known kind: {error}.") from error


FILES = Files(layers_prefix=LAYERS, layers_head=LAYERS, layouts=(Layout(published_state, published_config),))

PUBLISHED = (
    SD15_OR_SDXL,
    PublishedFile(
        "adapter",
        "ip-adapter-faceid_sdxl.bin or ip-adapter-faceid_sd15.bin",
        ADAPTERS,
        "huggingface.co/h94/IP-Adapter-FaceID",
        RESEARCH_ONLY,
    ),
    BUFFALO_L,
)
