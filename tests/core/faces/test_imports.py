from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_heavy_libraries_wait_for_their_first_use() -> None:
    script = (
        "import sys, idadapter_core.faces as faces\n"
        "heavy = {'insightface', 'onnxruntime', 'onnx', 'cv2', 'skimage'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(faces.__all__) <= set(dir(faces))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
