"""Plain data types shared by the parts of the package.

Frozen dataclasses that hold tensors compare by object identity (`eq=False`), because a tensor has no single truth value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from .errors import InputError, MismatchError

MODES = ("auto", "learned", "concatenate", "mean")
OUTLIERS = ("reject", "keep")


@dataclass(frozen=True)
class Remark:
    """One sentence of a report to the user."""

    text: str
    is_warning: bool = False
    is_detail: bool = False  # too much for a node, for the report alone


@dataclass(frozen=True)
class Face:
    """One detected face. Pixel coordinates refer to the photo as given, x to the right and y down."""

    box: tuple[float, float, float, float]  # x1, y1, x2, y2
    landmarks: tuple[
        tuple[float, float], ...
    ]  # left eye, right eye, nose, left and right mouth corner (as seen in the image)
    score: float  # detector confidence, 0..1
    image_index: int = 0  # index of the photo in the batch
    image_size: tuple[int, int] = (0, 0)  # width, height of that photo
    detection_size: int = 0  # side of the detector input in which it was found
    sex: str | None = None  # "M", "F", or None if unknown
    age: int | None = None  # years

    @property
    def width(self) -> float:
        return self.box[2] - self.box[0]

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]

    @property
    def area(self) -> float:
        return max(self.width, 0.0) * max(self.height, 0.0)

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def eye_distance(self) -> float:
        (x1, y1), (x2, y2) = self.landmarks[:2]
        return math.hypot(x2 - x1, y2 - y1)


class ViewKey(NamedTuple):
    """Origin of a part of the features: a network, and the view of the face that it read."""

    network: str  # digest of its weights; empty if unknown
    view: str  # a name in `faces.views.VIEWS`, or one of the two below


ALIGNED, HEAD = "aligned", "head"  # standard views of the recogniser and of CLIP vision


@dataclass(frozen=True, eq=False)
class FaceFeatures:
    """Features of F faces of one person, independent of any adapter.

    `embedding` and `stages` are from the view `ALIGNED`, `patch_tokens` and `class_embedding` from the view `HEAD`.
    """

    embedding: Tensor  # (F, 512) recogniser output, not normalised
    stages: tuple[Tensor, ...] = ()  # four maps (F, C, H, W) of the torch iResNet, or empty
    patch_tokens: Tensor | None = None  # (F, P, d) CLIP vision, no class token
    class_embedding: Tensor | None = None  # (F, d) CLIP vision
    faces: tuple[Face, ...] = ()
    recognizer: str = ""  # digest of the network behind embedding and stages
    crops: Tensor | None = None  # (F, 3, 112, 112) RGB in [-1, 1]
    vision: str = ""  # digest of the CLIP vision model
    views: Mapping[ViewKey, Tensor] = field(default_factory=dict)
    """Hidden states (F or 1, L, d) of CLIP vision, class token first, for the other views that methods read."""

    def __post_init__(self) -> None:
        if self.embedding.ndim != 2:
            raise InputError(
                f"FaceFeatures.embedding must be (faces, width), got {tuple(self.embedding.shape)}"
            )
        count = self.embedding.shape[0]
        tensors = [*self.stages, self.patch_tokens, self.class_embedding, self.crops]
        tensors += [states for states in self.views.values() if states.shape[0] != 1]
        if any(t is not None and t.shape[0] != count for t in tensors) or (
            self.faces and len(self.faces) != count
        ):
            raise InputError(f"every part of FaceFeatures must describe the same {count} faces")

    def __len__(self) -> int:
        return int(self.embedding.shape[0])

    @property
    def keys(self) -> tuple[ViewKey, ...]:
        """The network and view of each part."""
        found = [ViewKey(self.recognizer, ALIGNED)]
        found += [ViewKey(self.vision, HEAD)] if self.patch_tokens is not None else []
        return (*found, *self.views)

    def states(self, view: str) -> Tensor:
        """Return CLIP vision's hidden states (F or 1, L, d) for a view.

        Raises:
            MismatchError: there are none.
        """
        found = [states for key, states in self.views.items() if key.view == view]
        if not found:
            raise MismatchError(
                f"these face features hold nothing of the view {view!r}, which the adapter reads. Wire Load CLIP Vision, with the model the "
                "adapter was trained with, to `clip_vision` of Extract Face Features."
            )
        return found[0]

    @property
    def class_word(self) -> str:
        """ "man" or "woman" by majority of the faces whose sex is known, else ""."""
        votes = [face.sex for face in self.faces if face.sex in ("M", "F")]
        men, women = votes.count("M"), votes.count("F")
        return "" if men == women else "man" if men > women else "woman"

    def pick(self, indices: list[int]) -> FaceFeatures:
        """Return the features of the faces at these indices, in that order; an index may repeat."""
        return replace(
            self,
            embedding=self.embedding[indices],
            stages=tuple(stage[indices] for stage in self.stages),
            patch_tokens=None if self.patch_tokens is None else self.patch_tokens[indices],
            class_embedding=None if self.class_embedding is None else self.class_embedding[indices],
            crops=None if self.crops is None else self.crops[indices],
            faces=tuple(self.faces[i] for i in indices) if self.faces else (),
            views={key: t if t.shape[0] == 1 else t[indices] for key, t in self.views.items()},
        )


@dataclass(frozen=True)
class Mix:
    """Settings for combining the faces of one person into one identity."""

    mode: str = "auto"
    references: int = 0  # 0: as many as the method uses
    weights: tuple[float, ...] = ()  # one number >= 0 per face; empty: equal weights
    outliers: str = "keep"  # "reject": without weights, drop faces that disagree with the others

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.outliers not in OUTLIERS:
            raise InputError(f"outliers must be one of {', '.join(OUTLIERS)}, got {self.outliers!r}")
        if self.references < 0:
            raise InputError(
                f"references must be 0 (the adapter's own number) or more, got {self.references}"
            )
        if any(not weight >= 0 or weight == float("inf") for weight in self.weights):
            raise InputError(f"weights must be finite numbers of at least 0, got {self.weights}")
        if self.weights and not any(self.weights):
            raise InputError("all weights are 0, so no face is left; give at least one face a weight above 0")


@dataclass(frozen=True, eq=False)
class Identity:
    """The output of one adapter's encoder for the features of one person."""

    adapter_tokens: Tensor | None  # (1, T, D); None where the adapter has no adapter branch
    adapter_tokens_uncond: Tensor | None  # (1, T, D); None: the adapter is skipped on negative rows
    text_tokens: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # per text encoder: "l" (1, n, 768), "g" (1, n, 1280)
    method: str = ""
    adapter: str = ""  # digest of the adapter's weights
    recognizer: str = ""  # digest of the recogniser behind the features
    class_word: str = ""  # "man", "woman", or "" if unknown
    adapter_bias: Tensor | None = None
    """(1, T): log of how often each of the adapter_tokens counts in the attention; None: each counts once."""
    embedding: Tensor | None = None
    """(1, 512): mean direction of the photos' embeddings, of length 1, to compare pictures with the person; None in older files."""
    thumbnail: Tensor | None = None
    """(112, 112, 3) uint8, RGB: the face that counts most, as the recogniser sees it; None: not kept."""
