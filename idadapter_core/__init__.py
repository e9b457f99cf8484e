"""Face identity adapters for diffusion UNets, in pure torch: UniID and IDAdapter.

This package does not depend on ComfyUI. The nodes of the pack and the trainer use it.
"""

from .adapter import Adapter, load_adapter, save_adapter
from .attention import decoupled_attention, gated_self_attention, normalized_rescale
from .errors import IDAdapterError
from .identity import load_identity, save_identity
from .sites import Site, attention_sites
from .stable_diffusion.inject import eject, inject
from .types import Face, FaceFeatures, Identity, Mix

__all__ = [
    "Adapter",
    "Face",
    "FaceFeatures",
    "IDAdapterError",
    "Identity",
    "Mix",
    "Site",
    "attention_sites",
    "decoupled_attention",
    "eject",
    "gated_self_attention",
    "inject",
    "load_adapter",
    "load_identity",
    "normalized_rescale",
    "save_adapter",
    "save_identity",
]
