"""Waiting for data and for disks ends: with a reason, and soon after a signal."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from idadapter_core import waiting
from idadapter_core.data import index
from idadapter_core.errors import InputError, TrainingError
from idadapter_core.logs import read_log
from idadapter_core.stable_diffusion import sampler as sampling
from idadapter_core.training import bundle, disk, loading, loop, monitor, signals as hearing
from idadapter_core.training.checkpoints import checkpoints
from idadapter_core.training.loading import Batches, prepare_worker
from idadapter_core.training.loop import STOPPED, train
from idadapter_core.waiting import WorkerThread
from tests.core.training.processes import Process
from tests.tiny.toy import Toy


@pytest.fixture(autouse=True)
def _no_handler_of_other_tests() -> Iterator[None]:
    """A loader that another test began in the main thread leaves torch's handler of SIGCHLD behind, for the whole process."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


if sys.platform == "win32":
    pytest.skip("signals and pipes of POSIX", allow_module_level=True)


class Left(Exception):  # noqa: N818  # as a signal's
    """Who waited has left."""


class Photos(Dataset[Any]):
    """Photos of which the second is as `act` has it."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> Any:
        return self.act() if number else torch.zeros(1)


class Unsendable:
    """What cannot be handed over to another process."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


@contextlib.contextmanager
def batches(act: Callable[[], Any], workers: int, **options: Any) -> Iterator[Batches]:
    loader = DataLoader(
        Photos(act), batch_size=None, num_workers=workers, worker_init_fn=prepare_worker, prefetch_factor=None
    )
    with contextlib.closing(Batches(loader, **options)) as found:
        yield found
    assert not multiprocessing.active_children()


def full() -> Any:
    # As torch says it where /dev/shm is too small.
    return Unsendable(
        RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
        )
    )


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (full, r"shared memory is full: /dev/shm.*--shm-size.*data\.workers = 0"),
        (lambda: Unsendable(OSError(24, "Too many open files")), r"ulimit -n.*data\.workers = 0"),
        (lambda: Unsendable(TypeError("no pickle")), "cannot send the data that it read: no pickle"),
        (
            lambda: os.kill(os.getpid(), signal.SIGBUS),
            "died: it was ended by SIGBUS: shared memory is full.*--shm-size",
        ),
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            "died: it was ended by SIGKILL, .*memory.*fewer data.workers",
        ),
        (lambda: os._exit(3), "died: it ended with exit code 3"),
    ],
)
def test_a_worker_that_gives_nothing(act: Callable[[], Any], reason: str) -> None:
    with batches(act, 1, advice="Go on.") as given:
        with pytest.raises(TrainingError, match=f"{reason}.*Go on\\."):
            list(given)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photo_that_is_never_read(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pipe that nobody writes to stands for a disk that does not answer. Who waits may leave, is told of it, and waits not for ever."""
    os.mkfifo(tmp_path / "photo")
    looked: list[int] = []
    is_stuck = False

    def look() -> None:
        looked.append(1)
        if is_stuck and len(looked) == 3:
            raise Left

    def read() -> bytes:
        return (tmp_path / "photo").read_bytes()

    monkeypatch.setattr(waiting, "POLL_INTERVAL", 0.05)
    monkeypatch.setattr(loading, "_BETWEEN_WARNINGS", 0.0)
    with batches(read, workers, poll=look) as given:
        given.next()
        is_stuck = True
        looked.clear()
        with pytest.raises(Left):
            given.next()
    assert re.search(
        "no data for 0 s: .*read", "".join(r.getMessage() for r in caplog.records).replace("reading", "read")
    )
    with batches(read, workers) as given:
        given.next()
        monkeypatch.setattr(loading, "WAIT_TIMEOUT", 0.1)
        with pytest.raises(TrainingError, match="no data for .* s: .*Look at the disk"):
            given.next()


def test_a_photo_that_is_broken_is_no_failure_of_the_loader() -> None:
    def broken() -> Any:
        return InputError("this one")

    for workers in (0, 1):
        with (
            batches(broken, workers, advice="Go on.") as given,
            pytest.raises(InputError, match=r"^this one$"),
        ):
            list(given)


def test_a_thread_aside_hands_over_what_comes_of_its_work() -> None:
    worker = WorkerThread("test")
    assert worker.run(lambda: 3, lambda seconds: None) == 3
    with pytest.raises(ZeroDivisionError):
        worker.run(lambda: 1 // 0, lambda seconds: None)
    assert worker.run(threading.current_thread, lambda seconds: None) is not threading.current_thread()
    worker.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_while_data_is_waited_for(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """The fifth photo is on a disk that does not answer, for which a pipe stands."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = index.read_file
    photos: list[Path] = []

    def stuck(path: Path) -> bytes:
        photos.append(path)
        return pipe.read_bytes() if len(photos) == 5 else read(path)

    def signal_the_reader() -> None:
        end = os.open(pipe, os.O_WRONLY)  # comes back when somebody reads
        os.kill(os.getpid(), signal.SIGTERM)
        over.wait()
        os.close(end)

    monkeypatch.setattr(index, "read_file", stuck)
    over, helper = threading.Event(), threading.Thread(target=signal_the_reader, daemon=True)
    helper.start()
    run = tmp_path / "run"
    settings: dict[str, Any] = {"train": {"steps": 100, "global_batch_size": 2}, "data": {"workers": workers}}
    try:
        assert train(toy.config(run, **settings)) == STOPPED
    finally:
        over.set()
    done = len(read_log(run))
    assert [c.step for c in checkpoints(run)] == ([done] if done else [])


@pytest.mark.parametrize("what", ["first line", "checkpoint", "second signal", "no signal"])
def test_a_disk_that_does_not_answer(
    what: str, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A write that comes back when the test is over: one signal ends the run after a grace, a second one at once."""
    over, began = threading.Event(), threading.Event()
    monkeypatch.setattr(waiting, "POLL_INTERVAL", 0.02)
    monkeypatch.setattr(disk, "WAIT_TIMEOUT", 1000.0)  # models take longer to read than a write may take here
    monkeypatch.setattr(disk, "_GRACE", 1000.0 if what == "second signal" else 0.1)
    monkeypatch.setattr(hearing, "_SECOND_SIGNAL_DELAY", 0.0)
    writes = 0

    def stuck(*args: Any, **options: Any) -> Any:
        nonlocal writes
        writes += 1
        if what != "first line" and writes == 1:
            written = write(*args, **options)
            if what == "no signal":
                monkeypatch.setattr(disk, "WAIT_TIMEOUT", 1.0)
            return written
        began.set()
        over.wait()
        raise OSError("over")

    def signals() -> None:
        began.wait()
        for _ in range({"no signal": 0, "second signal": 2}.get(what, 1)):
            if over.is_set():  # the run has ended without a signal
                return
            os.kill(os.getpid(), signal.SIGTERM)
            over.wait(0.2)

    where: tuple[Any, str] = (monitor, "RunLog") if what == "first line" else (loop, "write_checkpoint")
    write = getattr(*where)
    monkeypatch.setattr(*where, stuck)
    helper = threading.Thread(target=signals, daemon=True)
    helper.start()
    config = toy.config(tmp_path / "run", train={"steps": 9}, output={"save_every": 1})
    message = rf"{re.escape(config.output.folder)} has not answered for .* s\. .*--resume auto"
    try:
        if what == "no signal":
            with pytest.raises(TrainingError, match=message):
                train(config)
        elif what == "second signal":
            with pytest.raises(waiting.Terminated):
                train(config)
        else:
            assert train(config) == STOPPED
            assert re.search(message, capsys.readouterr().err)
    finally:
        over.set()
        began.set()
        helper.join()
    assert [c.step for c in checkpoints(tmp_path / "run")] == ([] if what == "first line" else [1])


@pytest.mark.parametrize("ends", ["signal", "patience"])
def test_models_that_are_never_read(
    ends: str, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, where no signal has a checkpoint to write."""
    over = threading.Event()
    monkeypatch.setattr(waiting, "POLL_INTERVAL", 0.02)

    def stuck(*args: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()  # which must hear signals
        if ends == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        over.wait()

    monkeypatch.setattr(loop, "load_parts", stuck)
    monkeypatch.setattr(disk, "WAIT_TIMEOUT", 1000.0 if ends == "signal" else 0.1)
    try:
        with (
            pytest.raises(waiting.Terminated if ends == "signal" else TrainingError),
            waiting.terminable(),
        ):
            train(toy.config(tmp_path))
    finally:
        over.set()


def test_a_program_ends_though_a_thread_is_stuck() -> None:
    """At once, with its exit code and all that it said."""
    code = (
        "import threading\n"
        "from idadapter_core.cli.program import start\n"
        "from idadapter_core.waiting import WorkerThread\n"
        "def look(seconds): raise TimeoutError\n"
        "def main():\n"
        "    try: WorkerThread('disk').run(threading.Event().wait, look)\n"
        "    except TimeoutError: print('left')\n"
        "    import atexit; atexit.register(print, 'waited')\n"
        "    return 143\n"
        "start(main)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=240)
    assert (ended.returncode, ended.stdout) == (143, b"left\n"), ended.stderr


def test_a_program_ends_after_its_threads() -> None:
    """Its work is done, but its thread still releases memory or has not been closed."""
    code = (
        "import time\n"
        "from idadapter_core.cli.program import start\n"
        "from idadapter_core.waiting import WorkerThread, start_thread\n"
        "class Held:\n"
        "    def __del__(self): time.sleep(0.3); print('released')\n"
        "def main():\n"
        "    held = Held()\n"
        "    def work(held=held): pass\n"
        "    del held\n"
        "    tasks = [work]\n"
        "    del work\n"
        "    WorkerThread('disk').run(tasks.pop(), print)\n"
        "    start_thread(lambda: (time.sleep(0.3), print('helped')), 'helper')\n"
        "    import atexit; atexit.register(print, 'over')\n"
        "    return 3\n"
        "start(main)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=240)
    assert ended.returncode == 3, ended.stderr
    *said, last = ended.stdout.decode().split()
    assert (sorted(said), last) == (["helped", "released"], "over")


def test_shared_memory_that_is_too_small(toy: Toy, tmp_path: Path) -> None:
    """With the file system of a container that has none to spare."""
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=100k tmpfs /dev/shm && "
    if shutil.which("unshare") is None or subprocess.run([*mounted, f"{mount} true"], check=False).returncode:
        pytest.skip("this system lets nobody but its owner mount a file system")
    process = Process(
        toy, tmp_path / "run", data={"workers": 1}, wrapper=[*mounted, f'{mount} exec "$@"', "sh"]
    )
    code, output = process.wait()
    assert code == 1, output
    assert re.search(r"shared memory is full: /dev/shm \(.*--shm-size.*data\.workers = 0", output)
    assert "Traceback" not in output


@pytest.mark.parametrize("when", ["validation", "a grid"])
def test_a_signal_between_two_steps(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Pictures of a large model take minutes, in which a launcher loses its patience."""
    calls: list[int] = []
    is_grid = when == "a grid"
    where: tuple[Any, str] = (sampling, "_conditions") if is_grid else (bundle.Bundle, "measure")
    function = getattr(*where)

    def signalled(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    monkeypatch.setattr(*where, signalled)
    grids = {"sample_every": 2, "sample_people": 1, "sample_steps": 50}
    output = {**(grids if is_grid else {"validate_every": 2, "validate_samples": 400}), "save_every": 4}
    if not is_grid:  # none before the first step
        assert train(toy.config(tmp_path, train={"steps": 1}, output={"save_every": 1})) == 0
    resume = "auto" if checkpoints(tmp_path) else "never"
    assert train(toy.config(tmp_path, output=output), resume=resume) == STOPPED
    assert len(calls) == 2
    assert checkpoints(tmp_path)[-1].step == 2
    assert not list((tmp_path / "samples").glob("*"))
    assert not any("validation" in line for line in read_log(tmp_path))
