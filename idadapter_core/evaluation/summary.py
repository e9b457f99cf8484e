"""Summary of an evaluation: one row per run and scale, and one per anchor."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..statistics import FAR, Estimate
from .config import EvaluationConfig
from .measure import NOT_AVAILABLE, Bands, ImageRow
from .metrics import METRICS, SECTIONS, Metric, aggregate
from .presets import PRESETS, Figures, Preset


@dataclass(frozen=True, eq=False)
class SummaryRow:
    """The images of a run at one scale."""

    run: str
    scale: float | None  # None: an anchor
    pictures: tuple[ImageRow, ...]
    metrics: Mapping[str, Estimate | None]
    published: Figures  # the paper's values, if any

    @property
    def misses(self) -> int:
        """Number of images without a recognisable face."""
        return sum(not row.det_ok for row in self.pictures)

    @property
    def title(self) -> str:
        """The run, with its scale unless it is an anchor."""
        return self.run if self.scale is None else f"{self.run}, scale {self.scale:g}"

    def show(self, metric: Metric) -> str:
        """Format the mean of a metric, or n/a."""
        found = self.metrics[metric.name]
        return NOT_AVAILABLE if found is None else metric.show(found.mean)

    def show_interval(self, metric: Metric) -> str:
        """Format the interval of a metric; empty if there is none."""
        found = self.metrics[metric.name]
        if found is None or found.low is None or found.high is None:
            return ""
        return f"{metric.number(found.low)} to {metric.number(found.high)}"


@dataclass(frozen=True, eq=False)
class Summary:
    """The result of an evaluation."""

    rows: tuple[SummaryRow, ...]
    groups: tuple[str, ...]  # of prompts, in order
    people: int
    available: tuple[Metric, ...]
    bands: Bands  # of the first recogniser
    second_bands: Bands | None
    preset: Preset | None
    notes: tuple[str, ...]
    facts: Mapping[str, Any]  # versions and digests

    def of_group(self, row: SummaryRow, group: str) -> Mapping[str, Estimate | None]:
        """The metrics of a row over the prompts of one group."""
        return aggregate([picture for picture in row.pictures if picture.group == group], self.available)

    def adapters(self) -> list[SummaryRow]:
        """The rows other than anchors."""
        return [row for row in self.rows if row.scale is not None]


def summarise(
    config: EvaluationConfig,
    rows: Sequence[ImageRow],
    people: int,
    available: tuple[Metric, ...],
    bands: Bands,
    second_bands: Bands | None,
    notes: Sequence[str],
    facts: Mapping[str, Any],
) -> Summary:
    """Summarise all images. Rows are in the order in which runs and scales first appear."""
    preset = PRESETS.get(config.preset.name)
    together: dict[tuple[str, float | None], list[ImageRow]] = {}
    for row in rows:
        together.setdefault((row.run, row.scale), []).append(row)
    return Summary(
        rows=tuple(
            SummaryRow(
                run,
                scale,
                tuple(pictures),
                aggregate(pictures, available),
                preset.published.get(run, {}) if preset else {},
            )
            for (run, scale), pictures in together.items()
        ),
        groups=tuple(dict.fromkeys(prompt.group for prompt in config.all_prompts())),
        people=people,
        available=available,
        bands=bands,
        second_bands=second_bands,
        preset=preset,
        notes=tuple(notes),
        facts=facts,
    )


def to_json(summary: Summary) -> str:
    """Render summary.json. Missing values are null."""

    def plain(metrics: Mapping[str, Estimate | None]) -> dict[str, Any]:
        return {name: None if e is None else dataclasses.asdict(e) for name, e in metrics.items()}

    content = {
        "facts": dict(summary.facts),
        "people": summary.people,
        "notes": list(summary.notes),
        "rows": [
            {
                "run": row.run,
                "scale": row.scale,
                "n": len(row.pictures),
                "misses": row.misses,
                "metrics": plain(row.metrics),
                "groups": {group: plain(summary.of_group(row, group)) for group in summary.groups},
                "published": dict(row.published),
            }
            for row in summary.rows
        ],
        "real_photos": {
            name: None if bands is None else describe_bands(bands)
            for name, bands in (("first", summary.bands), ("second", summary.second_bands))
        },
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def describe_bands(bands: Bands) -> dict[str, Any]:
    """Statistics of a recogniser's cosines of real photos."""

    def of(values: Sequence[float]) -> dict[str, Any] | None:
        if not values:
            return None
        low, middle, high = np.percentile(values, [5, 50, 95])
        return {"pairs": len(values), "p5": float(low), "median": float(middle), "p95": float(high)}

    return {
        "genuine": of(bands.genuine),
        "impostors": of(bands.impostors),
        f"threshold_far_{FAR:g}": bands.threshold,
    }


def to_markdown(summary: Summary) -> str:
    """Render summary.md: one table per section of metrics, with intervals; the paper's values; and explanations of the metrics."""
    pictures = sum(len(row.pictures) for row in summary.rows)
    lines = [
        "# Evaluation",
        "",
        f"{summary.people} people, {pictures} pictures. In brackets: 95 % bootstrap interval over people. "
        "Diversity alone rewards failure (who is lost has another pose, too): read it beside the identity.",
        "",
    ]
    lines += [f"- {note}" for note in summary.notes] + ([""] if summary.notes else [])
    for section in SECTIONS:
        metrics = [metric for metric in METRICS if metric.section == section]
        lines += [f"## {section.capitalize()}", "", *_markdown_table(summary, metrics), ""]
    if summary.preset and summary.preset.published:
        lines += ["## As published", "", f"{summary.preset.source}.", "", *_published_table(summary), ""]
    lines += ["## What the numbers are", ""]
    lines += [f"- {metric.title} (`{metric.name}`): {metric.meaning}" for metric in METRICS]
    return "\n".join(lines) + "\n"


def _markdown_table(summary: Summary, metrics: Sequence[Metric]) -> list[str]:
    head = ["run", "scale", "n", "misses", *(metric.title for metric in metrics)]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in summary.rows:
        cells = [
            row.run,
            "" if row.scale is None else f"{row.scale:g}",
            str(len(row.pictures)),
            str(row.misses),
        ]
        for metric in metrics:
            interval = row.show_interval(metric)
            cells.append(row.show(metric) + (f" ({interval})" if interval else ""))
        lines.append(_line(cells))
    return lines


def published_metrics(summary: Summary) -> list[Metric]:
    """The metrics for which the paper has values."""
    names = {name for row in (summary.preset.published if summary.preset else {}).values() for name in row}
    return [metric for metric in METRICS if metric.name in names]


def published_rows(summary: Summary) -> list[tuple[str, list[tuple[str, str]]]]:
    """Rows of the paper's table: the name and, for each of `published_metrics`, our value and the paper's."""
    assert summary.preset is not None
    measured = {row.run: row for row in reversed(summary.adapters())}
    lines = []
    for name, figures in summary.preset.published.items():
        cells = []
        for metric in published_metrics(summary):
            ours = measured[name].show(metric) if name in measured else "not evaluated"
            cells.append((ours, metric.show(figures[metric.name])))
        lines.append((name, cells))
    return lines


def _published_table(summary: Summary) -> list[str]:
    head = ["row", *(metric.title for metric in published_metrics(summary))]
    lines = [_line(head), _line(["---"] * len(head))]
    for name, cells in published_rows(summary):
        lines.append(_line([name, *(f"{ours} (paper: {theirs})" for ours, theirs in cells)]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main_row(summary: Summary, run: str) -> SummaryRow:
    """The row that represents a run where there is room for only one: the scale nearest to 1, or an anchor's only row."""
    rows = [row for row in summary.rows if row.run == run]
    return min(rows, key=lambda row: abs((row.scale if row.scale is not None else 1.0) - 1.0))


__all__ = [
    "Summary",
    "SummaryRow",
    "describe_bands",
    "main_row",
    "published_metrics",
    "published_rows",
    "summarise",
    "to_json",
    "to_markdown",
]
