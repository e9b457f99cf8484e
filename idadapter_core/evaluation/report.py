"""report.html: the whole result in one file that needs no network and no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from ..faces.images import Image
from ..logs import read_log
from .charts import Bars, Point, Series, bars, color_of, curves, histogram, legend, scatter
from .config import BASE_MODEL, PASTE, EvaluationConfig
from .measure import NOT_AVAILABLE, Bands, ImageRow
from .metrics import BY_NAME, METRICS, SECTIONS, Metric
from .statistics import Estimate
from .summary import Summary, SummaryRow, main_row, published_metrics, published_rows

THUMBNAIL = 128  # pixels
_LONGEST_LABEL = 20  # characters
SHOWN = 3  # pictures of each kind in a grid
_GENUINE, _IMPOSTOR = "genuine", "impostor"  # colours of the bands of real photos

Read = Callable[[ImageRow], Image]


@dataclass(frozen=True)
class Pictures:
    """Where the report gets pictures from; each (H, W, 3), RGB uint8."""

    of_row: Read
    reference: Read  # the first reference photo of a row's person
    base: Read  # the base model's picture of a row's prompt and seed


def to_html(summary: Summary, config: EvaluationConfig, pictures: Pictures) -> str:
    """The report as one HTML document."""
    sections = [
        _overview(summary),
        *_published(summary),
        *_fronts(summary),
        *_groups(summary),
        _histograms(summary),
        *_training(config),
        *_grids(summary, pictures),
        _tables(summary),
        _meaning(summary),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>Evaluation of identity adapters</title><style>{_STYLE}</style></head><body><main>"
        f"{''.join(sections)}</main></body></html>\n"
    )


# ------------------------------------------------------------------------------------------------ parts


def _overview(summary: Summary) -> str:
    pictures = sum(len(row.pictures) for row in summary.rows)
    notes = "".join(f"<li>{escape(note)}</li>" for note in summary.notes)
    names = ("id_sim", "id_sim_miss0", "id_sim_2", "verified", "clip_t_gain", "expr_div", "pose_div_yaw")
    table = _metric_table(summary, [BY_NAME[name] for name in names])
    return (
        "<header><h1>Evaluation of identity adapters</h1>"
        f"<p>{summary.people} people, {pictures} pictures. Small numbers under a mean: 95 % bootstrap interval over people. "
        "Two anchors need no adapter: the base model, which knows nobody, and the reference photo itself, which follows no prompt."
        f"</p>{f'<ul>{notes}</ul>' if notes else ''}</header>{table}"
    )


def _published(summary: Summary) -> list[str]:
    if summary.preset is None or not summary.preset.published:
        return []
    head = "".join(
        f'<th scope="col" colspan="2">{escape(metric.title)}</th>' for metric in published_metrics(summary)
    )
    second = '<th scope="col">here</th><th scope="col">paper</th>' * len(published_metrics(summary))
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(ours)}</td><td>{escape(theirs)}</td>" for ours, theirs in cells)
        + "</tr>"
        for name, cells in published_rows(summary)
    )
    return [
        f"<section><h2>Beside the published figures</h2><p>{escape(summary.preset.title)}. {escape(summary.preset.source)}.</p>"
        f'<div class="scroll"><table><thead><tr><th rowspan="2" scope="col">row</th>{head}</tr><tr>{second}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    ]


def _fronts(summary: Summary) -> list[str]:
    fronts = [
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
    ]
    return [
        f"<section><h2>{title}</h2><p>{text}</p>{_front(summary, BY_NAME[name])}</section>"
        for name, title, text in fronts
    ]


def _front(summary: Summary, across: Metric) -> str:
    identity = BY_NAME["id_sim_miss0"]
    if across not in summary.available:
        return f'<p class="missing">{escape(across.title)} is {NOT_AVAILABLE}: {across.needs} names no model.</p>'
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
        return f'<p class="missing">No row has a value of {escape(across.title)}.</p>'
    unit, least = {"%": (" (share)", 0.1), "°": (" (degrees)", 4.0)}.get(across.unit, ("", 0.1))
    label = (
        f"{identity.title} against {across.title} for {len(series)} runs; the numbers are in the table below"
    )
    note = (
        f"<p>Without a value of {escape(across.title)}: {escape('; '.join(unmeasured))}.</p>"
        if unmeasured
        else ""
    )
    return (
        f'<div class="scroll">{scatter(series, across.title + unit, identity.title, label, least=(least, 0.1))}</div>'
        f"{legend([(one.name, one.number, 'marker') for one in series])}{note}"
        f"{_details(_metric_table(summary, [identity, across]))}"
    )


def _point_label(row: SummaryRow, summary: Summary) -> str:
    """The scale where a run has several, else its name if there is room for it."""
    if sum(other.run == row.run for other in summary.rows) > 1:
        return f"{row.scale:g}"
    return row.run if len(row.run) <= _LONGEST_LABEL else ""


def _groups(summary: Summary) -> list[str]:
    sections = []
    for name in ("id_sim_miss0", "clip_t_gain"):
        metric = BY_NAME[name]
        if metric not in summary.available:
            continue
        series = []
        for number, run in enumerate(_runs(summary)):
            row = main_row(summary, run)
            found = [summary.of_group(row, group)[name] for group in summary.groups]
            series.append(
                Bars(row.title, number, [e.mean if e else None for e in found], [_interval(e) for e in found])
            )
        label = f"{metric.title} of {len(series)} runs in each group of prompts; the numbers are in the table below"
        head = "".join(f'<th scope="col">{escape(group)}</th>' for group in summary.groups)
        rows = "".join(
            f'<tr><th scope="row">{escape(one.name)}</th>'
            + "".join(f"<td>{NOT_AVAILABLE if v is None else metric.show(v)}</td>" for v in one.values)
            + "</tr>"
            for one in series
        )
        table = f'<div class="scroll"><table><thead><tr><th scope="col">run</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        sections.append(
            f"<h3>{escape(metric.title)}</h3>"
            f'<div class="scroll">{bars(summary.groups, series, metric.title, label)}</div>'
            f"{legend([(one.name, one.number, 'bar') for one in series])}{_details(table)}"
        )
    if not sections:
        return []
    text = "Each run at its scale nearest to 1. Thin lines: 95 % intervals."
    return [f"<section><h2>By group of prompts</h2><p>{text}</p>{''.join(sections)}</section>"]


def _histograms(summary: Summary) -> str:
    charts = _histogram(summary, "First recogniser", summary.bands, lambda row: row.id_cos)
    if summary.second_bands is not None:
        charts += _histogram(summary, "Second recogniser", summary.second_bands, lambda row: row.id_cos_2)
    return (
        "<section><h2>Cosines, and what they mean</h2><p>Raw cosines of two recognisers cannot be compared. The areas are real "
        "photos: pairs of one person, and pairs of two people. The lines are generated pictures against the person's reference "
        f"photos, each run at its scale nearest to 1; pictures without a face are not in them.</p>{charts}</section>"
    )


def _histogram(summary: Summary, title: str, bands: Bands, value: Callable[[ImageRow], float | None]) -> str:
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
    counts = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{len(values)}</td><td>{_quantile(values, 0.05):.3f}</td>'
        f"<td>{_quantile(values, 0.5):.3f}</td><td>{_quantile(values, 0.95):.3f}</td></tr>"
        for name, _, values in (*filled, *outlined)
    )
    table = (
        '<div class="scroll"><table><thead><tr><th scope="col"></th><th scope="col">count</th><th scope="col">5 %</th>'
        f'<th scope="col">median</th><th scope="col">95 %</th></tr></thead><tbody>{counts}</tbody></table></div>'
    )
    label = f"{title}: histograms of cosines of {len(outlined)} runs and of real photos; the numbers are in the table below"
    threshold = (
        f"The threshold lets 0.1 % of {len(bands.impostors)} pairs of two people pass"
        if bands.threshold is not None
        else f"No threshold: {len(bands.impostors)} pairs of two people are fewer than the 1000 that FAR 0.1 % needs"
    )
    entries = [(name, color, "band") for name, color, _ in filled] + [
        (name, color, "line") for name, color, _ in outlined
    ]
    return (
        f"<h3>{title}</h3><p>{threshold}.</p>"
        f'<div class="scroll">{histogram(filled, outlined, bands.threshold, "cosine", label)}</div>{legend(entries)}{_details(table)}'
    )


def _training(config: EvaluationConfig) -> list[str]:
    """Gates and norm ratios over training, where runs name the folders of their logs."""
    sections = []
    for run in config.runs:
        lines = read_log(Path(run.log)) if run.log else []
        charts = _gate_charts(lines) + _ratio_chart(lines)
        if charts:
            sections.append(f"<h3>{escape(run.name)}</h3>{charts}")
    return (
        [f"<section><h2>Gates and norms while training</h2>{''.join(sections)}</section>"] if sections else []
    )


def _gate_charts(lines: Sequence[Mapping[str, Any]]) -> str:
    logged = [line for line in lines if line.get("gates")]
    charts = ""
    for place, name in enumerate(("attention", "feed-forward")):
        values = [(line["step"], [pair[place] for pair in line["gates"].values()]) for line in logged]
        charts += _spread(values, f"|gate| of the {name}")
    return charts


def _ratio_chart(lines: Sequence[Mapping[str, Any]]) -> str:
    logged = [(line["step"], list(line["norm_ratios"].values())) for line in lines if line.get("norm_ratios")]
    return _spread(logged, "norm of what adapters add over norm of what they add to")


def _spread(values: Sequence[tuple[float, Sequence[float | None]]], title: str) -> str:
    """Smallest, median and largest magnitude over the blocks, by training step. A log has None for what was not finite."""
    known = [(step, [abs(v) for v in found if v is not None]) for step, found in values]
    known = [(step, found) for step, found in known if found]
    if len(known) < 2:
        return ""
    shares = (("largest", 1.0), ("median", 0.5), ("smallest", 0.0))
    series = [
        Series(name, number, [Point(step, _quantile(found, share)) for step, found in known])
        for number, (name, share) in enumerate(shares)
    ]
    first, last = known[0], known[-1]
    rows = "".join(
        f'<tr><th scope="row">{step:g}</th>'
        + "".join(f"<td>{_quantile(found, share):.4g}</td>" for _, share in shares)
        + "</tr>"
        for step, found in (first, last)
    )
    table = (
        '<div class="scroll"><table><thead><tr><th scope="col">step</th>'
        + "".join(f'<th scope="col">{name}</th>' for name, _ in shares)
        + f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    label = f"{title} by training step: smallest, median and largest over the blocks; first and last values are in the table below"
    return (
        f'<div class="scroll">{curves(series, "step", title, label)}</div>'
        f"{legend([(one.name, one.number, 'line') for one in series])}{_details(table)}"
    )


def _grids(summary: Summary, pictures: Pictures) -> list[str]:
    sections = []
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
        grids = "".join(
            f"<h4>{name}</h4><div class='grid'>{''.join(_cell(picture, pictures) for picture in chosen)}</div>"
            for name, chosen in kinds
            if chosen
        )
        sections.append(f"<h3>{escape(row.title)}</h3>{grids}")
    if not sections:
        return []
    return [
        "<section><h2>Best, median and worst pictures</h2><p>By the cosine of the first recogniser. From left to right: the first "
        f"reference photo, the base model's picture of the same prompt and seed, the adapter's.</p>{''.join(sections)}</section>"
    ]


def _cell(row: ImageRow, pictures: Pictures) -> str:
    prompt = row.prompt.replace("<class word>", row.class_word)
    cosine = "no face" if row.id_cos is None else f"cos {row.id_cos:.3f}"
    images = (
        (pictures.reference(row), f"reference photo of {row.identity}"),
        (pictures.base(row), f"base model: {prompt}"),
        (pictures.of_row(row), f"{row.run}: {prompt}, {cosine}"),
    )
    shown = "".join(_image(image, text) for image, text in images)
    return f"<figure><div>{shown}</div><figcaption><b>{cosine}</b> · {escape(row.identity)}<br>{escape(prompt)}</figcaption></figure>"


def _tables(summary: Summary) -> str:
    tables = ""
    for section in SECTIONS:
        metrics = [metric for metric in METRICS if metric.section == section]
        tables += f"<h3>{section.capitalize()}</h3>{_metric_table(summary, metrics)}"
    return f"<section><h2>All numbers</h2>{tables}</section>"


def _meaning(summary: Summary) -> str:
    metrics = "".join(
        f"<dt>{escape(metric.title)} <code>{metric.name}</code></dt><dd>{escape(metric.meaning)}</dd>"
        for metric in METRICS
    )
    facts = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(value)) or '–'}</dd>"
        for name, value in summary.facts.items()
    )
    return f"<section><h2>What the numbers are</h2><dl>{metrics}</dl><h2>What was used</h2><dl>{facts}</dl></section>"


# ------------------------------------------------------------------------------------------------ pieces


def _runs(summary: Summary) -> list[str]:
    """Adapters first, so that their colours do not depend on the anchors."""
    names = list(dict.fromkeys(row.run for row in summary.rows))
    return sorted(names, key=lambda name: name in (BASE_MODEL, PASTE))


def _metric_table(summary: Summary, metrics: Sequence[Metric]) -> str:
    head = "".join(f'<th scope="col">{escape(metric.title)}</th>' for metric in metrics)
    rows = "".join(_metric_row(row, metrics) for row in summary.rows)
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">run</th><th scope="col">scale</th><th scope="col">n</th>'
        f'<th scope="col">misses</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _metric_row(row: SummaryRow, metrics: Sequence[Metric]) -> str:
    cells = "".join(
        f"<td>{row.show(metric)}{f'<small>{interval}</small>' if (interval := row.show_interval(metric)) else ''}</td>"
        for metric in metrics
    )
    scale = "–" if row.scale is None else f"{row.scale:g}"
    return f'<tr><th scope="row">{escape(row.run)}</th><td>{scale}</td><td>{len(row.pictures)}</td><td>{row.misses}</td>{cells}</tr>'


def _details(table: str) -> str:
    return f"<details><summary>The numbers</summary>{table}</details>"


def _interval(found: Estimate | None) -> tuple[float, float] | None:
    return None if found is None or found.low is None or found.high is None else (found.low, found.high)


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def _image(image: Image, text: str) -> str:
    picture = PILImage.fromarray(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL), PILImage.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" width="{picture.width}" height="{picture.height}" alt="{escape(text)}">'


# Told apart with any kind of colour vision where they are next to each other, at 4.5:1 or more on the page.
_LIGHT = (
    "#0072b2",
    "#c04f00",
    "#007d5a",
    "#aa3f86",
    "#7a5c00",
    "#5a4fcf",
    "#a3303b",
    "#2b6f77",
    "#5b5b5b",
    "#1b1f24",
)
_DARK = (
    "#56b4e9",
    "#f0904a",
    "#3fcf9f",
    "#e38fc4",
    "#e0c04a",
    "#a9a1ff",
    "#ff8f98",
    "#7fd0d8",
    "#b8b8b8",
    "#e6e9ed",
)


def _colors(values: Sequence[str]) -> str:
    return "".join(f"--s{number}:{value};" for number, value in enumerate(values))


_STYLE = f"""
:root{{--back:#fff;--text:#1b1f24;--soft:#57606a;--rule:#d5dae0;--stripe:#f4f6f8;--genuine:#4a90c9;--impostor:#c06a6a;{_colors(_LIGHT)}}}
@media(prefers-color-scheme:dark){{:root{{--back:#14181d;--text:#e6e9ed;--soft:#a3adb8;--rule:#39414b;--stripe:#1c222a;--genuine:#6fb6ea;--impostor:#e08a8a;{_colors(_DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--back);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}}
main{{max-width:1160px;margin:0 auto;padding:24px 20px 64px}}
h1{{font-size:1.7em;margin:0 0 .3em}} h2{{font-size:1.3em;margin:2.2em 0 .4em}} h3{{font-size:1.08em;margin:1.6em 0 .4em}} h4{{margin:1.1em 0 .3em}}
p{{max-width:70ch}} .missing{{color:var(--soft);font-style:italic}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;margin:.6em 0;font-variant-numeric:tabular-nums}}
th,td{{padding:5px 9px;border-bottom:1px solid var(--rule);text-align:right;vertical-align:top;white-space:nowrap}}
thead th{{vertical-align:bottom;color:var(--soft);font-weight:600;white-space:normal}}
tbody th,thead tr:first-child th:first-child{{text-align:left;position:sticky;left:0;background:var(--back)}}
tbody th{{white-space:normal;min-width:9em;max-width:16em}}
tbody tr:nth-child(even),tbody tr:nth-child(even) th{{background:var(--stripe)}}
td small{{display:block;color:var(--soft);font-size:.78em}}
details{{margin:.4em 0}} summary{{cursor:pointer;color:var(--soft)}}
dt{{font-weight:600;margin-top:.6em}} dd{{margin:0 0 0 1.2em;max-width:80ch;overflow-wrap:anywhere}} code{{font-size:.9em;color:var(--soft);font-weight:400}}
.legend{{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;padding:0;margin:.3em 0 .6em}} .legend li{{display:flex;align-items:center;gap:6px}}
.chart{{display:block;width:100%;height:auto}}
.chart text{{font-size:12px;fill:var(--text)}} .chart .axis,.chart .note{{fill:var(--soft)}} .chart .title{{font-size:13px}}
.chart .point{{font-size:11px;fill:currentColor;paint-order:stroke;stroke:var(--back);stroke-width:3px}}
.grid{{stroke:var(--rule);stroke-width:1;fill:none}} .zero{{stroke:var(--soft);fill:none}}
.line{{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}}
.interval{{fill:none;stroke:currentColor;stroke-width:1;opacity:.55}} .whisker{{fill:none;stroke:var(--text);stroke-width:1.2;opacity:.7}}
.marker{{fill:currentColor;stroke:var(--back);stroke-width:1}} .bar{{fill:currentColor}}
.band{{fill:currentColor;opacity:.32}} .threshold{{fill:none;stroke:var(--text);stroke-dasharray:5 4}}
.genuine{{color:var(--genuine)}} .impostor{{color:var(--impostor)}}
{"".join(f".s{n}{{color:var(--s{n})}}" for n in range(len(_LIGHT)))}
div.grid{{display:flex;flex-wrap:wrap;gap:14px}}
figure{{margin:0;width:360px;max-width:100%}} figure div{{display:flex;gap:4px;align-items:flex-start}} figure img{{max-width:33%;height:auto;border-radius:3px}}
figcaption{{font-size:.83em;color:var(--soft);margin-top:3px}} figcaption b{{color:var(--text)}}
@media (max-width:640px){{th,td{{padding:4px 5px;font-size:.85em}} tbody th{{min-width:5em;max-width:8em}}}}
@media print{{details>*{{display:block}}}}
""".replace("\n", "")
