"""What is tried of other packs: each case is one of their nodes on a MODEL, called through the pack's own code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from tests.golden import recipe
from tests.nodes.sampling import prompt
from tests.real_packs import narrow, weights
from tests.real_packs.hosting import Host

COMFYUI = "ComfyUI"
"""Stands for a pack in cases of ComfyUI's own nodes."""


class Make(Protocol):
    """Puts a node of theirs on a MODEL, giving a new one."""

    def __call__(self, host: Host, model: Any, **inputs: Any) -> Any: ...


class Draw(Protocol):
    """Samples a MODEL: latents (batch, 4, height, width)."""

    def __call__(self, host: Host, model: Any, kind: str) -> Tensor: ...


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


def node(name: str, **inputs: Any) -> Make:
    """A node that takes nothing but the MODEL and plain values."""

    def make(host: Host, model: Any, **more: Any) -> Any:
        return host.call(name, model=model, **inputs, **more)

    return make


# --- nodes that add attention ---


class _Face(dict[str, Any]):
    __getattr__ = dict.__getitem__


class _FaceAnalysis:
    """Stands in for insightface, whose networks are not there: finds one face, always the same."""

    class det_model:  # noqa: N801 (insightface's name)
        input_size = (640, 640)

    def get(self, _: np.ndarray) -> list[_Face]:
        points = np.array([[20, 20], [40, 20], [30, 30], [22, 40], [38, 40]], dtype=float)
        embedding = recipe.value(4, "face", (512,)).numpy()
        return [_Face(bbox=np.array([10.0, 10.0, 50.0, 50.0]), kps=points, embedding=embedding)]


def _widths(kind: str) -> dict[weights.Block, int]:
    return {block[:2]: width for block, width in narrow.site_layers(kind)}


def ipadapter(kind: str, **inputs: Any) -> Make:
    def make(host: Host, model: Any, weight: float = 1.0, mask: Tensor | None = None, **_: Any) -> Any:
        file = host.models / "ipadapter" / f"narrow_{kind}.safetensors"
        if not file.exists():
            weights.write_ipadapter(file, kind, _widths(kind))
        embedding = recipe.value(3, "image", (1, weights.IMAGE_WIDTH))
        given = {
            "weight_type": "linear",
            "start_at": 0.0,
            "end_at": 1.0,
            "embeds_scaling": "V only",
            **inputs,
        }
        return host.call(
            "IPAdapterEmbeds",
            model=model,
            ipadapter=host.load_model("IPAdapterModelLoader", ipadapter_file=file.name),
            pos_embed=embedding,
            neg_embed=torch.zeros_like(embedding),
            weight=weight,
            attn_mask=mask,
            **given,
        )

    return make


def instantid(host: Host, model: Any, weight: float = 1.0, mask: Tensor | None = None, **_: Any) -> Any:
    module = host.module_of("InstantIDModelLoader")
    file = host.models / "instantid" / "narrow.safetensors"
    if not file.exists():
        torch.manual_seed(0)
        encoder = module.Resampler(1280, 4, 64, 20, 16, 512, weights.SDXL_CONTEXT, 4)
        weights.write_face_adapter(file, encoder, _widths("sdxl"))
    return host.call(
        "InstantIDAttentionPatch",
        instantid=host.load_model("InstantIDModelLoader", instantid_file=file.name),
        insightface=_FaceAnalysis(),
        image=narrow.picture(),
        model=model,
        weight=weight,
        start_at=0.0,
        end_at=1.0,
        mask=mask,
    )


class _EvaClip(torch.nn.Module):
    """Stands in for PuLID's vision network, whose weights are not there."""

    image_size = 336
    image_mean = image_std = (0.5, 0.5, 0.5)

    def forward(self, image: Tensor, **_: Any) -> tuple[Tensor, list[Tensor]]:
        hidden = [recipe.value(5, f"hidden.{layer}", (1, 6, 1024)) for layer in range(5)]
        return recipe.value(5, "vision", (1, 768)), hidden


class _FaceHelper:
    """Stands in for facexlib's, which downloads its networks: the whole picture is the face."""

    def __init__(self, **_: Any) -> None:
        self.cropped_faces: list[np.ndarray] = []

    def clean_all(self) -> None:
        self.cropped_faces = []

    def read_image(self, image: np.ndarray) -> None:
        self.cropped_faces = [image]

    def get_face_landmarks_5(self, **_: Any) -> None: ...

    def align_warp_face(self) -> None: ...


def _all_face(**_: Any) -> Callable[[Tensor], tuple[Tensor]]:
    """In place of facexlib's parsing network: every pixel has the label 1, of skin."""

    def parse(image: Tensor) -> tuple[Tensor]:
        labels = torch.zeros(1, 19, *image.shape[-2:])
        labels[:, 1] = 1
        return (labels,)

    return parse


def pulid(method: str) -> Make:
    def make(host: Host, model: Any, weight: float = 1.0, mask: Tensor | None = None, **_: Any) -> Any:
        module = host.module_of("ApplyPulid")
        module.FaceRestoreHelper, module.init_parsing_model = _FaceHelper, _all_face
        file = host.models / "pulid" / "narrow.safetensors"
        if not file.exists():
            torch.manual_seed(0)
            weights.write_face_adapter(file, module.IDEncoder(), _widths("sdxl"))
        return host.call(
            "ApplyPulid",
            model=model,
            pulid=host.load_model("PulidModelLoader", pulid_file=file.name),
            eva_clip=_EvaClip(),
            face_analysis=_FaceAnalysis(),
            image=narrow.picture(),
            method=method,
            weight=weight,
            start_at=0.0,
            end_at=1.0,
            attn_mask=mask,
        )

    return make


# --- nodes that change the text's attention ---


def guided_attention(host: Host, model: Any, **_: Any) -> Any:
    return host.call("NormalizedAttentionGuidance", model=model, negative=prompt("sd15", "unwanted"))


def attention_couple(host: Host, model: Any, **_: Any) -> Any:
    left = narrow.left_mask(size=16)
    positive = [
        [prompt("sd15", "left")[0][0], {"mask": left, "mask_strength": 1.0}],
        [prompt("sd15", "right")[0][0], {"mask": 1 - left, "mask_strength": 1.0}],
    ]
    negative = prompt("sd15", "negative")
    return host.call("Attention couple", model=model, positive=positive, negative=negative, mode="Attention")


def attention_couple_ppm(host: Host, model: Any, **_: Any) -> Any:
    left = narrow.left_mask()
    return host.call(
        "AttentionCouplePPM",
        model=model,
        base_cond=prompt("sd15", "positive"),
        base_mask=left,
        cond_1=prompt("sd15", "right"),
        mask_1=1 - left,
    )


def attention_couple_cgem(host: Host, model: Any, **_: Any) -> Any:
    left = narrow.left_mask()
    right = prompt("sd15", "right")
    return host.call("AttentionCouple|cgem156", model=model, base_mask=left, cond_1=right, mask_1=1 - left)


# --- nodes that act through the conditioning or the sampler ---


def unchanged(_: Host, model: Any, **__: Any) -> Any:
    return model


def with_reference(reference: str) -> Draw:
    """Reference ControlNet of Advanced-ControlNet, which runs its own copy of the transformer block."""

    def sample(host: Host, model: Any, kind: str) -> Tensor:
        from tests.tiny.checkpoints import tiny_vae

        image = host.call(
            "ACN_ReferencePreprocessor",
            vae=tiny_vae(),
            image=narrow.picture(),
            latent_size={"samples": torch.zeros(1, 4, 16, 16)},
        )
        control = host.call(
            "ACN_ReferenceControlNet", reference_type=reference, style_fidelity=0.5, ref_weight=1.0
        )
        positive, negative = host.outputs(
            "ControlNetApplyAdvanced",
            positive=prompt(kind, "positive"),
            negative=prompt(kind, "negative"),
            control_net=control,
            image=image,
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
        )
        return narrow.draw(model, kind, positive=positive, negative=negative)

    return sample


def growing(host: Host, model: Any, kind: str) -> Tensor:
    """SamplerLCMUpscale: the latent doubles on the way."""
    sampler = host.call("SamplerLCMUpscale", scale_ratio=2.0, scale_steps=-1, upscale_method="bislerp")
    torch.manual_seed(0)
    sigmas = host.call("BasicScheduler", model=model, scheduler="normal", steps=3, denoise=1.0)
    return host.call(  # type: ignore[no-any-return]
        "SamplerCustom",
        model=model,
        add_noise=True,
        noise_seed=0,
        cfg=4.0,
        positive=prompt(kind, "positive"),
        negative=prompt(kind, "negative"),
        sampler=sampler,
        sigmas=sigmas,
        latent_image={"samples": torch.zeros(1, 4, 8, 8)},
    )["samples"]


def guided_from_inside(host: Host, model: Any, kind: str) -> Tensor:
    """KSamplerWithNAG: the UNet gets a further text for each row and compares both inside of its layers."""
    return host.call(  # type: ignore[no-any-return]
        "KSamplerWithNAG",
        model=model,
        seed=0,
        steps=2,
        cfg=4.0,
        nag_scale=5.0,
        nag_tau=2.5,
        nag_alpha=0.25,
        nag_sigma_end=0.0,
        sampler_name="euler",
        scheduler="normal",
        positive=prompt(kind, "positive"),
        negative=prompt(kind, "negative"),
        nag_negative=prompt(kind, "unwanted"),
        latent_image={"samples": torch.zeros(1, 4, 16, 16)},
        denoise=1.0,
    )["samples"]


def windows(contextref: bool = False) -> Make:
    """AnimateDiff's sliding windows over a batch, without a motion model."""

    def make(host: Host, model: Any, **_: Any) -> Any:
        context = host.call(
            "ADE_StandardUniformContextOptions", context_length=4, context_overlap=2, context_stride=1
        )
        if contextref:
            extras = host.call("ADE_ContextExtras_ContextRef", start_percent=0.0, end_percent=1.0)
            context = host.call("ADE_ContextExtras_Set", context_opts=context, context_extras=extras)
        return host.call(
            "ADE_UseEvolvedSampling", model=model, beta_schedule="autoselect", context_options=context
        )

    return make


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
