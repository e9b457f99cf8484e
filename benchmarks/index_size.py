"""Cost of an index of millions of rows: opening time, memory per process beyond the map, and random access to a row.

    python benchmarks/index_size.py [--rows 6000000] [--folder FOLDER]

Writes a synthetic index (a fifth of the rows of unknown people, 3 % bad), then opens it in 1, 4 and 8 processes at once, each as in
training: the usable rows, their people, the samples. There are no embeddings, because training never reads them. Six million rows
take a few minutes and 6 GB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PROCESSES = (1, 4, 8)
ACCESSES = 20_000
GATE = "gate"  # file that starts the waiting processes


def batches(count: int, rows_of_a_batch: int) -> Iterator[Any]:
    """Record batches of typical rows, as written by a scan, built by columns."""
    import numpy as np
    import pyarrow as pa

    from idadapter_core.data.columns import schema

    draw = np.random.default_rng(0)
    for first in range(0, count, rows_of_a_batch):
        numbers = np.arange(first, min(first + rows_of_a_batch, count))
        size = len(numbers)
        is_bad = draw.random(size) < 0.03
        people = np.where(draw.random(size) < 0.2, -1, numbers // 8)
        corner = np.round(draw.random((size, 2)) * 200, 2)
        texts = {
            "source": [f"shard-{n // 1000:06}.tar::{n:09}" for n in numbers],
            "sha256": [hashlib.sha256(b"%d" % n).hexdigest() for n in numbers],
            "identity": ["" if person < 0 else f"person_{person:07}" for person in people],
            "caption": [
                f"a photo of a woman with brown hair, smiling, in front of a wall, number {n}"
                for n in numbers
            ],
            "class_noun": np.where(numbers % 2, "woman", "man"),
            "phash": [f"{n * 0x9E3779B97F4A7C15 % 2**64:016x}" for n in numbers.tolist()],
            "split": np.where(is_bad, "", np.where(numbers // 8 % 20 == 0, "test", "train")),
            "status": np.where(is_bad, "blur", "ok"),
            "reason": np.where(is_bad, "the crop's sharpness is 9.5, at least 15 is needed", ""),
        }
        plain = {
            "number": numbers,
            "width": np.full(size, 1024),
            "height": np.full(size, 1024),
            "faces": np.ones(size),
            "offset": numbers * 250_112 % 250_112_000 + 512,
            "size": 200_000 + numbers % 100_000,
        }
        lists = {
            "box": np.concatenate([corner, corner + 600], 1),
            "landmarks": (
                corner[:, None] + [[150, 200], [450, 200], [300, 350], [180, 480], [420, 480]]
            ).reshape(size, 10),
        }
        arrays = []
        for field in schema():
            if field.name in lists:
                values = pa.array(lists[field.name].reshape(-1))
                ends = np.arange(size + 1, dtype=np.int32) * lists[field.name].shape[1]
                arrays.append(pa.ListArray.from_arrays(ends, values))
            elif field.name in texts or field.name in plain:
                values = texts.get(field.name, plain.get(field.name))
                arrays.append(pa.array(values).cast(field.type))
            else:
                arrays.append(pa.array(np.round(draw.random(size) * 20, 4)))
        yield pa.record_batch(arrays, schema=schema())


def write(folder: Path, count: int) -> dict[str, Any]:
    from idadapter_core.data import memory_map, parquet
    from idadapter_core.data.rows import BATCH

    path = folder / "index.parquet"
    facts = {"version": parquet.VERSION, "root": ".", "rows": count, "embeddings": "0" * 16}
    began = time.perf_counter()
    head = parquet.write_parquet(path, batches(count, BATCH), facts)
    written = time.perf_counter()
    memory_map.mapped_rows(path, head, path)
    mapped = time.perf_counter()
    beside = memory_map.map_path(path, head.digest)
    return {
        "writing": written - began,
        "mapping": mapped - written,
        "parquet": path.stat().st_size,
        "map": beside.stat().st_size,
    }


def private() -> dict[str, float]:
    """Private memory of this process, and touched pages of mapped files, in MB."""
    sizes = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value, _ = line.split()
        sizes[name.rstrip(":")] = int(value) / 1000
    return {"private": sizes["Anonymous"], "resident": sizes["Rss"]}


def open_one(folder: Path) -> None:
    """Run one process: wait for the gate, open the index and print the cost."""
    import pyarrow.parquet  # noqa: F401  what every training has loaded

    from idadapter_core.config import parse_config
    from idadapter_core.data.index import read_index
    from idadapter_core.training.config import RunConfig
    from idadapter_core.training.samples import Samples, usable_rows

    config = parse_config(RunConfig, {"data": {"max_bad_share": 0.5}})
    before = private()
    print("ready", flush=True)
    while not (folder / GATE).exists():
        time.sleep(0.005)
    began, computing = time.perf_counter(), time.process_time()
    index = read_index(folder / "index.parquet")
    opened = time.perf_counter()
    counts = index.counts()
    train = usable_rows(index, config, "train")
    test = usable_rows(index, config, "test")
    samples = Samples(index, train, config, 1000)
    people = len(samples._people.of)
    prepared, computed = time.perf_counter(), time.process_time()
    places = [random.Random(0).randrange(len(train)) for _ in range(ACCESSES)]
    cold = time.process_time()
    for place in places:
        train[place]
    first = time.process_time()
    for place in places:
        train[place]
    warm = time.process_time()
    after = private()
    print(
        json.dumps(
            {
                "open": opened - began,
                "prepare": prepared - opened,
                "computing": computed - computing,
                "first": (first - cold) / ACCESSES * 1e6,
                "again": (warm - first) / ACCESSES * 1e6,
                "before": before["private"],
                "private": after["private"] - before["private"],
                "whole": after["private"],
                "rows": sum(counts.values()),
                "train": len(train),
                "test": len(test),
                "people": people,
            }
        ),
        flush=True,
    )


def together(folder: Path, processes: int) -> list[dict[str, Any]]:
    gate = folder / GATE
    gate.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--folder", str(folder), "--open-one"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        gate.touch()
        found = [json.loads(process.communicate(timeout=600)[0]) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return found


def report(folder: Path, count: int) -> None:
    if not (folder / "index.parquet").exists():
        made = write(folder, count)
        print(
            f"{count} rows: written in {made['writing']:.0f} s, mapped in {made['mapping']:.0f} s; "
            f"{made['parquet'] / 1e9:.2f} GB of Parquet, {made['map'] / 1e9:.2f} GB of map"
        )
    print(
        "\n| processes | open, s | with people and samples, s | of it CPU, s | private MB for it | private MB in all | "
        "a row, first time, CPU µs | again, CPU µs |\n|---|---|---|---|---|---|---|---|"
    )
    for processes in PROCESSES:
        found = together(folder, processes)

        def worst(*names: str) -> float:
            return max(sum(one[name] for name in names) for one in found)  # noqa: B023

        def middle(name: str) -> float:
            return statistics.median(one[name] for one in found)  # noqa: B023

        print(
            f"| {processes} | {worst('open'):.2f} | {worst('open', 'prepare'):.2f} | {worst('computing'):.2f} | {worst('private'):.0f} | {worst('whole'):.0f} | "
            f"{middle('first'):.1f} | {middle('again'):.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=6_000_000)
    parser.add_argument("--folder", type=Path, help="keep the files there, or use those of before")
    parser.add_argument("--open-one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open_one:
        open_one(options.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report(folder, options.rows)


if __name__ == "__main__":
    main()
