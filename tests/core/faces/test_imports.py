from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_heavy_libraries_wait_for_their_first_use() -> None:
    script = (
        "import importlib, pkgutil, sys, idadapter_core.faces as faces\n"
        "names = [module.name for module in pkgutil.iter_modules(faces.__path__, 'idadapter_core.faces.')]\n"
        "assert len([importlib.import_module(name) for name in names]) >= 8\n"
        "heavy = {'insightface', 'onnxruntime', 'onnx', 'cv2', 'skimage'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
