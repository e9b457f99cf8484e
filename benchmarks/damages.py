"""What the quality gate sees when something is broken: the measurements of tests/nodes/test_quality.py with one damage at a time.

    COMFYUI_PATH=... python -m benchmarks.damages [DAMAGE ...]

Each damage changes the loaded pack, not the judges. Prints a row for each: likeness and the share of the prompts that is followed, by case.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch

from tests.harness.comfy import PACK_MODULE
from tests.nodes.test_quality import Measured

CASES = ("base", "uniid_4_rescaled", "uniid_4", "idadapter_4")
CORE = f"{PACK_MODULE}.idadapter_core"
ASIDE = 25.0  # pixels


def _core(name: str) -> ModuleType:
    return importlib.import_module(f"{CORE}.{name}")


def _replace(function: Any, other: Any) -> None:
    """Put `other` wherever the pack's modules hold `function`."""
    for name, module in list(sys.modules.items()):
        if name.startswith(PACK_MODULE):
            for key, value in list(vars(module).items()):
                if value is function:
                    setattr(module, key, other)


def _change_projections(owner: Any, change: Callable[[Any, Any], tuple[Any, Any]]) -> None:
    """Change the keys and values that a mechanism projects identity tokens to."""
    usual = owner.project
    owner.project = lambda self, *given: change(*usual(self, *given))


def _opposite() -> None:
    _change_projections(_core("mechanisms.decoupled").SiteProjections, lambda keys, values: (keys, -values))
    gated = _core("mechanisms.gated").GatedAdapter
    attend = gated._attend

    def opposed(self: Any, *given: Any) -> Iterator[tuple[Any, Any]]:
        for mixed, strength in attend(self, *given):
            yield -mixed, strength

    gated._attend = opposed


def _swapped() -> None:
    for owner in (_core("mechanisms.decoupled").SiteProjections, _core("mechanisms.gated").GatedAdapter):
        _change_projections(owner, lambda keys, values: (values, keys))


def _bgr() -> None:
    function = _core("faces.features").crops_to_tensor
    _replace(function, lambda crops: function(crops).flip(1))


def _beside() -> None:
    function = _core("faces.align").align_face
    _replace(function, lambda image, landmarks, *more: function(image, np.asarray(landmarks) + ASIDE, *more))


DAMAGES: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "sign of the adapter's attention": _opposite,
    "K and V swapped": _swapped,
    "BGR for RGB in crops of faces": _bgr,
    f"faces cropped {ASIDE:g} px beside their place": _beside,
}


def _measure(name: str) -> str:
    measured = Measured()  # loads the pack
    DAMAGES[name]()
    values = [measured.of(case) for case in CASES]
    return (
        f"| {name} | " + " | ".join(f"{likeness:.3f}, {prompts:.2f}" for likeness, prompts in values) + " |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("damages", nargs="*", metavar="DAMAGE", help=f"of: {'; '.join(DAMAGES)}")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        torch.set_num_threads(1)
        print(_measure(options.alone), flush=True)
        return 0
    if unknown := set(options.damages) - set(DAMAGES):
        parser.error(f"there is no damage {', '.join(sorted(unknown))}; choose from: {'; '.join(DAMAGES)}")
    for name in options.damages or DAMAGES:  # each in a process of its own, so that no damage stays
        command = [sys.executable, "-m", "benchmarks.damages", "--alone", name]
        if code := subprocess.run(command, check=False).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
