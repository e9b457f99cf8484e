"""Nodes of other packs, each put on a MODEL through the pack's own code, and samplings that they act through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tests.golden import recipe
from tests.nodes.sampling import prompt
from tests.real_packs import narrow, weights
from tests.real_packs.hosting import Host


class Make(Protocol):
    """Puts a node of theirs on a MODEL, giving a new one."""

    def __call__(self, host: Host, model: Any, **inputs: Any) -> Any: ...


class Draw(Protocol):
    """Samples a MODEL: latents (batch, 4, height, width)."""

    def __call__(self, host: Host, model: Any, kind: str) -> Tensor: ...


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
