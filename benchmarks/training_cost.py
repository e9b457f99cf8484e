"""What a training costs at real sizes, and how that grows: a calculation. Nothing is timed, and no weights are needed.

    python -m benchmarks.training_cost                          # all tables, as markdown
    python -m benchmarks.training_cost --utilisation 0.2        # of the GPU's tensor cores; hours grow as it falls

Operations are counted by PyTorch while the real networks (the UNets, text encoders and VAE of SD1.5, SD2.1 and SDXL, CLIP ViT-L/14,
IResNet, the adapters injected as in training) run forward and backward on the meta device, which computes shapes alone. Bytes
are those of the tensors. Everything else is division by the assumptions in `Machine` and `Costs`, which the first table states.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from idadapter_core.checkpoint import Adapter
from idadapter_core.data.index import Row, write_index
from idadapter_core.faces.align import TEMPLATE, TEMPLATE_SIZE
from idadapter_core.faces.iresnet import EMBEDDING_WIDTH, IRESNET100_LAYERS, STAGE_WIDTHS, IResNet
from idadapter_core.methods import METHODS, idadapter, uniid
from idadapter_core.training.adapters import Wanted, fresh_config
from idadapter_core.training.bundle import BORDER
from idadapter_core.training.cache import PART
from idadapter_core.training.config import LossConfig, TrainConfig
from idadapter_core.training.diffusion import scaled_linear
from idadapter_core.training.single_file import _UNETS, KL, TEXT_ENCODERS
from idadapter_core.training.text import LENGTH, TextEncoders
from idadapter_core.unet import inject
from tests.harness.shim import run_shim

FAMILIES = {"sd15": "SD1.5", "sd21": "SD2.1", "sdxl": "SDXL"}
ENCODERS = {"sd15": "l", "sd21": "h", "sdxl": "lg"}
IRESNET50_LAYERS = (3, 4, 14, 3)  # buffalo_l's recogniser, which configs/idadapter_*.toml name
FACTOR = 8  # pixels of a latent
GIGA, TERA = 1e9, 1e12
PHOTOS = {"30 k": 30_000, "100 k": 100_000, "1 M": 1_000_000, "6 M": 6_000_000}
PAPER_STEPS, PAPER_BATCH, PAPER_PHOTOS = 50_000, 4, 30_000
EPOCHS = {"text": 12, "adapter": 16}  # of UniID's branches

# Both datasets are cut so that the eyes are at most a quarter of the side apart, which fills the picture with the face.
EYES = {"CelebA-HQ and FFHQ": 0.25, "a portrait to the waist": 0.10, "a person at full length": 0.04}
TEMPLATE_EYES = float(TEMPLATE[1, 0] - TEMPLATE[0, 0])


@dataclass(frozen=True)
class Machine:
    """A GPU of the H100 class (SXM, dense figures of the data sheet), and what it is joined to others by."""

    utilisation: float = field(default=0.4, metadata={"says": "share of the tensor cores' peak in bf16"})
    bf16: float = field(default=989e12, metadata={"says": "peak in bf16, operations/s"})
    tf32: float = field(
        default=495e12, metadata={"says": "peak of fp32 convolutions, which PyTorch does in TF32 by default"}
    )
    convolution: float = field(
        default=0.25, metadata={"says": "share of that peak in VAE and face network, bound by memory"}
    )
    fp32: float = field(default=67e12, metadata={"says": "peak of fp32 matrix products (CLIP vision)"})
    product: float = field(default=0.6, metadata={"says": "share of that peak"})
    inside: float = field(
        default=400e9, metadata={"says": "bytes/s between the GPUs of a machine (NVLink), one direction"}
    )
    slow: float = field(default=12.5e9, metadata={"says": "bytes/s of a machine's 100 Gbit/s network"})
    fast: float = field(default=50e9, metadata={"says": "bytes/s of a machine's 400 Gbit/s network"})

    def seconds(self, narrow: float = 0, convolutions: float = 0, products: float = 0) -> float:
        """For operations in bf16, in fp32 convolutions and in fp32 matrix products."""
        return (
            narrow / (self.bf16 * self.utilisation)
            + convolutions / (self.tf32 * self.convolution)
            + products / (self.fp32 * self.product)
        )


@dataclass(frozen=True)
class Costs:
    """What is done on CPU cores, and what photos weigh."""

    decode: float = field(
        default=0.03,
        metadata={"says": "core-seconds to decode a photo of a megapixel and cut out what is needed"},
    )
    read: float = field(default=0.0005, metadata={"says": "core-seconds to read a sample from the cache"})
    scan: float = field(
        default=0.5,
        metadata={
            "says": "core-seconds to scan a photo: SCRFD-10G at 640 px is about 27 G operations, IResNet-50 13 G, a core 80 G/s"
        },
    )
    cores: int = field(default=64, metadata={"says": "cores for the scan"})
    photo: float = field(default=250e3, metadata={"says": "bytes of a photo"})


@dataclass(frozen=True)
class Recipe:
    """A kind of run, with the settings of configs/."""

    method: str
    family: str
    branch: str = "adapter"
    resolution: int = 512
    batch: int = 16  # samples of a step on one GPU, over all micro-batches
    references: int = 4

    @property
    def name(self) -> str:
        kind = "IDAdapter" if self.method == idadapter.METHOD else f"UniID, {self.branch}"
        return f"{kind}, {FAMILIES[self.family]} {self.resolution} px"


RECIPES = (
    Recipe(idadapter.METHOD, "sd15", batch=4),
    Recipe(idadapter.METHOD, "sd21", batch=4),
    Recipe(idadapter.METHOD, "sdxl", resolution=1024, batch=4),
    Recipe(uniid.METHOD, "sd15", "text"),
    Recipe(uniid.METHOD, "sd15", "adapter"),
    Recipe(uniid.METHOD, "sd21", "adapter"),
    Recipe(uniid.METHOD, "sdxl", "text"),
    Recipe(uniid.METHOD, "sdxl", "adapter"),
)


# ------------------------------------------------------------------------------------------------------ operations


def operations(function: Callable[[], object]) -> int:
    """Floating-point operations of a call: two for each multiplication with addition; matrix products, convolutions, attention."""
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def convolution_share(function: Callable[[], object]) -> float:
    """Which part of a call's operations convolutions have."""
    with FlopCounterMode(display=False) as counter:
        function()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for name, count in counts.items() if "convolution" in str(name)) / sum(counts.values())


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@cache
def unet(family: str) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**_UNETS[family]).requires_grad_(False)


@cache
def text_encoders(family: str) -> TextEncoders:
    import transformers

    models, tokenizers = {}, {}
    for name in ENCODERS[family]:
        kind = "CLIPTextModelWithProjection" if name == "g" else "CLIPTextModel"
        config = transformers.CLIPTextConfig(**TEXT_ENCODERS[name])
        with torch.device("meta"):
            models[name] = getattr(transformers, kind)(config)
        tokenizers[name] = SimpleNamespace(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)
    return TextEncoders(family, models, tokenizers).requires_grad_(False)


@cache
def vision() -> Any:
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
    )
    with torch.device("meta"):
        return transformers.CLIPVisionModel(config).requires_grad_(False)


@cache
def autoencoder() -> Any:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(**KL).requires_grad_(False)


@cache
def recognizer(method: str) -> IResNet:
    with torch.device("meta"):
        network = IResNet(IRESNET100_LAYERS if method == uniid.METHOD else IRESNET50_LAYERS)
    return network.requires_grad_(False)


@cache
def adapter(recipe: Recipe) -> Adapter:
    wanted = Wanted(
        recipe.method,
        text_widths=text_encoders(recipe.family).widths,
        vision=(1024, 256),
        recognizer="",
        branch=recipe.branch,
        settings={"references": recipe.references} if recipe.method == idadapter.METHOD else {},
    )
    config = fresh_config(unet(recipe.family), wanted)
    parts = METHODS[recipe.method]
    with torch.device("meta"):
        encoder, layers = parts.encoder(config), parts.layers(config, nn)
    return Adapter(recipe.name, "", recipe.method, config, encoder, layers)


def meta(*shape: int, dtype: torch.dtype = torch.float32, learned: bool = False) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype, requires_grad=learned)


@dataclass(frozen=True)
class Operations:
    """Of one sample with its identity, in training."""

    alone: int  # the frozen UNet, forward
    forward: int  # the UNet with the adapter
    identity: int  # what makes tokens and the word's embeddings, and the text encoders that read the word
    backward: int  # of all of that
    again: int  # the second forward pass of gradient checkpointing

    @property
    def total(self) -> int:
        return self.forward + self.identity + self.backward + self.again


@cache
def counted(recipe: Recipe) -> Operations:
    model, trained = unet(recipe.family), adapter(recipe)
    with torch.no_grad():
        states = text_states(recipe, {})
        alone = operations(lambda: call_unet(recipe, model, states))
    sums = []
    for checkpointing in (False, True):
        model.train()
        toggle = (
            model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing
        )
        toggle()
        sums.append(_training_step(recipe, model, trained))
    model.disable_gradient_checkpointing()
    (identity, forward, backward), (_, _, longer) = sums
    return Operations(alone, forward, identity, backward, longer - backward)


def _training_step(recipe: Recipe, model: Any, trained: Adapter) -> tuple[int, int, int]:
    """Operations of the identity's way to the UNet, of the UNet, and of the backward pass."""
    acts = trained.config.has_adapter_branch
    injected = inject(model, trained) if acts else None
    with FlopCounterMode(display=False) as counter:
        tokens, states = _conditioning(recipe, trained)
        if injected is not None:
            injected.set_identity(tokens)
        identity = counter.get_total_flops()
        prediction = call_unet(recipe, model, states)
        forward = counter.get_total_flops()
        prediction.sum().backward()
        backward = counter.get_total_flops()
    if injected is not None:
        injected.eject()
    return identity, forward - identity, backward - forward


def _conditioning(recipe: Recipe, trained: Adapter) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Tokens for the UNet, and what it reads of the text, both with gradients where training has them."""
    if recipe.method == idadapter.METHOD:
        patches = meta(1, recipe.references * trained.config.vision_patches, trained.config.vision_width)
        tokens, word = trained.encoder(
            patches, meta(1, EMBEDDING_WIDTH), meta(1, trained.config.vision_width)
        )
        return tokens, text_states(recipe, word)
    sides = (uniid.FUSED_SIDE,) * 3 + (uniid.STAGE_SIDES[3],)
    stages = tuple(meta(1, width, size, size) for width, size in zip(STAGE_WIDTHS, sides, strict=True))
    text, tokens = trained.encoder(meta(1, EMBEDDING_WIDTH), stages)
    with torch.no_grad():  # the prompts are few, and encoded once in a run: not counted
        given = {
            "states": meta(1, LENGTH, unet(recipe.family).config.cross_attention_dim),
            "pooled": meta(1, 1280),
        }
    if text:
        inserted = torch.cat([text[name] for name in uniid.ENCODERS if name in text], dim=-1)
        given["states"] = torch.cat([inserted, given["states"][:, inserted.shape[1] :]], dim=1)
    return tokens, given


def text_states(recipe: Recipe, word: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the UNet reads of a prompt, with the word's embeddings in it, where there are any."""
    encoders = text_encoders(recipe.family)
    tokens = meta(1, LENGTH, dtype=torch.long)
    places = meta(1, LENGTH, dtype=torch.bool)
    found, pooled = [], None
    for name in ENCODERS[recipe.family]:
        embedding = word.get(name)
        rows = None if embedding is None else embedding[:, :1].expand(-1, LENGTH, -1)
        states, pooled = encoders._run(name, tokens, places, rows)
        found.append(states)
    given = {"states": torch.cat(found, dim=-1)}
    return given if pooled is None else {**given, "pooled": pooled}


def call_unet(recipe: Recipe, model: Any, states: dict[str, Tensor]) -> Tensor:
    side = recipe.resolution // FACTOR
    given: dict[str, Any] = {"encoder_hidden_states": states["states"]}
    if recipe.family == "sdxl":
        given["added_cond_kwargs"] = {"text_embeds": states["pooled"], "time_ids": meta(1, 6)}
    prediction: Tensor = model(meta(1, 4, side, side), meta(1, dtype=torch.long), **given).sample
    return prediction


@cache
def forward_and_backward(what: str, side: int = 0) -> tuple[int, int]:
    """Operations of decoding side x side latents, or of a face network: forward, and forward with backward to the input."""
    given = (
        meta(1, 4, side, side, learned=True)
        if what == "decode"
        else meta(1, 3, TEMPLATE_SIZE, TEMPLATE_SIZE, learned=True)
    )

    def run() -> Tensor:
        if what == "decode":
            image: Tensor = autoencoder().decode(given).sample
            return image
        embedding: Tensor = recognizer(what)(given)[0]
        return embedding

    with torch.no_grad():
        forward = operations(run)
    return forward, operations(lambda: run().sum().backward())


@cache
def encode(resolution: int) -> int:
    with torch.no_grad():
        return operations(lambda: autoencoder().encode(meta(1, 3, resolution, resolution)))


@cache
def look(method: str) -> int:
    """The face network on one face."""
    return forward_and_backward(method)[0]


@cache
def see() -> int:
    """CLIP vision on one head."""
    with torch.no_grad():
        return operations(lambda: vision()(pixel_values=meta(1, 3, 224, 224)))


def window(resolution: int, eyes: float) -> int:
    """Side of the latents that are decoded around a face whose eyes are that share of the picture's side apart."""
    crop = TEMPLATE_SIZE / TEMPLATE_EYES * eyes * resolution / FACTOR
    return min(math.floor(crop) + 1 + 2 * BORDER, resolution // FACTOR)


def identity_term(recipe: Recipe, eyes: float) -> float:
    """Operations of L_id for a sample on average: fp32 convolutions, in the share of samples where it counts."""
    if recipe.method == uniid.METHOD:
        return 0.0
    side = window(recipe.resolution, eyes)
    return counted_share() * (
        forward_and_backward("decode", side)[1] + forward_and_backward(recipe.method)[1]
    )


def counted_share() -> float:
    """Of samples that keep their identity and whose noise is low enough (gate = "noise")."""
    low = float((scaled_linear("epsilon").alphas >= LossConfig().gate_alpha).float().mean())
    return low * keeps_identity()


def keeps_identity() -> float:
    """The share of samples whose identity is not dropped."""
    train = TrainConfig()
    return 1 - train.drop_identity - train.drop_both


def seconds_per_sample(
    recipe: Recipe, machine: Machine, cached: bool = True, eyes: float = EYES["CelebA-HQ and FFHQ"]
) -> float:
    """On one GPU, with gradient checkpointing."""
    convolutions, products = identity_term(recipe, eyes), 0.0
    if not cached:
        convolutions += encode(recipe.resolution) + faces_of(recipe) * look(recipe.method)
        products += recipe.references * see() if recipe.method == idadapter.METHOD else 0
    return machine.seconds(counted(recipe).total, convolutions, products)


def faces_of(recipe: Recipe) -> int:
    """How many faces a sample needs: the references' and the target's."""
    return recipe.references + 1 if recipe.method == idadapter.METHOD else 1


# ------------------------------------------------------------------------------------------------------ bytes


def trained_parameters(recipe: Recipe) -> int:
    return parameters(adapter(recipe).encoder) + parameters(adapter(recipe).layers)


def frozen_bytes(recipe: Recipe) -> int:
    """UNet and text encoders in bf16; VAE, face network and CLIP vision in fp32."""
    narrow = parameters(unet(recipe.family)) + parameters(text_encoders(recipe.family))
    wide = parameters(autoencoder()) + parameters(recognizer(recipe.method))
    wide += parameters(vision()) if recipe.method == idadapter.METHOD else 0
    return 2 * narrow + 4 * wide


def latent_bytes(recipe: Recipe) -> int:
    return 2 * 8 * (recipe.resolution // FACTOR) ** 2  # mean and deviation, fp16


def photo_bytes(recipe: Recipe, features: bool = True) -> int:
    """An entry of the cache for a photo: what the networks see in it, or (features = False) what they are shown."""
    embedding = 4 * EMBEDDING_WIDTH
    if recipe.method == idadapter.METHOD:
        return embedding + 2 * (257 * 1024 if features else 3 * 224 * 224)
    if not features:
        return embedding + 3 * TEMPLATE_SIZE**2
    fused = sum(STAGE_WIDTHS[:3]) * uniid.FUSED_SIDE**2
    return embedding + 2 * (fused + STAGE_WIDTHS[3] * uniid.STAGE_SIDES[3] ** 2)


def sample_bytes(recipe: Recipe) -> int:
    """Read from the cache for a sample."""
    return latent_bytes(recipe) + faces_of(recipe) * photo_bytes(recipe)


def entries(recipe: Recipe) -> int:
    """Latents of a photo in the cache: IDAdapter mirrors half of its targets."""
    return 2 if recipe.method == idadapter.METHOD else 1


def stored_bytes(recipe: Recipe, features: bool = True) -> int:
    """Of the cache for a photo whose person has enough others, so that no variants are made."""
    return entries(recipe) * latent_bytes(recipe) + photo_bytes(recipe, features)


def exchange(parameters_: int, processes: int, bandwidth: float) -> float:
    """Seconds of a ring all-reduce of fp32 gradients: each link carries 2 (n - 1) / n of them."""
    return 2 * (processes - 1) / processes * 4 * parameters_ / bandwidth


@dataclass(frozen=True)
class RowBytes:
    """Of one photo, in every process that trains."""

    index_file: float
    index: float  # rows in memory
    places: float  # where entries are in the cache


def usual_rows(count: int) -> list[Row]:
    """Rows of an index as a scan of shards with captions writes them."""
    return [
        Row(
            number=number,
            source=f"shards/photos-{number // 1000:06}.tar::{number:09}",
            sha256=f"{number:064x}",
            width=1024,
            height=1024,
            identity=f"person_{number // 5:07}",
            caption=f"a photo of a woman with brown hair, smiling, in front of a wall, number {number}",
            class_noun="woman",
            box=(201.25 + number, 180.5, 790.75, 960.125),
            landmarks=tuple((300.5 + number, 400.25 + point) for point in range(5)),
            score=0.87 + number * 1e-9,
            faces=1,
            face_fraction=0.31 + number * 1e-9,
            yaw=-7.25 + number,
            pitch=3.5 + number,
            sharpness=412.75 + number,
            phash=f"{number:016x}",
            split="train",
            offset=512 * number + 512,
            size=250_000 + number,
        )
        for number in range(count)
    ]


@cache
def row_bytes(count: int = 4000) -> RowBytes:
    """Of the files, measured; of memory, see benchmarks/index_size.py and `cache.Folder`, whose arrays have 24 bytes for an entry."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.parquet"
        write_index(path, Path(folder), usual_rows(count), torch.zeros(count, EMBEDDING_WIDTH), {})
        size = sum(file.stat().st_size for file in Path(folder).iterdir() if file.suffix != ".safetensors")
    return RowBytes(size / count, 24, 24)


# ------------------------------------------------------------------------------------------------------ tables


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tera(value: float) -> str:
    return f"{value / TERA:.2f}" if value < 10 * TERA else f"{value / TERA:.1f}"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def plain(value: float) -> str:
    for letter, size in (("T", TERA), ("G", GIGA), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"


def rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def hours(seconds: float) -> str:
    value = seconds / 3600
    if value < 10:
        return f"{value:.1f}"
    return f"{value:,.0f}".replace(",", " ")


def gigabytes(value: float) -> str:
    return f"{value / GIGA:.1f}" if value < 1000 * GIGA else f"{value / GIGA:,.0f}".replace(",", " ")


def assumptions(machine: Machine, costs: Costs) -> str:
    rows = []
    for source in (machine, costs):
        for entry in fields(source):
            value = getattr(source, entry.name)
            rows.append([str(entry.metadata["says"]), plain(value)])
    return table(("assumed", "value"), rows)


def operations_table(machine: Machine) -> str:
    head = (
        "TFLOP for a sample",
        "UNet alone, forward",
        "with adapter, forward",
        "identity and text",
        "backward",
        "checkpointing's second forward",
        "L_id",
        "sum",
        "samples/s",
        "not cached: + TFLOP",
        "samples/s",
    )
    rows = []
    for recipe in RECIPES:
        count = counted(recipe)
        term = identity_term(recipe, EYES["CelebA-HQ and FFHQ"])
        more = encode(recipe.resolution) + faces_of(recipe) * look(recipe.method)
        more += recipe.references * see() if recipe.method == idadapter.METHOD else 0
        rows.append(
            (
                recipe.name,
                tera(count.alone),
                tera(count.forward),
                tera(count.identity),
                tera(count.backward),
                tera(count.again),
                tera(term),
                tera(count.total + term),
                rate(1 / seconds_per_sample(recipe, machine)),
                tera(more),
                rate(1 / seconds_per_sample(recipe, machine, cached=False)),
            )
        )
    return table(head, rows)


def identity_term_table(machine: Machine) -> str:
    head = ("L_id of one sample that counts", "latents decoded", "TFLOP, forward and backward", "ms")
    head += ("of a sample's time on average, SD2.1", "SDXL, 1024 px")
    rows = []
    for name, eyes in EYES.items():
        side = window(512, eyes)
        cost = forward_and_backward("decode", side)[1] + forward_and_backward(idadapter.METHOD)[1]
        shares = []
        for recipe in (RECIPES[1], RECIPES[2]):
            term = machine.seconds(convolutions=identity_term(recipe, eyes))
            shares.append(percent(term / seconds_per_sample(recipe, machine, eyes=eyes)))
        rows.append(
            (name, f"{side} x {side}", tera(cost), f"{1e3 * machine.seconds(convolutions=cost):.0f}", *shares)
        )
    shares = []
    for recipe in (
        RECIPES[1],
        RECIPES[2],
    ):  # where a detector decides, all samples with their identity are decoded, and whole
        side = recipe.resolution // FACTOR
        term = machine.seconds(convolutions=keeps_identity() * forward_and_backward("decode", side)[1])
        shares.append(percent(term / (term + machine.seconds(counted(recipe).total))))
    cost = forward_and_backward("decode", 64)[1] + forward_and_backward(idadapter.METHOD)[1]
    milliseconds = f"{1e3 * machine.seconds(convolutions=cost):.0f}"
    rows.append(("gate or align = detector, any picture", "64 x 64", tera(cost), milliseconds, *shares))
    return table(head, rows)


def hours_table(machine: Machine, costs: Costs) -> str:
    head = (
        "base",
        "photos",
        "IDAdapter, 50 000 x 4 samples",
        f"IDAdapter, the paper's {PAPER_STEPS * PAPER_BATCH / PAPER_PHOTOS:.1f} passes",
        "UniID text, 12 passes",
        "UniID adapter, 16 passes",
        "cache for IDAdapter",
        "cache for UniID",
    )
    rows = []
    for family, title in FAMILIES.items():
        by_branch = {
            recipe.branch if recipe.method == uniid.METHOD else "idadapter": recipe
            for recipe in RECIPES
            if recipe.family == family
        }
        for name, photos in PHOTOS.items():
            own = seconds_per_sample(by_branch["idadapter"], machine)
            passes = PAPER_STEPS * PAPER_BATCH / PAPER_PHOTOS
            branches = [
                hours(EPOCHS[branch] * photos * seconds_per_sample(by_branch[branch], machine))
                if branch in by_branch
                else "-"
                for branch in EPOCHS
            ]
            builds = [
                hours(photos * build_seconds(by_branch[key], machine)) for key in ("idadapter", "adapter")
            ]
            rows.append(
                (
                    title,
                    name,
                    hours(PAPER_STEPS * PAPER_BATCH * own),
                    hours(passes * photos * own),
                    *branches,
                    *builds,
                )
            )
    return table(head, rows)


def build_seconds(recipe: Recipe, machine: Machine) -> float:
    """Of a GPU, for a photo's entries in the cache."""
    products = see() if recipe.method == idadapter.METHOD else 0
    return machine.seconds(0, entries(recipe) * encode(recipe.resolution) + look(recipe.method), products)


def memory_table() -> str:
    head = (
        "GB on each GPU",
        "trained, M",
        "frozen networks",
        "masters, gradients, Adam (16 B)",
        "bf16 copies in a step (2 B)",
        "averaged weights, if any (4 B)",
        "buckets, with several GPUs (4 B)",
        "all of it, without activations",
        "all-reduce of a step",
        "a checkpoint on disk",
    )
    rows = []
    for recipe in RECIPES:
        count = trained_parameters(recipe)
        parts = [frozen_bytes(recipe), *(width * count for width in (16, 2, 4, 4))]
        rows.append(
            (
                recipe.name,
                f"{count / 1e6:.0f}",
                *map(gigabytes, parts),
                gigabytes(sum(parts)),
                gigabytes(4 * count),
                gigabytes((4 + 4 + 8) * count),
            )
        )
    return table(head, rows)


def cache_table(machine: Machine) -> str:
    head = (
        "cache",
        "kB for a photo",
        "GB: 30 k",
        "100 k",
        "1 M",
        "6 M",
        "6 M, cache_features = false",
        "kB read for a sample",
        "MB/s for one GPU",
        "for 8",
        "for 32",
    )
    rows = []
    for recipe in (RECIPES[1], RECIPES[2], RECIPES[5], RECIPES[7]):
        speed = 1 / seconds_per_sample(recipe, machine)
        stored = stored_bytes(recipe)
        rows.append(
            (
                recipe.name,
                f"{stored / 1e3:.0f}",
                *(gigabytes(stored * photos) for photos in PHOTOS.values()),
                gigabytes(stored_bytes(recipe, features=False) * PHOTOS["6 M"]),
                f"{sample_bytes(recipe) / 1e3:.0f}",
                *(f"{gpus * speed * sample_bytes(recipe) / 1e6:.0f}" for gpus in (1, 8, 32)),
            )
        )
    return table(head, rows)


def scaling_table(machine: Machine) -> str:
    head = (
        "a step, samples a GPU",
        "compute ms (backward)",
        "8 GPUs: all-reduce ms",
        "samples/s",
        "efficiency",
        "32 GPUs, 100 Gbit/s: ms",
        "samples/s",
        "efficiency",
        "32 GPUs, 400 Gbit/s: ms",
        "samples/s",
        "efficiency",
    )
    rows = []
    for recipe in RECIPES:
        for accumulate in (1, 8) if recipe.resolution == 1024 else (1,):
            rows.append(_scaling_row(recipe, accumulate, machine))
    return table(head, rows)


def _scaling_row(recipe: Recipe, accumulate: int, machine: Machine) -> tuple[str, ...]:
    count = counted(recipe)
    compute = accumulate * recipe.batch * seconds_per_sample(recipe, machine)
    # Gradients travel while those of earlier blocks are computed, in the last micro-batch.
    hidden = recipe.batch * machine.seconds(count.backward + count.again)
    cells = [f"{1e3 * compute:.0f} ({1e3 * hidden:.0f})"]
    for gpus, bandwidth in ((8, machine.inside), (32, machine.slow), (32, machine.fast)):
        travel = exchange(trained_parameters(recipe), gpus, bandwidth)
        best, worst = compute + max(0.0, travel - hidden), compute + travel
        samples = [gpus * accumulate * recipe.batch / step for step in (worst, best)]
        cells += [
            f"{1e3 * travel:.0f}",
            f"{samples[0]:.0f} to {samples[1]:.0f}",
            f"{percent(compute / worst)} to {percent(compute / best)}",
        ]
    suffix = f", {accumulate} micro-batches" if accumulate > 1 else ""
    return (f"{recipe.name}: {accumulate * recipe.batch}{suffix}", *cells)


def six_million_table(machine: Machine, costs: Costs) -> str:
    photos = PHOTOS["6 M"]
    row = row_bytes()
    adapter_run = RECIPES[7]
    visits = sum(EPOCHS.values())
    speed = 1 / seconds_per_sample(adapter_run, machine)
    kinds = 2
    facts = (
        ("photos", f"{photos * costs.photo / TERA:.1f} TB"),
        (
            "scan",
            f"{hours(photos * costs.scan)} core-hours: {hours(photos * costs.scan / costs.cores)} h on {costs.cores} cores",
        ),
        (
            f"the same detection in the loader, at each of {visits} visits",
            f"{hours(visits * photos * costs.scan)} core-hours",
        ),
        (
            "index",
            f"{photos * row.index_file / GIGA:.1f} GB on disk, {photos * row.index / GIGA:.2f} GB of memory in every process",
        ),
        (
            "cache, where its entries are",
            f"{photos * kinds * row.places / GIGA:.1f} GB of memory in every process "
            f"({photos * kinds / PART:,.0f} files of {PART} entries)".replace(",", " "),
        ),
        (
            "cache for UniID on SDXL",
            f"{photos * stored_bytes(adapter_run) / TERA:.1f} TB; {hours(photos * build_seconds(adapter_run, machine))} GPU-hours, "
            f"{hours(photos * kinds * costs.decode)} core-hours of decoding",
        ),
        (
            "reading it",
            f"{32 * speed * kinds:,.0f} entries/s anywhere in it, {32 * speed * sample_bytes(adapter_run) / GIGA:.2f} GB/s, "
            "for 32 GPUs".replace(",", " ", 1),
        ),
        (
            "training both branches on SDXL",
            f"{hours(photos * sum(EPOCHS[r.branch] * seconds_per_sample(r, machine) for r in RECIPES[6:8]))} GPU-hours",
        ),
    )
    return table(("6 million photos", ""), facts)


def published_table(machine: Machine, costs: Costs) -> str:
    """What UniID's published way of working adds to a sample."""
    head = ("UniID on SDXL, for a sample", "core-seconds in the loader", "GPU ms", "samples/s of a GPU")
    head += ("cores to keep it busy",)
    recipe = RECIPES[7]
    prompts = operations(lambda: text_states(recipe, {}))
    ours = seconds_per_sample(recipe, machine)
    extra = machine.seconds(prompts, encode(recipe.resolution) + look(recipe.method))
    # In fp32 as published, without gradient checkpointing.
    count = counted(recipe)
    step = count.total - count.again
    with torch.no_grad():
        states = text_states(recipe, {})
        share = convolution_share(lambda: call_unet(recipe, unet(recipe.family), states))
    wide = machine.seconds(
        products=(1 - share) * step + prompts,
        convolutions=share * step + encode(recipe.resolution) + look(recipe.method),
    )
    rows = []
    for name, core, gpu in (
        ("with the cache, bf16", costs.read, ours),
        ("without a cache, bf16", costs.decode, ours + extra - machine.seconds(prompts)),
        ("detection in the loader, all networks in each step, bf16", costs.scan + costs.decode, ours + extra),
        ("the same in fp32 and without checkpointing, as published", costs.scan + costs.decode, wide),
    ):
        rows.append((name, f"{core:.4f}", f"{1e3 * gpu:.0f}", f"{1 / gpu:.0f}", f"{core / gpu:.2g}"))
    return table(head, rows)


def tables(machine: Machine, costs: Costs) -> dict[str, str]:
    """All of them, by title."""
    return {
        "Assumptions": assumptions(machine, costs),
        "Operations": operations_table(machine),
        "L_id": identity_term_table(machine),
        "Hours on one GPU": hours_table(machine, costs),
        "The published way": published_table(machine, costs),
        "Memory": memory_table(),
        "Cache": cache_table(machine),
        "More GPUs": scaling_table(machine),
        "Six million photos": six_million_table(machine, costs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--utilisation", type=float, default=Machine.utilisation, help="0..1")
    parser.add_argument(
        "--scan", type=float, default=Costs.scan, help="core-seconds for a photo, with a real face package"
    )
    options = parser.parse_args()
    run_shim()
    for title, content in tables(Machine(utilisation=options.utilisation), Costs(scan=options.scan)).items():
        print(f"\n## {title}\n\n{content}")


if __name__ == "__main__":
    main()
