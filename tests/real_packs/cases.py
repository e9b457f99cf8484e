"""The cases tried of other packs: each is one of their nodes on a MODEL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from tests.real_packs import narrow
from tests.real_packs.hosting import Host
from tests.real_packs.theirs import (
    Draw,
    Make,
    attention_couple,
    attention_couple_cgem,
    attention_couple_ppm,
    growing,
    guided_attention,
    guided_from_inside,
    instantid,
    ipadapter,
    node,
    pulid,
    unchanged,
    windows,
    with_reference,
)

COMFYUI = "ComfyUI"
"""Stands for a pack in cases of ComfyUI's own nodes."""


@dataclass(frozen=True)
class Case:
    """One node of another pack.

    Args:
        effect: what it does to the text's attention. "nothing": it works elsewhere. "adds": it adds attention to tokens of its own,
            and `make` takes `weight` and `mask`. "changes": it changes that attention itself. "hides": it computes the UNet past
            ComfyUI's hooks, so that no identity can act. "refused": no identity can act beside it, and the run ends with our error.
        visible: whether the node changes pictures; one that only computes them in another way does not.
        windowed: whether it hands the model windows of a batch; pictures of it are then independent of each other.
        together: other packs that it needs.
    """

    name: str
    pack: str
    make: Make
    kind: str = "sd15"
    effect: Literal["nothing", "adds", "changes", "hides", "refused"] = "nothing"
    visible: bool = True
    windowed: bool = False
    together: tuple[str, ...] = ()
    sample: Draw | None = None
    options: dict[str, Any] = field(default_factory=dict)  # for `narrow.draw`

    def draw(self, host: Host, model: Any) -> Tensor:
        if self.sample is not None:
            return self.sample(host, model, self.kind)
        return narrow.draw(model, self.kind, **self.options)


_ALWAYS = {"sigma_start": -1.0, "sigma_end": -1.0}
CASES = (
    Case("IPAdapter, SD1.5", "ComfyUI_IPAdapter_plus", ipadapter("sd15"), effect="adds"),
    Case("IPAdapter, SDXL", "ComfyUI_IPAdapter_plus", ipadapter("sdxl"), "sdxl", "adds"),
    Case(
        "IPAdapter, ease in, K+V",
        "ComfyUI_IPAdapter_plus",
        ipadapter("sd15", weight_type="ease in", embeds_scaling="K+V"),
    ),
    Case("InstantID", "ComfyUI_InstantID", instantid, "sdxl", "adds"),
    *(
        Case(f"PuLID, {method}", "PuLID_ComfyUI", pulid(method), "sdxl", "adds")
        for method in ("fidelity", "style", "neutral")
    ),
    Case(
        "PLADIS",
        "sd-perturbed-attention",
        node("PLADIS", scale=2.0, sparse_func="entmax1.5"),
        effect="changes",
    ),
    Case("Normalized Attention Guidance", "sd-perturbed-attention", guided_attention, effect="changes"),
    Case(
        "Perturbed Attention",
        "sd-perturbed-attention",
        node(
            "PerturbedAttention",
            scale=3.0,
            adaptive_scale=0.0,
            unet_block="middle",
            unet_block_id=0,
            rescale=0.0,
            rescale_mode="full",
            **_ALWAYS,
        ),
    ),
    Case("Attention Couple", "attention-couple-ComfyUI", attention_couple, effect="changes"),
    Case("Attention Couple (PPM)", "ComfyUI-ppm", attention_couple_ppm, effect="changes"),
    Case("Attention Couple (cgem156)", "cgem156-ComfyUI", attention_couple_cgem, effect="changes"),
    Case(
        "Scale Crafter",
        "cgem156-ComfyUI",
        node("ScaleCrafter|cgem156", dilation_rate=2.0, depth=0, start=0, end=500),
    ),
    *(
        Case(
            f"Reference ControlNet, {reference}",
            "ComfyUI-Advanced-ControlNet",
            unchanged,
            sample=with_reference(reference),
        )
        for reference in ("reference_attn", "reference_adain", "reference_attn+adain")
    ),
    Case(
        "AnimateDiff windows",
        "ComfyUI-AnimateDiff-Evolved",
        windows(),
        visible=False,  # a motion model would tie the pictures together
        windowed=True,
        options={"batch": 6, "size": 8},
    ),
    Case(
        "AnimateDiff ContextRef",
        "ComfyUI-AnimateDiff-Evolved",
        windows(contextref=True),
        together=("ComfyUI-Advanced-ControlNet",),
        options={"batch": 6, "size": 8},
    ),
    Case(
        "DeepCache",
        "ComfyUI-deepcache",
        node("DeepCache", cache_interval=2, cache_depth=3, start_step=0, end_step=1000),
        effect="hides",
        options={"steps": 4},
    ),
    Case(
        "DeepCache (Fix)",
        "ComfyUI-DeepCache-Fix",
        node(
            "DeepCache_Fix",
            cache_interval=2,
            cache_depth=3,
            start_steps=0,
            end_steps=12,
            input_cache="Yes",
            middle_cahce="Yes",
            output_cache="Yes",
        ),
        effect="hides",
        options={"steps": 4},
    ),
    Case(
        "RAUNet",
        "ComfyUI-BrushNet",
        node("RAUNet", du_start=0, du_end=1, xa_start=1, xa_end=2),
        effect="hides",
    ),
    *(
        Case(
            f"Tiled Diffusion, {method}",
            "ComfyUI-TiledDiffusion",
            node(
                "TiledDiffusion",
                method=method,
                tile_width=128,
                tile_height=128,
                tile_overlap=64,
                tile_batch_size=2,
            ),
            options={"size": 24},
        )
        for method in ("MultiDiffusion", "Mixture of Diffusers", "SpotDiffusion")
    ),
    Case("Automatic CFG", "ComfyUI-AutomaticCFG", node("Automatic CFG", hard_mode=True, boost=True)),
    Case(
        "FBCache",
        "Comfy-WaveSpeed",
        node("ApplyFBCacheOnModel", object_to_patch="diffusion_model", residual_diff_threshold=0.3),
        options={"steps": 6},
    ),
    Case(
        "EnhancedCompileModel",
        "Comfy-WaveSpeed",
        node(
            "EnhancedCompileModel",
            is_patcher=True,
            object_to_patch="diffusion_model",
            compiler="torch.compile",
            fullgraph=False,
            dynamic=False,
            mode="",
            options="",
            disable=False,
            backend="eager",
        ),
        visible=False,
    ),
    Case(
        "TorchCompileModelAdvanced",
        "ComfyUI-KJNodes",
        node(
            "TorchCompileModelAdvanced",
            backend="eager",
            fullgraph=False,
            mode="default",
            dynamic="false",
            dynamo_cache_size_limit=64,
            compile_transformer_blocks_only=True,
            debug_compile_keys=False,
        ),
        visible=False,
    ),
    Case("KSamplerWithNAG", "ComfyUI-NAG", unchanged, effect="refused", sample=guided_from_inside),
    Case(
        "ContextWindowsManual",
        COMFYUI,
        node(
            "ContextWindowsManual",
            context_length=4,
            context_overlap=2,
            context_schedule="standard_static",
            context_stride=1,
            closed_loop=False,
            fuse_method="pyramid",
            dim=0,
            freenoise=False,
        ),
        visible=False,
        windowed=True,
        options={"batch": 6, "size": 8},
    ),
    Case("NAGuidance", COMFYUI, node("NAGuidance", nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5)),
    Case("FreeU_V2", COMFYUI, node("FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2)),
    Case(
        "HyperTile",
        COMFYUI,
        node("HyperTile", tile_size=32, swap_size=2, max_depth=0, scale_depth=False),
        options={"size": 32},
    ),
    Case("TomePatchModel", COMFYUI, node("TomePatchModel", ratio=0.3)),
    Case("SelfAttentionGuidance", COMFYUI, node("SelfAttentionGuidance", scale=0.5, blur_sigma=2.0)),
    Case("SamplerLCMUpscale", COMFYUI, unchanged, sample=growing),
)
PACKS = tuple(dict.fromkeys(case.pack for case in CASES))
