"""The analyzer's tests once more, against insightface 0.7.3, which many installations still have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

VERSION = "0.7.3"
ROOT = Path(__file__).parents[3]
# Large libraries that 0.7.3 imports for drawing masks and plots, which no test does.
STAND_INS = {
    "albumentations/__init__.py": "",
    "albumentations/core/__init__.py": "",
    "albumentations/core/transforms_interface.py": "class ImageOnlyTransform: ...",
    "matplotlib/__init__.py": "",
    "matplotlib/pyplot.py": "",
    "mpl_toolkits/mplot3d.py": "Axes3D = None",
}


@pytest.fixture(scope="module")
def older_insightface() -> Path:
    """A folder to put on PYTHONPATH. Built once: 0.7.3 is source only and needs a C++ compiler."""
    cache = Path(os.environ.get("IDADAPTER_CACHE") or ROOT / ".cache")
    folder = cache / f"insightface-{VERSION}-py{sys.version_info[0]}{sys.version_info[1]}"
    if not (folder / f"insightface-{VERSION}.dist-info" / "RECORD").is_file():
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*command, f"insightface=={VERSION}"], capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"insightface {VERSION} cannot be built here: {reason}")
    for name, content in STAND_INS.items():
        path = folder / "stand_ins" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


@pytest.mark.network
def test_analyzer_on_older_insightface(older_insightface: Path) -> None:
    folders = [str(older_insightface), str(older_insightface / "stand_ins")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    check = "import insightface; print(insightface.__version__)"
    version = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True)
    assert version.stdout.strip() == VERSION, version.stderr
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/core/faces/test_detector.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
