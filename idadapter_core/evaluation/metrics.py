"""Metrics of a result row, each a mean over images, and requirements on them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..config import nearest
from ..errors import ConfigError
from ..statistics import Estimate, estimate
from .config import EvaluationConfig
from .measure import NOT_AVAILABLE, ImageRow

SECTIONS = ("identity", "prompt", "diversity", "picture")
SECOND, CLIP, EXPRESSIONS = "metrics.second", "metrics.clip", "expression.path"  # settings that name a model


@dataclass(frozen=True)
class Metric:
    """A mean over images. Images for which `value` is None do not count."""

    name: str
    title: str
    section: str
    value: Callable[[ImageRow], float | None]
    meaning: str
    needs: str = ""  # setting of its model; empty: always available
    unit: str = ""  # %, ° or s

    def number(self, value: float) -> str:
        """Format a value without its unit."""
        digits = {"%": 1, "": 3}.get(self.unit, 2)
        # Adding 0.0 turns -0.0 into 0.0.
        rounded = round(100 * value if self.unit == "%" else value, digits) + 0.0
        return f"{rounded:.{digits}f}"

    def show(self, value: float) -> str:
        """Format a value with its unit."""
        return f"{self.number(value)}{self.unit}"


def _missed(value: Callable[[ImageRow], float | None]) -> Callable[[ImageRow], float | None]:
    return lambda row: value(row) if row.det_ok else 0.0


METRICS = (
    Metric(
        "id_sim",
        "IDAdapter ID-Sim",
        "identity",
        lambda row: row.id_cos,
        "mean cosine of the first recogniser between the picture and the person's reference photos, where a face was found; as the "
        "IDAdapter paper defines it, for adapters of any method",
    ),
    Metric(
        "id_sim_miss0",
        "ID-Sim, miss = 0",
        "identity",
        _missed(lambda row: row.id_cos),
        "the same over all pictures; one without a face counts 0",
    ),
    Metric(
        "id_sim_2",
        "ID-Sim, second",
        "identity",
        lambda row: row.id_cos_2,
        "as IDAdapter ID-Sim, by the second recogniser",
        SECOND,
    ),
    Metric(
        "id_sim_2_miss0",
        "second, miss = 0",
        "identity",
        _missed(lambda row: row.id_cos_2),
        "the same over all pictures; one without a face counts 0",
        SECOND,
    ),
    Metric(
        "verified",
        "Verified",
        "identity",
        lambda row: row.verified if row.det_ok else 0.0,
        "share of pairs of picture and reference photo that the first recogniser takes for one person, at a threshold that "
        "0.1 % of pairs of real photos of two people pass; a picture without a face counts 0",
        unit="%",
    ),
    Metric(
        "verified_2",
        "Verified, second",
        "identity",
        lambda row: row.verified_2 if row.det_ok else 0.0,
        "the same by the second recogniser",
        SECOND,
        "%",
    ),
    Metric(
        "miss_rate",
        "Misses",
        "identity",
        lambda row: float(not row.det_ok),
        "share of pictures in which no face was found that could be recognised",
        unit="%",
    ),
    Metric(
        "clip_t",
        "CLIP-T",
        "prompt",
        lambda row: row.clip_t,
        "cosine of CLIP between picture and prompt",
        CLIP,
    ),
    Metric(
        "clip_t_gain",
        "CLIP-T gain",
        "prompt",
        lambda row: row.clip_t_gain,
        "CLIP-T minus that of the base model's picture of the same prompt and seed",
        CLIP,
    ),
    Metric(
        "expr_hit",
        "Expression hit",
        "prompt",
        lambda row: row.asked_expr_hit,
        "share of the prompts that ask for an expression whose picture shows it",
        EXPRESSIONS,
        "%",
    ),
    Metric(
        "pose_hit",
        "Pose hit",
        "prompt",
        lambda row: row.asked_pose_hit,
        "share of the prompts that ask for a pose of the head whose picture shows it",
        unit="%",
    ),
    Metric(
        "pose_div_pitch",
        "Pose-Div pitch",
        "diversity",
        lambda row: row.d_pitch,
        "mean absolute difference of pitch to the first reference photo",
        unit="°",
    ),
    Metric(
        "pose_div_yaw",
        "Pose-Div yaw",
        "diversity",
        lambda row: row.d_yaw,
        "mean absolute difference of yaw to the first reference photo",
        unit="°",
    ),
    Metric(
        "expr_div",
        "Expr-Div",
        "diversity",
        lambda row: row.expr_changed,
        "share of pictures with another expression than the first reference photo",
        EXPRESSIONS,
        "%",
    ),
    Metric(
        "copy_geo",
        "Copying",
        "diversity",
        lambda row: row.copy_geo,
        "1: the picture is as near to the first reference photo as that is to itself; -1: the same for a photo of the person that "
        "no adapter saw; 0: as near to one as to the other",
    ),
    Metric(
        "clip_i",
        "CLIP-I",
        "diversity",
        lambda row: row.clip_i,
        "cosine of CLIP between the picture and the reference photos",
        CLIP,
    ),
    Metric(
        "outside",
        "Changed outside",
        "picture",
        lambda row: row.outside,
        "mean absolute difference of the pixels (0..1) outside the faces to the base model's picture of the same prompt and seed",
    ),
    Metric(
        "face_fraction",
        "Face size",
        "picture",
        lambda row: row.face_fraction,
        "share of the picture that the largest face's box covers",
        unit="%",
    ),
    Metric(
        "several_faces",
        "Several faces",
        "picture",
        lambda row: float(row.n_faces > 1),
        "share of pictures with more than one face",
        unit="%",
    ),
    Metric(
        "seconds",
        "Seconds",
        "picture",
        lambda row: row.seconds,
        "time to generate a picture",
        unit="s",
    ),
)
BY_NAME = {metric.name: metric for metric in METRICS}


def available(config: EvaluationConfig, verifies: tuple[bool, bool]) -> tuple[Metric, ...]:
    """The measurable metrics. `verifies`: whether each recogniser has a threshold."""
    return tuple(
        metric
        for metric in METRICS
        if not _missing(metric, config)
        and (metric.name != "verified" or verifies[0])
        and (metric.name != "verified_2" or verifies[1])
    )


def aggregate(rows: Sequence[ImageRow], metrics: Sequence[Metric]) -> dict[str, Estimate | None]:
    """Mean of every metric over the rows, with its interval over people; None if it is not one of `metrics` or has no value."""
    people = [row.identity for row in rows]
    return {
        metric.name: estimate([metric.value(row) for row in rows], people) if metric in metrics else None
        for metric in METRICS
    }


def _missing(metric: Metric, config: EvaluationConfig) -> bool:
    settings = {
        "": "always",
        SECOND: config.metrics.second,
        CLIP: config.metrics.clip,
        EXPRESSIONS: config.expression.path,
    }
    return not settings[metric.needs]


class Result(Protocol):
    """Interface of a result row (`summary.SummaryRow`)."""

    @property
    def run(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def metrics(self) -> Mapping[str, Estimate | None]: ...


@dataclass(frozen=True)
class Requirement:
    """A required value: `metric>=value` for all adapters at all scales, or `run/metric>=value` for those of one run."""

    text: str
    run: str  # empty: all adapters
    metric: str
    comparison: str
    value: float

    def failures(self, rows: Sequence[Result]) -> list[str]:
        """One line for each adapter row that fails. A metric without a value fails."""
        compare = {">=": operator.ge, "<=": operator.le}[self.comparison]
        lines = []
        for row in rows:
            found = row.metrics[self.metric]
            if self.run in ("", row.run) and not (found is not None and compare(found.mean, self.value)):
                shown = NOT_AVAILABLE if found is None else f"{found.mean:.4g}"
                lines.append(f"required {self.text}: {row.title} has {self.metric} {shown}")
        return lines


_REQUIREMENT = re.compile(r"(?:(?P<run>.+)/)?(?P<metric>\w+)\s*(?P<comparison>>=|<=)\s*(?P<value>\S+)")


def read_requirement(text: str, config: EvaluationConfig) -> Requirement:
    """Parse a requirement from the command line.

    Raises:
        ConfigError: wrong form, an unknown metric or run, or a metric whose model is not configured.
    """
    match = _REQUIREMENT.fullmatch(text.strip())
    try:
        value = float(match["value"]) if match else float("nan")
    except ValueError:
        value = float("nan")
    if match is None or value != value:
        raise ConfigError(
            f"--require takes a metric, >= or <=, and a number, in quotes since a shell takes > for itself: 'id_sim>=0.5' or "
            f"'my run/id_sim>=0.5'; got {text!r}"
        )
    metric = BY_NAME.get(match["metric"])
    if metric is None:
        raise ConfigError(
            f"--require {text}: there is no metric {match['metric']}{nearest(match['metric'], BY_NAME)}"
        )
    if _missing(metric, config):
        raise ConfigError(
            f"--require {text}: {metric.name} needs {metric.needs}, which the configuration does not name"
        )
    runs = [run.name for run in config.runs]
    if not runs or (match["run"] and match["run"] not in runs):
        raise ConfigError(
            f"--require {text}: there is no run {match['run'] or 'at all'}; there are {', '.join(runs) or 'none'}"
        )
    return Requirement(text.strip(), match["run"] or "", metric.name, match["comparison"], value)
