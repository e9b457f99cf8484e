"""Nodes that turn photos into face features."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..idadapter_core.errors import FaceError
from ..idadapter_core.faces.align import align_face, square_crop
from ..idadapter_core.faces.detector import POLICIES, PROVIDERS, FaceAnalyzer, open_analyzer
from ..idadapter_core.faces.enrich import MAX_COLOUR, MAX_ROTATION, enrich
from ..idadapter_core.faces.features import ON_MISSING, Extraction, crops_to_tensor, extract_features
from ..idadapter_core.faces.images import Image, check_image
from ..idadapter_core.faces.iresnet import digest, load_iresnet
from ..idadapter_core.faces.packages import find_packages, package_files, resolve_package
from ..idadapter_core.faces.preview import small_preview, worth_showing
from ..idadapter_core.methods import views_read
from ..idadapter_core.types import Face, FaceFeatures
from .host import choices, images, paths
from .host.choices import AUTO, FROM_PACKAGE
from .host.memory import Live, Recent, manage, require_same_file
from .host.messages import from_remarks, info, keeps_report, report_ui
from .host.origins import photo_origins
from .host.vision import digest_of, encode_heads, encode_views
from .sockets import CATEGORY, FaceAnalyzerSocket, FaceFeaturesSocket, auto_options

MORE_PHOTOS, MOST_MORE = "more_photos", 15
NO_PACKAGE = "(no package yet: put buffalo_l into models/insightface/models)"


_recent: Recent[Extraction] = Recent()


@dataclass(frozen=True, eq=False)
class LoadedAnalyzer:
    """Value of the FACE_ANALYZER socket: the detector, and the torch recogniser under ComfyUI's management."""

    analyzer: FaceAnalyzer
    recognizer: Any = None  # ModelPatcher of an IResNet, or None for the recogniser of the package
    recognizer_digest: str = ""

    @property
    def digest(self) -> str:
        """Id of the recogniser in features."""
        return self.recognizer_digest or self.analyzer.recognizer_digest

    def get_models(self) -> list[Any]:
        """Return the patcher, for ComfyUI's memory accounting of cached node outputs."""
        return [] if self.recognizer is None else [self.recognizer]

    def recognize(self, crops: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Compute embedding and stages of crops (F, 3, 112, 112) on ComfyUI's compute device."""
        comfy.model_management.load_models_gpu([self.recognizer])
        result: tuple[Tensor, list[Tensor]] = self.recognizer.model(crops.to(self.recognizer.load_device))
        return result

    def features_in(self, picture: Tensor) -> FaceFeatures | None:
        """Describe all faces in a picture (H, W, 3), RGB in 0..1; None if there is none that can be used."""
        pixels = check_image(picture)
        faces: list[Face] = []
        crops: list[Image] = []
        check = comfy.model_management.throw_exception_if_processing_interrupted
        for face in self.analyzer.detect(pixels, check=check):
            with contextlib.suppress(FaceError):  # one at the edge that cannot be cut out
                crops.append(align_face(pixels, face.landmarks))
                faces.append(face)
        if not faces:
            return None
        cut = crops_to_tensor(crops)
        return FaceFeatures(self.embed(cut), faces=tuple(faces), recognizer=self.digest, crops=cut)

    def embed(self, crops: Tensor) -> Tensor:
        """Compute the embeddings (F, 512) of crops (F, 3, 112, 112), RGB in [-1, 1]."""
        if self.recognizer is not None:
            return self.recognize(crops)[0].float().cpu()
        levels = ((crops + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).cpu().numpy()
        return torch.stack([torch.from_numpy(self.analyzer.embed(crop)) for crop in levels])


def load_recognizer(
    path: Path, progress: Callable[[], object] = lambda: None, *, any_layers: bool = False
) -> tuple[Any, str]:
    """Load a torch face network. Return its ModelPatcher and digest; `progress` is called after each of the two.

    `any_layers`: accept networks of other sizes than the published ones.
    """
    network = load_iresnet(path, any_layers=any_layers)
    progress()
    name = digest(network)
    progress()
    return manage(network, _reload_recognizer, path, name, any_layers), name


def _reload_recognizer(path: Path, expected: str, any_layers: bool) -> Any:
    patcher, found = load_recognizer(path, any_layers=any_layers)
    require_same_file(path, expected, found)
    return patcher


_live: Live[LoadedAnalyzer] = Live()


def _open(package: Path, recognizer: Path | None, provider: str) -> LoadedAnalyzer:
    if recognizer is None:
        return LoadedAnalyzer(open_analyzer(package, provider, recognition=True))
    progress = comfy.utils.ProgressBar(3)
    patcher, recognizer_digest = load_recognizer(recognizer, lambda: progress.update(1))
    analyzer = open_analyzer(package, provider)
    progress.update(1)
    return LoadedAnalyzer(analyzer, patcher, recognizer_digest)


class LoadFaceAnalyzer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        packages = sorted(find_packages(paths.insightface_roots())) or [NO_PACKAGE]
        return io.Schema(
            node_id="IDAdapterLoadFaceAnalyzer",
            display_name="Load Face Analyzer",
            category=CATEGORY,
            description=(
                "Opens a face detector (insightface) and, for UniID, the face recognition network. "
                "The models of insightface are for non-commercial research only."
            ),
            search_aliases=["insightface", "face analysis", "buffalo_l", "antelopev2", "arcface"],
            inputs=[
                io.Combo.Input(
                    "package",
                    options=auto_options(packages),
                    tooltip="A folder of insightface models: buffalo_l or antelopev2, in models/insightface/models; auto takes the only one, "
                    "or buffalo_l. Nothing is downloaded. For non-commercial research only.",
                ),
                io.Combo.Input(
                    "recognizer",
                    options=[FROM_PACKAGE, *paths.files(paths.RECOGNIZERS)],
                    default=FROM_PACKAGE,
                    tooltip="The network that turns a face into numbers. UniID needs its iResNet-100 as a file of "
                    "models/idadapter/recognizers (.pth, .safetensors or .onnx); the package's own gives no stage maps.",
                ),
                io.Combo.Input(
                    "provider",
                    options=["auto", *PROVIDERS],
                    default="auto",
                    tooltip="Where the insightface models run. auto takes CUDA where torch and onnxruntime both have it, "
                    "else the CPU, which is fast enough for a few photos. The log says which was used.",
                ),
            ],
            outputs=[FaceAnalyzerSocket.Output(tooltip="For Extract Face Features.")],
        )

    @classmethod
    def execute(cls, package: str, recognizer: str, provider: str) -> io.NodeOutput:
        wanted = choices.package(AUTO if package == NO_PACKAGE else package)
        folder = resolve_package(wanted, paths.insightface_roots())
        file = None if recognizer == FROM_PACKAGE else paths.path_of(paths.RECOGNIZERS, recognizer)
        stamp = f"{provider} {paths.stamp(*package_files(folder), *(() if file is None else (file,)))}"
        return io.NodeOutput(_live.get(stamp, lambda: _open(folder, file, provider)))

    @classmethod
    def fingerprint_inputs(cls, package: str | None, recognizer: str | None, **_: Any) -> str:
        packages = find_packages(paths.insightface_roots())
        folders = [folder for name, folder in packages.items() if package in (name, None, AUTO)]
        models = paths.stamp(*(path for folder in folders for path in package_files(folder)))
        return f"{models} {paths.stamp_of(paths.RECOGNIZERS, recognizer)}"


def _extract_inputs() -> list[io.Input]:
    """Inputs of Extract Face Features."""
    return [
        io.Image.Input(
            "image",
            tooltip="One photo, or a batch of photos of one person. Photos of other shapes go to `more_photos`, because Batch Images "
            "crops every photo to the shape of the first.",
        ),
        FaceAnalyzerSocket.Input("analyzer", tooltip="From Load Face Analyzer."),
        io.ClipVision.Input(
            "clip_vision",
            optional=True,
            tooltip="Only for adapters that also read CLIP vision features (the IDAdapter method). UniID does not: "
            "leave it empty and save the time.",
        ),
        io.Combo.Input(
            "select",
            options=list(POLICIES),
            default="largest",
            tooltip="Which face counts where a photo shows several; the order in which `index` counts. "
            "all takes every face of every photo, less those that lie mostly outside it.",
        ),
        io.Int.Input(
            "index",
            default=0,
            min=0,
            max=99,
            tooltip="0 is the first face in the order of `select`, 1 the second … The preview shows the numbers.",
        ),
        io.Combo.Input(
            "on_missing",
            options=list(ON_MISSING),
            default="error",
            tooltip="A photo without that face: stop with an error, or leave the photo out and say so in the report.",
        ),
        io.Autogrow.Input(
            MORE_PHOTOS,
            template=io.Autogrow.TemplatePrefix(
                io.Image.Input("photo", tooltip="Another photo of the same person, of any shape."),
                prefix="photo",
                min=0,
                max=MOST_MORE,
            ),
            optional=True,
            tooltip="More photos of the same person, of any shapes, each with a socket of its own.",
        ),
    ]


def _extract(
    node: type[io.ComfyNode],
    pictures: Sequence[Tensor],
    analyzer: LoadedAnalyzer,
    settings: tuple[str, int, str, tuple[str, ...]],
    clip_vision: Any,
) -> Extraction:
    """Find and describe the faces; see the inputs of Extract Face Features. `settings` ends with the names of the sockets of more photos."""
    select, index, on_missing, more = settings
    progress = comfy.utils.ProgressBar(len(pictures))
    sockets = ("image", *(f"{MORE_PHOTOS}.{name}" for name in more))
    extraction = extract_features(
        pictures,
        analyzer.analyzer,
        None if analyzer.recognizer is None else analyzer.recognize,
        select=select,
        index=index,
        on_missing=on_missing,
        recognizer_digest=analyzer.recognizer_digest,
        origins=photo_origins(node.hidden, sockets, len(pictures)),
        progress=lambda: progress.update(1),
        check=comfy.model_management.throw_exception_if_processing_interrupted,
    )
    if clip_vision is None:
        return extraction
    features = extraction.features
    photos = [(check_image(pictures[face.image_index]), face) for face in features.faces]
    patch_tokens, class_embedding = encode_heads(clip_vision, (square_crop(*pair) for pair in photos))
    features = replace(
        features,
        patch_tokens=patch_tokens,
        class_embedding=class_embedding,
        vision=digest_of(clip_vision),
        views=encode_views(clip_vision, views_read(), photos),
    )
    return replace(extraction, features=features)


class ExtractFaces(io.ComfyNode):
    @classmethod
    @keeps_report
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterExtractFaces",
            display_name="Extract Face Features",
            category=CATEGORY,
            description=(
                "Finds the face in each photo of a batch and describes it in numbers. All photos should show the same "
                "person. Runs only when the photos or these settings change, never for a changed weight."
            ),
            search_aliases=["face embedding", "face crop", "id embedding", "insightface"],
            inputs=_extract_inputs(),
            outputs=[
                FaceFeaturesSocket.Output("faces", display_name="faces", tooltip="For Mix Face Features."),
                io.Image.Output(
                    "crops", display_name="crops", tooltip="The faces as the recogniser sees them, 112 x 112."
                ),
                io.Mask.Output(
                    "boxes",
                    display_name="boxes",
                    tooltip="One mask per photo: 1 inside the chosen faces' boxes. As large as the photo; smaller for more than "
                    "16 photos, as the preview.",
                ),
                io.Image.Output(
                    "preview",
                    display_name="preview",
                    tooltip="The photos with numbered boxes; the chosen faces in green. Of more than 16 photos it is made smaller: "
                    "16 megapixels for all, but at least a quarter of each side. Photos of several shapes lie on canvases of one.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="What was found where, and what to watch out for.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.dynprompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        analyzer: LoadedAnalyzer,
        select: str,
        index: int,
        on_missing: str,
        clip_vision: Any = None,
        more_photos: Mapping[str, Tensor] | None = None,
    ) -> io.NodeOutput:
        more = {name: photo for name, photo in (more_photos or {}).items() if photo is not None}
        pictures = images.photos(image, *more.values())
        others = [*more.values(), *([] if clip_vision is None else [clip_vision])]
        settings = (select, index, on_missing, tuple(more))
        extraction = _recent.get(
            image,
            others,
            settings,
            lambda: _extract(cls, pictures, analyzer, settings, clip_vision),
            analyzer,
        )
        features = extraction.features
        preview, boxes = images.previews(pictures, extraction.found, extraction.chosen)
        assert features.crops is not None  # extract_features always cuts them
        return io.NodeOutput(
            features,
            images.crops_to_image(features.crops),
            boxes,
            preview,
            extraction.report,
            ui={
                **images.picture_ui(cls, _node_pictures(pictures, extraction)),
                **report_ui(from_remarks(extraction.remarks)),
            },
        )


def _node_pictures(pictures: Sequence[Tensor], extraction: Extraction) -> list[Image]:
    """Return small photos with face boxes. If there are too many to show, skipped photos have priority."""
    left_out = {i for i, chosen in enumerate(extraction.chosen) if not chosen}
    shown = worth_showing(len(pictures), left_out)
    return [
        small_preview(check_image(pictures[i]), extraction.found[i], extraction.chosen[i], f"image {i + 1}")
        for i in shown
    ]


class EnrichPhotos(io.ComfyNode):
    @classmethod
    @keeps_report
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterEnrich",
            display_name="Enrich Photos",
            category=CATEGORY,
            description=(
                "Makes more photos of the few there are of a person: mirrored, turned a little, in slightly other colours. "
                "IDAdapter was trained on four photos of a person; without this node one photo is repeated, which is the "
                "default way and works."
            ),
            search_aliases=["augment references", "augmentation", "more photos", "flip rotate"],
            inputs=[
                io.Image.Input("image", tooltip="One photo, or a batch of photos of one person."),
                io.Int.Input(
                    "count",
                    default=4,
                    min=1,
                    max=16,
                    tooltip="Photos to reach, the given ones included. A batch of that size or larger passes unchanged.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Other variants for another seed. Keep it fixed: a new seed is a new identity, so faces are looked "
                    "for again.",
                ),
                io.Boolean.Input(
                    "flip",
                    default=True,
                    tooltip="Mirror every other variant by chance. Off where the two sides of a face differ, as with a scar or "
                    "a parting.",
                ),
                io.Float.Input(
                    "rotation",
                    default=10.0,
                    min=0.0,
                    max=MAX_ROTATION,
                    step=1.0,
                    tooltip="Turn variants by up to this many degrees, either way.",
                ),
                io.Float.Input(
                    "colour",
                    default=0.15,
                    min=0.0,
                    max=MAX_COLOUR,
                    step=0.05,
                    tooltip="Change brightness, contrast and saturation of variants by up to this share: 0.15 is 15 %.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image",
                    display_name="image",
                    tooltip="The photos as they were, then the variants. For Extract Face Features.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, image: Tensor, count: int, seed: int, flip: bool, rotation: float, colour: float
    ) -> io.NodeOutput:
        pictures = images.photos(image)
        if len(pictures) >= count:
            passed = info(f"{len(pictures)} photos were given and {count} wanted, so they pass unchanged.")
            return io.NodeOutput(image, ui=report_ui([passed]))
        enriched = enrich(pictures, count, seed, flip=flip, rotation=rotation, colour=colour)
        made = info(f"{len(pictures)} given, {count - len(pictures)} made of them: {count} photos.")
        return io.NodeOutput(images.to_image(enriched, len(enriched)), ui=report_ui([made]))
