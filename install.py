"""Brings insightface and exactly one fitting onnxruntime into the Python that runs this file.

ComfyUI-Manager and comfy-cli run it after `pip install -r requirements.txt`; by hand: `python install.py` with
ComfyUI's own Python. It can be repeated at will and downloads no model weights, unless they are named:
`python install.py --models buffalo_l` passes what follows on to the command `fetch`, and `--doctor` to `doctor`.

Why it exists: `onnxruntime` (CPU), `onnxruntime-gpu`, `onnxruntime-directml` ... are separate distributions that own
the same import package. pip sees no conflict, so packs that depend on different ones overwrite each other's files,
and uninstalling one of two leaves a folder that imports but is empty.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

CPU_RUNTIME = "onnxruntime"
CUDA_RUNTIME = "onnxruntime-gpu"
INSIGHTFACE = "insightface>=0.7.3"
PACK = Path(__file__).resolve().parent
COMMANDS = {"--models": "fetch", "--doctor": "doctor"}  # options that run a command of the pack instead

# Published onnxruntime-gpu wheels: up to 1.26 linked against CUDA 12, from 1.27 on against CUDA 13.
CUDA_RUNTIME_VERSIONS = {12: ">=1.20,<1.27", 13: ">=1.27"}
CUDA_WHEEL_PLATFORMS = {("linux", "x86_64"), ("win32", "amd64")}

# Named like the runtime, but packages of their own beside it; `onnxruntime-genai` stands for its flavours too.
COMPANIONS = ("onnxruntime-extensions", "onnxruntime-genai", "onnxruntime-tools")

HEADLESS_OPENCV = {
    "opencv-python": "opencv-python-headless",
    "opencv-contrib-python": "opencv-contrib-python-headless",
}


@dataclass(frozen=True)
class Machine:
    """What the choice of a runtime depends on."""

    system: str  # sys.platform: "linux", "win32", "darwin"
    architecture: str  # platform.machine() in lower case: "x86_64", "amd64", "arm64", "aarch64"
    cuda: str = ""  # CUDA version torch was built for, such as "12.8"; "" = torch without CUDA, or no torch


@dataclass(frozen=True)
class Requirement:
    """A distribution and the versions of it that fit."""

    name: str
    versions: str = ""  # comma-separated ">=1.27", "<1.27", "==1.20.1"; "" = any

    def __str__(self) -> str:
        return self.name + self.versions

    def accepts(self, version: str) -> bool:
        found = _numbers(version)
        for sign, bound in re.findall(r"([<>=]+)([^,]+)", self.versions):
            limit = _numbers(bound)
            series = found[: len(limit)]
            if not {">=": series >= limit, "<": series < limit, "==": found == limit}[sign]:
                return False
        return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def choose_runtime(installed: Mapping[str, str], usable: bool, machine: Machine) -> Requirement:
    """Decide which single runtime should remain.

    installed: name and version of every distribution that owns the `onnxruntime` package.
    usable: whether `onnxruntime.InferenceSession` can be reached at the moment.
    """
    special = sorted(set(installed) - {CPU_RUNTIME, CUDA_RUNTIME})
    if (
        special
    ):  # DirectML, ROCm, OpenVINO ...: nobody gets those by accident, and pip cannot guess a better one
        return Requirement(special[0], f"=={installed[special[0]]}")

    cuda_major = _numbers(machine.cuda)[:1]
    if cuda_major and (machine.system, machine.architecture) in CUDA_WHEEL_PLATFORMS:
        newest = max(CUDA_RUNTIME_VERSIONS)
        versions = CUDA_RUNTIME_VERSIONS.get(min(cuda_major[0], newest))
        if versions is not None:  # CUDA 11 and older: no wheel is left that fits
            return Requirement(CUDA_RUNTIME, versions)

    if set(installed) == {CUDA_RUNTIME} and usable:  # it runs on the CPU too; somebody's own choice stays
        return Requirement(CUDA_RUNTIME, f"=={installed[CUDA_RUNTIME]}")
    return Requirement(CPU_RUNTIME)


def installed_runtimes() -> dict[str, str]:
    """Name and version of every installed distribution that owns the import package `onnxruntime`."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = _name(distribution)
        if not name.startswith(("onnxruntime", "ort-")) or name.startswith(COMPANIONS):
            continue
        files = distribution.files  # None where the installer kept no list, as some package managers do
        if files is None or any(file.as_posix() == "onnxruntime/__init__.py" for file in files):
            found[name] = distribution.version
    return found


def _name(distribution: importlib.metadata.Distribution) -> str:
    metadata = distribution.metadata  # empty in what an interrupted uninstall leaves behind
    return _canonical(metadata["Name"] or "") if metadata else ""


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _python() -> list[str]:
    """This interpreter, ignoring the user's site-packages if it ignores them itself (portable ComfyUI does)."""
    return [sys.executable, "-s"] if sys.flags.no_user_site else [sys.executable]


def _evaluate(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter: a broken extension module must not take this process along."""
    return _capture([*_python(), "-c", code])


def _capture(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


def runtime_usable(folder: Path | None = None) -> bool:
    """Whether onnxruntime works, in `folder` if given; a hollow package imports but has no InferenceSession."""
    # Portable ComfyUI ignores PYTHONPATH, so the folder is put in front by the code itself.
    prefix = f"import sys; sys.path.insert(0, {str(folder)!r}); " if folder else ""
    return _evaluate(prefix + "import onnxruntime; onnxruntime.InferenceSession").returncode == 0


def this_machine() -> Machine:
    # torch.version.cuda says what torch was built for, which holds too where the image is built without a GPU.
    torch_cuda = _evaluate("import torch; print(torch.version.cuda or '')")
    lines = torch_cuda.stdout.split() if torch_cuda.returncode == 0 else []
    return Machine(sys.platform, platform.machine().lower(), lines[-1] if lines else "")


class Installer:
    """pip or uv, whichever this Python has (environments made by uv have no pip)."""

    def __init__(self) -> None:
        self.command, self._target = self._find()

    @staticmethod
    def _find() -> tuple[list[str], list[str]]:
        for module in (["pip"], ["uv", "pip"]):
            command = [*_python(), "-m", *module]
            if _capture([*command, "--version"]).returncode == 0:
                return command, ["--python", sys.executable] if module[0] == "uv" else []
        uv = shutil.which("uv")
        if uv is not None:
            return [uv, "pip"], ["--python", sys.executable]
        return [], []

    def fetch(self, requirement: str, folder: Path) -> list[str] | None:
        """Download once. Returns the options that make installs use the download, None if it could not be had."""
        if self._target:
            return []  # uv has no such command, but keeps what it downloads
        fetched = self._run("download", "--no-deps", "--dest", str(folder), requirement)
        return ["--no-index", "--find-links", str(folder)] if fetched else None

    def install(self, *arguments: str) -> bool:
        return self._run("install", *self._target, *arguments)

    def uninstall(self, names: Iterable[str]) -> bool:
        confirm = [] if self._target else ["-y"]  # uv never asks, and knows no -y
        return self._run("uninstall", *self._target, *confirm, *names)

    def _run(self, *arguments: str) -> bool:
        command = [*self.command, *arguments]
        _say("running: " + subprocess.list2cmdline(command))
        result = _capture(command)
        importlib.invalidate_caches()  # or the package listing of this process stays as it was before
        if result.returncode != 0:
            tail = (result.stdout + result.stderr).strip().splitlines()[-5:]
            _say(f"that failed (exit code {result.returncode}):", *(f"    {line}" for line in tail))
        return result.returncode == 0


def _say(*lines: str) -> None:
    for line in lines:
        print(f"[IDAdapter] {line}", flush=True)


def ensure_runtime(installer: Installer) -> bool:
    """Leave exactly one fitting onnxruntime. True if a usable one is there in the end, fitting or not."""
    installed, usable = installed_runtimes(), runtime_usable()
    wanted = choose_runtime(installed, usable, this_machine())
    if usable and list(installed) == [wanted.name] and wanted.accepts(installed[wanted.name]):
        _say(f"onnxruntime: {wanted.name} {installed[wanted.name]} is in order")
        return True

    found = ", ".join(f"{name} {version}" for name, version in installed.items()) or "none"
    _say(f"onnxruntime: found {found}{'' if usable else ' (not usable)'}; wanted: {wanted} alone")
    candidates = [wanted]
    two_by_accident = wanted.name == CUDA_RUNTIME and len(installed) > 1
    if two_by_accident or (wanted.name != CPU_RUNTIME and not usable):
        candidates.append(Requirement(CPU_RUNTIME))  # the next best for what should not stay as it is
    for candidate in candidates:
        if _bring(installer, candidate):
            _say(
                f"onnxruntime: {candidate.name} {installed_runtimes()[candidate.name]} is now the only one and works"
            )
            return True
        _say(f"onnxruntime: {candidate} could not be had or does not run here")

    usable = runtime_usable()
    verdict = (
        "what is installed works and stays as it is" if usable else "no usable runtime could be installed"
    )
    _say(f"onnxruntime: {verdict}.", *_commands_by_hand(installed_runtimes(), wanted))
    return usable


def _bring(installer: Installer, wanted: Requirement) -> bool:
    """Make this runtime the only one. Nothing that works is removed before the candidate was fetched and tried."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        source = installer.fetch(str(wanted), Path(folder))
        if source is None:
            return False
        if runtime_usable() and not _works_aside(installer, wanted, source, Path(folder) / "aside"):
            return False
        return _replace(installer, wanted, source)


def _works_aside(installer: Installer, wanted: Requirement, source: list[str], folder: Path) -> bool:
    """Try the candidate in a folder of its own."""
    return installer.install("--no-deps", *source, "--target", str(folder), str(wanted)) and runtime_usable(
        folder
    )


def _replace(installer: Installer, wanted: Requirement, source: list[str]) -> bool:
    """Uninstall every owner of the package, because each removal takes shared files along; then install one."""
    installed = installed_runtimes()
    if installed and not installer.uninstall(installed):
        return False
    # The second install only adds what the runtime itself requires and is not there yet.
    return (
        installer.install("--no-deps", *source, str(wanted))
        and installer.install(str(wanted))
        and runtime_usable()
    )


def _commands_by_hand(installed: Mapping[str, str], wanted: Requirement) -> list[str]:
    pip = subprocess.list2cmdline([*_python(), "-m", "pip"])
    removal = [f"    {pip} uninstall -y {' '.join(installed)}"] if installed else []
    return ["To do it by hand, with ComfyUI stopped:", *removal, f'    {pip} install "{wanted}"']


def _all_by_hand() -> list[str]:
    pip = subprocess.list2cmdline([*_python(), "-m", "pip"])
    this_file = subprocess.list2cmdline([*_python(), str(Path(__file__).resolve())])
    return [
        "To do it by hand, with ComfyUI stopped (the first line may bring a second onnxruntime, the next removes it):",
        f'    {pip} install "{INSIGHTFACE}"',
        f"    {this_file}",
    ]


def ensure_insightface(installer: Installer) -> bool:
    """Make `import insightface` work, without the requirements that would undo somebody else's choice."""
    failure = _import_failure("insightface")
    if failure:
        _say(f"insightface: cannot be imported ({failure})")
        if "insightface" not in _installed_names():
            installer.install("--no-deps", INSIGHTFACE)
        missing = _missing_requirements("insightface")
        if missing:
            installer.install(*missing)
        if sys.platform == "linux":
            _ensure_headless_opencv(installer)
        failure = _import_failure("insightface")
    if failure:
        _say(f"insightface: still cannot be imported ({failure}).", *_all_by_hand())
        return False
    version = _installed_version("insightface")
    _say(f"insightface: {version or 'a copy without package metadata'} is in order")
    return True


def _import_failure(module: str) -> str:
    """The last line of what importing the module says when it fails, or an empty string."""
    check = _evaluate(f"import {module}")
    if check.returncode == 0:
        return ""
    return check.stderr.strip().rpartition("\n")[2] or f"exit code {check.returncode}"


def _installed_names() -> set[str]:
    return {_name(distribution) for distribution in importlib.metadata.distributions()}


def _installed_version(name: str) -> str:
    """The version of a distribution, or an empty string where only the import package is there, such as a checkout."""
    named = (found for found in importlib.metadata.distributions() if _name(found) == name)
    first = next(named, None)
    return first.version if first else ""


def _missing_requirements(name: str) -> list[str]:
    """Requirements of an installed distribution that are absent, less the runtimes and a second OpenCV."""
    installed = _installed_names()
    if name not in installed:
        return []
    has_opencv = any(other.startswith("opencv-") for other in installed)
    missing = []
    for requirement in importlib.metadata.requires(name) or []:
        required = _canonical(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
        is_extra = re.search(r"\bextra\s*==", requirement)
        is_second_opencv = has_opencv and required.startswith("opencv-")
        if not (is_extra or is_second_opencv or required in installed or required.startswith("onnxruntime")):
            missing.append(requirement)
    return missing


def _ensure_headless_opencv(installer: Installer) -> None:
    """On a server without display libraries the desktop build of OpenCV cannot load; the headless one can."""
    failure = _import_failure("cv2")
    desktop = sorted(_installed_names() & set(HEADLESS_OPENCV))
    if desktop and ".so" in failure:  # "libGL.so.1: cannot open shared object file"
        _say(f"OpenCV: {failure}; changing to the build without windows")
        installer.uninstall(desktop)
        installer.install("--force-reinstall", "--no-deps", *(HEADLESS_OPENCV[name] for name in desktop))


def main() -> int:
    """Put both packages in order; whatever the system refuses on the way ends in a message, not in a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A Windows console may lack characters of paths and of what pip says.
        sys.stdout.reconfigure(errors="replace")
    try:
        for option, command in COMMANDS.items():
            if option in sys.argv[1:2]:
                return _run_command(command, sys.argv[2:])
        return _put_in_order()
    except (OSError, subprocess.SubprocessError) as error:
        _say(f"this cannot go on ({type(error).__name__}: {error}).", *_all_by_hand())
        return 1
    except KeyboardInterrupt:
        _say("interrupted, so the packages may be half in place.", *_all_by_hand())
        return 130


def _run_command(name: str, arguments: list[str]) -> int:
    """Run a command of the pack. Portable Python does not find modules in the current folder, so the code names it."""
    code = f"import sys; sys.path.insert(0, {str(PACK)!r}); from idadapter_core.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([*_python(), "-c", code, name, *arguments], cwd=PACK, check=False).returncode


def _put_in_order() -> int:
    installer = Installer()
    if not installer.command:
        _say(
            f"neither pip nor uv can be used with {sys.executable}, so nothing can be checked or repaired.",
            f"Give it pip first: {subprocess.list2cmdline([*_python(), '-m', 'ensurepip'])}",
        )
        return 0 if runtime_usable() else 1
    runtime = ensure_runtime(installer)  # first, because insightface imports it
    insightface = ensure_insightface(installer)
    return 0 if runtime and insightface else 1


if __name__ == "__main__":
    sys.exit(main())
