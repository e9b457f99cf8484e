"""ComfyUI and diffusers behind the same methods: the only way in which the contract suite runs a UNet.

`apply` puts identities on the base model, `sample` draws with the result, `release` takes them off again. What a drawing is
compared by are the calls of the UNet: always with the rows of the negative prompt first, then those of the positive one.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from idadapter_core.adapter import load_adapter, save_adapter
from idadapter_core.errors import IDAdapterError
from idadapter_core.identity import load_identity, save_identity
from idadapter_core.stable_diffusion.base import load_base
from idadapter_core.stable_diffusion.config import BaseConfig
from idadapter_core.stable_diffusion.inject import inject
from idadapter_core.stable_diffusion.pipeline import Pipeline, Strengths
from idadapter_core.types import Mix
from tests.contract.samples import VISION, Case, Sizes, features, trained, write_adapter
from tests.harness.comfy import pack_nodes
from tests.tiny.bases import write_tiny_base
from tests.tiny.checkpoints import CHECKPOINT_NAMES, write_tiny_checkpoints
from tests.tiny.diffusers_unet import inputs, traces

PROMPT = "a photo of a person reading"
PROMPT_WITH_CLASS = "a photo of a <class word> reading"
NEGATIVE = "blurry"
SEED, CFG = 7, 3.0


@dataclass(frozen=True, eq=False)
class Act:
    """An identity at work. Windows and masks are ComfyUI's alone."""

    adapter: Any
    person: Any
    strength: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    mask: Tensor | None = None  # (1 or latents, H, W) in 0..1


@dataclass(frozen=True)
class Drawn:
    """What the UNet was given and gave at each step, and the picture it led to."""

    negative: Tensor  # (steps, latents, 4, h, w)
    positive: Tensor  # (steps, latents, 4, h, w)
    contexts: tuple[Tensor, Tensor]  # (latents, tokens, width) of the first step: negative, positive
    pictures: Callable[[], Tensor]  # (latents, 3, H, W), RGB in 0..1

    @property
    def out(self) -> Tensor:
        return torch.cat([self.negative, self.positive], dim=1)

    def equals(self, other: Drawn) -> bool:
        """Bit by bit."""
        return torch.equal(self.out, other.out)

    def distance(self, other: Drawn) -> float:
        """The largest difference of any prediction."""
        return float((self.out - other.out).abs().max())

    def first(self, other: Drawn) -> float:
        """The largest difference in positive rows of the first step, in which the latents are still the same."""
        return float((self.positive[0] - other.positive[0]).abs().max())


@dataclass
class _Calls:
    """Calls of the UNet while they are recorded, split into negative and positive rows."""

    given: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    gave: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def note(self, context: Tensor, out: Tensor, positive: Sequence[bool]) -> None:
        """`positive` says for each equal part of the rows whether it is the positive prompt's."""
        assert sorted(positive) == [False, True], "negative and positive rows in one call"
        for rows, told in ((context, self.given), (out, self.gave)):
            parts = dict(zip(positive, rows.clone().chunk(2), strict=True))
            told.append((parts[False], parts[True]))

    def drawn(self, pictures: Callable[[], Tensor]) -> Drawn:
        negative, positive = (torch.stack(parts) for parts in zip(*self.gave, strict=True))
        return Drawn(negative, positive, self.given[0], pictures)


class ComfyHost:
    """ComfyUI with the nodes of the pack, as a graph runs them."""

    def __init__(self, family: str, checkpoint: Path, comfyui: Path) -> None:
        import comfy.sd
        from ComfyUI_IDAdapter.idadapter_core.errors import IDAdapterError as Refusal

        pack_nodes()  # announces the folders of the pack to ComfyUI
        self.family, self.refusal = family, Refusal
        self.model, self.clip, self.vae = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:3]

    # --- files ---

    def load(self, path: Path) -> Any:
        """What Load ID Adapter gives."""
        from ComfyUI_IDAdapter.nodes.adapter import load

        return load(path, None)

    def save_adapter(self, adapter: Any, path: Path) -> Path:
        save_adapter(adapter.adapter, path)
        return path

    def digest(self, adapter: Any) -> str:
        digest: str = adapter.adapter.digest
        return digest

    def encode(self, adapter: Any, features: Any, mode: str = "auto", weights: str = "") -> Any:
        """What Mix Face Features gives."""
        return _run("IDAdapterMixFeatures", adapter, features, mode, 0, weights)

    def save_identity(self, identity: Any, path: Path) -> Path:
        _run("IDAdapterSaveIdentity", identity, path.stem)
        shutil.move(_identities() / path.name, path)
        return path

    def load_identity(self, path: Path, adapter: Any) -> Any:
        """What Load Identity gives."""
        there = _identities() / path.name
        shutil.copy(path, there)
        try:
            return _run("IDAdapterLoadIdentity", path.name, adapter)
        finally:
            there.unlink()

    # --- drawing ---

    def apply(self, *acts: Act) -> Any:
        """A MODEL with an Apply ID Adapter for each of them, in this order."""
        model = self.model
        for act in acts:
            model = _run(
                "IDAdapterApply", model, act.adapter, act.person, act.strength, *act.window, act.mask
            )
        return model

    def sample(
        self,
        model: Any,
        *,
        said: Any = None,
        attached: Any = None,
        steps: int = 2,
        latents: int = 1,
        size: tuple[int, int] = (64, 64),
    ) -> Drawn:
        """Draw with KSampler.

        Args:
            said: an identity for ID Prompt; None: the plain prompt.
            attached: an identity that both prompts carry by Attach Identity to Conditioning.
            latents: in the batch.
            size: height and width in pixels.
        """
        from comfy.patcher_extension import WrappersMP

        from nodes import EmptyLatentImage, KSampler, VAEDecode

        calls = _Calls()

        def note(executor: Any, *args: Any, **kwargs: Any) -> Any:
            out = executor(*args, **kwargs)
            calls.note(args[2], out, [index == 0 for index in args[5]["cond_or_uncond"]])
            return out

        recorded = model.clone()
        recorded.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "contract", note)
        positive, negative = self._positive(said), self._encoded(NEGATIVE)
        if attached is not None:
            positive = _run("IDAdapterAttach", positive, attached, "positive")
            negative = _run("IDAdapterAttach", negative, attached, "negative")
        with torch.inference_mode():
            empty = EmptyLatentImage().generate(size[1], size[0], latents)[0]
            drawn = KSampler().sample(
                recorded, SEED, steps, CFG, "euler", "simple", positive, negative, empty
            )[0]

        def pictures() -> Tensor:
            with torch.inference_mode():
                decoded: Tensor = VAEDecode().decode(self.vae, {"samples": drawn["samples"]})[0]
            return decoded.movedim(-1, 1).clone()

        return calls.drawn(pictures)

    def release(self, model: Any) -> None:
        """Nothing to do: the MODEL that was applied to is not changed."""

    def draw(self, *acts: Act, **options: Any) -> Drawn:
        return self.sample(self.apply(*acts), **options)

    def _positive(self, said: Any) -> Any:
        if said is None:
            return self._encoded(PROMPT)
        return _run("IDAdapterPrompt", self.clip, said, PROMPT_WITH_CLASS, "auto", 1.0)

    @functools.cache  # noqa: B019 - hosts live as long as the tests
    def _encoded(self, text: str) -> Any:
        from nodes import CLIPTextEncode

        with torch.inference_mode():
            return CLIPTextEncode().encode(self.clip, text)[0]

    # --- what must not change ---

    def weights(self) -> dict[str, Tensor]:
        """Copies of all weights of the base model, as they are when it draws alone."""
        import comfy.model_management

        with torch.inference_mode():
            comfy.model_management.load_models_gpu([self.model])
            return _copies(self.model.model.diffusion_model.state_dict())

    def traces(self) -> Any:
        """All that could be left on the modules of the UNet, and on the MODEL."""
        patches = {name: len(some) for name, some in self.model.patches.items()}
        options = repr(self.model.model_options)
        hooks = [(name, found) for name, _, found in traces(self.model.model.diffusion_model)]
        return patches, options, sorted(self.model.object_patches), hooks


class DiffusersHost:
    """A diffusers UNet with `inject`, in the pipeline by which the trainer and the evaluation draw."""

    refusal: type[Exception] = IDAdapterError

    def __init__(self, family: str, checkpoint: Path, comfyui: Path) -> None:
        self.family = family
        self.base = load_base(
            BaseConfig(
                path=str(checkpoint),
                family=family,
                config=str(write_tiny_base(checkpoint.parent / family, family)),
                tokenizer=str(comfyui / "comfy" / "sd1_tokenizer"),
            )
        )

    # --- files ---

    def load(self, path: Path) -> Any:
        return load_adapter(path)

    def save_adapter(self, adapter: Any, path: Path) -> Path:
        save_adapter(adapter, path)
        return path

    def digest(self, adapter: Any) -> str:
        digest: str = adapter.digest
        return digest

    def encode(self, adapter: Any, features: Any, mode: str = "auto", weights: str = "") -> Any:
        parts = tuple(float(part) for part in weights.split(",") if part)
        return adapter.encode(features, Mix(mode, weights=parts))

    def save_identity(self, identity: Any, path: Path) -> Path:
        save_identity(identity, path)
        return path

    def load_identity(self, path: Path, adapter: Any) -> Any:
        identity = load_identity(path)
        adapter.require_identity(identity, path.name)
        return identity

    # --- drawing ---

    def apply(self, *acts: Act) -> tuple[Pipeline, Act | None]:
        """A pipeline with one of them at most."""
        act = acts[0] if acts else None
        assert len(acts) <= 1, "the pipeline draws one person"
        if act is None:
            return Pipeline(self.base), None
        assert act.mask is None, "the pipeline has no masks"
        assert act.window == (0.0, 1.0), "the pipeline has no windows"
        return Pipeline(self.base, act.adapter), act

    def sample(self, applied: tuple[Pipeline, Act | None], *, said: Any = None, steps: int = 2) -> Drawn:
        """Draw. `said`: whether the identity is in the prompt as well; anything but None is."""
        pipeline, act = applied
        calls = _Calls()

        def note(unet: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
            calls.note(kwargs["encoder_hidden_states"], out.sample, (False, True))

        hook = self.base.unet.register_forward_hook(note, with_kwargs=True)
        try:
            picture = pipeline.generate(
                PROMPT if said is None else PROMPT_WITH_CLASS,
                identity=None if act is None else act.person,
                strengths=None if act is None else Strengths(act.strength, text=float(said is not None)),
                negative=NEGATIVE,
                seed=SEED,
                cfg=CFG,
                steps=steps,
                width=64,
                height=64,
            )
        finally:
            hook.remove()
        return calls.drawn(lambda: picture[None])

    def release(self, applied: tuple[Pipeline, Act | None]) -> None:
        applied[0].close()

    def draw(self, *acts: Act, **options: Any) -> Drawn:
        applied = self.apply(*acts)
        try:
            return self.sample(applied, **options)
        finally:
            self.release(applied)

    # --- the injection itself ---

    def predict(self, adapter: Any, people: Sequence[Any], strength: float = 1.0, rows: int = 2) -> Tensor:
        """One call of the UNet in which each row has its own person, (rows, 4, h, w); one person for all rows where there is one."""
        with self.injected(adapter) as injected:
            tokens = torch.cat([person.adapter_tokens for person in people]).clone()
            bias = people[0].adapter_bias
            more = {} if bias is None else {"bias": bias[0]}
            with injected.identity(tokens, strength=strength, **more):
                return self.predict_alone(rows)

    def predict_alone(self, rows: int = 2) -> Tensor:
        """One call of the UNet as it is now, for the same inputs."""
        with torch.no_grad():
            out: Tensor = self.base.unet(**inputs(self.family, rows)).sample
        return out

    @contextmanager
    def injected(self, adapter: Any) -> Iterator[Any]:
        injected = inject(self.base.unet, adapter)
        try:
            yield injected
        finally:
            injected.eject()

    # --- what must not change ---

    def weights(self) -> dict[str, Tensor]:
        return _copies(self.base.unet.state_dict())

    def traces(self) -> Any:
        return repr(self.base.unet), traces(self.base.unet)


class Cast:
    """An adapter loaded into a host, and the people it has made identities of."""

    def __init__(self, host: Any, file: Path, sizes: Sizes | None = None) -> None:
        self.host, self.file = host, file
        self._vision = VISION if sizes is None else sizes.vision
        self.adapter = host.load(file)
        self._people: dict[tuple[int, int], Any] = {}
        self._drawn: dict[tuple[int, float, bool], Drawn] = {}

    def person(self, seed: int = 1, photos: int = 1) -> Any:
        """The same identity each time."""
        if (seed, photos) not in self._people:
            self._people[seed, photos] = self.host.encode(self.adapter, features(seed, photos, self._vision))
        return self._people[seed, photos]

    def drawn(self, seed: int = 1, strength: float = 1.0, said: bool = False) -> Drawn:
        """One step with this person, drawn once."""
        key = (seed, strength, said)
        if key not in self._drawn:
            person = self.person(seed) if said else None
            self._drawn[key] = self.host.draw(self.act(seed, strength), said=person, steps=1)
        return self._drawn[key]

    def act(self, seed: int = 1, strength: float = 1.0, **options: Any) -> Act:
        return Act(self.adapter, self.person(seed), strength, **options)


HOSTS: tuple[type[Any], ...] = (ComfyHost, DiffusersHost)
Host = TypeVar("Host")


@functools.cache
def folder() -> Path:
    """For the files of a run."""
    folder = Path(tempfile.mkdtemp(prefix="contract-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _checkpoints() -> Path:
    """The tiny checkpoints of all families, which both hosts read."""
    write_tiny_checkpoints(folder())
    return folder() / "checkpoints"


@functools.cache
def host_of(kind: Callable[[str, Path, Path], Host], family: str, comfyui: Path) -> Host:
    """A host with the tiny base model of a family, made once for all tests."""
    return kind(family, _checkpoints() / CHECKPOINT_NAMES[family], comfyui)


@functools.cache
def cast_of(host: Any, case: Case) -> Cast:
    """The trained adapter of a case in a host."""
    return Cast(host, write_adapter(trained(case), folder() / f"{case}.safetensors"))


@functools.cache
def base_of(host: Any, **options: Any) -> Drawn:
    """What the base model draws alone, in one step."""
    drawn: Drawn = host.draw(steps=1, **options)
    return drawn


def _run(node_id: str, *arguments: Any) -> Any:
    """Execute one of the pack's nodes; its first output."""
    with torch.inference_mode():
        return pack_nodes()[node_id].execute(*arguments).result[0]


def _identities() -> Path:
    from ComfyUI_IDAdapter.nodes.host import paths

    folder: Path = paths.folder_of(paths.IDENTITIES)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}
