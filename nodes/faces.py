"""Nodes that turn photos into face features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..idadapter_core.faces.detector import POLICIES, PROVIDERS
from ..idadapter_core.faces.enrich import MAX_COLOUR, MAX_ROTATION, enrich
from ..idadapter_core.faces.features import ON_MISSING
from ..idadapter_core.faces.packages import find_packages, package_files
from .host import images, paths
from .host.analyzer import LoadedAnalyzer, Selection, faces_in, open_files, with_heads
from .host.choices import AUTO, FROM_PACKAGE
from .host.messages import from_remarks, info, keeps_report, report_ui
from .sockets import CATEGORY, FaceAnalyzerSocket, FaceFeaturesSocket, auto_options

MORE_PHOTOS = "more_photos"
PHOTO_NAMES = [f"photo_{number}" for number in range(1, 17)]
NO_PACKAGE = "(no package yet: put buffalo_l into models/insightface/models)"


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
        return io.NodeOutput(open_files(AUTO if package == NO_PACKAGE else package, recognizer, provider))

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
            template=io.Autogrow.TemplateNames(
                io.Image.Input("photo", tooltip="Another photo of the same person, of any shape."),
                names=PHOTO_NAMES[1:],
                min=0,
            ),
            optional=True,
            tooltip="More photos of the same person, of any shapes, each with a socket of its own.",
        ),
    ]


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
        more = {
            f"{MORE_PHOTOS}.{name}": photo for name, photo in (more_photos or {}).items() if photo is not None
        }
        pictures, extraction = faces_in(
            {"image": image, **more}, analyzer, Selection(select, index, on_missing), cls.hidden
        )
        features = extraction.features
        if clip_vision is not None:
            features = with_heads(features, pictures, clip_vision)
        preview, boxes = images.previews(pictures, extraction.found, extraction.chosen)
        assert features.crops is not None  # extract_features always cuts them
        return io.NodeOutput(
            features,
            images.crops_to_image(features.crops),
            boxes,
            preview,
            extraction.report,
            ui={
                **images.picture_ui(cls, images.found_pictures(pictures, extraction)),
                **report_ui(from_remarks(extraction.remarks)),
            },
        )


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
