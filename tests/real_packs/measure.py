"""Measures what happens beside other packs.

    python -m tests.real_packs.measure                     the table of docs/other_packs.md, from all packs in PACKS_PATH
    python -m tests.real_packs.measure PACK --out FILE     the figures of one pack, as JSON

Each pack gets a process of its own: some of them change ComfyUI when they are imported.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.harness.comfy import REPOSITORY, import_comfy, load_pack
from tests.harness.server import server_environment
from tests.nodes.sampling import difference, record, rescale
from tests.real_packs import narrow
from tests.real_packs.cases import CASES, COMFYUI, PACKS, Case
from tests.real_packs.hosting import Host, PackError, packs_folder

SHARES = (1.0, 1 / 4, 1 / 16)
"""Shares of the picture that a mask of theirs is white in."""
METHODS = ("uniid", "idadapter")
HIGH = 1000.0
"""An adapter scale that no addition of the tests reaches."""


@dataclass
class Figures:
    """What was measured of one case. Differences are relative to the second picture unless said otherwise."""

    broken: str = ""  # why the case cannot run even without our nodes; nothing else is measured then
    alone: float = 0.0  # their node alone against the plain model
    order: dict[str, float] = field(default_factory=dict)  # by method, largest absolute difference
    ours_act: dict[str, float] = field(default_factory=dict)  # both nodes against theirs alone
    theirs_acts: dict[str, float] = field(default_factory=dict)  # both nodes against ours alone
    weight_0: dict[str, float] = field(default_factory=dict)  # largest absolute difference from theirs alone
    upstream: float = 0.0  # largest absolute change of the models that nodes were put on
    growth: int = 0  # tensors that stay per further run, beyond those that stay with theirs alone
    rescaled: float = 0.0  # `every attention patch` with no ID adapter, against theirs alone
    local_ratio: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # by share: least and largest of all sites
    below_cap: float = 0.0  # mode limit with a high cap against no rescaling, over weights of theirs
    dial: float = 0.0  # mode limit: weight 0.2 of theirs against weight 0.8
    framed: list[list[int]] = field(
        default_factory=list
    )  # for each picture of a batch: those that change if only its mask is white
    refusal: str = ""  # the error of a run with both nodes
    said: list[str] = field(
        default_factory=list
    )  # our warnings while both nodes were sampled, in both orders


@dataclass
class PackFigures:
    """What was measured of one pack."""

    commit: str = ""
    missing: str = ""  # why it could not be loaded
    cases: dict[str, Figures] = field(default_factory=dict)


class _Heard(logging.Handler):
    """The warnings of our own loggers."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("ComfyUI_IDAdapter"):
            self.texts.append(record.getMessage())


def measure(case: Case, host: Host) -> Figures:
    """Everything about one case."""
    figures = Figures()
    base = narrow.unet(case.kind)
    plain = case.draw(host, base)
    try:
        theirs_on = case.make(host, base)
        theirs = case.draw(host, theirs_on)
    except Exception as error:
        figures.broken = f"{type(error).__name__}: {error}".splitlines()[0]
        return figures
    if case.effect == "refused":
        figures.refusal = _refusal(case, host)
        return figures
    without = case.draw(host, base) if case.sample is None else narrow.draw(base, case.kind)
    figures.alone = difference(theirs, without) if theirs.shape == without.shape else float("inf")

    heard = _Heard()
    logging.getLogger().addHandler(heard)
    for method in METHODS:
        before = case.draw(host, case.make(host, narrow.apply(base, case.kind, method)))
        after = case.draw(host, narrow.apply(theirs_on, case.kind, method))
        figures.order[method] = _largest(before, after)
        figures.ours_act[method] = difference(after, theirs)
        ours = _ours_alone(case, host, narrow.apply(base, case.kind, method))
        figures.theirs_acts[method] = difference(after, ours) if after.shape == ours.shape else float("inf")
    figures.said = heard.texts
    logging.getLogger().removeHandler(heard)
    for method in METHODS:
        silent = case.draw(host, narrow.apply(theirs_on, case.kind, method, weight=0.0))
        figures.weight_0[method] = _largest(silent, theirs)
    figures.upstream = max(
        _largest(case.draw(host, base), plain), _largest(case.draw(host, theirs_on), theirs)
    )
    figures.growth = _growth(case, host)
    if case.effect in ("adds", "changes"):
        figures.rescaled = difference(case.draw(host, _every(theirs_on)), theirs)
    if case.windowed:
        figures.framed = _framed(case, host, theirs_on, theirs)
    if case.effect == "adds":
        _measure_addition(case, host, figures)
    return figures


def _refusal(case: Case, host: Host) -> str:
    try:
        case.draw(host, narrow.apply(narrow.unet(case.kind), case.kind))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _framed(case: Case, host: Host, theirs_on: Any, theirs: Tensor) -> list[list[int]]:
    """For each picture of a batch, which pictures change if the identity is let into this one alone."""
    framed = []
    for number in range(len(theirs)):
        mask = torch.zeros(len(theirs), 64, 64)
        mask[number] = 1
        drawn = case.draw(host, narrow.apply(theirs_on, case.kind, mask=mask))
        framed.append(
            [i for i, (new, old) in enumerate(zip(drawn, theirs, strict=True)) if not torch.equal(new, old)]
        )
    return framed


def _ours_alone(case: Case, host: Host, model: Any) -> Tensor:
    return narrow.draw(model, case.kind, **case.options) if case.sample else case.draw(host, model)


def _every(model: Any, mode: str = "normalized", scale: float = 1.0) -> Any:
    scales = {"adapter_early": scale, "adapter_late": scale}
    return rescale(model, mode, "every attention patch", **scales)


def _largest(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


def _measure_addition(case: Case, host: Host, figures: Figures) -> None:
    base = narrow.unet(case.kind)
    for share in SHARES:
        ratios = local_ratios(_every(case.make(host, base, mask=corner(share))), case.kind)
        figures.local_ratio[f"{share:g}"] = (min(ratios), max(ratios))
    weak, strong = (case.make(host, base, weight=weight) for weight in (0.2, 0.8))
    figures.below_cap = max(
        difference(case.draw(host, _every(model, "limit", HIGH)), case.draw(host, model))
        for model in (weak, strong)
    )
    weak_picture, strong_picture = (case.draw(host, _every(model, "limit", HIGH)) for model in (weak, strong))
    figures.dial = difference(weak_picture, strong_picture)


def corner(share: float, size: int = 128) -> Tensor:
    """A MASK (1, size, size) that is white in a corner of this share, 1 / 4**n."""
    mask = torch.zeros(1, size, size)
    side = round(size * share**0.5)
    mask[:, :side, :side] = 1
    return mask


def local_ratios(model: Any, kind: str) -> list[float]:
    """For each site and row: length of what was added over the text's, both over the tokens on which anything was added."""
    recorded, calls = record(model)
    narrow.draw(recorded, kind, steps=1, size=16)
    ratios: list[float] = []
    for site in calls[0].sites.values():
        text = site.text
        added = site.out.double() - text
        for row in range(len(added)):
            lives = added[row].norm(dim=1) > 1e-3 * text[row].norm(dim=1)
            if lives.any():
                ratios.append(float(added[row][lives].norm() / text[row][lives].norm()))
    return ratios


def _growth(case: Case, host: Host) -> int:
    base = narrow.unet(case.kind)

    def stays(model: Callable[[], Any]) -> int:
        counts = []
        for _ in range(3):
            case.draw(host, model())
            gc.collect()
            counts.append(sum(isinstance(thing, Tensor) for thing in gc.get_objects()))
        return counts[-1] - counts[1]

    beside = stays(lambda: narrow.apply(case.make(host, base), case.kind))
    return beside - max(stays(lambda: case.make(host, base)), 0)


def measure_pack(name: str) -> PackFigures:
    """All cases of one pack, in this process."""
    import_comfy()
    load_pack()
    torch.set_num_threads(1)
    folder = packs_folder()
    assert folder is not None  # the caller looked
    host, found = Host(folder), PackFigures()
    cases = [case for case in CASES if case.pack == name]
    wanted = [other for case in cases for other in case.together]
    if name != COMFYUI:
        found.commit = commit_of(folder / name)
        wanted.append(name)
    for pack in dict.fromkeys(wanted):
        if not (folder / pack / "__init__.py").is_file():
            found.missing = f"PACKS_PATH has no folder {pack}"
            return found
        try:
            host.load(pack)
        except PackError as error:
            found.missing = f"{pack} does not import here: {error}"
            return found
    found.cases = {case.name: measure(case, host) for case in cases}
    return found


def commit_of(folder: Path) -> str:
    """The first ten digits of a checkout's commit; "unknown" without git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short=10", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def measure_apart(name: str) -> PackFigures:
    """`measure_pack` in a process of its own.

    Raises:
        RuntimeError: the process broke off; the message has the tail of what it wrote.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "figures.json"
        done = subprocess.run(
            [sys.executable, "-m", "tests.real_packs.measure", name, "--out", str(out)],
            cwd=REPOSITORY,
            env=server_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not out.is_file():
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
            raise RuntimeError(f"measuring {name} ended with {done.returncode}:\n{tail}")
        read = json.loads(out.read_text(encoding="utf-8"))
    cases = {case: Figures(**figures) for case, figures in read.pop("cases").items()}
    return PackFigures(**read, cases=cases)


def table() -> str:
    """The figures of all packs as a Markdown table."""
    lines = [
        "| pack, commit | node | alone | order | ours acts | theirs acts | weight 0 | grows | `every`: ratio or change |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in PACKS:
        pack = measure_apart(name)
        title = f"{name} {pack.commit}".strip()
        if pack.missing:
            lines.append(f"| {title} | not tried: {pack.missing} | | | | | | | |")
        for case in (case for case in CASES if case.name in pack.cases):
            lines.append(_line(title, case, pack.cases[case.name]))
    return "\n".join(lines)


def _line(title: str, case: Case, figures: Figures) -> str:
    if figures.broken:
        return f"| {title} | {case.name} | does not run here by itself: {figures.broken} | | | | | | |"
    if case.effect == "refused":
        return f"| {title} | {case.name} | refused with our error: {figures.refusal} | | | | | | |"
    if case.effect == "adds":
        every = ", ".join(f"{low:.3f} to {high:.3f}" for low, high in figures.local_ratio.values())
    elif case.effect == "changes":
        every = f"changed by {figures.rescaled:.1e}"
    else:
        every = ""
    cells = [
        title,
        case.name,
        f"{figures.alone:.3f}",
        f"{max(figures.order.values()):g}",
        " / ".join(f"{value:.3f}" for value in figures.ours_act.values()),
        " / ".join(f"{value:.3f}" for value in figures.theirs_acts.values()),
        f"{max(figures.weight_0.values()):g}",
        str(figures.growth),
        every,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pack", nargs="?", choices=PACKS)
    parser.add_argument("--out", type=Path, help="file for the figures of one pack")
    options = parser.parse_args()
    if packs_folder() is None:
        parser.error("set PACKS_PATH to a folder with checkouts of other packs")
    if options.pack is None:
        print(table())
        return
    figures = json.dumps(asdict(measure_pack(options.pack)), indent=1)
    if options.out is None:
        print(figures)
    else:
        options.out.write_text(figures, encoding="utf-8")


if __name__ == "__main__":
    main()
