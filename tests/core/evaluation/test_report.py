"""What is told of a result, from rows that are made up."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from idadapter_core.config import parse_config
from idadapter_core.evaluation.charts import Bars, Point, Series, bars, histogram, scatter
from idadapter_core.evaluation.config import BASE_MODEL, EvaluationConfig
from idadapter_core.evaluation.measure import Bands, ImageRow
from idadapter_core.evaluation.metrics import METRICS
from idadapter_core.evaluation.presets import with_preset
from idadapter_core.evaluation.report import Pictures, to_html
from idadapter_core.evaluation.summary import Summary, summarise, to_markdown

PROMPT = "a <class word> in a boat"
KNOWN: dict[str, Any] = {
    "group": "own",
    "prompt": PROMPT,
    "class_word": "man",
    "seed": 0,
    "det_ok": True,
    "n_faces": 1,
}


def row(run: str, scale: float | None, identity: str, id_cos: float | None, **more: Any) -> ImageRow:
    blank = dict.fromkeys((entry.name for entry in fields(ImageRow)), None)
    given = {"run": run, "scale": scale, "identity": identity, "id_cos": id_cos, "asks": "", "picture": "p"}
    return ImageRow(**{**blank, **KNOWN, **given, **more})


def configuration(**sections: Any) -> EvaluationConfig:
    content = {
        "metrics": {"faces": "f", "clip": "c"},
        "prompts": [{"text": PROMPT}],
        "sampling": {"groups": []},
        "data": {"references": 5},
    }
    return with_preset(parse_config(EvaluationConfig, {**content, **sections}))


def summary_of(config: EvaluationConfig, rows: list[ImageRow]) -> Summary:
    bands = Bands([0.7, 0.8], [0.0, 0.1], None)
    return summarise(config, rows, 2, METRICS, bands, None, ["a <note>"], {"torch": "2"})


def page(summary: Summary, config: EvaluationConfig) -> str:
    def image(row: ImageRow) -> np.ndarray:
        return np.full((40, 60, 3), 128, np.uint8)

    return to_html(summary, config, Pictures(image, image, image))


def test_the_papers_figures_stand_beside_ours() -> None:
    config = configuration(preset={"name": "idadapter-table2", "adapters": {"full": "x"}})
    rows = [
        row(run, 1.0, who, cosine, expr_changed=who == "a")
        for run, cosine in (("N=4", 0.5), ("N=1", 0.25))
        for who in "ab"
    ]
    summary = summary_of(config, rows)
    text = to_markdown(summary)
    line = next(line for line in text.splitlines() if line.startswith("| N=4 | 0.5"))
    assert "0.500 (paper: 0.603)" in line
    assert "50.0% (paper: 65.0%)" in line
    assert "| no ID loss (N=4) | not evaluated (paper: 0.592)" in text
    html = page(summary, config)
    assert "<td>0.500</td><td>0.603</td>" in html
    assert "a &lt;note&gt;" in html


def test_gates_and_norms_of_a_training(tmp_path: Path) -> None:
    lines = [
        {"step": step, "gates": {"0": [0.1 * step, -0.2], "3": [None, 0.0]}, "norm_ratios": {"0": 0.3}}
        for step in (1, 2, 3)
    ]
    (tmp_path / "log.jsonl").write_text(
        "".join(f"{json.dumps(line)}\n" for line in [{"step": 0}, *lines]), encoding="utf-8"
    )
    config = configuration(runs=[{"name": "one", "path": "p", "log": str(tmp_path)}])
    html = page(summary_of(config, [row("one", 1.0, "a", 0.5)]), config)
    for title in ("|gate| of the attention", "|gate| of the feed-forward", "norm of what adapters add"):
        assert title in html
    assert '<th scope="row">3</th><td>0.3</td><td>0.3</td><td>0.3</td>' in html
    without = configuration(runs=[{"name": "one", "path": "p", "log": str(tmp_path / "none")}])
    assert "|gate|" not in page(summary_of(without, [row("one", 1.0, "a", 0.5)]), without)


def test_a_run_without_a_single_face() -> None:
    config = configuration(runs=[{"name": "one", "path": "p"}])
    lost = [row("one", 1.0, who, None, det_ok=False, n_faces=0, clip_t_gain=0.1) for who in "ab"]
    base = [row(BASE_MODEL, None, who, 0.1, clip_t_gain=0.0) for who in "ab"]
    html = page(summary_of(config, base + lost), config)
    assert "No face found" in html
    assert "Without a value of Pose-Div yaw" in html or "No row has a value of Pose-Div yaw" in html
    assert "nan" not in html.lower().replace("finance", "")


def test_grids_show_best_median_and_worst() -> None:
    config = configuration(runs=[{"name": "one", "path": "p"}])
    cosines = [round(0.05 * number, 3) for number in range(1, 16)]
    rows = [row("one", 1.0, f"person {cosine}", cosine) for cosine in cosines]
    html = page(summary_of(config, rows), config)
    found = {
        name: re.findall(r"<b>cos ([\d.]+)</b>", part)
        for name, part in re.findall(r"<h4>(\w+)</h4>(.*?)(?=<h4>|</section>)", html, re.S)
    }
    assert found["Best"] == ["0.750", "0.700", "0.650"]
    assert found["Worst"] == ["0.050", "0.100", "0.150"]
    assert found["Median"] == ["0.450", "0.400", "0.350"]
    assert html.count("reference photo of person") == 9
    assert 'alt="one: a man in a boat, cos 0.750"' in html


def numbers(svg: str, attribute: str) -> list[float]:
    return [float(value) for value in re.findall(rf'<text class="axis" {attribute}="([-\d.]+)"', svg)]


@pytest.mark.parametrize(
    "values", [[0.0, 1.0], [-0.1271, 0.003], [12.0, 12.0], [0.0], [1e-5, 3e-5], [-3000.0, 52000.0]]
)
def test_axes_hold_all_points_and_their_ticks_are_true(values: list[float]) -> None:
    points = [Point(value, 0.5, "label") for value in values]
    svg = scatter([Series("s", 0, points)], "x", "y", "what it shows")
    places = [float(x) for x in re.findall(r'class="marker s0" transform="translate\(([-\d.]+)', svg)]
    assert len(places) == len(values)
    assert all(62 <= place <= 622 for place in places)
    ticks = re.findall(r'<text class="axis" x="([-\d.]+)" y="346.*?>([-\d.]+)</text>', svg)
    assert len(ticks) >= 2
    # The printed number of each tick stands where a point of that value would.
    (x0, v0), (x1, v1) = ((float(place), float(value)) for place, value in (ticks[0], ticks[-1]))
    for value, place in zip(values, places, strict=True):
        assert x0 + (value - v0) * (x1 - x0) / (v1 - v0) == pytest.approx(place, abs=1.0)


def test_bars_and_histograms_hold_what_there_is() -> None:
    svg = bars(["a", "b"], [Bars("one", 0, [0.5, None], [(0.4, 0.6), None])], "y", "label")
    assert svg.count('class="bar') == 1
    assert svg.count("whisker") == 1
    assert ">–</text>" in svg
    svg = histogram([("real", "genuine", [0.5] * 10)], [("run", "s0", [])], None, "x", "label")
    assert "nan" not in svg
    assert "threshold" not in svg
    assert svg.count("<path class=") >= 2


def test_a_scale_has_a_row_of_its_own() -> None:
    config = configuration(runs=[{"name": "one", "path": "p", "scales": [0.5, 1.5]}])
    rows = [row("one", scale, who, scale / 2) for who in "ab" for scale in (0.5, 1.5)]
    summary = summary_of(config, rows)
    assert [(r.run, r.scale, len(r.pictures)) for r in summary.rows] == [("one", 0.5, 2), ("one", 1.5, 2)]
    assert replace(config, runs=()).runs == ()
