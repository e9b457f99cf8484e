"""Draws docs/images/fronts.svg, identity against prompt over scales, from docs/claims/claims.json. Needs matplotlib.

python -m tests.harness.fronts_picture
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from idadapter_core.demo_world.claims.cases import SCALES, fronts
from idadapter_core.demo_world.claims.record import Digests, Numbers, facts_of
from idadapter_core.demo_world.shipped import ASSETS
from tests.harness.claims_page import measured
from tests.harness.comfy import REPOSITORY

PICTURE = REPOSITORY / "docs" / "images" / "fronts.svg"
METRICS = frozenset({"likeness", "accuracy"})
WAYS = {"naive": "naive", "rescaled": "rescaled", "stepped": "rescaled, schedule of steps"}
TITLES = {"uniid": "UniID", "faceid": "IP-Adapter FaceID"}


def main() -> int:
    record, digests = measured(), Digests(ASSETS)
    found = {case.name: record.find(case.name, facts_of(case, digests, ()), METRICS) for case in fronts()}
    plot: Any = import_module("matplotlib.pyplot")
    plot.rcParams["svg.hashsalt"] = PICTURE.name  # the same file each time
    figure, axes = plot.subplots(1, len(TITLES), figsize=(10, 4), sharex=True, sharey=True, squeeze=False)
    for axis, (adapter, title) in zip(axes[0], TITLES.items(), strict=True):
        for way, label in WAYS.items():
            of_scales = [(scale, found[f"{adapter}_{way}_{scale}"]) for scale in SCALES]
            points = [(scale, _point(numbers)) for scale, numbers in of_scales if numbers is not None]
            axis.plot(*zip(*(point for _, point in points), strict=True), marker="o", label=label)
            for scale, point in points:
                axis.annotate(f"{scale:g}", point, textcoords="offset points", xytext=(4, 4), fontsize=8)
        axis.set(title=title, xlabel="share of the prompt followed")
        axis.legend()
    axes[0][0].set_ylabel("likeness, second recogniser")
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})
    print(f"wrote {PICTURE}")
    return 0


def _point(numbers: Numbers) -> tuple[float, float]:
    accuracy, likeness = numbers["accuracy"], numbers["likeness"]
    assert accuracy is not None
    assert likeness is not None
    return accuracy.mean, likeness.mean


if __name__ == "__main__":
    sys.exit(main())
