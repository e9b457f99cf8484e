"""The cases of a measurement: which adapter, how many photos, how strongly; and the anchors to compare them with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ...schedule import RescaleSchedule
from ...stable_diffusion.pipeline import Strengths
from ..world import RESCALED

SCALES = (0.5, 0.8, 1.2, 1.8, 2.4)  # of the fronts
STRANGERS = (0, 1)
USUAL_MODES = {
    "uniid": "concatenate",
    "idadapter": "learned",
}  # what "auto" is; of one photo, all modes make the same


@dataclass(frozen=True)
class Case:
    """One way to draw every person with every prompt.

    adapter: name of the adapter's file; empty: none.
    photos: number of reference photos; with `stranger` the last of them shows another person.
    anchor: "base" draws without an adapter, "true" renders the person as asked, "copy" is the first reference photo itself.
    """

    name: str
    title: str
    adapter: str = ""
    photos: int = 1
    mode: str = "auto"
    stranger: bool = False
    strengths: Strengths = field(default_factory=Strengths)
    anchor: str = ""

    @property
    def drawn(self) -> Case:
        """What the pictures depend on: cases with the same are one, and measured once."""
        is_usual = self.photos == 1 or self.mode == USUAL_MODES.get(self.adapter)
        return replace(self, name="", title="", mode="auto" if is_usual else self.mode)


def constant(scale: float) -> RescaleSchedule:
    """The same scale for the adapter in all steps, and text tokens at the length of a name."""
    return RescaleSchedule(scale, scale, 1.0, 1.0)


def stepped(scale: float) -> RescaleSchedule:
    """The published schedule of steps, with both scales of the adapter multiplied by `scale`."""
    usual = RescaleSchedule()
    return replace(usual, adapter_early=usual.adapter_early * scale, adapter_late=usual.adapter_late * scale)


ANCHORS = (
    Case("base", "base model, no identity", anchor="base"),
    Case("true", "true render as asked (ceiling)", anchor="true"),
    Case("copy", "the reference photo itself (copy)", anchor="copy"),
)
UNIID = (
    Case("uniid_text", "UniID, text branch alone", "uniid", strengths=Strengths(0.0, 1.0)),
    Case("uniid_adapter", "UniID, adapter branch alone", "uniid", strengths=Strengths(1.0, 0.0)),
    Case("uniid_naive", "UniID, both branches, naive", "uniid"),
    Case("uniid", "UniID, both branches, rescaled", "uniid", strengths=Strengths(rescale=RESCALED)),
    Case("uniid_naive_4", "UniID, both branches, naive, four photos", "uniid", photos=4),
    Case(
        "uniid_4",
        "UniID, both branches, rescaled, four photos",
        "uniid",
        photos=4,
        strengths=Strengths(rescale=RESCALED),
    ),
    Case(
        "uniid_published",
        "UniID, both branches, rescaled by the numbers for SDXL",
        "uniid",
        strengths=Strengths(rescale=RescaleSchedule()),
    ),
)
IDADAPTER = tuple(
    Case(f"idadapter_{count}", f"IDAdapter, N = {count}", "idadapter", photos=count) for count in (1, 2, 4)
)
ABLATIONS = tuple(
    Case(f"idadapter_{name}_{photos}", f"IDAdapter, {title}", f"idadapter_{name}", photos=photos)
    for name, photos, title in (
        ("no_mff", 4, "N = 4, without MFF"),
        ("no_text", 4, "N = 4, without identity word"),
        ("no_id_loss", 4, "N = 4, without L_id"),
        ("own_photo", 1, "trained with N = 1, the photo to draw itself"),
        ("other_photos", 4, "N = 4, trained with other photos only"),
    )
)
FACEID = (
    Case("faceid", "IP-Adapter FaceID, naive", "faceid"),
    Case(
        "faceid_rescaled", "IP-Adapter FaceID, rescaled", "faceid", strengths=Strengths(rescale=constant(1.0))
    ),
)


def fronts() -> Iterator[Case]:
    """Identity against prompt over scales: naive, rescaled with one scale, rescaled with the schedule of steps."""
    for adapter, title in (("uniid", "UniID"), ("faceid", "IP-Adapter FaceID")):
        for scale in SCALES:
            yield Case(
                f"{adapter}_naive_{scale}", f"{title}, naive {scale}", adapter, strengths=Strengths(scale)
            )
            yield Case(
                f"{adapter}_rescaled_{scale}",
                f"{title}, rescaled {scale}",
                adapter,
                strengths=Strengths(rescale=constant(scale)),
            )
            yield Case(
                f"{adapter}_stepped_{scale}",
                f"{title}, rescaled with steps, x {scale}",
                adapter,
                strengths=Strengths(rescale=stepped(scale)),
            )


def mixtures() -> Iterator[Case]:
    """Ways to mix one to four photos, with and without a stranger among them."""
    rescaled = Strengths(rescale=RESCALED)
    ways = {
        "uniid": (rescaled, ("concatenate", "mean")),
        "idadapter": (Strengths(), ("learned", "concatenate", "mean")),
    }
    for adapter, (strengths, modes) in ways.items():
        for mode in modes:
            for count in (1, 2, 4):
                for stranger in STRANGERS if count > 1 else (0,):
                    suffix = "_stranger" if stranger else ""
                    yield Case(
                        f"{adapter}_{mode}_{count}{suffix}",
                        f"{adapter}, {mode}, {count} photos{', one of a stranger' if stranger else ''}",
                        adapter,
                        count,
                        mode,
                        bool(stranger),
                        strengths,
                    )


def all_cases() -> tuple[Case, ...]:
    """Every case, the short ones first."""
    return (*ANCHORS, *UNIID, *IDADAPTER, *ABLATIONS, *FACEID, *fronts(), *mixtures())


SHORT = (*ANCHORS, *UNIID, IDADAPTER[0], IDADAPTER[-1], *FACEID)
"""Those of the form for CI."""
