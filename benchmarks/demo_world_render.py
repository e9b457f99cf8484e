"""Rendering time of an image of the demo world, with numpy alone and with numba.

    python -m benchmarks.demo_world_render [--people 8] [--pictures 4] [--repeats 5]

CPU seconds of one process. The kinds are interleaved, so that other load affects all of them; compare ratios. "one by one" draws each
image in a separate call, which rebuilds mesh and skin.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from idadapter_core.demo_world import STYLES, Factors, Person, render, seed_of
from idadapter_core.demo_world.mesh import posed_meshes, rest_meshes
from idadapter_core.demo_world.skin import skin_map

BACKENDS = ("numpy", "numba") if importlib.util.find_spec("numba") else ("numpy",)


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of a function, without cached skins."""
    skin_map.cache_clear()
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the renderer of the demo world.")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=4, help="of each person")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=128)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    people = [
        Person.sample(seed_of("training", k)) for k in range(options.people) for _ in range(options.pictures)
    ]
    factors = [Factors.sample(rng, style="photo") for _ in people]
    count = len(people)

    def together(backend: str) -> Callable[[], object]:
        return lambda: render(people, factors, options.size, backend=backend)

    def one_by_one() -> None:
        for person, factor in zip(people, factors, strict=True):
            skin_map.cache_clear()
            render([person], [factor], options.size, backend=BACKENDS[-1])

    kinds: dict[str, Callable[[], object]] = {f"batch, {name}": together(name) for name in BACKENDS}
    kinds[f"one by one, {BACKENDS[-1]}"] = one_by_one
    kinds["meshes of a batch alone"] = lambda: posed_meshes(rest_meshes(people), people, factors)
    kinds["meshes one by one"] = lambda: [
        posed_meshes(rest_meshes([p]), [p], [f]) for p, f in zip(people, factors, strict=True)
    ]
    for style in STYLES[1:]:
        styled = [Factors.sample(rng, style=style) for _ in people]
        kinds[f"batch, {BACKENDS[-1]}, {style}"] = lambda styled=styled: render(
            people, styled, options.size, backend=BACKENDS[-1]
        )
    for work in kinds.values():
        work()  # loads the head, and compiles
    rounds = [{name: seconds(work) / count for name, work in kinds.items()} for _ in range(options.repeats)]
    first = next(iter(kinds))
    print(
        f"{'':28}{'median':>9}{'lowest':>9}{'ratio':>8}   (CPU ms per picture of {options.size} px, {options.repeats} rounds)"
    )
    for name in kinds:
        values = [entry[name] for entry in rounds]
        ratio = statistics.median(entry[name] / entry[first] for entry in rounds)
        print(f"{name:28}{1000 * statistics.median(values):9.1f}{1000 * min(values):9.1f}{ratio:8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
