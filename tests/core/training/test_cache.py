"""The cache: it holds what would be computed, knows what it lacks, and can be built in pieces and by several processes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from idadapter_core.cli import cache as command
from idadapter_core.config import config_toml
from idadapter_core.data.index import read_index, write_index
from idadapter_core.data.rows import Row
from idadapter_core.errors import ConfigError, InputError
from idadapter_core.training import cache as caches
from idadapter_core.training.bundle import Bundle
from idadapter_core.training.cache import FACTS, KEYS, Cache, Folder, build, kinds, verify
from idadapter_core.training.checkpoints import ADAPTER, latest
from idadapter_core.training.config import RunConfig
from idadapter_core.training.loop import train
from idadapter_core.training.parts import Parts, load_parts, prepare_adapter
from idadapter_core.training.samples import VALIDATION, Batch, Samples, join, place
from tests.tiny.toy import Toy

METHODS: dict[str, dict[str, Any]] = {
    "idadapter": {"adapter": {"method": "idadapter", "settings": {"mixer_depth": 1}}},
    "uniid": {"adapter": {"method": "uniid", "settings": {"adapter_depth": 1}}, "loss": {"identity": 0.0}},
}


@dataclass(frozen=True)
class Few:
    """Five photos: three of one person, so that two references are others; one of the next, so that variants are needed; one to
    measure by."""

    toy: Toy
    index: Path

    def config(self, run: Path, cache: Path | str, method: str, /, **sections: dict[str, Any]) -> RunConfig:
        data = {"index": str(self.index), "cache": str(cache), **sections.pop("data", {})}
        return self.toy.config(run, **{**METHODS[method], **sections, "data": data})


@pytest.fixture(scope="module")
def few(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Few:
    whole = read_index(toy.index)
    by_person = itertools.groupby(whole.rows, key=lambda row: row.identity)
    people = [list(rows) for _, rows in by_person]
    chosen = [*people[0][:3], people[1][0], people[-1][0]]
    assert [row.split for row in chosen] == ["train"] * 4 + ["test"]
    rows = [dataclasses.replace(row, number=number) for number, row in enumerate(chosen)]
    path = tmp_path_factory.mktemp("few") / "index.parquet"
    write_index(path, whole.root, rows, torch.zeros(len(rows), 512), {})
    return Few(toy, path)


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def parts(few: Few, method: str, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return load_parts(few.config(tmp_path_factory.mktemp("run"), "", method))


@pytest.fixture(scope="module")
def built(few: Few, parts: Parts, method: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The configuration of a run whose cache is there. No test may change it."""
    folder = tmp_path_factory.mktemp("cache")
    config = few.config(folder, folder, method)
    assert build(parts, config) == {"latents": 9, "photos": 7 if method == "idadapter" else 5}
    return config


@pytest.fixture
def copied(built: RunConfig, tmp_path: Path) -> RunConfig:
    """The same with a cache of its own."""
    shutil.copytree(built.data.cache, tmp_path / "cache")
    data = dataclasses.replace(built.data, cache=str(tmp_path / "cache"))
    return dataclasses.replace(built, data=data)


def content(config: RunConfig) -> dict[str, dict[str, Tensor]]:
    """All entries on the disk, by folder and key."""
    found = {}
    for path in sorted(Path(config.data.cache).iterdir()):
        folder = Folder(path)
        for part in path.glob("part-*"):
            with safetensors.safe_open(part, framework="pt") as file:
                keys = caches.json.loads(file.metadata()[KEYS])
            found |= {f"{path.name}/{key}": folder.read(key) for key in keys}
    return found


def the_same(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].keys() == other[key].keys()
        and all(
            torch.allclose(one[key][name].float(), other[key][name].float(), atol=2e-3) for name in one[key]
        )
        for key in one
    )


def close(one: Tensor, other: Tensor) -> bool:
    """Up to what fp16 leaves of the largest values."""
    return one.shape == other.shape and bool(
        (one - other).abs().max() <= 2e-3 * other.abs().max().clamp_min(1e-3)
    )


@pytest.mark.parametrize("features", [True, False])
@torch.no_grad()
def test_it_holds_what_would_be_computed(
    built: RunConfig, parts: Parts, tmp_path: Path, features: bool
) -> None:
    """Latents, mirrored or not; features of photos, variants and targets, or the pixels they are made of; and so the loss."""
    if not features:
        shutil.copytree(built.data.cache, tmp_path / "cache")
        data = dataclasses.replace(built.data, cache=str(tmp_path / "cache"), cache_features=False)
        built = dataclasses.replace(built, data=data)
        assert build(parts, built)["latents"] == 0
    vision = parts.networks.vision
    preprocess = None if vision is None else vision.preprocess
    store = Cache(Path(built.data.cache), kinds(parts, built))
    bundle = Bundle(parts.base, prepare_adapter(built, parts), parts.networks, built)
    assert bundle.injected is not None
    with bundle.injected:
        for rows, epoch in ((parts.train_rows, 0), (parts.test_rows, VALIDATION)):
            cached, plain = (
                _batch(Samples(parts.index, rows, built, 1000, origin, preprocess), epoch)
                for origin in (store, None)
            )
            assert cached.pictures is None
            assert cached.moments is not None
            assert plain.pictures is not None
            assert close(cached.moments, parts.base.vae.moments(plain.pictures))
            if not features:
                assert (cached.crops if vision is None else cached.heads) is not None
            whole, computed = bundle.complete(cached), bundle.complete(plain)
            names = ("embedding", "patch_tokens", "class_embedding")
            for name in names[:1] if vision is None else names:
                assert close(getattr(whole, name), getattr(computed, name)), name
            assert len(whole.stages) == len(computed.stages) == (4 if vision is None else 0)
            assert all(map(close, whole.stages, computed.stages))
            losses = [float(bundle(batch)["loss"]) for batch in (whole, computed)]
            assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def _batch(samples: Samples, epoch: int) -> Batch:
    batch = join([samples.sample(epoch, number) for number in range(len(samples))])
    mirrored = [
        not torch.allclose(points, torch.from_numpy(place(row, 64, False).points(row.landmarks)).float())
        for points, row in zip(batch.landmarks, samples.rows, strict=True)
    ]
    assert (any(mirrored) and not all(mirrored)) == (epoch != VALIDATION)
    return batch.to("cpu")


def test_mirrored_targets_have_latents_of_their_own(built: RunConfig, parts: Parts) -> None:
    store = Cache(Path(built.data.cache), kinds(parts, built))
    row = parts.train_rows[0]
    one, other = store.latents(row, False), store.latents(row, True)
    assert (one.float() - other.float()).abs().max() > 0.1


def test_building_again_computes_nothing(built: RunConfig, parts: Parts) -> None:
    assert build(parts, built) == {"latents": 0, "photos": 0}
    with_other_settings = dataclasses.replace(
        built, train=dataclasses.replace(built.train, learning_rate=1e-3, seed=9)
    )
    Cache(Path(built.data.cache), kinds(parts, with_other_settings))


class _CutOffError(Exception):
    pass


@pytest.mark.parametrize(("name", "value"), [("PART", 2), ("_LONGEST", 0.0)])
def test_a_build_that_was_cut_off_goes_on(
    built: RunConfig, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    """Between two parts, which end when they are full or took long; and after a part was lost. What is there is not computed
    again."""
    monkeypatch.setattr(caches, "_FACES", 2)
    monkeypatch.setattr(caches, "_PIXELS", 2 * 64**2)
    monkeypatch.setattr(caches, name, value)
    config = dataclasses.replace(built, data=dataclasses.replace(built.data, cache=str(tmp_path / "cache")))

    @contextmanager
    def cut_off(kind: str) -> Iterator[Callable[[int, int], None]]:
        def told(done: int, total: int) -> None:
            if (kind, done) == ("photos", 4):
                raise _CutOffError

        yield told

    with pytest.raises(_CutOffError):
        build(parts, config, progress=cut_off)
    with pytest.raises(ConfigError, match="photos are not in the cache"):
        Cache(Path(config.data.cache), kinds(parts, config))
    whole = content(built)
    assert build(parts, config) == {"latents": 0, "photos": len(whole) - 9 - 2}
    assert the_same(content(config), whole)
    lost = sorted(Path(config.data.cache).glob("latents-*/part-*"))[1]
    lost.unlink()
    assert build(parts, config)["latents"] in (1, 2)
    assert the_same(content(config), whole)


def test_two_processes_share_a_build(built: RunConfig, parts: Parts, tmp_path: Path) -> None:
    """Whenever each of them begins: here the second one does when the first has ended."""
    config = dataclasses.replace(built, data=dataclasses.replace(built.data, cache=str(tmp_path / "cache")))
    first = build(parts, config, rank=0, world=2)
    with pytest.raises(ConfigError, match="4 of 9 latents are not in the cache"):
        Cache(Path(config.data.cache), kinds(parts, config))
    second = build(parts, config, rank=1, world=2)
    assert (first["latents"], second["latents"]) == (5, 4)
    assert the_same(content(config), content(built))


@pytest.mark.parametrize("what", ["photo", "face", "recogniser", "resolution"])
def test_what_changed_is_missing(built: RunConfig, parts: Parts, what: str) -> None:
    """And the message says what to run. Nothing that was there is touched."""
    row, *rest = parts.train_rows
    changed: dict[str, tuple[Parts, RunConfig, str]] = {
        "photo": (_with(parts, dataclasses.replace(row, sha256="ab" * 32), *rest), built, "2 of 9 latents"),
        "face": (
            _with(parts, dataclasses.replace(row, landmarks=((1.0, 1.0), *(row.landmarks or ())[1:])), *rest),
            built,
            r"1 of \d photos",
        ),
        "recogniser": (dataclasses.replace(parts, recognizer_digest="0" * 16), built, r"(\d) of \1 photos"),
        "resolution": (
            parts,
            dataclasses.replace(built, data=dataclasses.replace(built.data, resolution=128)),
            "9 of 9 latents",
        ),
    }
    before = content(built)
    with pytest.raises(ConfigError, match=changed[what][2]) as raised:
        Cache(Path(built.data.cache), kinds(*changed[what][:2]))
    assert "python -m idadapter_core cache build" in str(raised.value)
    assert "data.cache" in str(raised.value)
    found = {
        "recogniser": f"There are photos of recognizer {parts.recognizer_digest}, but recognizer {'0' * 16} is wanted",
        "resolution": "There are latents of resolution 64, but resolution 128 is wanted",
    }
    assert found.get(what, "") in str(raised.value)
    assert content(built).keys() == before.keys()


def test_photos_of_the_same_bytes_are_computed_once(built: RunConfig, parts: Parts) -> None:
    row = parts.train_rows[0]
    twice = _with(parts, *parts.train_rows, dataclasses.replace(row, number=99, identity=""))
    for one, other in zip(kinds(parts, built), kinds(twice, built), strict=True):
        keys = [entry.key for entry in other.entries]
        assert len(set(keys)) == len(keys)
        assert {entry.key for entry in one.entries} <= set(keys)
    assert len(kinds(twice, built)[0].entries) == len(kinds(parts, built)[0].entries)


def test_keys_that_are_half_the_same_are_told_apart(tmp_path: Path) -> None:
    """Nothing but chance makes them: they are digests."""
    digits = [f"{high:016x}{low:016x}" for high in (2**64 - 1, 0, 7) for low in (9, 2**63, 0, 3)]
    for number, part in enumerate((digits[:5], digits[5:])):
        places = torch.arange(len(part)) + 5 * number
        save_file({"a": places}, tmp_path / f"part-{number}.safetensors", {KEYS: json.dumps(part)})
    folder = Folder(tmp_path)
    assert len(folder) == len(digits)
    assert [int(folder.read(key)["a"]) for key in digits] == list(range(len(digits)))
    absent = [f"{high:016x}{low:016x}" for high in (0, 7, 8, 2**64 - 1) for low in (1, 10, 2**64 - 1)]
    assert not any(key in folder for key in absent)
    assert digits[0] not in Folder(tmp_path / "absent")


def test_fewer_photos_of_a_person_need_more_variants(built: RunConfig, parts: Parts) -> None:
    fewer = kinds(_with(parts, *parts.train_rows[1:]), built)
    if parts.networks.vision is None:  # UniID knows a person by the target alone
        Cache(Path(built.data.cache), fewer)
        return
    with pytest.raises(ConfigError, match="2 of 8 photos"):
        Cache(Path(built.data.cache), fewer)


def _with(parts: Parts, *rows: Row) -> Parts:
    return dataclasses.replace(parts, train_rows=rows)


def test_a_damaged_part_is_named(copied: RunConfig, parts: Parts) -> None:
    (part,) = Path(copied.data.cache).glob("photos-*/part-*")
    part.write_bytes(part.read_bytes()[:1000])
    for read in (
        lambda: Cache(Path(copied.data.cache), kinds(parts, copied)),
        lambda: build(parts, copied),
    ):
        with pytest.raises(ConfigError, match=rf"{part.name}.*Delete it and run") as raised:
            read()
        assert str(part) in str(raised.value)
    part.unlink()
    build(parts, copied)
    assert max(verify(parts, copied, 64).values()) < 2e-3


@pytest.mark.parametrize(("name", "value"), [("latents", float("nan")), ("photos", 1.5)])
def test_verify_finds_another_value(copied: RunConfig, parts: Parts, name: str, value: float) -> None:
    tamper(copied, name, value)
    differences = verify(parts, copied, 64)
    assert differences.pop(name) > 0.1
    assert max(differences.values()) < 2e-3


def tamper(config: RunConfig, name: str, value: float) -> None:
    """Another value in one entry of a folder."""
    (part,) = Path(config.data.cache).glob(f"{name}-*/part-*")
    with safetensors.safe_open(part, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(part)
    tensor = next(t for t in tensors.values() if t.is_floating_point())
    tensor[3].flatten()[7] = tensor[3].abs().max() * value
    save_file(tensors, part, metadata)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photo_that_changed_since_the_scan(few: Few, tmp_path: Path, workers: int) -> None:
    toy = Toy(tmp_path / "toy", few.toy.kind)
    shutil.copytree(few.toy.folder / "photos", toy.folder / "photos")
    index = read_index(few.index)
    path = toy.folder / "index.parquet"
    write_index(path, toy.folder / "photos", index.rows, torch.zeros(len(index.rows), 512), {})
    config = few.config(tmp_path, tmp_path / "cache", "uniid", data={"index": str(path), "workers": workers})
    parts = load_parts(config)
    photo = toy.folder / "photos" / index.rows[2].source
    photo.write_bytes(photo.read_bytes()[:-20])
    with pytest.raises(InputError, match=f"{photo.name}.*changed since the scan") as raised:
        build(parts, config)
    assert "Traceback" not in str(raised.value)


# ------------------------------------------------------------------------------------------------ the command and the loop


def test_the_command(few: Few, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = few.config(tmp_path / "run", tmp_path / "cache", "uniid")
    toml = tmp_path / "run.toml"
    toml.write_text(config_toml(config), encoding="utf-8")
    arguments = ["--config", str(toml)]
    assert command.main(["verify", *arguments]) == 1
    assert "9 of 9 latents are not in the cache" in capsys.readouterr().err
    assert command.main(["build", *arguments]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "latents: 9 entries computed",
        "photos: 5 entries computed",
    ]
    assert command.main(["build", *arguments]) == 0
    assert "latents: all entries exist already" in capsys.readouterr().out
    assert all((folder / FACTS).is_file() for folder in (tmp_path / "cache").iterdir())
    assert command.main(["verify", *arguments, "--count", "2"]) == 0
    assert "largest relative difference" in capsys.readouterr().out
    tamper(config, "photos", 1.5)
    assert command.main(["verify", *arguments]) == 1
    assert command.main(["build", *arguments, "--set", "data.cache="]) == 1
    assert "data.cache is empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["verify", *arguments, "--count", "0"])


def test_a_run_learns_from_it_what_it_learns_without(built: RunConfig, parts: Parts, tmp_path: Path) -> None:
    """fp16 in the cache changes little: the two runs go the same way."""
    weights = {}
    for name, cache in (("without", ""), ("with", built.data.cache)):
        config = dataclasses.replace(
            built,
            data=dataclasses.replace(built.data, cache=cache),
            train=dataclasses.replace(built.train, steps=3, learning_rate=1e-3),
            output=dataclasses.replace(built.output, folder=str(tmp_path / name)),
        )
        assert train(config) == 0
        found = latest(tmp_path / name)
        assert found is not None
        weights[name] = load_file(found.path / ADAPTER)
    start = prepare_adapter(built, parts).state_dict()
    learned = _length({key: weights["without"][key] - start[key] for key in start})
    apart = _length({key: weights["with"][key] - weights["without"][key] for key in start})
    assert learned > 0.1
    assert apart < 0.02 * learned


def _length(state: dict[str, Tensor]) -> float:
    return sum(float(tensor.square().sum()) for tensor in state.values()) ** 0.5
