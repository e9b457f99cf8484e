"""Checkpoints are whole or not there, whatever interrupts the writing of one."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from idadapter_core.errors import CheckpointError
from idadapter_core.training.checkpoints import checkpoints, latest, load_optimizer, write_checkpoint

ROOT = Path(__file__).parents[3]


def save(run: Path, step: int, text: str = "weights", **options: int) -> None:
    write_checkpoint(run, step, {"step": step}, lambda folder: _put(folder, text), **options)


def _put(folder: Path, text: str) -> None:
    (folder / "adapter.bin").write_text(text)
    (folder / "rank").mkdir()
    (folder / "rank" / "0.bin").write_text("rank")


def steps(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints(run)]


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert checkpoints(tmp_path / "absent") == []


def test_the_newest_is_the_one_to_resume_from(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        save(tmp_path, step, f"weights {step}", keep_last=9)
    newest = latest(tmp_path)
    assert newest is not None
    assert newest.state() == {"step": 100}
    assert (newest.path / "adapter.bin").read_text() == "weights 100"
    assert (newest.path / "rank" / "0.bin").read_text() == "rank"
    assert steps(tmp_path) == [5, 20, 100]


def test_old_ones_go_once_the_new_one_is_there(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step, keep_last=2, keep_every=3)
    assert steps(tmp_path) == [3, 6, 7]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3, "old")
    save(tmp_path, 3, "new")
    newest = latest(tmp_path)
    assert newest is not None
    assert (newest.path / "adapter.bin").read_text() == "new"
    assert len(list(newest.path.parent.iterdir())) == 1


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_last_good_one(tmp_path: Path, failure: BaseException) -> None:
    save(tmp_path, 1)

    def full(folder: Path) -> None:
        (folder / "adapter.bin").write_text("half")
        raise failure

    expected = CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write_checkpoint(tmp_path, 2, {}, full, keep_last=1)
    if expected is CheckpointError:
        assert "No space left on device" in str(caught.value)
        assert "earlier checkpoints are untouched" in str(caught.value)
    assert steps(tmp_path) == [1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_process_that_is_killed_while_writing_leaves_the_last_good_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from idadapter_core.training.checkpoints import write_checkpoint\n"
        "def write(folder):\n"
        "    (folder / 'adapter.bin').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_checkpoint(Path(sys.argv[1]), 2, {}, write, keep_last=1)\n"
    ).replace("\\\n", "\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert steps(tmp_path) == [1]
    save(tmp_path, 2)  # also clears away what the dead process left
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000002",
    ]


def test_a_damaged_state_says_so(tmp_path: Path) -> None:
    save(tmp_path, 1)
    newest = latest(tmp_path)
    assert newest is not None
    (newest.path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="resume|Resume"):
        newest.state()


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".step-00000009.1.tmp", "step-9", "notes", "step-00000008"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert steps(tmp_path) == [1]


def test_a_resumed_optimizer_does_not_change_with_its_file(tmp_path: Path) -> None:
    def adam() -> torch.optim.Adam:
        weight = torch.nn.Parameter(torch.ones(1000))
        optimizer = torch.optim.Adam([weight])
        weight.square().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return optimizer

    one, other, path = adam(), adam(), tmp_path / "optimizer.pt"
    torch.save(one.state_dict(), path)
    load_optimizer(other, path)
    size = path.stat().st_size
    with path.open("r+b") as file:  # in place
        file.write(bytes(size))
    (expected,), (found,) = one.state.values(), other.state.values()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
