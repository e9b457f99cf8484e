"""Face Identity: the whole way from photos and a text to a model and its prompts, in one node.

It expands to the other nodes of this pack, so it draws what they draw. ComfyUI may drop the results of its parts at any time, also while it
keeps those of ordinary nodes; what is dear to make is therefore found again as long as anything uses it (`memory.Live`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder, Node

from ..idadapter_core.adapter import Adapter
from ..idadapter_core.faces.detector import POLICIES
from ..idadapter_core.faces.features import ON_MISSING
from ..idadapter_core.faces.packages import find_packages
from ..idadapter_core.placeholders import CLASS_WORD
from ..idadapter_core.schedule import RescaleSchedule
from ..idadapter_core.strength import STRONGEST
from ..idadapter_core.types import OUTLIERS
from .adapter import RESCALE_MODES, SCOPES, load_files
from .faces import MORE_PHOTOS, MOST_MORE
from .host import choices, paths
from .host.choices import AUTO, FROM_PACKAGE, NONE
from .host.memory import LoadedAdapter
from .host.messages import info, keeps_report, report_ui
from .host.titles import FACE_IDENTITY, RESCALE
from .prompt import CLASS_WORDS
from .sockets import CATEGORY, AdapterSocket, FaceAnalyzerSocket, IdentitySocket

PHOTOS = "photos"
Link = list[Any]  # [id of a node, number of its output], as in a queued prompt


def _photos() -> io.Input:
    return io.Autogrow.Input(
        PHOTOS,
        template=io.Autogrow.TemplatePrefix(
            io.Image.Input("photo", raw_link=True, tooltip="A photo of the person, or a batch of photos."),
            prefix="photo",
            min=1,
            max=MOST_MORE + 1,
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
            raw_link=True,
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
            ],  # fmt: skip
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
        strength: float,
        negative: str,
        index: int,
        adapter: str,
        text_branch: str,
        loaded_adapter: LoadedAdapter | None = None,
        attn_mask: Link | None = None,
        **given: Any,
    ) -> io.NodeOutput:
        graph = GraphBuilder()
        if loaded_adapter is None:
            loaded_adapter, link = _loaded(graph, adapter, text_branch)
        else:
            link = cls.hidden.dynprompt.get_node(cls.hidden.unique_id)["inputs"]["loaded_adapter"]
        weight, rescale = loaded_adapter.adapter.at_strength(strength)
        faces = _faces(graph, loaded_adapter.adapter, {**given, "index": index})
        identity = graph.node(
            "IDAdapterMixFeatures", "identity", adapter=link, faces=faces.out(0), mode=AUTO, references=0, weights="",
            outliers=given["outliers"],
        )  # fmt: skip
        prompts = _prompts(graph, clip, identity, strength, negative, given)
        applied = graph.node(
            "IDAdapterApply", "model", model=model, adapter=link, identity=identity.out(0), weight=weight, start_percent=0.0,
            end_percent=1.0, **({} if attn_mask is None else {"attn_mask": attn_mask}),
        )  # fmt: skip
        if rescale is not None:
            applied = graph.node(
                "IDAdapterRescale", "rescale", model=applied.out(0), mode=RESCALE_MODES[0], scope=SCOPES[0], gated=False, **vars(rescale)
            )  # fmt: skip
        means = info(_means(strength, weight, rescale))
        return io.NodeOutput(
            applied.out(0), *prompts, identity.out(0), expand=graph.finalize(), ui=report_ui([means])
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


def _loaded(graph: GraphBuilder, adapter: str, text_branch: str) -> tuple[LoadedAdapter, Link]:
    """Add the node that loads an adapter. The node that the graph runs gets what is loaded here."""
    first = choices.adapter_file(adapter)
    second = choices.text_branch(text_branch, first)
    loaded = load_files(first, second, hand_over=True)
    node = graph.node("IDAdapterLoadAdapter", "adapter", adapter=first, text_branch=second or NONE)
    return loaded, node.out(0)


def _faces(graph: GraphBuilder, adapter: Adapter, given: Mapping[str, Any]) -> Node:
    """Add the nodes that describe the photos."""
    analyzer = given.get("loaded_analyzer")
    if analyzer is None:
        loader = graph.node(
            "IDAdapterLoadFaceAnalyzer", "analyzer", package=given["package"], recognizer=choices.recognizer(given["recognizer"], adapter),
            provider=AUTO,
        )  # fmt: skip
        analyzer = loader.out(0)
    vision = given.get("clip_vision")
    if vision is None and (name := choices.clip_vision(given["vision"], adapter)) is not None:
        vision = graph.node("CLIPVisionLoader", "vision", clip_name=name).out(0)
    first, *more = (link for link in given[PHOTOS].values() if link is not None)
    return graph.node(
        "IDAdapterExtractFaces", "faces", image=first, analyzer=analyzer, select=given["select"], index=given["index"],
        on_missing=given["on_missing"], **({} if vision is None else {"clip_vision": vision}),
        **{f"{MORE_PHOTOS}.photo{number}": link for number, link in enumerate(more)},
    )  # fmt: skip


def _prompts(
    graph: GraphBuilder, clip: Link, identity: Node, strength: float, negative: str, given: Mapping[str, Any]
) -> tuple[Link, Link]:
    """Add the positive and the negative prompt. At strength 0 the positive one is an ordinary prompt."""
    if strength:
        node = graph.node(
            "IDAdapterPrompt", "positive", clip=clip, identity=identity.out(0), text=given["text"], class_word=given["class_word"],
            token_weight=1.0,
        )  # fmt: skip
    else:
        noun = "person" if given["class_word"] == AUTO else given["class_word"]
        plain = re.sub(re.escape(CLASS_WORD), lambda _: noun, given["text"], flags=re.IGNORECASE)
        node = graph.node("CLIPTextEncode", "positive", clip=clip, text=plain)
    return node.out(0), graph.node("CLIPTextEncode", "negative", clip=clip, text=negative).out(0)


def _means(strength: float, weight: float, rescale: RescaleSchedule | None) -> str:
    """Say what a strength means for the parts."""
    if not strength:
        return "Strength 0: the model alone."
    if rescale is None:
        return f"Strength {strength:g}: weight {weight:.2f}."
    return f"Strength {strength:g}: {RESCALE} with adapter_early {rescale.adapter_early:.2f} and adapter_late {rescale.adapter_late:.2f}."
