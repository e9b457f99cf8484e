"""install.py: the choice of a runtime as a table, and the repair itself in a throw-away environment."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from install import Machine, Requirement, choose_runtime, installed_runtimes

INSTALL = Path(__file__).resolve().parents[2] / "install.py"

LINUX = Machine("linux", "x86_64")
LINUX_CUDA_11 = Machine("linux", "x86_64", "11.8")
LINUX_CUDA_12 = Machine("linux", "x86_64", "12.8")
LINUX_CUDA_13 = Machine("linux", "x86_64", "13.0")
LINUX_CUDA_14 = Machine("linux", "x86_64", "14.1")
LINUX_ARM_CUDA_13 = Machine("linux", "aarch64", "13.0")
WINDOWS_CUDA_12 = Machine("win32", "amd64", "12.6")
WINDOWS_ARM = Machine("win32", "arm64")
MAC = Machine("darwin", "arm64")

CPU = {"onnxruntime": "1.31.1"}
GPU = {"onnxruntime-gpu": "1.31.1"}
DIRECTML = {"onnxruntime-directml": "1.24.4"}

FITS_CUDA_12 = "onnxruntime-gpu>=1.20,<1.27"
FITS_CUDA_13 = "onnxruntime-gpu>=1.27"


@pytest.mark.parametrize(
    ("installed", "usable", "machine", "wanted"),
    [
        pytest.param({}, False, LINUX, "onnxruntime", id="nothing, no GPU"),
        pytest.param({}, False, MAC, "onnxruntime", id="nothing, Mac"),
        pytest.param({}, False, WINDOWS_ARM, "onnxruntime", id="nothing, Windows on ARM"),
        pytest.param({}, False, LINUX_CUDA_12, FITS_CUDA_12, id="nothing, CUDA 12"),
        pytest.param({}, False, WINDOWS_CUDA_12, FITS_CUDA_12, id="nothing, Windows, CUDA 12"),
        pytest.param({}, False, LINUX_CUDA_13, FITS_CUDA_13, id="nothing, CUDA 13"),
        pytest.param({}, False, LINUX_CUDA_14, FITS_CUDA_13, id="a CUDA newer than this file"),
        pytest.param({}, False, LINUX_CUDA_11, "onnxruntime", id="no wheel for CUDA 11"),
        pytest.param({}, False, LINUX_ARM_CUDA_13, "onnxruntime", id="no GPU wheel for ARM"),
        pytest.param(CPU, True, LINUX_CUDA_13, FITS_CUDA_13, id="CPU runtime beside a CUDA torch"),
        pytest.param(CPU | GPU, True, LINUX, "onnxruntime", id="both, no GPU"),
        pytest.param(CPU | GPU, True, LINUX_CUDA_12, FITS_CUDA_12, id="both, CUDA 12"),
        pytest.param(
            GPU, True, LINUX, "onnxruntime-gpu==1.31.1", id="a GPU runtime alone works on the CPU: kept"
        ),
        pytest.param(GPU, False, LINUX, "onnxruntime", id="hollow GPU runtime, no GPU"),
        pytest.param(GPU, True, LINUX_ARM_CUDA_13, "onnxruntime-gpu==1.31.1", id="own build on ARM: kept"),
        pytest.param(
            {"onnxruntime-gpu": "1.26.0"}, True, LINUX_CUDA_12, FITS_CUDA_12, id="GPU runtime that fits"
        ),
        pytest.param(GPU, True, LINUX_CUDA_12, FITS_CUDA_12, id="GPU runtime of another CUDA"),
        pytest.param(DIRECTML, True, WINDOWS_CUDA_12, "onnxruntime-directml==1.24.4", id="DirectML: kept"),
        pytest.param(
            CPU | DIRECTML,
            True,
            WINDOWS_ARM,
            "onnxruntime-directml==1.24.4",
            id="DirectML overwritten by the CPU one",
        ),
        pytest.param(
            GPU | {"onnxruntime-rocm": "1.22.1+rocm6"},
            False,
            LINUX,
            "onnxruntime-rocm==1.22.1+rocm6",
            id="ROCm: kept",
        ),
    ],
)
def test_choice_of_the_runtime(
    installed: dict[str, str], usable: bool, machine: Machine, wanted: str
) -> None:
    assert str(choose_runtime(installed, usable, machine)) == wanted


@pytest.mark.parametrize(
    ("versions", "version", "accepted"),
    [
        ("", "1.31.1", True),
        (">=1.27", "1.27.0", True),
        (">=1.27", "1.31.1", True),
        (">=1.27", "1.26.9", False),
        (">=1.27", "1.9.0", False),
        (">=1.27", "2.0", True),
        (">=1.20,<1.27", "1.26.0", True),
        (">=1.20,<1.27", "1.27.0", False),
        (">=1.20,<1.27", "1.19.2", False),
        ("==1.22.1+rocm6", "1.22.1+rocm6", True),
        ("==1.22.1", "1.22.10", False),
    ],
)
def test_versions_are_compared_as_numbers(versions: str, version: str, accepted: bool) -> None:
    assert Requirement("onnxruntime-gpu", versions).accepts(version) is accepted


def write_metadata(site_packages: Path, name: str, version: str, files: list[str] | None = None) -> Path:
    """What an installed distribution leaves in site-packages; files=None is an installer that keeps no list."""
    info = site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
    )
    if files is not None:
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files), encoding="utf-8")
    return info


@pytest.mark.parametrize(
    ("name", "files", "owns"),
    [
        ("onnxruntime-rocm", ["onnxruntime/__init__.py"], True),
        ("onnxruntime-rocm", None, True),
        ("onnxruntime_training", None, True),
        ("ort-nightly-gpu", ["onnxruntime/__init__.py"], True),
        ("ort-nightly-gpu", None, True),
        ("onnxruntime-qnn", ["onnxruntime_qnn/__init__.py"], False),
        ("onnxruntime-extensions", ["onnxruntime_extensions/__init__.py"], False),
        ("onnxruntime-extensions", None, False),
        ("onnxruntime_extensions", None, False),
        ("onnxruntime-genai", None, False),
        ("onnxruntime-genai-cuda", None, False),
        ("onnxruntime-genai-directml", None, False),
        ("onnxruntime-tools", None, False),
        ("sort-tools", None, False),
    ],
)
def test_what_counts_as_a_runtime(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, files: list[str] | None, owns: bool
) -> None:
    write_metadata(tmp_path, name, "0.0.7", files)
    monkeypatch.syspath_prepend(tmp_path)
    found = installed_runtimes().get(name.replace("_", "-"))
    assert found == ("0.0.7" if owns else None)


# --- in a Python of its own, without pip -----------------------------------------------------------------------------


def run_python(
    python: str | Path, code: str, **variables: str
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run code that can import install.py; returns also its output, which never holds a traceback."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    prefix = f"import sys; sys.path.append({str(INSTALL.parent)!r})\n"
    result = subprocess.run(
        [str(python), "-c", prefix + textwrap.dedent(code)],
        env=inherited | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    output = result.stdout + result.stderr
    assert "Traceback" not in output
    return result, output


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        pytest.param("1.2.3", "insightface: 1.2.3 is in order", id="installed"),
        pytest.param(None, "insightface: a copy without package metadata is in order", id="no metadata"),
        pytest.param("", "insightface: a copy without package metadata is in order", id="empty metadata"),
    ],
)
def test_an_insightface_that_works_is_in_order(tmp_path: Path, metadata: str | None, said: str) -> None:
    venv.create(tmp_path / "venv")
    windows = sys.platform == "win32"
    python = tmp_path / "venv" / ("Scripts/python.exe" if windows else "bin/python")
    site_packages = next((tmp_path / "venv").glob("Lib/site-packages" if windows else "lib/*/site-packages"))
    (site_packages / "insightface.py").touch()
    if metadata is not None:
        info = write_metadata(site_packages, "insightface", metadata or "1.0")
        if not metadata:  # as an uninstall leaves it that was broken off
            (info / "METADATA").write_text("", encoding="utf-8")
    code = "import install; sys.exit(not install.ensure_insightface(install.Installer()))"
    result, output = run_python(python, code)
    assert result.returncode == 0
    assert said in output


@pytest.mark.parametrize("kind", ["missing", "a folder", "not executable", "not a program"])
def test_a_refusal_of_the_system_ends_in_a_message(tmp_path: Path, kind: str) -> None:
    python = tmp_path / "pythön"
    if kind == "a folder":
        python.mkdir()
    elif kind != "missing":
        python.write_bytes(b"\0not a program")
        python.chmod(0o755 if kind == "not a program" else 0o644)
    code = f"sys.executable = {str(python)!r}; import install; sys.exit(install.main())"
    result, output = run_python(sys.executable, code, PYTHONIOENCODING="ascii")
    assert result.returncode == 1
    assert "this cannot go on" in output
    assert "pyth?n -m pip install" in output, "the command by hand, as far as an ASCII terminal can show it"


@pytest.mark.skipif(
    sys.platform == "win32", reason="Windows has no signal that a child can send to its parent alone"
)
def test_an_interruption_ends_in_a_message(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -INT $PPID\nexec sleep 60\n", encoding="utf-8")
    python.chmod(0o755)
    code = f"""
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
        sys.executable = {str(python)!r}
        import install
        sys.exit(install.main())
    """
    result, output = run_python(sys.executable, code)
    assert result.returncode == 130
    assert "interrupted" in output
    assert "-m pip install" in output


# --- the real thing --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own, and wheels of runtimes that own the `onnxruntime` folder."""

    python: Path
    wheels: Path

    def run(self, *arguments: str | Path, offline: bool = False) -> subprocess.CompletedProcess[str]:
        links = "" if offline else f"{os.environ.get('PIP_FIND_LINKS', '')} {self.wheels}".strip()
        variables = {"PIP_FIND_LINKS": links, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        if offline:
            variables["PIP_NO_INDEX"] = "1"
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self.python), *map(str, arguments)]
        return subprocess.run(
            command, cwd=self.wheels, env=inherited | variables, capture_output=True, text=True, check=False
        )

    def install(self, *, offline: bool = False) -> subprocess.CompletedProcess[str]:
        result = self.run(INSTALL, offline=offline)
        assert "Traceback" not in result.stdout + result.stderr
        return result

    def pip(self, *arguments: str) -> None:
        result = self.run("-m", "pip", *arguments)
        assert result.returncode == 0, result.stdout + result.stderr

    def runtimes(self) -> set[str]:
        lines = self.run("-m", "pip", "freeze", "--all").stdout.splitlines()
        return {
            line for line in (line.partition("==")[0] for line in lines) if line.startswith("onnxruntime")
        }

    def providers(self) -> str:
        """What the runtime can run on, from a session-capable package; empty if it cannot be used."""
        code = "import onnxruntime as o; o.InferenceSession; print(o.get_available_providers())"
        return self.run("-c", code).stdout.strip()


def write_runtime_wheel(folder: Path, name: str, version: str) -> None:
    """A tiny distribution that owns the `onnxruntime` folder as the real ones do, with a module only it has."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    files = {
        "onnxruntime/__init__.py": (
            "from enum import Enum\n"
            "class InferenceSession: pass\n"
            f"def get_available_providers(): return [{name!r}]\n"
            f"__version__ = {version!r}\n"
        ),
        "onnxruntime/only_here.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with pip and nothing else."""
    folder = tmp_path_factory.mktemp("install")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    wheels = folder / "wheels"
    wheels.mkdir()
    environment = Environment(python, wheels)
    if environment.run("-m", "pip", "install", "numpy>=1.25").returncode != 0:
        pytest.skip("needs a package index, or a pip that finds packages without one")
    return environment


@pytest.fixture(scope="module")
def first_run(fresh: Environment) -> subprocess.CompletedProcess[str]:
    return fresh.install()


@pytest.fixture
def healthy(fresh: Environment, first_run: subprocess.CompletedProcess[str]) -> Iterator[Environment]:
    """The environment after the first run, put in order again after the test."""
    assert first_run.returncode == 0, first_run.stdout
    write_runtime_wheel(fresh.wheels, "onnxruntime-gpu", "0.0.1")
    write_runtime_wheel(fresh.wheels, "onnxruntime-directml", "0.0.1")
    yield fresh
    if fresh.runtimes() != {"onnxruntime"} or not fresh.providers():
        fresh.pip("uninstall", "-y", "onnxruntime", "onnxruntime-gpu", "onnxruntime-directml")
        fresh.pip("install", "onnxruntime")


@pytest.mark.network
class TestRepair:
    def test_an_empty_environment_gets_both(self, healthy: Environment) -> None:
        assert healthy.runtimes() == {"onnxruntime"}
        assert "CPUExecutionProvider" in healthy.providers()
        assert healthy.run("-c", "import insightface").returncode == 0

    def test_a_second_run_changes_nothing(self, healthy: Environment) -> None:
        before = healthy.run("-m", "pip", "freeze", "--all").stdout
        result = healthy.install(offline=True)
        assert result.returncode == 0
        assert "running:" not in result.stdout
        assert healthy.run("-m", "pip", "freeze", "--all").stdout == before

    def test_two_runtimes_become_one(self, healthy: Environment) -> None:
        healthy.pip("install", "--no-deps", "onnxruntime-gpu==0.0.1")
        assert healthy.runtimes() == {"onnxruntime", "onnxruntime-gpu"}
        assert healthy.install().returncode == 0
        assert healthy.runtimes() == {"onnxruntime"}
        assert "CPUExecutionProvider" in healthy.providers()

    def test_a_hollow_folder_is_filled(self, healthy: Environment) -> None:
        healthy.pip("install", "--no-deps", "onnxruntime-gpu==0.0.1")
        healthy.pip("uninstall", "-y", "onnxruntime")
        assert healthy.run("-c", "import onnxruntime").returncode == 0, "this is what makes it treacherous"
        assert not healthy.providers()
        assert healthy.install().returncode == 0
        assert healthy.runtimes() == {"onnxruntime"}
        assert "CPUExecutionProvider" in healthy.providers()

    def test_a_special_flavour_outlives_the_cpu_one(self, healthy: Environment) -> None:
        healthy.pip("install", "--no-deps", "onnxruntime-directml==0.0.1")
        healthy.pip("install", "--no-deps", "--force-reinstall", "onnxruntime")
        assert "CPUExecutionProvider" in healthy.providers()
        healthy.install()
        assert healthy.runtimes() == {"onnxruntime-directml"}
        assert "onnxruntime-directml" in healthy.providers()

    def test_offline_a_working_runtime_is_left_alone(self, healthy: Environment) -> None:
        healthy.pip("install", "--no-deps", "onnxruntime-gpu==0.0.1")
        result = healthy.install(offline=True)
        assert "stays as it is" in result.stdout
        assert "pip uninstall -y" in result.stdout
        assert healthy.runtimes() == {"onnxruntime", "onnxruntime-gpu"}
        assert healthy.providers()

    def test_the_cpu_one_replaces_a_broken_flavour_that_cannot_be_had(self, healthy: Environment) -> None:
        healthy.pip("install", "--no-deps", "onnxruntime-directml==0.0.1")
        healthy.pip("uninstall", "-y", "onnxruntime")
        assert not healthy.providers()
        for wheel in healthy.wheels.glob("onnxruntime_directml*"):
            wheel.unlink()
        result = healthy.install()
        assert result.returncode == 0
        assert "onnxruntime-directml==0.0.1 could not be had" in result.stdout
        assert healthy.runtimes() == {"onnxruntime"}
        assert "CPUExecutionProvider" in healthy.providers()

    def test_offline_without_a_runtime_it_says_what_to_do(self, healthy: Environment) -> None:
        healthy.pip("uninstall", "-y", "onnxruntime")
        result = healthy.install(offline=True)
        assert result.returncode == 1
        assert "no usable runtime could be installed" in result.stdout
        assert "pip install" in result.stdout
