"""The work of each stage of the build."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...adapter import save_adapter
from ...faces.iresnet import CROP_SIZE, EMBEDDING_WIDTH, IResNet, digest, load_iresnet, save_iresnet
from ...files import replacing
from ..autoencoder import load_autoencoder, save_autoencoder
from ..base import load_base, save_base
from ..readers import load_reader, save_reader
from ..second_recognizer import EMBEDDING, SecondRecognizer, save_second_recognizer
from ..shipped import (
    AUTOENCODER,
    BASE,
    CLIP_VISION,
    DETECTOR_FILE,
    JUDGE,
    PACKAGE,
    READER,
    RECOGNIZER_FILE,
    SEX_AND_AGE_FILE,
    adapter_file,
)
from .batches import Pool
from .detector import Detector, Exported, output_names, train_detector
from .onnx_files import write_onnx
from .pictures import draw_pictures, open_pictures
from .scores import MEASURES, call, embed
from .settings import FULL, SECOND, TrainingSchedule
from .sex_and_age import SIDE, train_sex_and_age
from .stages import Stage, Workspace
from .train_adapters import (
    ABLATIONS,
    BASE_FOLDER,
    PHOTOS,
    RECOGNIZER,
    export_adapter,
    scan_photos,
    train_adapter,
    train_further,
)
from .train_autoencoder import train_autoencoder
from .train_base import encode_pictures, train_base
from .train_latent_reader import (
    CLASSES,
    accuracy,
    load_latent_reader,
    save_latent_reader,
    train_latent_reader,
)
from .train_readers import train_reader
from .train_recognizers import first_of, train_recognizer
from .train_start import train_start
from .train_text import load_caption_reader, save_caption_reader, text_scores, train_text_encoder
from .train_vision import CONFIG_FILE, WEIGHTS, save_vision, train_vision
from .trainer_files import write_base_folder, write_photos

RECOGNIZER_LAYERS, RECOGNIZER_WIDTHS = (1, 2, 2, 1), (16, 32, 64, 96)
LATENTS, TEXT, LATENT_READER, UNIID_START = (  # in the folder of a build
    "latents/training.npy",
    "text.safetensors",
    "latent_reader.safetensors",
    "uniid_start.safetensors",
)
EXAMPLE_SIDE = 320  # of the detector's input during the export; the file accepts any size


def _pool(workspace: Workspace, *groups: str) -> Pool:
    return Pool([open_pictures(workspace.pictures, group) for group in groups])


def _training(workspace: Workspace, name: str) -> dict[str, Any]:
    """Arguments of a stage's training, besides its network and pictures."""
    schedule: TrainingSchedule = workspace.schedule(name)
    log: Callable[[str], None] = lambda line: workspace.log(name, line)  # noqa: E731
    return {
        "schedule": schedule,
        "checkpoint": workspace.checkpoint(name),
        "seed": workspace.settings.seed,
        "log": log,
    }


def _pictures(workspace: Workspace) -> None:
    _draw(workspace, "pictures", [name for name in workspace.settings.groups if name != SECOND])


def _second_pictures(workspace: Workspace) -> None:
    _draw(workspace, "second_pictures", [SECOND])


def _draw(workspace: Workspace, stage: str, groups: list[str]) -> None:
    draw_pictures(
        workspace.pictures,
        workspace.settings,
        workspace.processes,
        lambda line: workspace.log(stage, line),
        groups,
    )


def _readers(workspace: Workspace) -> None:
    reader = train_reader(_pool(workspace, "training"), **_training(workspace, "readers"))
    save_reader(reader, workspace.files / READER)


class _EmbeddingAlone(nn.Module):
    def __init__(self, network: IResNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, crops: Tensor) -> Tensor:
        return first_of(self.network(crops))


def write_package_file(kind: str, network: nn.Module, folder: Path) -> Path:
    """Write "detector", "recognizer" or "sex_and_age" as a file of a face package."""
    free_rows: dict[str, Mapping[int, str]] = {"input": {0: "None"}}
    if kind == "detector":
        assert isinstance(network, Detector)
        names, example = output_names(), torch.zeros(1, 3, EXAMPLE_SIDE, EXAMPLE_SIDE)
        free = {"input": {2: "height", 3: "width"}, **{name: {0: f"n{name.split('_')[1]}"} for name in names}}
        path = folder / DETECTOR_FILE
        write_onnx(Exported(network), example, path, names, free)
    elif kind == "recognizer":
        assert isinstance(network, IResNet)
        path = folder / RECOGNIZER_FILE
        example = torch.zeros(1, 3, CROP_SIZE, CROP_SIZE)
        write_onnx(
            _EmbeddingAlone(network), example, path, ["embedding"], {**free_rows, "embedding": {0: "None"}}
        )
    else:
        path = folder / SEX_AND_AGE_FILE
        write_onnx(network, torch.zeros(1, 3, SIDE, SIDE), path, ["fc1"], {**free_rows, "fc1": {0: "None"}})
    return path


def _recognizer(workspace: Workspace) -> None:
    network = IResNet(RECOGNIZER_LAYERS, RECOGNIZER_WIDTHS)
    torch.manual_seed(workspace.settings.seed)
    trained = train_recognizer(
        network, embed, EMBEDDING_WIDTH, _pool(workspace, "training"), **_training(workspace, "recognizer")
    )
    assert isinstance(trained, IResNet)
    write_package_file("recognizer", trained, workspace.files / PACKAGE)


def _second_recognizer(workspace: Workspace) -> None:
    torch.manual_seed(workspace.settings.seed + 1)
    trained = train_recognizer(
        SecondRecognizer(),
        call,
        EMBEDDING,
        _pool(workspace, SECOND),
        **_training(workspace, "second_recognizer"),
    )
    assert isinstance(trained, SecondRecognizer)
    save_second_recognizer(trained, workspace.files / JUDGE)


def _detector(workspace: Workspace) -> None:
    detector = train_detector(_pool(workspace, "training"), **_training(workspace, "detector"))
    write_package_file("detector", detector, workspace.files / PACKAGE)


def _sex_and_age(workspace: Workspace) -> None:
    network = train_sex_and_age(_pool(workspace, "training"), **_training(workspace, "sex_and_age"))
    write_package_file("sex_and_age", network, workspace.files / PACKAGE)


def _autoencoder(workspace: Workspace) -> None:
    pool = _pool(workspace, "training")
    network = train_autoencoder(
        pool, load_reader(workspace.files / READER), **_training(workspace, "autoencoder")
    )
    for folder in (workspace.home, workspace.files):  # the stage `decoder` changes the second file
        save_autoencoder(network, folder / AUTOENCODER)


def _decoder(workspace: Workspace) -> None:
    network, reader = load_autoencoder(workspace.home / AUTOENCODER), load_reader(workspace.files / READER)
    pool = _pool(workspace, "training")
    network = train_autoencoder(pool, reader, trained=network, **_training(workspace, "decoder"))
    save_autoencoder(network, workspace.files / AUTOENCODER)


def _vision(workspace: Workspace) -> None:
    model = train_vision(_pool(workspace, "training"), **_training(workspace, "vision"))
    save_vision(model, workspace.files / CLIP_VISION)


def _latents(workspace: Workspace) -> None:
    network = load_autoencoder(workspace.files / AUTOENCODER)
    latents = encode_pictures(network, _pool(workspace, "training"))
    with replacing(workspace.home / LATENTS) as file, file.open("wb") as stream:
        np.save(stream, latents.half().numpy())


def _text(workspace: Workspace) -> None:
    reader = train_text_encoder(**_training(workspace, "text"))
    save_caption_reader(reader, workspace.home / TEXT)
    workspace.score("text", text_scores(load_caption_reader(workspace.home / TEXT)))


def _latent_reader(workspace: Workspace) -> None:
    latents = np.load(workspace.home / LATENTS)
    labels = _pool(workspace, "training").labels("expression", CLASSES)
    path = workspace.home / LATENT_READER
    save_latent_reader(train_latent_reader(latents, labels, **_training(workspace, "latent_reader")), path)
    others = _pool(workspace, "validation")
    encoded = encode_pictures(load_autoencoder(workspace.files / AUTOENCODER), others)
    right = accuracy(load_latent_reader(path), encoded, others.labels("expression", CLASSES))
    workspace.score("latent_reader", {"expression": right})


def _base(workspace: Workspace) -> None:
    latents = np.load(workspace.home / LATENTS)
    text = load_caption_reader(workspace.home / TEXT).text
    reader = load_latent_reader(workspace.home / LATENT_READER)
    base = train_base(_pool(workspace, "training"), latents, text, reader, **_training(workspace, "base"))
    save_base(base, workspace.files / BASE)


def _photos(workspace: Workspace) -> None:
    write_photos(open_pictures(workspace.pictures, "training"), workspace.home / PHOTOS)


def _index(workspace: Workspace) -> None:
    network = load_iresnet(workspace.files / PACKAGE / RECOGNIZER_FILE, any_layers=True)
    save_iresnet(network, workspace.home / RECOGNIZER, torch.float32)  # rounded, it would be another network
    scan_photos(workspace)


def _base_folder(workspace: Workspace) -> None:
    write_base_folder(
        load_base(workspace.files / BASE), workspace.files / AUTOENCODER, workspace.home / BASE_FOLDER
    )


def _uniid_start(workspace: Workspace) -> None:
    recognizer = load_iresnet(workspace.home / RECOGNIZER)
    adapter = train_start(
        _pool(workspace, "training"),
        load_base(workspace.files / BASE),
        recognizer,
        digest(recognizer),
        **_training(workspace, "uniid_start"),
    )
    save_adapter(adapter, workspace.home / UNIID_START)


def _uniid(workspace: Workspace) -> None:
    start = f"adapter.start={workspace.home / UNIID_START}"
    first = train_adapter(workspace, "uniid_adapter", [start])
    adapter = train_further(workspace, "uniid_identity", first)
    export_adapter(workspace, "uniid", adapter, train_adapter(workspace, "uniid_text"))


def _idadapter(workspace: Workspace) -> None:
    first = train_adapter(workspace, "idadapter")
    export_adapter(workspace, "idadapter", train_further(workspace, "idadapter_identity", first))


def _ablation(workspace: Workspace, name: str) -> None:
    ablation, run = ABLATIONS[name], f"idadapter_{name}"
    first = train_adapter(workspace, "idadapter", ablation.both, f"{run}_first" if ablation.both else "")
    settings = (*ablation.both, *ablation.second)
    export_adapter(workspace, run, train_further(workspace, "idadapter_identity", first, settings, run))


def _faceid(workspace: Workspace) -> None:
    first = train_adapter(workspace, "faceid")
    export_adapter(workspace, "faceid", train_further(workspace, "faceid_identity", first))


STAGES: Mapping[str, Stage] = {
    stage.name: replace(stage, measure=MEASURES.get(stage.name))
    for stage in (
        Stage(
            "pictures", "draw the pictures for training and tests", (), _pictures,
            keeps=tuple(f"pictures/{name}" for name in FULL.groups if name != SECOND),
        ),
        Stage(
            "second_pictures", "draw the people of the second recogniser's training", (), _second_pictures,
            keeps=(f"pictures/{SECOND}",),
        ),
        Stage(
            "detector", "train the face detector", ("pictures",), _detector, (f"{PACKAGE}/{DETECTOR_FILE}",),
            {"found": 0.98, "alone": 0.95, "landmarks": 0.88},
        ),
        Stage(
            "sex_and_age", "train the network that estimates sex and age", ("pictures",), _sex_and_age,
            (f"{PACKAGE}/{SEX_AND_AGE_FILE}",), {"sex": 0.95},
        ),
        Stage(
            "readers", "train the classifier of factors", ("pictures",), _readers, (READER,),
            {"expression": 0.85, "direction": 0.97, "background": 0.97, "style": 0.97, "sex": 0.95, "accessory": 0.93},
        ),
        Stage(
            "recognizer", "train the face package's recogniser", ("pictures", "detector"), _recognizer,
            (f"{PACKAGE}/{RECOGNIZER_FILE}",),
            {"photo_auc": 0.98, "photo_rank_one": 0.9, "found_auc": 0.98, "found_rank_one": 0.9},
        ),
        Stage(
            "second_recognizer", "train the second recogniser, which evaluates, on other people",
            ("pictures", "second_pictures"), _second_recognizer,
            (JUDGE,), {"photo_auc": 0.98, "photo_rank_one": 0.9},
        ),
        Stage(
            "autoencoder", "train the autoencoder", ("pictures", "readers", "recognizer"), _autoencoder,
        ),
        Stage(
            "decoder", "train the autoencoder's decoder further", ("autoencoder",), _decoder, (AUTOENCODER,), {"kept": 0.97},
        ),
        Stage(
            "vision", "train the CLIP vision model for IDAdapter", ("pictures",), _vision,
            (f"{CLIP_VISION}/{WEIGHTS}", f"{CLIP_VISION}/{CONFIG_FILE}"), {"photo_auc": 0.8},
        ),
        Stage("latents", "encode the pictures", ("pictures", "autoencoder"), _latents, keeps=("latents",)),
        Stage("text", "train the text encoder to name what captions say", (), _text),
        Stage("latent_reader", "train a network that reads expressions in latents", ("latents",), _latent_reader),
        Stage(
            "base", "train the base model", ("latents", "latent_reader", "readers", "text"), _base, (BASE,),
            {"style": 0.95, "background": 0.95, "sex": 0.95, "accessory": 0.90, "expression": 0.75, "direction": 0.95},
        ),
        Stage("photos", "write the photos as a folder", ("pictures",), _photos, keeps=(PHOTOS,)),
        Stage("index", "scan the photos", ("photos", "detector", "sex_and_age", "recognizer"), _index),
        Stage("base_folder", "write the base model as a diffusers folder", ("base", "decoder"), _base_folder, keeps=(BASE_FOLDER,)),
        Stage(
            "uniid_start", "train the tokens of UniID's adapter branch to tell people apart", ("index", "base"), _uniid_start,
        ),
        Stage(
            "uniid", "train UniID's two branches", ("index", "base_folder", "uniid_start"), _uniid, (adapter_file("uniid"),),
            keeps=("runs/uniid_adapter", "runs/uniid_identity", "runs/uniid_text"),
        ),
        Stage(
            "idadapter", "train IDAdapter", ("index", "base_folder", "vision"), _idadapter, (adapter_file("idadapter"),),
            keeps=("runs/idadapter", "runs/idadapter_identity"),
        ),
        Stage(
            "faceid", "train an IP-Adapter FaceID", ("index", "base_folder"), _faceid, (adapter_file("faceid"),),
            keeps=("runs/faceid", "runs/faceid_identity"),
        ),
        *(
            Stage(
                f"idadapter_{name}", f"train IDAdapter with {', '.join((*ablation.both, *ablation.second))}, for measurements",
                ("index", "base_folder", "vision"), partial(_ablation, name=name),
                keeps=(f"runs/idadapter_{name}_first", f"runs/idadapter_{name}"),
            )
            for name, ablation in ABLATIONS.items()
        ),
    )
}  # fmt: skip
