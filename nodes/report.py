"""The Identity Report node: how like pictures are to a person."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.utils
from comfy_api.latest import io
from torch import Tensor

from ..idadapter_core import FaceFeatures, Identity
from ..idadapter_core.errors import InputError, MismatchError
from ..idadapter_core.faces.images import check_image
from ..idadapter_core.likeness import (
    Likeness,
    Person,
    best_of,
    compare,
    mean_of,
    person_in,
    person_of,
    remarks_on,
)
from ..idadapter_core.likeness_chart import draw_chart
from ..idadapter_core.types import Remark
from .host import images
from .host.analyzer import LoadedAnalyzer
from .host.messages import from_remarks, keeps_report, report_ui
from .sockets import CATEGORY, FaceAnalyzerSocket, FaceFeaturesSocket, IdentitySocket

TITLE = "Identity Report"


class IdentityReport(io.ComfyNode):
    @classmethod
    @keeps_report
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterReport",
            display_name=TITLE,
            category=CATEGORY,
            description=(
                "Measures how like pictures are to the person in the reference photos: a number and a word for each picture, the best of the "
                "batch, a chart, and what was copied of the photos' poses."
            ),
            search_aliases=[
                "face similarity",
                "likeness",
                "compare faces",
                "best of batch",
                "identity score",
                "embeds distance",
            ],
            inputs=_inputs(),
            outputs=[
                io.Image.Output(
                    "best", display_name="best", tooltip="The picture that is most like the person."
                ),
                io.Image.Output(
                    "chart",
                    display_name="chart",
                    tooltip="One row for each picture, with a bar over coloured bands.",
                ),
                io.Float.Output(
                    "similarity",
                    display_name="similarity",
                    tooltip="Mean similarity of all pictures, -1 to 1; a picture without a face counts 0.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="The numbers of all pictures, in sentences."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        images: Tensor,
        analyzer: LoadedAnalyzer,
        faces: FaceFeatures | None = None,
        identity: Identity | None = None,
        independent: LoadedAnalyzer | None = None,
    ) -> io.NodeOutput:
        return _report(cls, images, analyzer, faces, identity, independent)


def _inputs() -> list[io.Input]:
    """Inputs of Identity Report."""
    return [
        io.Image.Input("images", tooltip="The pictures to judge: one, or a batch."),
        FaceAnalyzerSocket.Input(
            "analyzer",
            tooltip="From Load Face Analyzer. It finds the faces and compares them. The recogniser that the adapter reads favours the "
            "adapter a little: see `independent`.",
        ),
        FaceFeaturesSocket.Input(
            "faces",
            optional=True,
            tooltip="The person to compare with: from Extract Face Features. From two different photos on, the words go by how much they agree.",
        ),
        IdentitySocket.Input(
            "identity",
            optional=True,
            tooltip="Instead of `faces`: an identity, for example from Load Identity. The analyzer must have the recogniser that it was "
            "made with.",
        ),
        FaceAnalyzerSocket.Input(
            "independent",
            optional=True,
            tooltip="A second analyzer with another recogniser, which no adapter was trained with. It judges the same faces; needs `faces`.",
        ),
    ]


def _report(
    node: type[io.ComfyNode],
    pictures: Tensor,
    analyzer: LoadedAnalyzer,
    faces: FaceFeatures | None,
    identity: Identity | None,
    independent: LoadedAnalyzer | None,
) -> io.NodeOutput:
    person = _person(analyzer, faces, identity)
    second = None if independent is None else _second(independent, analyzer, faces)
    photos = images.photos(pictures)
    progress = comfy.utils.ProgressBar(len(photos))
    found: list[Likeness] = []
    for photo in photos:
        features = analyzer.features_in(photo)
        likeness, nearest = compare(person, features)
        if features is not None and independent is not None and second is not None:
            assert features.crops is not None  # extract_features always cuts them
            seen = replace(
                features.pick([nearest]), embedding=independent.embed(features.crops[nearest : nearest + 1])
            )
            likeness = replace(likeness, independent=compare(second, seen)[0].similarity)
        found.append(likeness)
        progress.update(1)
    remarks = remarks_on(person, found)
    best = best_of(found)
    chart = draw_chart(person, [check_image(photo, n, len(photos)) for n, photo in enumerate(photos)], found)
    return io.NodeOutput(
        pictures[best : best + 1],
        images.to_image([chart], 1),
        mean_of(found),
        "\n".join(remark.text for remark in remarks),
        ui={**images.picture_ui(node, [chart]), **_shown(remarks)},
    )


def _shown(remarks: list[Remark]) -> dict[str, Any]:
    """The sentences on the node; those about single pictures are in the chart."""
    return report_ui(from_remarks([remark for remark in remarks if not remark.is_detail]), TITLE)


def _person(analyzer: LoadedAnalyzer, faces: FaceFeatures | None, identity: Identity | None) -> Person:
    if (faces is None) == (identity is None):
        given = "both are wired" if faces is not None else "nothing is wired"
        raise InputError(
            f"{TITLE} compares with `faces` or with `identity`, and {given}. Wire Extract Face Features to `faces`, or Load Identity (or Mix "
            "Face Features) to `identity`."
        )
    if faces is not None:
        return person_in(_seen_by(analyzer, faces))
    assert identity is not None
    if identity.recognizer != analyzer.digest:
        raise MismatchError(
            f"the identity was made with the face recogniser {identity.recognizer or '(unknown)'}, this analyzer has {analyzer.digest}: their "
            "numbers cannot be compared. Choose that recogniser in Load Face Analyzer, or wire the photos to `faces`."
        )
    return person_of(identity)


def _seen_by(analyzer: LoadedAnalyzer, faces: FaceFeatures) -> FaceFeatures:
    """The same faces as this analyzer's recogniser sees them."""
    if faces.recognizer == analyzer.digest:
        return faces
    if faces.crops is None:
        raise MismatchError(
            f"the photos' features are of the face recogniser {faces.recognizer}, this analyzer has {analyzer.digest}. Wire the analyzer "
            "of Extract Face Features here, too."
        )
    return replace(faces, embedding=analyzer.embed(faces.crops), recognizer=analyzer.digest)


def _second(independent: LoadedAnalyzer, analyzer: LoadedAnalyzer, faces: FaceFeatures | None) -> Person:
    if independent.digest == analyzer.digest:
        raise InputError(
            f"`independent` has the same face recogniser as `analyzer` ({analyzer.digest}), which judges nothing anew. Choose another one "
            "in a second Load Face Analyzer, or remove the link."
        )
    if faces is None:
        raise InputError(
            "`independent` needs the photos: an identity holds the numbers of one recogniser only. Wire Extract Face Features to `faces` "
            "in place of `identity`, or remove the link to `independent`."
        )
    return person_in(_seen_by(independent, faces))
