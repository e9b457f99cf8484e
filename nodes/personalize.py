"""Face Identity: the whole way from photos and a text to a model and its prompts, in one node.

It expands to the other nodes of this pack, so it draws what they draw. ComfyUI may drop the results of its parts at any time, also while it
keeps those of ordinary nodes; what is dear to make is therefore found again as long as anything uses it (`memory.Live`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder
from torch import Tensor

from ..idadapter_core import Mix
from ..idadapter_core.faces.detector import POLICIES
from ..idadapter_core.faces.features import ON_MISSING
from ..idadapter_core.faces.packages import find_packages
from ..idadapter_core.mixing import left_out, mix_remarks, select_references
from ..idadapter_core.placeholders import CLASS_WORD
from ..idadapter_core.schedule import RescaleSchedule
from ..idadapter_core.strength import STRONGEST
from ..idadapter_core.types import OUTLIERS
from .adapter import RESCALE_MODES, SCOPES, load_files
from .faces import MORE_PHOTOS, PHOTO_NAMES
from .host import choices, images, paths
from .host.analyzer import LoadedAnalyzer, Selection, faces_in, open_files
from .host.choices import AUTO, FROM_PACKAGE, NONE
from .host.memory import LoadedAdapter
from .host.messages import Message, from_remarks, info, keeps_report, report_ui, warning
from .host.off import is_off
from .host.titles import FACE_IDENTITY, RESCALE
from .prompt import CLASS_WORDS, class_word_line, class_word_of, fill_class_word
from .sockets import CATEGORY, AdapterSocket, FaceAnalyzerSocket, IdentitySocket

PHOTOS = "photos"
Link = list[Any]  # [id of a node, number of its output], as in a queued prompt


def _photos() -> io.Input:
    return io.Autogrow.Input(
        PHOTOS,
        template=io.Autogrow.TemplateNames(
            io.Image.Input("photo", tooltip="A photo of the person, or a batch of photos."),
            names=PHOTO_NAMES,
            min=1,
        ),
        tooltip="Photos of one person, of any shapes: one is enough, two to four are better. Each has a socket of its own.",
    )


def _strength() -> io.Input:
    return io.Float.Input(
        "strength",
        default=1.0,
        min=0.0,
        max=STRONGEST,
        step=0.05,
        display_mode=io.NumberDisplay.slider,
        tooltip="Less: more of the prompt. More: more of the person. 1 is what the adapter is usually used with, 0 the model alone. The node "
        "says which numbers of the parts it means.",
    )


def _texts() -> list[io.Input]:
    return [
        io.String.Input(
            "text",
            default=f"photo of a {CLASS_WORD}",
            multiline=True,
            dynamic_prompts=True,
            tooltip=f"What the person does, wears, where they are; not the face. {CLASS_WORD} becomes man, woman or person.",
        ),
        io.String.Input(
            "negative",
            default="",
            multiline=True,
            dynamic_prompts=True,
            tooltip="What the picture should not have. It is encoded without the person.",
        ),
    ]


def _details() -> list[io.Input]:
    """The inputs that nobody needs at first, after the sockets: their values follow those of the others in saved workflows."""
    packages = sorted(find_packages(paths.insightface_roots()))

    def combo(name: str, options: list[str], default: str, tooltip: str) -> io.Combo.Input:
        return io.Combo.Input(name, options=options, default=default, advanced=True, tooltip=tooltip)

    return [
        combo(
            "adapter",
            [AUTO, *paths.files(paths.ADAPTERS)],
            AUTO,
            "A file of models/idadapter; auto: the only one. Unused if `loaded_adapter` is wired.",
        ),
        combo(
            "text_branch",
            [AUTO, NONE, *paths.files(paths.ADAPTERS)],
            AUTO,
            "UniID's second file; auto: the one in the folder text_branch beside adapter_branch.",
        ),
        combo(
            "package",
            [AUTO, *packages],
            AUTO,
            "The face package; auto: the only one, or buffalo_l. Unused if `loaded_analyzer` is wired.",
        ),
        combo(
            "recognizer",
            [AUTO, FROM_PACKAGE, *paths.files(paths.RECOGNIZERS)],
            AUTO,
            "The face network; auto: the one that the adapter was trained with. Unused if `loaded_analyzer` is wired.",
        ),
        combo(
            "vision",
            [AUTO, *choices.clip_vision_files()],
            AUTO,
            "A CLIP vision model, for adapters that read one; auto: one of the right size. Unused if `clip_vision` is wired.",
        ),
        combo("select", list(POLICIES), "largest", "Which face counts where a photo shows several."),
        io.Int.Input(
            "index", default=0, min=0, max=99, advanced=True, tooltip="0 is the first face in that order."
        ),
        combo(
            "on_missing", list(ON_MISSING), "error", "A photo without that face: an error, or leave it out."
        ),
        combo("outliers", list(OUTLIERS), "reject", "reject: a photo of somebody else is left out."),
        combo("class_word", list(CLASS_WORDS), AUTO, f"What stands for {CLASS_WORD} in the text."),
    ]


def _sockets() -> list[io.Input]:
    return [
        AdapterSocket.Input(
            "loaded_adapter", optional=True, tooltip="From Load ID Adapter or Load Demo World."
        ),
        FaceAnalyzerSocket.Input(
            "loaded_analyzer",
            optional=True,
            tooltip="From Load Face Analyzer or Load Demo World.",
        ),
        io.ClipVision.Input(
            "clip_vision",
            optional=True,
            raw_link=True,
            tooltip="Only for adapters that read CLIP vision, such as IDAdapter.",
        ),
        io.Mask.Input(
            "attn_mask",
            optional=True,
            raw_link=True,
            tooltip="Where in the picture the person is (white), for one of several people.",
        ),
    ]


def _outputs() -> list[io.Output]:
    return [
        io.Model.Output("model", display_name="model", tooltip="For the sampler."),
        io.Conditioning.Output("positive", display_name="positive", tooltip="For the sampler."),
        io.Conditioning.Output("negative", display_name="negative", tooltip="For the sampler."),
        IdentitySocket.Output(
            "identity", display_name="identity", tooltip="For Save Identity or Identity Report."
        ),
    ]


class FaceIdentity(io.ComfyNode):
    @classmethod
    @keeps_report
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterPersonalize",
            display_name=FACE_IDENTITY,
            category=CATEGORY,
            description=(
                "Photos of a person and a text in, a model that draws this person and its prompts out: everything between Load Checkpoint and "
                "KSampler. One dial between prompt and person; the files are found by themselves."
            ),
            search_aliases=[
                "face",
                "portrait",
                "person",
                "likeness",
                "consistent character",
                "same person",
                "instantid",
                "pulid",
                "ipadapter",
                "faceid",
                "photomaker",
                "identity",
                "uniid",
                "character reference",
            ],
            inputs=[
                io.Model.Input(
                    "model", raw_link=True, tooltip="Of the checkpoint, for example SDXL for UniID."
                ),
                io.Clip.Input("clip", raw_link=True, tooltip="Of the same checkpoint."),
                _photos(),
                *_texts(),
                _strength(),
                *_sockets(),
                *_details(),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
            enable_expand=True,
        )

    @classmethod
    def execute(
        cls,
        model: Link,
        clip: Link,
        photos: Mapping[str, Tensor],
        text: str,
        negative: str,
        strength: float,
        adapter: str,
        text_branch: str,
        package: str,
        recognizer: str,
        vision: str,
        select: str,
        index: int,
        on_missing: str,
        outliers: str,
        class_word: str,
        loaded_adapter: LoadedAdapter | None = None,
        loaded_analyzer: LoadedAnalyzer | None = None,
        clip_vision: Link | None = None,
        attn_mask: Link | None = None,
    ) -> io.NodeOutput:
        parts = _Parts(cls.hidden)
        if is_off(cls.hidden):
            prompts = parts.prompts(clip, text, negative, class_word_of(class_word, ""), False)
            off = report_ui([info("Off: the model alone.")])
            return io.NodeOutput(model, *prompts, None, expand=parts.graph(), ui=off)
        loaded = parts.adapter(loaded_adapter, adapter, text_branch)
        analyzer = parts.analyzer(loaded_analyzer, package, recognizer, loaded)
        parts.clip_vision(clip_vision, vision, loaded)
        given = {f"{PHOTOS}.{name}": photo for name, photo in photos.items() if photo is not None}
        selection = Selection(select, index, on_missing)
        pictures, found = faces_in(given, analyzer, selection, cls.hidden)
        parts.identity(list(given), selection, outliers)
        weight, rescale = loaded.adapter.at_strength(strength)
        mix = loaded.adapter.with_own_number(Mix(AUTO, outliers=outliers))
        seen = select_references(found.features, mix)[0].class_word
        noun = class_word_of(class_word, seen)
        prompts = parts.prompts(clip, text, negative, noun, bool(strength))
        applied = parts.model(model, weight, rescale, attn_mask)

        not_used = {found.features.faces[i].image_index for i in left_out(found.features, mix)}
        messages = [
            info(_means(strength, weight, rescale)),
            *from_remarks(found.remarks),
            *_in_short(from_remarks(mix_remarks(found.features, mix))),
            info(class_word_line(noun, class_word, seen)),
            *map(warning, loaded.adapter.notes),
        ]
        shown = images.picture_ui(cls, images.found_pictures(pictures, found, not_used))
        return io.NodeOutput(
            applied,
            *prompts,
            parts.identity_link,
            expand=parts.graph(),
            ui={**shown, **report_ui(messages, FACE_IDENTITY)},
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        return " ".join(
            (
                paths.stamp_of(paths.ADAPTERS, None),
                paths.stamp_of(paths.RECOGNIZERS, None),
                *sorted(find_packages(paths.insightface_roots())),
                *choices.clip_vision_files(),
            )
        )


class _Parts:
    """The nodes that Face Identity expands to.

    They report to nobody: Face Identity says it all in its own result, which ComfyUI sends again when it is cached.
    """

    def __init__(self, hidden: Any) -> None:
        self._builder = GraphBuilder()
        self._node = str(hidden.unique_id)
        self._given: Mapping[str, Any] = hidden.dynprompt.get_node(hidden.unique_id)["inputs"]
        self._adapter: Link = []
        self._analyzer: Link = []
        self._vision: Link | None = None
        self.identity_link: Link = []

    def _add(self, kind: str, name: str, **inputs: Any) -> Link:
        node = self._builder.node(kind, name, **inputs)
        node.set_override_display_id(f"{self._node}.{name}")
        return list(node.out(0))

    def adapter(self, loaded: LoadedAdapter | None, adapter: str, text_branch: str) -> LoadedAdapter:
        """Load the adapter, unless it is wired. The node that the graph runs gets what is loaded here."""
        if loaded is not None:
            self._adapter = self._given["loaded_adapter"]
            return loaded
        first = choices.adapter_file(adapter)
        second = choices.text_branch(text_branch, first)
        self._adapter = self._add(
            "IDAdapterLoadAdapter", "adapter", adapter=first, text_branch=second or NONE
        )
        return load_files(first, second, hand_over=True)

    def analyzer(
        self, loaded: LoadedAnalyzer | None, package: str, recognizer: str, adapter: LoadedAdapter
    ) -> LoadedAnalyzer:
        """Open the face package, unless it is wired."""
        if loaded is not None:
            self._analyzer = self._given["loaded_analyzer"]
            return loaded
        files = {
            "package": choices.package(package),
            "recognizer": choices.recognizer(recognizer, adapter.adapter),
        }
        self._analyzer = self._add("IDAdapterLoadFaceAnalyzer", "analyzer", provider=AUTO, **files)
        return open_files(**files, provider=AUTO, hand_over=True)

    def clip_vision(self, link: Link | None, file: str, adapter: LoadedAdapter) -> None:
        self._vision = link
        if link is None and (name := choices.clip_vision(file, adapter.adapter)) is not None:
            self._vision = self._add("CLIPVisionLoader", "vision", clip_name=name)

    def identity(self, photos: Sequence[str], selection: Selection, outliers: str) -> None:
        """Describe the photos, wired to the inputs of those names, and make one identity of them."""
        first, *more = (self._given[name] for name in photos)
        optional = {} if self._vision is None else {"clip_vision": self._vision}
        optional |= {f"{MORE_PHOTOS}.{name}": link for name, link in zip(PHOTO_NAMES[1:], more, strict=False)}
        faces = self._add(
            "IDAdapterExtractFaces",
            "faces",
            image=first,
            analyzer=self._analyzer,
            **vars(selection),
            **optional,
        )
        self.identity_link = self._add(
            "IDAdapterMixFeatures", "identity", adapter=self._adapter, faces=faces, mode=AUTO, references=0, weights="",
            outliers=outliers,
        )  # fmt: skip

    def prompts(
        self, clip: Link, text: str, negative: str, noun: str, has_identity: bool
    ) -> tuple[Link, Link]:
        """Encode the positive prompt, with the identity or as an ordinary one, and the negative one."""
        if has_identity:
            positive = self._add(
                "IDAdapterPrompt", "positive", clip=clip, identity=self.identity_link, text=text, class_word=noun, token_weight=1.0
            )  # fmt: skip
        else:
            plain = fill_class_word(text, noun)
            positive = self._add("CLIPTextEncode", "positive", clip=clip, text=plain)
        return positive, self._add("CLIPTextEncode", "negative", clip=clip, text=negative)

    def model(self, model: Link, weight: float, rescale: RescaleSchedule | None, mask: Link | None) -> Link:
        optional = {} if mask is None else {"attn_mask": mask}
        applied = self._add(
            "IDAdapterApply", "model", model=model, adapter=self._adapter, identity=self.identity_link, weight=weight,
            start_percent=0.0, end_percent=1.0, **optional,
        )  # fmt: skip
        if rescale is None:
            return applied
        return self._add(
            "IDAdapterRescale", "rescale", model=applied, mode=RESCALE_MODES[0], scope=SCOPES[0], gated=False, **vars(rescale)
        )  # fmt: skip

    def graph(self) -> dict[str, Any]:
        return dict(self._builder.finalize())


def _in_short(messages: list[Message]) -> list[Message]:
    """Leave out the weights of single photos, which are equal here."""
    return [*messages[:1], *(message for message in messages[1:] if message.level == "warning")]


def _means(strength: float, weight: float, rescale: RescaleSchedule | None) -> str:
    """Say what a strength means for the parts."""
    if not strength:
        return "Strength 0: the model alone."
    if rescale is None:
        return f"Strength {strength:g}: weight {weight:.2f}."
    return f"Strength {strength:g}: {RESCALE} with adapter_early {rescale.adapter_early:.2f} and adapter_late {rescale.adapter_late:.2f}."
