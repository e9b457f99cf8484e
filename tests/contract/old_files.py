"""Of earlier releases: for each method a small adapter and its identities with their digests, and what a UNet predicts with it.

    python -m tests.contract.old_files

writes those of methods that have none yet, and leaves all others as they are: they stand for files that users have.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.contract.hosts import Cast, ComfyHost, Drawn, folder, host_of
from tests.contract.samples import (
    CASES,
    DATA,
    FAMILIES,
    METHOD_NAMES,
    SMALLEST,
    Case,
    acting,
    features,
    fresh,
    frozen,
    read_file,
    tokens_digest,
    write_adapter,
    write_file,
    write_identity,
)
from tests.harness.comfy import comfyui_path, load_pack

INDEX = DATA / "digests.json"
PREDICTIONS = DATA / "predictions.safetensors"
SEED = 1  # of the features behind each identity
PHOTOS = (1, 3)  # of the person, for each identity


@dataclass(frozen=True)
class OldFiles:
    """The files of one method. Digests are those that the release gave which wrote them."""

    method: str
    adapter_digest: str
    tokens_digests: tuple[str, ...]  # of the tensors of each identity

    @property
    def adapter(self) -> str:
        return f"{self.method}_adapter.safetensors"

    @property
    def identities(self) -> list[str]:
        return [f"{self.method}_identity_{photos}.safetensors" for photos in PHOTOS]


def old_files() -> list[OldFiles]:
    """What there is, by method."""
    stored = json.loads(INDEX.read_text(encoding="utf-8")) if INDEX.exists() else {}
    return [
        OldFiles(method, digests["adapter"], tuple(digests["identities"]))
        for method, digests in stored.items()
    ]


def write_missing() -> list[str]:
    """Write the files of methods that have none; the names of these methods."""
    found = {old.method: old for old in old_files()}
    new = [method for method in METHOD_NAMES if method not in found]
    for method in new:
        adapter = acting(fresh(Case(method, FAMILIES[0]), SMALLEST))
        people = [adapter.encode(features(SEED, photos, SMALLEST.vision)) for photos in PHOTOS]
        found[method] = old = OldFiles(method, adapter.digest, tuple(map(tokens_digest, people)))
        write_adapter(adapter, DATA / old.adapter)
        for person, name in zip(people, old.identities, strict=True):
            write_identity(person, DATA / name)
    digests = {
        old.method: {"adapter": old.adapter_digest, "identities": old.tokens_digests}
        for old in found.values()
    }
    INDEX.write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    return new


def predictions() -> dict[str, Tensor]:
    """What the UNet gave for `samples.frozen`, (2, 4, 8, 8), by case: the negative and the positive row of `predict`."""
    return read_file(PREDICTIONS)[0] if PREDICTIONS.exists() else {}


def predict(host: Any, case: Case) -> Tensor:
    """One step with the frozen adapter of a case, its identity in the prompt as well."""
    cast = Cast(host, write_adapter(frozen(case), folder() / f"frozen {case}.safetensors"))
    drawn: Drawn = host.draw(cast.act(), said=cast.person(), steps=1)
    return drawn.out[0]


def write_missing_predictions(comfyui: Path) -> list[str]:
    """Of cases that have none; their names."""
    found = predictions()
    new = [case for case in CASES if str(case) not in found]
    for case in new:
        found[str(case)] = predict(host_of(ComfyHost, case.family, comfyui), case).clone()
    write_file(PREDICTIONS, found, {})
    return list(map(str, new))


def main() -> None:
    print("files written:", ", ".join(write_missing()) or "none")
    load_pack()
    path = comfyui_path()
    assert path is not None  # load_pack has found it
    print("predictions written:", ", ".join(write_missing_predictions(path)) or "none")


if __name__ == "__main__":
    main()
