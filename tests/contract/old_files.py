"""Files of earlier releases: a small adapter and its identities for each method that a release had, with their digests.

    python -m tests.contract.old_files

writes those of methods that have none yet, and leaves all others as they are: they stand for files that users have.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from tests.contract.samples import (
    DATA,
    FAMILIES,
    METHOD_NAMES,
    SMALLEST,
    Case,
    acting,
    features,
    fresh,
    tokens_digest,
    write_adapter,
    write_identity,
)

INDEX = DATA / "digests.json"
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


if __name__ == "__main__":
    print("written:", ", ".join(write_missing()) or "nothing")
