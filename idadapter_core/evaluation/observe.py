"""Observe an image with the evaluation models: faces, their identity, the expression, CLIP's embedding.

Each image is observed once; all comparisons with other images and prompts are arithmetic on the observations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage

from ..errors import CheckpointError, ConfigError, FaceError
from ..extra import require
from ..faces.align import align_face, square_crop
from ..faces.detector import FaceAnalyzer, open_analyzer, order_faces
from ..faces.features import crops_to_tensor
from ..faces.images import Image
from ..faces.iresnet import digest, load_iresnet
from ..faces.packages import DETECTION
from ..files import file_digest, state_digest
from ..stable_diffusion.pretrained import first_line, from_library, load_folder
from ..types import Face
from .config import EvaluationConfig, ExpressionConfig
from .prompts import expression_name
from .storage import key_of

VERSION = 2  # of the observations; increase it to observe all images again
HEAD = 1.2  # side of the crop for the expression, relative to the face's box
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Vector = NDArray[np.float32]
Embed = Callable[[Image], Vector]


@dataclass(frozen=True, eq=False)
class Observation:
    """The observation of one image. Of several faces, the largest counts."""

    width: int
    height: int
    faces: int  # number of faces
    box: tuple[float, ...] | None = None  # x1, y1, x2, y2
    landmarks: tuple[tuple[float, float], ...] | None = None
    embedding: Vector | None = None  # (512,), unit length; None if no face could be recognised
    second: Vector | None = None  # likewise, from the second recogniser
    clip: Vector | None = None  # CLIP's embedding of the image, unit length
    expression: str | None = None

    @property
    def has_face(self) -> bool:
        """Whether a face was found and recognised."""
        return self.embedding is not None

    @property
    def face_fraction(self) -> float | None:
        """Share of the image covered by the face's box."""
        if self.box is None:
            return None
        x1, y1, x2, y2 = self.box
        width = min(x2, self.width) - max(x1, 0)
        height = min(y2, self.height) - max(y1, 0)
        return max(width, 0) * max(height, 0) / (self.width * self.height)

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Arrays for a file, without missing values."""
        found: dict[str, Any] = {"size": np.array([self.width, self.height, self.faces])}
        for name in ("box", "landmarks", "embedding", "second", "clip", "expression"):
            if (value := getattr(self, name)) is not None:
                found[name] = np.asarray(value)
        return found

    @staticmethod
    def of(arrays: Mapping[str, np.ndarray[Any, Any]]) -> Observation:
        """Inverse of `arrays`."""
        width, height, faces = (int(value) for value in arrays["size"])
        box = arrays.get("box")
        points = arrays.get("landmarks")
        expression = arrays.get("expression")
        return Observation(
            width,
            height,
            faces,
            box=None if box is None else tuple(float(value) for value in box),
            landmarks=None if points is None else tuple((float(x), float(y)) for x, y in points),
            embedding=arrays.get("embedding"),
            second=arrays.get("second"),
            clip=arrays.get("clip"),
            expression=None if expression is None else str(expression),
        )


class Observer:
    """The loaded evaluation models."""

    def __init__(self, config: EvaluationConfig, provider: str = "auto") -> None:
        """
        Raises:
            FacePackageError, RecognizerError, ConfigError: a model is missing or unusable.
        """
        metrics = config.metrics
        self.analyzer = open_analyzer(Path(metrics.faces), provider, recognition=True)
        self.recognizers = {"first": self.analyzer.recognizer_digest}
        self._second: Embed | None = None
        if metrics.second:
            self._second, self.recognizers["second"] = _open_recognizer(Path(metrics.second), provider)
            if self.recognizers["second"] == self.recognizers["first"]:
                raise ConfigError(
                    f"metrics.second is the same recogniser as that of metrics.faces ({metrics.faces}); name another one, or none"
                )
        self.clip = ClipJudge(Path(metrics.clip)) if metrics.clip else None
        self.expressions = Expressions(config.expression) if config.expression.path else None
        self.digests: dict[str, str] = {
            "detector": file_digest(self.analyzer.package.models[DETECTION]),
            **self.recognizers,
            "clip": self.clip.digest if self.clip else "",
            "expression": self.expressions.digest if self.expressions else "",
        }
        self.key = key_of({"version": VERSION, **self.digests})

    def observe(self, image: Image) -> Observation:
        """Observe an image (H, W, 3), RGB uint8."""
        height, width = image.shape[:2]
        faces = order_faces(self.analyzer.detect(image), "largest")
        seen: dict[str, Any] = {} if self.clip is None else {"clip": self.clip.of_picture(image)}
        if faces:
            seen |= {"box": faces[0].box, "landmarks": faces[0].landmarks, **self._of_face(image, faces[0])}
        return Observation(width, height, len(faces), **seen)

    def _of_face(self, image: Image, face: Face) -> dict[str, Any]:
        try:
            crop = align_face(image, face.landmarks)
        except FaceError:
            return {}  # too much of it lies outside the image
        return {
            "embedding": _unit(self.analyzer.embed(crop)),
            "second": None if self._second is None else _unit(self._second(crop)),
            "expression": None if self.expressions is None else self.expressions.of_face(image, face),
        }


def _unit(vector: Vector) -> Vector:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), np.float32)


def _open_recognizer(path: Path, provider: str) -> tuple[Embed, str]:
    """A function from an aligned crop (112, 112, 3) to its embedding (512,), and the recogniser's digest."""
    if path.is_dir():
        analyzer: FaceAnalyzer = open_analyzer(path, provider, recognition=True)
        return analyzer.embed, analyzer.recognizer_digest
    device = _device()
    net = load_iresnet(path, any_layers=True).to(device)

    @torch.no_grad()
    def embed(crop: Image) -> Vector:
        embedding, _ = net(crops_to_tensor([crop]).to(device))
        return np.asarray(embedding[0].float().cpu())

    return embed, digest(net)


class ClipJudge:
    """A CLIP model to score how well images and texts match."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"metrics.clip: {folder} is no folder of a transformers CLIPModel (it has no config.json); "
                "download one with its tokenizer, for example clip-vit-large-patch14"
            )
        try:
            model: Any = load_folder(from_library("transformers", "CLIPModel"), folder)
        except CheckpointError as error:  # a missing tower would score with random weights
            raise ConfigError(f"metrics.clip: {error}") from error
        try:
            tokenizers = from_library("transformers", "AutoTokenizer")
            self._tokenizer = tokenizers.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise ConfigError(
                f"metrics.clip: {folder} has no tokenizer that can be read ({first_line(error)}); complete the folder"
            ) from error
        self._model = model.eval().requires_grad_(False).to(_device())
        self._side: int = self._model.config.vision_config.image_size
        self._length: int = self._model.config.text_config.max_position_embeddings
        self.digest = state_digest(self._model.state_dict())

    @torch.no_grad()
    def of_picture(self, image: Image) -> Vector:
        """The embedding (d,), unit length, of an image (H, W, 3), RGB uint8, preprocessed as in CLIP: centre crop, bicubic."""
        height, width = image.shape[:2]
        scale = self._side / min(height, width)
        size = (max(round(width * scale), self._side), max(round(height * scale), self._side))
        resized = PILImage.fromarray(image).resize(size, PILImage.Resampling.BICUBIC)
        left, top = (size[0] - self._side) // 2, (size[1] - self._side) // 2
        square = np.asarray(resized.crop((left, top, left + self._side, top + self._side)), np.float32) / 255
        pixels = torch.from_numpy(((square - _CLIP_MEAN) / _CLIP_STD).astype(np.float32)).permute(2, 0, 1)
        pooled = self._model.vision_model(pixel_values=pixels[None].to(_device())).pooler_output
        return _unit(np.asarray(self._model.visual_projection(pooled)[0].float().cpu()))

    @torch.no_grad()
    def of_text(self, text: str) -> Vector:
        """The embedding (d,), unit length, of a text, truncated to the model's length."""
        tokens = self._tokenizer([text], truncation=True, max_length=self._length, return_tensors="pt")
        inputs = {name: tokens[name].to(_device()) for name in ("input_ids", "attention_mask")}
        pooled = self._model.text_model(**inputs).pooler_output
        return _unit(np.asarray(self._model.text_projection(pooled)[0].float().cpu()))


class Expressions:
    """A classifier of facial expressions in an ONNX file."""

    def __init__(self, config: ExpressionConfig) -> None:
        path = Path(config.path)
        if not path.is_file():
            raise ConfigError(f"expression.path: {path}: no such file; leave it empty to go without")
        onnxruntime = require("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors have no narrower base class
            raise ConfigError(
                f"expression.path: {path} cannot be opened as an ONNX model: {error}"
            ) from error
        self._config = config
        self._classes = [expression_name(name) for name in config.classes]
        source = self._session.get_inputs()[0]
        self._input: str = source.name
        self._channels = source.shape[1] if len(source.shape) == 4 else None
        if self._channels not in (1, 3):
            raise ConfigError(
                f"expression.path: {path} takes {source.shape}; it must take (1, 3, size, size), or (1, 1, size, size) for grey"
            )
        if len(config.mean) > self._channels or len(config.std) > self._channels:
            raise ConfigError(
                f"expression.mean and expression.std must be one number each: {path} takes grey"
            )
        facts = [config.size, list(config.classes), list(config.mean), list(config.std)]
        self.digest = key_of({"file": file_digest(path), "settings": facts})
        # To fail early if the model does not fit.
        self._scores(np.zeros((config.size, config.size, 3), np.uint8))

    def of_face(self, image: Image, face: Face) -> str:
        """The expression of a face in an image (H, W, 3), RGB uint8."""
        return self._classes[int(self._scores(square_crop(image, face, HEAD)).argmax())]

    def _scores(self, head: Image) -> NDArray[np.float32]:
        config = self._config
        picture = PILImage.fromarray(head).resize((config.size, config.size), PILImage.Resampling.BILINEAR)
        pixels = np.asarray(picture.convert("L" if self._channels == 1 else "RGB"), np.float32) / 255
        pixels = pixels.reshape(config.size, config.size, -1)
        values = (pixels - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
        try:
            (scores, *_) = self._session.run(
                None, {self._input: values.transpose(2, 0, 1)[None].astype(np.float32)}
            )
        except Exception as error:
            raise ConfigError(
                f"expression.path: {config.path} does not take a picture of expression.size {config.size}: {error}"
            ) from error
        scores = np.asarray(scores, np.float32).reshape(-1)
        # Some models append valence and arousal to the class scores.
        if len(scores) < len(self._classes):
            raise ConfigError(
                f"expression.classes names {len(self._classes)} classes, but {config.path} gives {len(scores)} scores"
            )
        return scores[: len(self._classes)]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
