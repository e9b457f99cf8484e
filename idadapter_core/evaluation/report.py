"""report.html: the whole result in one file, without network or scripts.

This module collects the content; `report.html.jinja` and `report.css` define the layout.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image as PILImage

from ..extra import require
from ..faces.images import Image
from ..logs import read_log
from ..statistics import Estimate
from .charts import Bars, Point, Series, bars, color_of, curves, histogram, legend, scatter
from .config import BASE_MODEL, PASTE, EvaluationConfig
from .measure import NOT_AVAILABLE, Bands, ImageRow
from .metrics import BY_NAME, METRICS, SECTIONS, Metric
from .summary import Summary, SummaryRow, main_row, published_metrics, published_rows

THUMBNAIL = 128  # pixels
_TEMPLATE = "report.html.jinja"
_LONGEST_LABEL = 20  # characters
SHOWN = 3  # images of each kind in a grid
_GENUINE, _IMPOSTOR = "genuine", "impostor"  # colours of the bands of real photos
_FRONTS = (
    (
        "clip_t_gain",
        "Identity against prompt",
        "Up: more like the person. Right: closer to the prompt than the base model's picture. A point for each scale, joined "
        "in the order of the scales.",
    ),
    (
        "pose_div_yaw",
        "Identity against variety of pose",
        "Diversity alone rewards failure: a lost person has another pose, too. Good is up and to the right.",
    ),
    ("expr_div", "Identity against variety of expression", "Good is up and to the right, as above."),
)
_OVERVIEW = ("id_sim", "id_sim_miss0", "id_sim_2", "verified", "clip_t_gain", "expr_div", "pose_div_yaw")

Read = Callable[[ImageRow], Image]


@dataclass(frozen=True)
class Pictures:
    """Sources of the report's images, each (H, W, 3), RGB uint8."""

    of_row: Read
    reference: Read  # the first reference photo of a row's person
    base: Read  # the base model's image of a row's prompt and seed


class Cell(NamedTuple):
    """A table value and a short note under it."""

    text: str
    small: str = ""


@dataclass(frozen=True)
class Numbers:
    """A table: column titles, the first one for the row names; row names and cells."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]


@dataclass(frozen=True)
class Figure:
    """A chart with its legend and numbers; or the reason why there is none."""

    chart: str = ""  # SVG
    legend: str = ""  # HTML
    numbers: Numbers = Numbers((), ())
    note: str = ""
    missing: str = ""


class Published(NamedTuple):
    """A paper's values next to ours."""

    metrics: Sequence[Metric]
    rows: Sequence[tuple[str, Sequence[tuple[str, str]]]]


def to_html(summary: Summary, config: EvaluationConfig, pictures: Pictures) -> str:
    """Render the report as one HTML document."""
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page: str = environment.get_template(_TEMPLATE).render(
        summary=summary,
        metrics=METRICS,
        pictures=sum(len(row.pictures) for row in summary.rows),
        overview=_metric_table(summary, [BY_NAME[name] for name in _OVERVIEW]),
        published=_published(summary),
        fronts=[(title, text, _front(summary, BY_NAME[name])) for name, title, text in _FRONTS],
        groups=_groups(summary),
        histograms=_histograms(summary),
        training=_training(config),
        grids=_grids(summary, pictures),
        tables=_tables(summary),
    )
    return page


# ------------------------------------------------------------------------------------------------ parts


def _published(summary: Summary) -> Published | None:
    if summary.preset is None or not summary.preset.published:
        return None
    return Published(published_metrics(summary), published_rows(summary))


def _front(summary: Summary, across: Metric) -> Figure:
    identity = BY_NAME["id_sim_miss0"]
    if across not in summary.available:
        return Figure(missing=f"{across.title} is {NOT_AVAILABLE}: {across.needs} names no model.")
    series, unmeasured = [], []
    for number, run in enumerate(_runs(summary)):
        points = []
        for row in summary.rows:
            x, y = row.metrics[across.name], row.metrics[identity.name]
            if row.run != run:
                continue
            if x is None or y is None:
                unmeasured.append(row.title)
                continue
            label = _point_label(row, summary)
            points.append(Point(x.mean, y.mean, label, _interval(x), _interval(y)))
        if points:
            series.append(Series(run, number, points))
    if not series:
        return Figure(missing=f"No row has a value of {across.title}.")
    unit, least = {"%": (" (share)", 0.1), "°": (" (degrees)", 4.0)}.get(across.unit, ("", 0.1))
    label = (
        f"{identity.title} against {across.title} for {len(series)} runs; the numbers are in the table below"
    )
    return Figure(
        scatter(series, across.title + unit, identity.title, label, least=(least, 0.1)),
        legend([(one.name, one.number, "marker") for one in series]),
        _metric_table(summary, [identity, across]),
        f"Without a value of {across.title}: {'; '.join(unmeasured)}." if unmeasured else "",
    )


def _point_label(row: SummaryRow, summary: Summary) -> str:
    """The scale if a run has several; otherwise its name, if there is room."""
    if sum(other.run == row.run for other in summary.rows) > 1:
        return f"{row.scale:g}"
    return row.run if len(row.run) <= _LONGEST_LABEL else ""


def _groups(summary: Summary) -> list[tuple[str, Figure]]:
    found = (BY_NAME[name] for name in ("id_sim_miss0", "clip_t_gain"))
    return [
        (metric.title, _bars_of_groups(summary, metric)) for metric in found if metric in summary.available
    ]


def _bars_of_groups(summary: Summary, metric: Metric) -> Figure:
    series = []
    for number, run in enumerate(_runs(summary)):
        row = main_row(summary, run)
        found = [summary.of_group(row, group)[metric.name] for group in summary.groups]
        series.append(
            Bars(row.title, number, [e.mean if e else None for e in found], [_interval(e) for e in found])
        )
    label = (
        f"{metric.title} of {len(series)} runs in each group of prompts; the numbers are in the table below"
    )
    rows = [
        (one.name, [Cell(NOT_AVAILABLE if v is None else metric.show(v)) for v in one.values])
        for one in series
    ]
    return Figure(
        bars(summary.groups, series, metric.title, label),
        legend([(one.name, one.number, "bar") for one in series]),
        Numbers(("run", *summary.groups), rows),
    )


def _histograms(summary: Summary) -> list[tuple[str, str, Figure]]:
    """Title, a sentence on the threshold, and the chart, for each recogniser."""
    found = [("First recogniser", summary.bands, lambda row: row.id_cos)]
    if summary.second_bands is not None:
        found.append(("Second recogniser", summary.second_bands, lambda row: row.id_cos_2))
    return [
        (title, _on_threshold(bands), _histogram(summary, title, bands, value))
        for title, bands, value in found
    ]


def _on_threshold(bands: Bands) -> str:
    if bands.threshold is None:
        return f"No threshold: {len(bands.impostors)} pairs of two people are fewer than the 1000 that FAR 0.1 % needs."
    return f"The threshold lets 0.1 % of {len(bands.impostors)} pairs of two people pass."


def _histogram(
    summary: Summary, title: str, bands: Bands, value: Callable[[ImageRow], float | None]
) -> Figure:
    filled = [
        (name, color, values)
        for name, color, values in (
            ("real photos, two people", _IMPOSTOR, bands.impostors),
            ("real photos, one person", _GENUINE, bands.genuine),
        )
        if values
    ]
    outlined = []
    for number, run in enumerate(_runs(summary)):
        row = main_row(summary, run)
        found = [v for v in map(value, row.pictures) if v is not None]
        if found and run != PASTE:
            outlined.append((row.title, color_of(number), found))
    rows = [
        (
            name,
            [
                Cell(f"{len(values)}"),
                *(Cell(f"{_quantile(values, share):.3f}") for share in (0.05, 0.5, 0.95)),
            ],
        )
        for name, _, values in (*filled, *outlined)
    ]
    label = f"{title}: histograms of cosines of {len(outlined)} runs and of real photos; the numbers are in the table below"
    bands_drawn = [(name, color, "band") for name, color, _ in filled]
    return Figure(
        histogram(filled, outlined, bands.threshold, "cosine", label),
        legend([*bands_drawn, *((name, color, "line") for name, color, _ in outlined)]),
        Numbers(("", "count", "5 %", "median", "95 %"), rows),
    )


def _training(config: EvaluationConfig) -> list[tuple[str, list[Figure]]]:
    """Gates and norm ratios over training, for runs with a log folder."""
    found = []
    for run in config.runs:
        lines = read_log(Path(run.log)) if run.log else []
        charts = [*_gate_charts(lines), *_ratio_chart(lines)]
        if charts:
            found.append((run.name, charts))
    return found


def _gate_charts(lines: Sequence[Mapping[str, Any]]) -> list[Figure]:
    logged = [line for line in lines if line.get("gates")]
    charts = []
    for place, name in enumerate(("attention", "feed-forward")):
        values = [(line["step"], [pair[place] for pair in line["gates"].values()]) for line in logged]
        charts += _spread(values, f"|gate| of the {name}")
    return charts


def _ratio_chart(lines: Sequence[Mapping[str, Any]]) -> list[Figure]:
    logged = [(line["step"], list(line["norm_ratios"].values())) for line in lines if line.get("norm_ratios")]
    return _spread(logged, "norm of what adapters add over norm of what they add to")


def _spread(values: Sequence[tuple[float, Sequence[float | None]]], title: str) -> list[Figure]:
    """Smallest, median and largest magnitude over the blocks, by training step. None in a log stands for a non-finite value."""
    known = [(step, [abs(v) for v in found if v is not None]) for step, found in values]
    known = [(step, found) for step, found in known if found]
    if len(known) < 2:
        return []
    shares = (("largest", 1.0), ("median", 0.5), ("smallest", 0.0))
    series = [
        Series(name, number, [Point(step, _quantile(found, share)) for step, found in known])
        for number, (name, share) in enumerate(shares)
    ]
    rows = [
        (f"{step:g}", [Cell(f"{_quantile(found, share):.4g}") for _, share in shares])
        for step, found in (known[0], known[-1])
    ]
    label = f"{title} by training step: smallest, median and largest over the blocks; first and last values are in the table below"
    return [
        Figure(
            curves(series, "step", title, label),
            legend([(one.name, one.number, "line") for one in series]),
            Numbers(("step", *(name for name, _ in shares)), rows),
        )
    ]


def _grids(summary: Summary, pictures: Pictures) -> list[tuple[str, list[tuple[str, list[dict[str, Any]]]]]]:
    """Title of each adapter, with its kinds of images and the images of each."""
    grids = []
    for row in summary.adapters():
        if row is not main_row(summary, row.run):
            continue
        found = sorted((p for p in row.pictures if p.id_cos is not None), key=lambda p: -(p.id_cos or 0.0))
        missed = [p for p in row.pictures if not p.det_ok]
        middle = max((len(found) - SHOWN) // 2, 0)
        kinds = (
            ("Best", found[:SHOWN]),
            ("Median", found[middle : middle + SHOWN]),
            ("Worst", found[-SHOWN:][::-1]),
            ("No face found", missed[:SHOWN]),
        )
        shown = [(name, [_cell(picture, pictures) for picture in chosen]) for name, chosen in kinds if chosen]
        grids.append((row.title, shown))
    return grids


def _cell(row: ImageRow, pictures: Pictures) -> dict[str, Any]:
    """A reference photo, the base model's image and the adapter's, with captions."""
    prompt = row.prompt.replace("<class word>", row.class_word)
    cosine = "no face" if row.id_cos is None else f"cos {row.id_cos:.3f}"
    images = (
        (pictures.reference(row), f"reference photo of {row.identity}"),
        (pictures.base(row), f"base model: {prompt}"),
        (pictures.of_row(row), f"{row.run}: {prompt}, {cosine}"),
    )
    shown = [_image(image, text) for image, text in images]
    return {"images": shown, "cosine": cosine, "person": row.identity, "prompt": prompt}


def _tables(summary: Summary) -> list[tuple[str, Numbers]]:
    """All metrics, by section."""
    return [
        (section.capitalize(), _metric_table(summary, [m for m in METRICS if m.section == section]))
        for section in SECTIONS
    ]


# ------------------------------------------------------------------------------------------------ pieces


def _runs(summary: Summary) -> list[str]:
    """Adapters first, so that their colours do not depend on the anchors."""
    names = list(dict.fromkeys(row.run for row in summary.rows))
    return sorted(names, key=lambda name: name in (BASE_MODEL, PASTE))


def _metric_table(summary: Summary, metrics: Sequence[Metric]) -> Numbers:
    rows = []
    for row in summary.rows:
        scale = "–" if row.scale is None else f"{row.scale:g}"
        counts = (Cell(scale), Cell(f"{len(row.pictures)}"), Cell(f"{row.misses}"))
        rows.append(
            (row.run, [*counts, *(Cell(row.show(metric), row.show_interval(metric)) for metric in metrics)])
        )
    return Numbers(("run", "scale", "n", "misses", *(metric.title for metric in metrics)), rows)


def _interval(found: Estimate | None) -> tuple[float, float] | None:
    return None if found is None or found.low is None or found.high is None else (found.low, found.high)


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def _image(image: Image, text: str) -> dict[str, Any]:
    """A thumbnail as a data URI, with its alternative text."""
    picture = PILImage.fromarray(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL), PILImage.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"source": source, "width": picture.width, "height": picture.height, "text": text}
