"""Lets ComfyUI start where torchvision does not fit this torch, or torchaudio is absent.

ComfyUI imports both at start-up; nothing that is tested here uses either. With this folder on PYTHONPATH, Python runs
this file when it starts. It touches nothing that works: a torchvision whose extension loads, and a torchaudio that is
installed, are used as they are.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


class DeclareTorchvisionOperators(MetaPathFinder):
    """Declares torchvision's operators just before its first import, if its compiled extension cannot do so."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and not extension_loads(Path(spec.submodule_search_locations[0])):
            declare_operators()
        return spec


def extension_loads(torchvision: Path) -> bool:
    import torch

    extensions = [torchvision / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    try:
        torch.ops.load_library(next(path for path in extensions if path.exists()))
    except (StopIteration, OSError):
        return False
    return True


def declare_operators() -> None:
    """torchvision registers shape functions for these two while it is imported, and fails if they do not exist."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.modules[__name__].torchvision_library = library  # the declarations live as long as this object


sys.meta_path.insert(0, DeclareTorchvisionOperators())
# At the end of the path, so that an installed torchaudio comes first.
sys.path.append(str(Path(__file__).parent / "stand_in"))
