"""Nodes that turn face features into an identity, attach it, and save and load identities."""

from __future__ import annotations

import logging
import re
import uuid
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..idadapter_core import FaceFeatures, Identity, Mix
from ..idadapter_core.errors import InputError
from ..idadapter_core.faces.images import Image
from ..idadapter_core.faces.preview import crop_sheet, worth_showing
from ..idadapter_core.identity import identical, load_identity, merged, save_identity
from ..idadapter_core.methods import METHODS
from ..idadapter_core.mixing import face_names, left_out, mix_remarks
from ..idadapter_core.types import MODES, OUTLIERS
from .host import images, paths
from .host.conditioning import ATTACHED, Attached
from .host.memory import LoadedAdapter
from .host.messages import Message, from_remarks, info, keeps_report, node_id_of, report_ui
from .host.off import is_off
from .host.titles import ATTACH, MIX
from .sockets import CATEGORY, AdapterSocket, FaceFeaturesSocket, IdentitySocket, file_options

log = logging.getLogger(__name__)
_NAME = re.compile(r"[^\\/:*?\"<>|\x00-\x1f]+")
LONGEST_NAME = 200  # bytes with the suffix; file systems allow 255, and the temporary name is longer
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # on Windows
ROLES = ("positive", "negative")


def parse_weights(text: str) -> tuple[float, ...]:
    """ "1, 0.5 0.5" -> (1.0, 0.5, 0.5); empty text -> ()."""
    parts = [part for part in re.split(r"[,;\s]+", text.strip()) if part]
    try:
        return tuple(float(part) for part in parts)
    except ValueError as error:
        raise InputError(
            f"weights must be numbers separated by commas, for example '1, 0.5, 0.5', got {text!r}"
        ) from error


class MixFeatures(io.ComfyNode):
    @classmethod
    @keeps_report
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterMixFeatures",
            display_name=MIX,
            category=CATEGORY,
            description="Makes one identity of the faces of one person, in the language of one adapter.",
            search_aliases=["combine faces", "merge embeddings", "encode identity"],
            inputs=[
                AdapterSocket.Input(
                    "adapter", tooltip="From Load ID Adapter. The identity works with this adapter only."
                ),
                FaceFeaturesSocket.Input(
                    "faces", tooltip="From Extract Face Features: one to four photos work well."
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="auto",
                    tooltip="How several photos become one identity. auto is the adapter's best way (UniID: concatenate, "
                    "IDAdapter: learned). concatenate lets the adapter look at all photos, mean averages them, learned needs an "
                    "IDAdapter. Which photos take part is decided before, by the inputs below.",
                ),
                io.Int.Input(
                    "references",
                    default=0,
                    min=0,
                    max=16,
                    tooltip="Use at most this many faces: those of the largest weight; among equals a choice of good photos that "
                    "differ from each other. 0 is the adapter's own number (UniID: all, IDAdapter: as many as in its training).",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip="Empty: all photos count alike. Or one number per face, for example 1, 0.5, 0 (0 leaves a face out).",
                ),
                io.Combo.Input(
                    "outliers",
                    options=list(OUTLIERS),
                    default="reject",
                    optional=True,
                    tooltip="reject: from three photos on, one that disagrees with the others, probably another person, is left "
                    "out; with `weights` the choice is yours and nothing is rejected. keep: it takes part. The report names it "
                    "in any case.",
                ),
            ],
            outputs=[
                IdentitySocket.Output(tooltip="For Apply ID Adapter, ID Prompt and Save Identity."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Which photos took part, with what weight, and which were left out and why.",
                ),
            ],
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        adapter: LoadedAdapter,
        faces: FaceFeatures,
        mode: str,
        references: int,
        weights: str,
        outliers: str = "reject",
    ) -> io.NodeOutput:
        if is_off(cls.hidden):
            return io.NodeOutput(None, "")
        # With the adapter's own number, so that the report describes the same choice.
        mix = adapter.adapter.with_own_number(Mix(mode, references, parse_weights(weights), outliers))
        identity = adapter.encode(faces, mix)
        remarks = mix_remarks(faces, mix)
        shown = images.picture_ui(cls, _faces_of(faces, mix))
        return io.NodeOutput(
            identity,
            "\n".join(remark.text for remark in remarks),
            ui={**shown, **report_ui(from_remarks(remarks), MIX)},
        )


def _faces_of(faces: FaceFeatures, mix: Mix) -> list[Image]:
    """Return the picture of a mix, the faces with their names; empty if the features hold no crops."""
    if faces.crops is None:
        return []
    absent = left_out(faces, mix)
    shown = worth_showing(len(faces), absent)
    names = [name.partition(" (")[0] for name in face_names(faces)]
    captions = [f"{names[i]} left out" if i in absent else names[i] for i in shown]
    return [crop_sheet(faces.crops[shown], captions, [shown.index(i) for i in absent if i in shown])]


def identity_file(name: str) -> str:
    """Return the file name of a new identity.

    Raises:
        InputError: the name is empty, contains a path, or contains characters that some system forbids.
    """
    stem = name.strip().removesuffix(".safetensors").strip()
    too_long = len(f"{stem}.safetensors".encode()) > LONGEST_NAME
    if (
        too_long
        or stem.startswith(".")
        or stem.endswith(".")
        or not _NAME.fullmatch(stem)
        or _RESERVED.fullmatch(stem)
    ):
        raise InputError(
            "an identity's name must be a plain file name without folders or any of \\ / : * ? \" < > |, of at most "
            f"{LONGEST_NAME} bytes, got {name!r}. It is saved in models/idadapter/identities."
        )
    return f"{stem}.safetensors"


class SaveIdentity(io.ComfyNode):
    @classmethod
    @keeps_report
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterSaveIdentity",
            display_name="Save Identity",
            category=CATEGORY,
            description=(
                "Saves an identity into models/idadapter/identities, to be used without the photos. "
                "A file of that name that holds another identity is never overwritten."
            ),
            is_output_node=True,
            inputs=[
                IdentitySocket.Input("identity", tooltip="From Mix Face Features."),
                io.String.Input("name", default="person", tooltip="The file's name, without a folder."),
                io.Boolean.Input(
                    "thumbnail",
                    default=True,
                    optional=True,
                    tooltip="Keep a picture of the face in the file, 112 x 112, for Load Identity to show. Off: the file holds numbers only.",
                ),
            ],
            outputs=[IdentitySocket.Output(tooltip="The same identity, to go on with.")],
        )

    @classmethod
    def execute(cls, identity: Identity | None, name: str, thumbnail: bool = True) -> io.NodeOutput:
        if identity is None:
            return io.NodeOutput(
                None, ui=report_ui([info("Nothing is saved: the node that makes the identity is off.")])
            )
        path = paths.folder_of(paths.IDENTITIES) / identity_file(name)
        before = load_identity(path) if path.exists() else None
        if before is not None and not identical(identity, before):
            raise InputError(
                f"{path.name} already holds another identity and is not overwritten. Choose another name, or delete the file "
                f"in {path.parent}."
            )
        changes = [] if before is None else _differences(identity, before, thumbnail)
        if before is None or changes:
            save_identity(identity, path, thumbnail=thumbnail)
            _save_fingerprints.record(path)
            log.info("saved identity %s", path)
        if before is None:
            done = f"Saved as {path.name} in {path.parent}. Load Identity lists it after a refresh (R)."
        elif changes:
            done = f"{path.name} in {path.parent} held this identity; {' and '.join(changes)}."
        else:
            done = f"{path.name} in {path.parent} holds this identity already."
        return io.NodeOutput(
            identity, ui={**_shown(cls, identity if thumbnail else None), **report_ui([info(done)])}
        )

    @classmethod
    def fingerprint_inputs(cls, name: str | None, **_: Any) -> str:
        if name is None:  # comes from another node, unknown until that ran
            return ""
        return _save_fingerprints.fingerprint(paths.folder_of(paths.IDENTITIES) / identity_file(name))


def _differences(identity: Identity, saved: Identity, thumbnail: bool) -> list[str]:
    """Say what a file that holds this identity lacks, or holds without being asked to."""
    found = []
    if saved.embedding is None and identity.embedding is not None:
        found.append("the numbers for Identity Report were added")
    wanted = thumbnail and identity.thumbnail is not None
    if wanted != (saved.thumbnail is not None):
        found.append("the thumbnail was added" if wanted else "the thumbnail was taken out")
    return found


def _shown(node: type[io.ComfyNode], identity: Identity | None) -> dict[str, Any]:
    """Return the UI output that shows the face of an identity, if it has one."""
    if identity is None or identity.thumbnail is None:
        return {}
    return images.picture_ui(node, [identity.thumbnail.numpy()])


class _SaveFingerprints:
    """Fingerprints for Save Identity: a missing file is always written; a file unchanged since the node wrote it is not.

    The fingerprint of a missing file stays valid for the file written next. Otherwise queueing the prompt again would save each new
    identity a second time and rerun all nodes after this one.
    """

    def __init__(self) -> None:
        self._begun: dict[Path, str] = {}
        self._done: dict[Path, tuple[str, str]] = {}  # stamp of the written file, and the fingerprint

    def fingerprint(self, path: Path) -> str:
        if not path.exists():
            self._begun[path] = uuid.uuid4().hex
            return self._begun[path]
        now = paths.stamp(path)
        written, fingerprint = self._done.get(path, ("", ""))
        return fingerprint if written == now else now

    def record(self, path: Path) -> None:
        if path in self._begun:
            self._done[path] = (paths.stamp(path), self._begun.pop(path))


_save_fingerprints = _SaveFingerprints()


class LoadIdentity(io.ComfyNode):
    @classmethod
    @keeps_report
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterLoadIdentity",
            display_name="Load Identity",
            category=CATEGORY,
            description="Loads an identity that Save Identity wrote. It belongs to the adapter that made it.",
            inputs=[
                io.Combo.Input(
                    "identity",
                    options=file_options(paths.IDENTITIES),
                    tooltip="A file of models/idadapter/identities (refresh the node list after saving one: R).",
                ),
                AdapterSocket.Input("adapter", tooltip="The adapter that the identity was made with."),
            ],
            outputs=[IdentitySocket.Output(tooltip="For Apply ID Adapter and ID Prompt.")],
        )

    @classmethod
    def execute(cls, identity: str, adapter: LoadedAdapter) -> io.NodeOutput:
        loaded = load_identity(paths.path_of(paths.IDENTITIES, identity))
        adapter.adapter.require_identity(loaded, identity)
        return io.NodeOutput(loaded, ui={**_shown(cls, loaded), **report_ui([_describe(loaded, identity)])})

    @classmethod
    def fingerprint_inputs(cls, identity: str | None, **_: Any) -> str:
        return paths.stamp_of(paths.IDENTITIES, identity)


def _describe(identity: Identity, file: str) -> Message:
    """Describe an identity loaded from a file."""
    seen = f", seen as a {identity.class_word}" if identity.class_word else ""
    return info(f"{file}: an identity for {METHODS[identity.method].title}{seen}.")


class MergeIdentities(io.ComfyNode):
    @classmethod
    @keeps_report
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterMergeIdentities",
            display_name="Merge Identities",
            category=CATEGORY,
            description=(
                "Makes somebody between two people: an identity that resembles both, more the one or the other. Several photos of one "
                "person belong into one Mix Face Features instead."
            ),
            search_aliases=["blend faces", "interpolate identities", "mix two people", "morph"],
            inputs=[
                IdentitySocket.Input(
                    "identity_a", tooltip="The first person: from Mix Face Features or Load Identity."
                ),
                IdentitySocket.Input(
                    "identity_b",
                    tooltip="The second person: an identity of the same adapter and face recogniser.",
                ),
                io.Float.Input(
                    "ratio",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="0 is exactly the first person, 1 exactly the second.",
                ),
            ],
            outputs=[IdentitySocket.Output(tooltip="For Apply ID Adapter, ID Prompt and Save Identity.")],
        )

    @classmethod
    def execute(cls, identity_a: Identity | None, identity_b: Identity | None, ratio: float) -> io.NodeOutput:
        if identity_a is None or identity_b is None:
            there = identity_a or identity_b
            return io.NodeOutput(
                there, ui=report_ui([info("One of the two is off, so there is nothing to merge.")])
            )
        identity = merged(identity_a, identity_b, ratio)
        words = {identity_a.class_word, identity_b.class_word}
        shares = f"{1 - ratio:.0%} of the first person, {ratio:.0%} of the second"
        seen = f"seen as a {identity.class_word}" if identity.class_word else 'class word "person"'
        why = " (the two differ)" if len(words) > 1 and not identity.class_word else ""
        return io.NodeOutput(identity, ui=report_ui([info(f"{shares}; {seen}{why}.")]))


class AttachIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterAttach",
            display_name=ATTACH,
            category=CATEGORY,
            description=(
                "Makes an identity act only where this conditioning acts: one prompt of several, one region, one span of "
                "steps. The MODEL still needs Apply ID Adapter with the same adapter; a conditioning with an identity of its "
                "own leaves the one wired there aside."
            ),
            search_aliases=["regional identity", "identity per prompt"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="The prompt, before or after areas and masks are set."
                ),
                IdentitySocket.Input("identity", tooltip="Who this conditioning shows."),
                io.Combo.Input(
                    "role",
                    options=list(ROLES),
                    default="positive",
                    tooltip="Where the conditioning will be wired: negative attaches the identity's unconditional tokens.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Conditioning.Output(tooltip="The same conditioning with the identity attached.")],
        )

    @classmethod
    def execute(cls, conditioning: list[list[Any]], identity: Identity | None, role: str) -> io.NodeOutput:
        if identity is None:
            return io.NodeOutput(conditioning)
        mark = Attached(identity, role, node_id_of(cls))
        attached = [
            [states, {**options, ATTACHED: (*options.get(ATTACHED, ()), mark)}]
            for states, options in conditioning
        ]
        return io.NodeOutput(attached)
