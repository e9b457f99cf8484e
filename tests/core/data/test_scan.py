"""A scan sees every photo, goes on where it was cut off, and writes the same index whoever does the work.

One file, because its tests share one scan.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from idadapter_core.data import ranks, scan as scanning
from idadapter_core.data.index import Index, read_index, write_index
from idadapter_core.data.measure import Limits, Models
from idadapter_core.data.progress import Progress
from idadapter_core.data.ranks import ALONE, Ranks
from idadapter_core.data.rows import STATUSES
from idadapter_core.data.scan import scan, scan_share
from idadapter_core.data.shards import write_shards
from idadapter_core.data.sources import list_photos
from idadapter_core.data.split import SplitSettings
from idadapter_core.data.stats import describe
from idadapter_core.errors import ConfigError, InputError
from idadapter_core.faces.align import align_face
from idadapter_core.faces.features import crops_to_tensor
from idadapter_core.faces.iresnet import IResNet, digest, save_iresnet
from tests.core.data.conftest import Scanned
from tests.golden import recipe
from tests.tiny.face_package import write_package

ROOT = Path(__file__).parents[3]

# Scans in a process, of the rank that its environment tells, that kills itself without warning when so many photos are done.
KILLED = """
import os, signal, sys
from pathlib import Path
from idadapter_core.data.ranks import ranks_of
from idadapter_core.data.scan import scan, scan_share
from idadapter_core.data.sources import list_photos

def progress(done, total):
    if done == int(sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    photos, output, package = map(Path, sys.argv[1:4])
    ranks = ranks_of()
    options = dict(package=package, provider="cpu", workers=int(sys.argv[4]), progress=progress)
    if ranks.is_first:
        scan(list_photos(photos), output, world=ranks.world, **options)
    else:
        scan_share(list_photos(photos), output, ranks=ranks, **options)
"""
NEVER = -1


TOTAL = 3 * 3 + 5


def again(scanned: Scanned, output: Path, **options: Any) -> Index:
    """The same scan, of photos where they are, to a folder beside them."""
    return run(scanned.photos, output, scanned.package, **options)


def run(photos: Path, output: Path, package: Path, **options: Any) -> Index:
    return scan(list_photos(photos), output, package=package, provider="cpu", **options)


@pytest.fixture
def beside(scanned: Scanned) -> Any:
    """A path for another index of the same photos: in the same folder, so that it should have the same bytes."""
    path = scanned.index.path.with_name("again.parquet")
    yield path
    for left in path.parent.glob("again.*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def start(
    photos: int, scanned: Scanned, output: Path, workers: int = 0, ranks: Ranks = ALONE
) -> subprocess.Popen:
    """A scan in another process, which is killed after so many photos."""
    script = output.with_name("again.py")
    script.write_text(KILLED)
    arguments = [scanned.photos, output, scanned.package, workers, photos]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world),
    }
    return subprocess.Popen(
        [sys.executable, script, *map(str, arguments)], env=environment, stderr=subprocess.PIPE
    )


def kill_after(photos: int, scanned: Scanned, output: Path, workers: int = 0, ranks: Ranks = ALONE) -> None:
    process = start(photos, scanned, output, workers, ranks)
    # Workers that stayed would keep the pipe open, and this would not return.
    _, told = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, told.decode()
    assert not output.exists()


def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sources that are looked at from now on, in this process."""
    seen: list[str] = []
    measure = scanning.measure

    def counted(photo: Any, root: Path, models: Models) -> Any:
        seen.append(photo.source)
        return measure(photo, root, models)

    monkeypatch.setattr(scanning, "measure", counted)
    return seen


def test_every_photo_has_a_row_and_a_status(scanned: Scanned) -> None:
    index = scanned.index
    assert [row.source for row in index.rows] == sorted(
        path.relative_to(scanned.photos).as_posix() for path in scanned.photos.rglob("*.png")
    )
    assert sum(index.counts().values()) == len(index.rows) == TOTAL
    statuses = {row.source: row.status for row in index.rows if row.status != "ok"}
    assert statuses == {
        "bad/corrupt.png": "corrupt",
        "bad/no_face.png": "no_face",
        "bad/noise.png": "no_face",
        "bad/tiny.png": "too_small",
        "bad/two_faces.png": "many_faces",
    }
    assert index.bad_share() == pytest.approx(5 / TOTAL)
    assert set(statuses.values()) <= set(STATUSES)


def test_what_the_index_says(scanned: Scanned, models: Models) -> None:
    index = read_index(scanned.index.path)
    assert index.rows == scanned.index.rows
    row = index.usable()[0]
    assert (row.source, row.identity, row.class_noun) == ("person_00/0.png", "person_00", "man")
    assert row.caption.startswith("a photo of a man in front of a ")
    assert row.phash
    assert index.facts["recognizer"] == models.analyzer.recognizer_digest
    assert index.facts["limits"]["min_side"] == Limits().min_side
    embeddings = index.embeddings()
    found = torch.tensor([row.box is not None and row.status != "too_small" for row in index.rows])
    assert embeddings[found].norm(dim=1).min() > 1
    assert not embeddings[[row.faces == 0 for row in index.rows]].any()


def test_the_number_of_workers_changes_nothing(scanned: Scanned, beside: Path) -> None:
    index = again(scanned, beside, workers=2)
    assert beside.read_bytes() == scanned.index.path.read_bytes()
    torch.testing.assert_close(index.embeddings(), scanned.index.embeddings(), rtol=0, atol=0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot stop a process")
def test_a_worker_that_is_stuck_holds_up_nobody(scanned: Scanned, beside: Path) -> None:
    """A stopped process stands for one that a disk does not answer."""

    def stop(done: int, total: int) -> None:
        if done:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGSTOP)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again(scanned, beside, workers=1, progress=stop)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot stop a process")
def test_waiting_for_a_worker_ends(scanned: Scanned, beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int) -> None:
        if done:
            monkeypatch.setattr(scanning, "WAIT_TIMEOUT", 0.2)
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGSTOP)

    with pytest.raises(InputError, match="no photo was scanned for 0 s: a worker is stuck at one of .*disk"):
        again(scanned, beside, workers=1, progress=stop)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
def test_a_worker_that_died_is_told_with_its_reason(scanned: Scanned, beside: Path) -> None:
    def kill(done: int, total: int) -> None:
        if done == 1:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGKILL)

    with pytest.raises(
        InputError,
        match=r"a worker process died at one of .*: it was ended by SIGKILL, .*memory.*fewer --workers",
    ):
        again(scanned, beside, workers=1, progress=kill)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("killed", "done", "resumed"), [(0, 6, 0), (2, 3, 1)])
def test_a_scan_that_was_killed_goes_on(
    killed: int, done: int, resumed: int, scanned: Scanned, beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By workers of another number, too; all give the same bytes."""
    kill_after(done, scanned, beside, workers=killed)
    seen = looked_at(monkeypatch)
    steps: list[int] = []
    index = again(scanned, beside, workers=resumed, progress=lambda so_far, total: steps.append(so_far))
    assert steps == list(range(done, TOTAL + 1))
    assert len(seen) == (0 if resumed else TOTAL - done)
    assert beside.read_bytes() == scanned.index.path.read_bytes()
    torch.testing.assert_close(index.embeddings(), scanned.index.embeddings(), rtol=0, atol=0)
    assert not list(beside.parent.glob("*.progress"))


def stop_after(done: int, photos: Path, output: Path, package: Path) -> Path:
    """A scan that was interrupted; returns its progress file."""

    def progress(so_far: int, total: int) -> None:
        if so_far == done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(photos, output, package, progress=progress)
    return output.with_name(f"{output.name}.progress") / "rank-00000.jsonl"


# ------------------------------------------------------------------------------------------------ several processes


def look_at_share(scanned: Scanned, output: Path, rank: int, world: int) -> None:
    source = list_photos(scanned.photos)
    scan_share(source, output, ranks=Ranks(rank, world), package=scanned.package, provider="cpu")


@pytest.mark.parametrize("world", [2, 3])
def test_the_number_of_ranks_changes_nothing(
    world: int, scanned: Scanned, beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a byte of the index; and nobody looks at what another has looked at."""
    seen = looked_at(monkeypatch)
    for rank in range(1, world):
        look_at_share(scanned, beside, rank, world)
        assert len(seen) == TOTAL * (rank + 1) // world - TOTAL // world
    index = again(scanned, beside, world=world)
    assert sorted(seen) == [row.source for row in index.rows]
    assert beside.read_bytes() == scanned.index.path.read_bytes()
    torch.testing.assert_close(index.embeddings(), scanned.index.embeddings(), rtol=0, atol=0)
    assert not list(beside.parent.glob("*.progress"))


def test_a_rank_that_was_killed_is_resumed(
    scanned: Scanned, beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While rank 0, in a process of its own, waits for it."""
    first = start(NEVER, scanned, beside, ranks=Ranks(0, 2))
    try:
        kill_after(2, scanned, beside, ranks=Ranks(1, 2))
        seen = looked_at(monkeypatch)
        look_at_share(scanned, beside, 1, 2)
        assert len(seen) == TOTAL // 2 - 2
        _, told = first.communicate(timeout=120)
        assert first.returncode == 0, told.decode()
    finally:
        first.kill()
        first.wait()
    assert beside.read_bytes() == scanned.index.path.read_bytes()


def test_ranks_of_another_number_go_on(
    scanned: Scanned, beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_after(3, scanned, beside, ranks=Ranks(2, 3))
    seen = looked_at(monkeypatch)
    look_at_share(scanned, beside, 1, 2)
    assert len(seen) == TOTAL // 2 - 3
    again(scanned, beside)
    assert len(seen) == TOTAL - 3
    assert beside.read_bytes() == scanned.index.path.read_bytes()


def test_a_rank_that_does_nothing_is_not_waited_for_for_ever(
    scanned: Scanned, beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "WAIT_TIMEOUT", 0.1)
    monkeypatch.setattr(ranks, "POLL", 0.05)
    with pytest.raises(
        InputError, match=r"no other process.*: 7 photos are waited for, among them person_00/2\.png"
    ):
        again(scanned, beside, world=2)
    assert not beside.exists()


def test_what_a_rank_found_in_a_photo_that_changed_since_does_not_count(
    few: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = Scanned(few, package, None, {})  # type: ignore[arg-type]
    output = tmp_path / "i.parquet"
    monkeypatch.setattr(scanning, "WAIT_TIMEOUT", 0.1)
    monkeypatch.setattr(ranks, "POLL", 0.05)
    look_at_share(scanned, output, 1, 2)
    (few / "person_01" / "2.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"1 photos are waited for, among them person_01/2\.png"):
        again(scanned, output, world=2)
    seen = looked_at(monkeypatch)
    look_at_share(scanned, output, 1, 2)
    index = again(scanned, output, world=2)
    assert seen == ["person_01/2.png"]
    assert index.counts()["corrupt"] == 1


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, Ranks(0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, Ranks(2, 4)),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4, WORLD_SIZE=4"),
        ({"RANK": "1"}, "RANK=1"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one"),
    ],
)
def test_ranks_are_told_by_the_environment(environment: dict[str, str], found: Ranks | str) -> None:
    if isinstance(found, Ranks):
        assert ranks.ranks_of(environment) == found
    else:
        with pytest.raises(ConfigError, match=found):
            ranks.ranks_of(environment)


# ------------------------------------------------------------------------------------------------ progress


def test_half_a_line_of_progress_is_forgotten(
    scanned: Scanned, beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = stop_after(6, scanned.photos, beside, scanned.package)
    progress.write_bytes(progress.read_bytes()[:-100])
    seen = looked_at(monkeypatch)
    again(scanned, beside)
    assert len(seen) == TOTAL - 5
    assert beside.read_bytes() == scanned.index.path.read_bytes()


def test_a_photo_that_changed_meanwhile_is_looked_at_again(
    package: Path, few: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (few / "person_00" / "0.png").write_bytes(b"broken")
    stop_after(5, few, tmp_path / "i.parquet", package)
    shutil.copy(few / "person_00" / "1.png", few / "person_00" / "0.png")
    seen = looked_at(monkeypatch)
    index = run(few, tmp_path / "i.parquet", package)
    assert seen == ["person_00/0.png", "person_01/2.png"]
    assert index.rows[0].status == "ok"


def test_progress_of_other_face_models_is_not_used(
    package: Path,
    few: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stop_after(2, few, tmp_path / "i.parquet", package)
    seen = looked_at(monkeypatch)
    with caplog.at_level(logging.WARNING):
        index = run(few, tmp_path / "i.parquet", write_package(tmp_path / "other", seed=1))
    assert "other face models" in caplog.text
    assert len(seen) == len(index.rows) == 6


def test_a_full_disk_keeps_what_was_found(
    package: Path, few: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    write = Progress._write

    def full(self: Any, content: Any) -> None:
        if self.left == 3:
            monkeypatch.setattr(self, "_file", open("/dev/full", "wb"))  # noqa: PTH123, SIM115
        write(self, content)

    monkeypatch.setattr(Progress, "_write", full)
    with pytest.raises(ConfigError, match=r"No space left.*what was found so far is kept"):
        run(few, tmp_path / "i.parquet", package)
    monkeypatch.undo()
    seen = looked_at(monkeypatch)
    index = run(few, tmp_path / "i.parquet", package)
    assert len(seen) == 6 - 3
    assert index.counts()["ok"] == 6


def test_an_index_that_could_not_be_written_is_made_of_what_was_found(
    scanned: Scanned, beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise ConfigError("No space left on device")

    monkeypatch.setattr(scanning, "write_index", full)
    with pytest.raises(ConfigError, match="No space left"):
        again(scanned, beside)
    monkeypatch.undo()
    seen = looked_at(monkeypatch)
    again(scanned, beside)
    assert seen == []
    assert beside.read_bytes() == scanned.index.path.read_bytes()


def test_somebody_else_in_a_persons_folder(package: Path, few: Path, tmp_path: Path) -> None:
    shutil.copy(few / "person_01" / "0.png", few / "person_00" / "9.png")
    shutil.rmtree(few / "person_01")
    index = run(few, tmp_path / "i.parquet", package)
    wrong = [row for row in index.rows if row.status == "id_mismatch"]
    assert [row.source for row in wrong] == ["person_00/9.png"]
    assert "to the median of 4 photos of person_00" in wrong[0].reason
    assert wrong[0].split == ""


def test_two_photos_are_too_few_to_say_who_is_wrong(package: Path, few: Path, tmp_path: Path) -> None:
    shutil.copy(few / "person_01" / "0.png", few / "person_00" / "0.png")
    (few / "person_00" / "1.png").unlink()
    index = run(few, tmp_path / "i.parquet", package)
    assert index.counts()["ok"] == 5


def test_one_person_in_two_folders_is_on_one_side(package: Path, few: Path, tmp_path: Path) -> None:
    """And not in a cluster with the other person, so the two sides are never empty."""
    for person in ("person_00", "person_01"):
        other = few / f"{person} again"
        other.mkdir()
        (few / person / "2.png").rename(other / "2.png")
    index = run(few, tmp_path / "i.parquet", package, split=SplitSettings(share=0.4))
    sides = {row.identity: row.split for row in index.usable()}
    assert sides["person_00"] == sides["person_00 again"] != sides["person_01"] == sides["person_01 again"]
    assert index.facts["split"]["clusters"] == 2
    assert index.facts["split"]["largest_cosine"] < 0.6


def test_a_torch_recogniser_gives_the_embeddings(scanned: Scanned, tmp_path: Path) -> None:
    network = IResNet((1, 1, 1, 1))
    recipe.fill(network, 0, "iresnet.")
    save_iresnet(network, tmp_path / "net.safetensors", torch.float32)
    index = run(
        scanned.photos / "person_00",
        tmp_path / "i.parquet",
        scanned.package,
        recognizer=tmp_path / "net.safetensors",
    )
    assert index.facts["recognizer"] == digest(network)
    crop = align_face(index.load(index.rows[1]), index.rows[1].landmarks or ())
    expected, _ = network(crops_to_tensor([crop]))
    # Landmarks are rounded in the index.
    assert torch.cosine_similarity(index.embeddings()[1], expected[0], dim=0) > 0.999


def test_shards_and_what_is_left_of_a_damaged_one(scanned: Scanned, tmp_path: Path) -> None:
    made = write_shards(scanned.index, tmp_path / "shards", photos=5)
    whole, damaged = sorted((tmp_path / "shards").glob("*.tar"))
    last = max(row.offset for row in made.usable() if row.source.startswith(damaged.name))
    damaged.write_bytes(damaged.read_bytes()[: last + 100])
    index = scan(
        list_photos(tmp_path / "shards"), tmp_path / "i.parquet", package=scanned.package, provider="cpu"
    )
    assert len(index.rows) == 5 + 3 + 1
    assert [(row.source, row.status) for row in index.rows if row.status != "ok"] == [
        (damaged.name, "corrupt")
    ]
    assert "3 whole samples" in index.rows[-1].reason
    row = index.usable()[6]
    assert row.source.startswith(f"{damaged.name}::")
    twin = scanned.index.rows[int(row.source.partition("::")[2])]
    assert (row.sha256, row.identity, row.caption, row.class_noun) == (
        twin.sha256,
        twin.identity,
        twin.caption,
        twin.class_noun,
    )
    np.testing.assert_array_equal(index.load(row), scanned.index.load(twin))
    assert whole.exists()


def test_a_list_may_name_a_photo_twice(scanned: Scanned, tmp_path: Path) -> None:
    path = scanned.photos / "person_00" / "0.png"
    (tmp_path / "list.txt").write_text(f"{path}\n{path}\n{path}.absent.png\n")
    index = scan(
        list_photos(tmp_path / "list.txt"), tmp_path / "i.parquet", package=scanned.package, provider="cpu"
    )
    assert [row.status for row in index.rows] == ["ok", "ok", "corrupt"]
    assert [row.source for row in index.rows][:2] == [path.as_posix()] * 2


def test_a_caption_that_cannot_be_read_is_a_bad_row_until_it_is_mended(
    package: Path, few: Path, tmp_path: Path
) -> None:
    """Whoever does the work, and not only for the scan that saw it first."""
    text = few / "person_00" / "1.txt"
    text.write_bytes("фото".encode("cp1251"))
    for workers, name in ((0, "a"), (2, "b")):
        index = run(few, tmp_path / f"{name}.parquet", package, workers=workers)
        assert [(row.source, row.status) for row in index.rows if row.status != "ok"] == [
            ("person_00/1.png", "corrupt")
        ]
        assert "1.txt cannot be read: byte 0xf4 at position 0" in index.rows[1].reason
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    stop_after(4, few, tmp_path / "c.parquet", package)
    text.write_text("a photo of a man")
    index = run(few, tmp_path / "c.parquet", package)
    assert (index.rows[1].status, index.rows[1].caption) == ("ok", "a photo of a man")


def test_a_photo_that_is_named_with_a_good_and_a_bad_text(package: Path, few: Path, tmp_path: Path) -> None:
    table = few / "t.jsonl"
    entries = [{"file": "person_00/0.png", "caption": caption} for caption in ("fine", "a\0b", "fine, too")]
    table.write_text("\n".join(map(json.dumps, entries)))
    index = run(table, tmp_path / "i.parquet", package)
    assert [(row.status, row.caption) for row in index.rows] == [
        ("ok", "fine"),
        ("corrupt", ""),
        ("ok", "fine, too"),
    ]


def test_names_that_no_file_can_have(package: Path, few: Path, tmp_path: Path) -> None:
    names = ["x" * 5000, "\ud83d", "\udc80", "a\0b", ".", "..", "/dev/null", "person_00", "person_00/0.png"]
    table = few / "t.jsonl"
    table.write_text("\n".join(json.dumps({"file": name}) for name in names))
    index = run(table, tmp_path / "i.parquet", package)
    assert [row.status for row in index.rows] == ["corrupt"] * 8 + ["ok"]
    assert read_index(tmp_path / "i.parquet").rows == index.rows


def test_colour_profiles_that_cannot_be_used_are_counted(package: Path, few: Path, tmp_path: Path) -> None:
    for name in ("0.png", "2.png"):
        with Image.open(few / "person_00" / name) as photo:
            photo.save(few / "person_00" / name, icc_profile=b"no profile")
    index = run(few, tmp_path / "i.parquet", package)
    assert index.counts()["ok"] == 6
    assert index.facts["notes"][-1] == (
        "2 of 6 photos: the colour profile cannot be used, so colours were taken for sRGB; first: person_00/0.png"
    )


def test_what_was_not_read_is_in_the_index(package: Path, few: Path, tmp_path: Path) -> None:
    (few / "person_00" / "old.zip").touch()
    (few / "person_01" / "2.txt").unlink()
    index = run(few, tmp_path / "i.parquet", package)
    unread = {".zip": {"count": 1, "first": "person_00/old.zip"}}
    assert index.facts["files"] == {"files": 12, "photos": 6, "texts": 5, "tables": 0, "not_read": unread}
    assert index.facts["notes"] == ["captions for 5 of 6 photos; first without: person_01/2.png"]
    told = describe(index)
    assert "files: 12, of these 6 photos, 5 texts, 0 tables, 1 not read" in told
    assert "not read: 1 .zip (first person_00/old.zip): unpack them" in told
    assert index.facts["notes"][0] in told


def test_an_index_beside_the_photos_is_the_same_after_an_interruption(
    package: Path, few: Path, tmp_path: Path
) -> None:
    def scan_into(name: str, **options: Any) -> bytes:
        output = few / name
        scan(list_photos(few, output=output), output, package=package, provider="cpu", **options)
        return output.read_bytes()

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    first = scan_into("i.parquet")
    assert scan_into("i.parquet") == first
    with pytest.raises(KeyboardInterrupt):
        scan_into("i.parquet", progress=interrupt)
    assert scan_into("i.parquet") == first


def test_an_index_from_before_files_were_counted(scanned: Scanned, tmp_path: Path) -> None:
    facts = {name: value for name, value in scanned.index.facts.items() if name not in ("files", "notes")}
    rows, embeddings = scanned.index.rows, scanned.index.embeddings()
    write_index(tmp_path / "i.parquet", scanned.index.root, rows, embeddings, facts)
    old = read_index(tmp_path / "i.parquet")
    assert old.rows == rows
    assert "not read" not in describe(old)
