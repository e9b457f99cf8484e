"""Forward pass of a training step: the frozen networks, the adapter and the losses.

    L = L_SD + F(x0_hat) * lambda * (1 - cos(R(x0_hat), f_a))        (arXiv 2403.13535, Eq. 8 and 9; lambda = 0 without L_id)

Both terms are means over the whole batch; F is 0 for samples without L_id. The gradient therefore does not depend on how a batch is
divided among processes and micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..adapter import Adapter
from ..attention_cpu import AttentionInFloat32, processor
from ..faces.align import TEMPLATE_SIZE
from ..faces.detector import select_faces
from ..faces.iresnet import IResNet
from ..methods.common import resized_shallow
from ..methods.method import BatchFeatures, Encoded, Needs
from ..stable_diffusion.base import Base
from ..stable_diffusion.inject import inject
from ..stable_diffusion.inject.text import insert_states, with_clause
from ..stable_diffusion.networks import Networks, encode_heads
from ..stable_diffusion.text import Conditioning
from .config import RunConfig
from .identity_loss import align_faces, crop_to_image, face_weights, identity_cosines
from .samples import STAGE_NAMES, Batch

BORDER = 4  # latents around a face that influence its pixels


@torch.no_grad()
def recognize(recognizer: IResNet, crops: Tensor, needs: Needs) -> dict[str, Tensor]:
    """Compute `embedding` (F, 512) of crops (F, 3, 112, 112) and, if the method reads them, the four stages.

    The first three stages have the size that the method reads, so resizing them again has no effect.
    """
    embedding, stages = recognizer(crops)
    features = {"embedding": embedding}
    if needs.stages:
        if needs.shallow_side:
            stages = resized_shallow(stages, needs.shallow_side)
        features |= dict(zip(STAGE_NAMES, stages, strict=True))
    return features


class Bundle(nn.Module):
    """All networks and losses of a training step.

    Only the adapter is a submodule. The frozen networks are kept out of the module, so that DDP neither compares nor sends them; they
    must be on the adapter's device.
    """

    def __init__(self, base: Base, adapter: Adapter, networks: Networks, config: RunConfig) -> None:
        super().__init__()
        self._base, self._networks, self._config = base, networks, config
        self.encoder, self.layers = adapter.encoder, adapter.layers
        self._adapter = adapter
        self.injected = inject(base.unet, adapter) if adapter.config.has_adapter_branch else None
        self._text = adapter.mechanisms.text
        # Tokens to reserve in every prompt.
        self._inserted = adapter.config.text_tokens if self._text == "states" else 0
        self._states: dict[str, Conditioning] = {}
        self._alphas = base.schedule.alphas_cumprod.cpu()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss and the values to log.

        Returns:
            `loss` (); `mse` (B,); `cosine` (B,), NaN where L_id does not count; `counts` (B,) bool, True where L_id counts.
        """
        batch = self.complete(batch)
        schedule = self._base.schedule
        latents = self._latents(batch)
        timesteps = batch.timesteps.to(latents.device, non_blocking=True)
        noisy = schedule.add_noise(latents, batch.noise, timesteps)
        with self._autocast(latents.device):
            given = self._with_identity(batch)
            prediction = self._predict(batch, noisy, timesteps, *given).float()
        target = schedule.target(latents, batch.noise, timesteps)
        errors = (prediction - target).square().mean(dim=1)
        mse = errors.mean(dim=(1, 2))
        weighted = (errors * self._face_weights(batch, errors)).mean(dim=(1, 2))
        loss = (weighted * schedule.min_snr_weight(timesteps, self._config.loss.snr_gamma)).mean()
        cosine, counts = torch.full_like(mse, float("nan")), torch.zeros_like(mse, dtype=torch.bool)
        if self._config.loss.identity > 0:
            if self._config.loss.denoise_steps:
                clean, at = self._denoised(batch, latents, *given)
            else:
                clean, at = schedule.clean(noisy, prediction, timesteps), batch.timesteps
            term, cosine, counts = self._identity_term(batch, clean, at)
            loss = loss + self._config.loss.identity * term
        return {"loss": loss, "mse": mse.detach(), "cosine": cosine, "counts": counts}

    @torch.no_grad()
    def measure(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Denoising error (B,) with the adapter, and without it for the same noise."""
        batch = self.complete(batch)
        schedule = self._base.schedule
        latents = self._latents(batch)
        timesteps = batch.timesteps.to(latents.device)
        noisy = schedule.add_noise(latents, batch.noise, timesteps)
        target = schedule.target(latents, batch.noise, timesteps)
        errors = []
        for given in (self._with_identity, self._without_identity):
            with self._autocast(latents.device):
                prediction = self._predict(batch, noisy, timesteps, *given(batch)).float()
            errors.append((prediction - target).square().mean(dim=(1, 2, 3)))
        return errors[0], errors[1]

    def complete(self, batch: Batch) -> Batch:
        """Compute the features that the batch did not get from a cache."""
        needs = self._config.needs
        if batch.embedding is None or (needs.stages and not batch.stages):
            assert batch.crops is not None
            rows = len(batch)
            found = recognize(self._networks.recognizer, batch.crops.flatten(0, 1), needs)
            batch = replace(batch, embedding=rearrange(found.pop("embedding"), "(b n) c -> b n c", b=rows))
            if needs.stages:
                last = {
                    name: rearrange(t, "(b n) ... -> b n ...", b=rows)[:, -1] for name, t in found.items()
                }
                batch = replace(batch, stages=tuple(last[name] for name in STAGE_NAMES))
        if needs.vision is not None and batch.patch_tokens is None:
            assert batch.heads is not None
            assert self._networks.vision is not None
            features = encode_heads(self._networks.vision, batch.heads.flatten(0, 1))
            patches, classes = (rearrange(t, "(b n) ... -> b n ...", b=len(batch)) for t in features.values())
            batch = replace(batch, patch_tokens=patches, class_embedding=classes)
        return batch

    @torch.no_grad()
    def _latents(self, batch: Batch) -> Tensor:
        moments = batch.moments
        if moments is None:
            assert batch.pictures is not None
            moments = self._base.vae.moments(batch.pictures)
        mean, deviation = moments.float().chunk(2, dim=1)
        return mean + deviation * batch.posterior

    def _predict(
        self,
        batch: Batch,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        setting: Mapping[str, Any],
    ) -> Tensor:
        given: dict[str, Any] = {}
        if conditioning.pooled is not None:
            given["added_cond_kwargs"] = {"text_embeds": conditioning.pooled, "time_ids": batch.sizes}
        if self.injected is not None:
            self.injected.set_identity(**setting)
        dtype = self._base.unet.dtype
        given["encoder_hidden_states"] = conditioning.states.to(dtype)
        prediction: Tensor = self._base.unet(noisy.to(dtype), timesteps, **given).sample
        return prediction

    def _denoised(
        self, batch: Batch, latents: Tensor, conditioning: Conditioning, setting: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return x0_hat of latents that the adapter denoised from heavy noise, and its timesteps (B,), on the CPU.

        The target's latents with little noise show who the target is, as pictures in the making do not. Only the last prediction has a
        gradient.
        """
        schedule, loss = self._base.schedule, self._config.loss
        begin, end = (
            torch.lerp(torch.tensor(float(low)), torch.tensor(float(high)), batch.denoising[:, which])
            for which, (low, high) in enumerate((loss.denoise_from, loss.denoise_to))
        )
        steps = range(loss.denoise_steps + 1)
        levels = [torch.lerp(begin, end, step / loss.denoise_steps).long() for step in steps]
        timesteps = levels[0].to(latents.device)
        noisy = schedule.add_noise(latents, batch.noise, timesteps)
        for level in levels[1:]:
            following = level.to(latents.device)
            # A context of its own: autocast may keep weights that it cast without a gradient.
            with torch.no_grad(), self._autocast(latents.device):
                prediction = self._predict(batch, noisy, timesteps, conditioning, setting).float()
            noisy, timesteps = schedule.less_noise(noisy, prediction, timesteps, following), following
        with self._autocast(latents.device):
            prediction = self._predict(batch, noisy, timesteps, conditioning, setting).float()
        return schedule.clean(noisy, prediction, timesteps), levels[-1]

    def _without_identity(self, batch: Batch) -> tuple[Conditioning, dict[str, Any]]:
        return self._plain(list(batch.prompts)), {"tokens": None, "strength": 0.0}

    def _with_identity(self, batch: Batch) -> tuple[Conditioning, dict[str, Any]]:
        """Conditioning with the identity, and the arguments for the injected layers."""
        assert batch.embedding is not None
        features = BatchFeatures(
            batch.embedding, batch.stages, batch.patch_tokens, batch.class_embedding, batch.identity
        )
        encoded = self._config.recipe.encode(self.encoder, self._adapter.config, features)
        setting = {"tokens": encoded.tokens, "rows": encoded.rows}
        if self._text == "word":
            return self._with_word(batch, encoded), setting
        conditioning = self._plain(list(batch.prompts))
        # Text tokens are not rescaled in training.
        return insert_states(conditioning, encoded.text) if encoded.text else conditioning, setting

    def _with_word(self, batch: Batch, encoded: Encoded) -> Conditioning:
        """Insert the identity word into the prompts whose identity is not dropped."""
        kept = [number for number, keep in enumerate(batch.identity.tolist()) if keep]
        prompts = list(batch.prompts)
        if not encoded.text or not kept:
            return self._plain(prompts)
        text, count = self._base.text, self._adapter.config.text_tokens
        for number in kept:
            prompts[number] = with_clause(text, prompts[number], batch.class_nouns[number], count)
        with_word = text.encode(
            [prompts[number] for number in kept], {name: t[kept] for name, t in encoded.text.items()}
        )
        if len(kept) == len(prompts):
            return with_word
        return _filled_in(self._plain(prompts, kept), with_word, kept)

    @torch.no_grad()
    def _plain(self, prompts: list[str], skipped: list[int] | None = None) -> Conditioning:
        """Encode prompts without an identity. Encodings are kept, while there are few; prompts numbered in `skipped` count as empty."""
        prompts = ["" if number in (skipped or ()) else prompt for number, prompt in enumerate(prompts)]
        if missing := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._states]:
            if len(self._states) > _KEPT_PROMPTS:
                self._states.clear()
                missing = list(dict.fromkeys(prompts))
            text = self._base.text
            made = text.encode([text.shortened(prompt, self._inserted) for prompt in missing])
            for number, prompt in enumerate(missing):
                pooled = None if made.pooled is None else made.pooled[number : number + 1]
                self._states[prompt] = Conditioning(made.states[number : number + 1], pooled)
        rows = [self._states[prompt] for prompt in prompts]
        pooled_rows = [row.pooled for row in rows if row.pooled is not None]
        return Conditioning(
            torch.cat([row.states for row in rows]), torch.cat(pooled_rows) if pooled_rows else None
        )

    def _face_weights(self, batch: Batch, errors: Tensor) -> Tensor | float:
        """Weights (B, h, w) of the errors of latents."""
        weight = self._config.loss.face_weight
        if weight == 1:
            return 1.0
        height, width = errors.shape[1:]
        return face_weights(batch.landmarks, height, width, self._base.vae.factor, weight).to(errors)

    def _identity_term(self, batch: Batch, clean: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean over the batch of F * (1 - cos) of x0_hat from `timesteps`, the cosines (B,) for the log, and F (B,)."""
        assert batch.embedding is not None
        cosines = torch.full((len(batch),), float("nan"), device=clean.device)
        gate = torch.zeros(len(batch), dtype=torch.bool, device=clean.device)
        with torch.autocast(clean.device.type, enabled=False):  # coordinates of pixels need their bits
            faces, chosen = [], []
            for number in self._candidates(batch, timesteps):
                landmarks = self._landmarks(clean[number].detach(), batch.landmarks[number])
                if landmarks is not None:
                    faces.append(align_faces(*self._decode(clean[number].float(), landmarks)))
                    chosen.append(number)
            if not faces:
                return clean.sum() * 0, cosines, gate
        wanted = batch.embedding[chosen, -1]
        with torch.autocast(clean.device.type, torch.bfloat16, enabled=self._is_identity_narrow):
            cosine = identity_cosines(torch.cat(faces), wanted, self._networks.recognizer)
        cosines[chosen], gate[chosen] = cosine.detach(), True
        return (1 - cosine).sum() / len(batch), cosines, gate

    def _candidates(self, batch: Batch, timesteps: Tensor) -> list[int]:
        """Samples with an identity whose noise level is low enough for L_id; with gate "detector", all with an identity."""
        counts = batch.identity
        if self._config.loss.gate == "noise":
            counts = counts & (self._alphas[timesteps] >= self._config.loss.gate_alpha)
        return [number for number, does in enumerate(counts.tolist()) if does]

    def _decode(self, latents: Tensor, landmarks: Tensor) -> tuple[Tensor, Tensor]:
        given = (self._base.vae, latents, landmarks, self._is_identity_narrow)
        if not self._config.train.gradient_checkpointing:
            return decode_face(*given)
        image, points = checkpoint(decode_face, *given, use_reentrant=False)
        return image, points

    @property
    def _is_identity_narrow(self) -> bool:
        return self._config.loss.mixed_precision == "bf16"

    def _landmarks(self, latents: Tensor, target: Tensor) -> Tensor | None:
        """Face landmarks (5, 2) of a predicted image, on the CPU: the target's, or the detector's (as in the paper).

        None if the detector finds no face and is the gate (F in the paper).
        """
        loss = self._config.loss
        if "detector" not in (loss.gate, loss.align):
            return target
        assert self._networks.detector is not None
        with torch.no_grad():
            image = self._base.vae.decode(latents.float()[None])[0]
        levels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        faces = self._networks.detector.detect(levels.movedim(0, -1).cpu().numpy())
        if not faces:
            return None if loss.gate == "detector" else target
        return torch.tensor(select_faces(faces)[0].landmarks) if loss.align == "detector" else target

    @contextmanager
    def _autocast(self, device: torch.device) -> Iterator[None]:
        if self._config.train.mixed_precision != "bf16":
            yield
            return
        is_slow = device.type == "cpu" and not processor().tiles
        with torch.autocast(device.type, torch.bfloat16), AttentionInFloat32() if is_slow else nullcontext():
            yield


_KEPT_PROMPTS = 1000
_WINDOW_STEP = 8  # latents


def _filled_in(plain: Conditioning, special: Conditioning, places: list[int]) -> Conditioning:
    """Replace the rows of `plain` at `places` with those of `special`."""
    index = torch.tensor(places, device=plain.states.device)
    states = plain.states.to(special.states.dtype).index_copy(0, index, special.states)
    if plain.pooled is None or special.pooled is None:
        return Conditioning(states, None)
    return Conditioning(states, plain.pooled.to(special.pooled.dtype).index_copy(0, index, special.pooled))


def decode_face(
    vae: Any, latents: Tensor, landmarks: Tensor, in_bfloat16: bool = False
) -> tuple[Tensor, Tensor]:
    """Decode the part of an image around its face, (1, 3, S, S), and return it with the landmarks (1, 5, 2) in it.

    Only a window of the latents (4, h, w) is decoded, covering the aligned face and the latents that influence it: the decoder is most
    of the cost of L_id. Its attention and norms see only this window, so pixels differ slightly from those of a full decode. Each face
    has its own window, so that other samples of the batch make no difference.

    Args:
        landmarks: (5, 2) on the CPU, in pixels of the whole image.
    """
    height, width = latents.shape[-2:]
    last = TEMPLATE_SIZE - 1
    corners = torch.tensor([[0, 0, 1], [last, 0, 1], [0, last, 1], [last, last, 1]], dtype=torch.float64)
    matrix = crop_to_image(landmarks.double()[None])[0]
    reached = (corners @ matrix.T) / vae.factor
    low, high = reached.amin(0).floor() - BORDER, reached.amax(0).ceil() + BORDER
    # Few distinct sizes, because kernels are selected per size.
    side = -(-int((high - low).max()) // _WINDOW_STEP) * _WINDOW_STEP
    side = min(side, height, width)
    middle = (low + high - side) / 2
    left, top = (int(middle[axis].round().clamp(0, size - side)) for axis, size in ((0, width), (1, height)))
    window = latents[None, :, top : top + side, left : left + side]
    image = vae.decode(window, in_bfloat16=in_bfloat16)
    return image, (landmarks - torch.tensor([left, top]) * vae.factor)[None]
