"""The Masks from Faces node: where each person of a picture is."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy_api.latest import io
from torch import Tensor

from ..idadapter_core.errors import FaceError
from ..idadapter_core.faces.images import check_image, image_name
from ..idadapter_core.faces.preview import small_preview, worth_showing
from ..idadapter_core.faces.regions import MAX_GROW, choose_people, people_masks
from ..idadapter_core.types import Face
from .host import images
from .host.analyzer import LoadedAnalyzer
from .host.messages import info, keeps_report, report_ui
from .sockets import CATEGORY, FaceAnalyzerSocket

MOST_PEOPLE = 4
TITLE = "Masks from Faces"


class FaceMasks(io.ComfyNode):
    @classmethod
    @keeps_report
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IDAdapterFaceMasks",
            display_name=TITLE,
            category=CATEGORY,
            description=(
                "Finds the people in a picture and makes a mask around each, from left to right, without overlap: for attn_mask of Apply ID "
                "Adapter, one for each person, and for Conditioning (Set Mask)."
            ),
            search_aliases=[
                "regional",
                "several people",
                "two people",
                "face mask",
                "person mask",
                "attention mask",
            ],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="A picture that shows the people, for example a first draft without identities.",
                ),
                FaceAnalyzerSocket.Input("analyzer", tooltip="From Load Face Analyzer."),
                io.Int.Input(
                    "people",
                    default=2,
                    min=1,
                    max=MOST_PEOPLE,
                    tooltip="How many people: the largest faces, counted from left to right.",
                ),
                io.Float.Input(
                    "grow",
                    default=1.0,
                    min=0.0,
                    max=MAX_GROW,
                    step=0.05,
                    tooltip="How far a mask reaches beyond the face on each side, in sizes of the face; downwards twice as far. Where masks "
                    "meet, each pixel belongs to the nearest face.",
                ),
            ],
            outputs=[
                *(
                    io.Mask.Output(
                        f"person_{number}",
                        display_name=f"person {number}",
                        tooltip=f"Person {number} from the left; black everywhere beyond `people`.",
                    )
                    for number in range(1, MOST_PEOPLE + 1)
                ),
                io.Mask.Output("others", display_name="others", tooltip="Everything outside these masks."),
            ],
        )

    @classmethod
    def execute(cls, image: Tensor, analyzer: LoadedAnalyzer, people: int, grow: float) -> io.NodeOutput:
        pictures = images.photos(image)
        chosen = [_people(analyzer, picture, n, len(pictures), people) for n, picture in enumerate(pictures)]
        height, width = image.shape[1:3]
        masks = torch.stack([people_masks(faces, height, width, grow) for faces, _ in chosen], dim=1)
        empty = masks.new_zeros(MOST_PEOPLE - people, *masks.shape[1:])
        shown = [
            small_preview(check_image(pictures[n]), chosen[n][0], chosen[n][0], f"picture {n + 1}", first=1)
            for n in worth_showing(len(pictures), ())
        ]
        more = sum(found > people for _, found in chosen)
        messages = [info(f"{people} {'person' if people == 1 else 'people'}, from left to right.")]
        if more:
            messages.append(
                info(f"{more} of {len(pictures)} pictures show more faces; the largest are taken.")
            )
        return io.NodeOutput(
            *masks, *empty, 1 - masks.amax(0), ui={**images.picture_ui(cls, shown), **report_ui(messages)}
        )


def _people(
    analyzer: LoadedAnalyzer, picture: Tensor, number: int, count: int, people: int
) -> tuple[list[Face], int]:
    """The chosen faces of a picture (H, W, 3), from left to right, and the number of all."""
    pixels = check_image(picture, number, count)
    check = comfy.model_management.throw_exception_if_processing_interrupted
    faces = analyzer.analyzer.detect(pixels, number, check)
    try:
        return choose_people(faces, people), len(faces)
    except FaceError as error:
        raise FaceError(f"{image_name(pixels, number, count, None)}: {error}") from error
