"""Making the demo world's networks: nothing depends on interruptions, and nothing half done is taken for done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from idadapter_core.adapter import load_adapter
from idadapter_core.cli.export import adapter_file
from idadapter_core.demo_world import Person, caption
from idadapter_core.demo_world.base import LATENT_CHANNELS, BaseModel, new_text_encoder
from idadapter_core.demo_world.build import pictures as drawing, train_base
from idadapter_core.demo_world.build.batches import Pool, as_tensor
from idadapter_core.demo_world.build.fitting import fit, rate_at
from idadapter_core.demo_world.build.measures import area_under_curve, rank_one, recognition
from idadapter_core.demo_world.build.pictures import draw_pictures, open_pictures
from idadapter_core.demo_world.build.settings import FULL, TINY, Group, Settings, TrainingSchedule
from idadapter_core.demo_world.build.stages import (
    Stage,
    Workspace,
    describe,
    run_stages,
    ship,
    take_shipped,
    write_json,
)
from idadapter_core.demo_world.build.train_adapters import ABLATIONS, train_adapter
from idadapter_core.demo_world.build.train_latent_reader import LatentReader
from idadapter_core.demo_world.build.train_start import Photos, Teller, train_start
from idadapter_core.demo_world.build.trainer_files import write_photos
from idadapter_core.demo_world.identity import split_of
from idadapter_core.demo_world.shipped import PACKAGE, RECOGNIZER_FILE
from idadapter_core.errors import InputError, TrainingError
from idadapter_core.faces.iresnet import IResNet, digest, load_iresnet
from idadapter_core.stable_diffusion.inject import inject
from idadapter_core.toml import read_table
from tests.tiny.bases import write_tokenizer

SMALL = Settings(
    "small",
    32,
    {
        "training": Group(5, 2, "training", 0),
        "shape": Group(4, 1, "test", 1, style="photo", accessory="none", one_look=True),
    },
)


class Stopped(Exception):
    """What a test ends a build with."""


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "PART", 4)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------------------------------- pictures
def test_pictures_do_not_depend_on_interruptions_and_processes(small_parts: None, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "at once", SMALL)
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        draw_pictures(tmp_path / "in two goes", SMALL, log=stop)
    with pytest.raises(
        InputError, match=r"no finished pictures of the group 'training'; run the stage `pictures`"
    ):
        open_pictures(tmp_path / "in two goes", "training")
    draw_pictures(tmp_path / "in two goes", SMALL, processes=2, log=lines.append)
    assert lines == [
        "training: 1 of 3 parts drawn", "training: 2 of 3 parts drawn", "training: 3 of 3 parts drawn",
        "shape: 1 of 1 parts drawn",
    ]  # fmt: skip
    assert _files(tmp_path / "in two goes") == _files(tmp_path / "at once")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    draw_pictures(folder, SMALL)
    return folder


def test_what_is_known_is_kept_with_each_picture(small: Path) -> None:
    from idadapter_core.demo_world import render

    stored = open_pictures(small, "training")
    assert len(stored) == 10
    assert stored.people.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    again = render([Person.sample(stored.facts[7].person)], [stored.facts[7].factors], 32)
    assert np.array_equal(stored.pixels[7], again.pixels[0])
    assert np.array_equal(stored.masks[7], again.masks[0])
    assert np.array_equal(stored.landmarks[7], again.landmarks[0])
    assert np.array_equal(stored.boxes[7], again.boxes[0])
    assert stored.facts[7].caption == again.captions[0]
    assert stored.facts[7].value("direction") == again.factors[0].direction
    assert {split_of(fact.person) for fact in stored.facts} == {"training"}


def test_people_of_one_look_differ_in_shape_alone(small: Path) -> None:
    facts = open_pictures(small, "shape").facts
    assert {fact.factors.style for fact in facts} == {"photo"}
    assert {fact.factors.accessory for fact in facts} == {"none"}
    part = drawing._Part(Path(), SMALL.groups["shape"], 0, 4, 32, 0)
    people, _ = drawing._subjects(part)
    for sex in ("woman", "man"):
        looks = [person.look for person in people if person.sex == sex]
        assert all(look == looks[0] for look in looks)
    assert len({person.shape for person in people}) == 4


def test_groups_of_a_build_are_of_different_people() -> None:
    seen: dict[str, set[int]] = {}
    for settings in (FULL, TINY):
        for group in settings.groups.values():
            part = drawing._Part(Path(), dataclasses.replace(group, each=1), 0, min(group.people, 3), 32, 0)
            people, _ = drawing._subjects(part)
            seen.setdefault(group.split, set()).update(person.seed for person in people)
        assert len({group.stream for group in settings.groups.values()}) == len(settings.groups)
    everybody = [seed for seeds in seen.values() for seed in seeds]
    assert len(everybody) == len(set(everybody))


def test_a_pool_joins_groups(small: Path) -> None:
    first, second = open_pictures(small, "training"), open_pictures(small, "shape")
    pool = Pool([first, second])
    assert len(pool) == 14
    assert len(set(pool.people.tolist())) == 9, "people of different groups are different"
    assert np.array_equal(pool.pixels(np.array([11, 3])), [second.pixels[1], first.pixels[3]])
    assert pool.where(style="photo").tolist()[-4:] == [10, 11, 12, 13]
    sexes = pool.labels("sex", ("woman", "man"))
    assert [("woman", "man")[sex] for sex in sexes] == [fact.sex for fact in (*first.facts, *second.facts)]
    batch = as_tensor(pool.pixels(np.array([0])))
    assert batch.shape == (1, 3, 32, 32)
    assert torch.equal(
        ((batch[0] + 1) * 127.5).round().byte(), torch.tensor(first.pixels[0]).permute(2, 0, 1)
    )


# -------------------------------------------------------------------------------------------------------- training
class _Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


def _loss(network: nn.Module, rng: np.random.Generator, step: int) -> Tensor:
    network.train()
    x = torch.from_numpy(rng.standard_normal((8, 3)).astype(np.float32))
    goal = x.sum(1, keepdim=True) + 0.01 * torch.randn(8, 1)
    return (network(x) - goal).square().mean()


def _fresh() -> _Line:
    torch.manual_seed(0)
    return _Line()


def test_a_training_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    schedule = TrainingSchedule(40, 8, 0.05)
    at_once = fit(_fresh(), _loss, schedule, tmp_path / "a.pt")

    def stop(network: nn.Module, rng: np.random.Generator, step: int) -> Tensor:
        if step == 17:
            raise Stopped
        return _loss(network, rng, step)

    with pytest.raises(Stopped):
        fit(_fresh(), stop, schedule, tmp_path / "b.pt", save_every=0)
    steps: list[int] = []

    def watched(network: nn.Module, rng: np.random.Generator, step: int) -> Tensor:
        steps.append(step)
        return _loss(network, rng, step)

    in_two_goes = fit(_fresh(), watched, schedule, tmp_path / "b.pt")
    assert steps == list(range(17, 40))
    assert not in_two_goes.training
    for one, other in zip(at_once.state_dict().values(), in_two_goes.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    x = torch.randn(64, 3)
    assert (in_two_goes(x) - x.sum(1, keepdim=True)).square().mean() < 0.5 * x.sum(1).square().mean()


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    fit(_fresh(), _loss, TrainingSchedule(1, 8, 0.05), tmp_path / "a.pt")
    with pytest.raises(TrainingError, match=r"a\.pt is of another network .*delete it to start again"):
        fit(nn.Linear(3, 1), _loss, TrainingSchedule(1, 8, 0.05), tmp_path / "a.pt")


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path) -> None:
    def broken(network: nn.Module, rng: np.random.Generator, step: int) -> Tensor:
        return _loss(network, rng, step) * float("nan")

    with pytest.raises(TrainingError, match=r"the loss is nan at step 3; lower the rate \(0\.05\)"):
        fit(_fresh(), broken, TrainingSchedule(3, 8, 0.05), tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()


def test_the_rate_rises_stays_and_falls() -> None:
    schedule = TrainingSchedule(1000, 8, 2.0, fall=0.2)
    rates = [rate_at(step, schedule) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02)
    assert all(rate == 2.0 for rate in rates[100:800])
    assert rates[900] == pytest.approx(1.0)
    assert 0 < rates[-1] <= 0.011
    longer = TrainingSchedule(5000, 8, 2.0, fall=0.2)
    assert [rate_at(step, longer) for step in range(800)] == rates[:800], (
        "a schedule can be made longer before it falls"
    )


# ---------------------------------------------------------------------------------------------------------- stages
def _stages(events: list[str]) -> dict[str, Stage]:
    def work(name: str) -> Callable[[Workspace], None]:
        def do(workspace: Workspace) -> None:
            events.append(name)
            (workspace.files).mkdir(parents=True, exist_ok=True)
            (workspace.files / f"{name}.bin").write_bytes(name.encode())
            workspace.score(name, {"accuracy": 0.5})

        return do

    return {
        "first": Stage("first", "do something", (), work("first"), ("first.bin",), {"accuracy": 0.4}),
        "second": Stage(
            "second", "do more", ("first",), work("second"), ("deep/second.bin",), {"accuracy": 0.6}
        ),
        "third": Stage("third", "look", (), work("third")),
    }


def _bench(home: Path, **changes: object) -> Workspace:
    return dataclasses.replace(Workspace(home, SMALL), **changes)  # type: ignore[arg-type]


def _run(names: Sequence[str], home: Path, **changes: object) -> list[str]:
    events: list[str] = []
    run_stages(_stages(events), names, _bench(home, **changes))
    return events


def test_all_stages_are_done_once_in_their_order(tmp_path: Path) -> None:
    assert _run((), tmp_path) == ["first", "second", "third"]
    assert _run((), tmp_path) == []
    assert _run(["second"], tmp_path, again=True) == ["second"]
    record = json.loads((tmp_path / "done" / "second.json").read_text("utf-8"))
    assert record["settings"] == "small"
    assert "second: done" in (tmp_path / "logs" / "second.log").read_text("utf-8")
    lines = describe(_stages([]), _bench(tmp_path)).splitlines()
    assert [line.split()[:2] for line in lines] == [[name, "done"] for name in ("first", "second", "third")]


def test_a_stage_needs_those_before_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the stage `second` needs the results of `first`; run that first"):
        _run(["second"], tmp_path)
    assert _run(["first", "second"], tmp_path) == ["first", "second"]


def test_a_stage_that_failed_is_not_done(tmp_path: Path) -> None:
    def fail(workspace: Workspace) -> None:
        raise Stopped

    stages = {"first": Stage("first", "fail", (), fail)}
    for _ in range(2):
        with pytest.raises(Stopped):
            run_stages(stages, (), _bench(tmp_path))
    assert not _bench(tmp_path).done("first").exists()


def test_unknown_stages_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no stage 'thrid'; choose from: first, second, third"):
        _run(["thrid"], tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is begun"


def test_one_folder_holds_one_build(tmp_path: Path) -> None:
    _run(["first"], tmp_path)
    other = dataclasses.replace(SMALL, size=64)
    with pytest.raises(InputError, match="whose settings 'small' differ .*choose another --work"):
        _run(["first"], tmp_path, settings=other)
    longer = dataclasses.replace(SMALL, schedules={"first": TrainingSchedule(10, 2, 1e-3)})
    assert _run(["first"], tmp_path, settings=longer) == [], "a schedule may change"


def test_what_is_made_again_begins_anew(tmp_path: Path) -> None:
    _run(["first"], tmp_path)
    checkpoint = _bench(tmp_path).checkpoint("first")
    checkpoint.parent.mkdir()
    checkpoint.touch()
    _run(["first"], tmp_path, again=True)
    assert not checkpoint.exists()


def test_only_what_is_good_enough_is_shipped(tmp_path: Path) -> None:
    _run((), tmp_path / "work")
    workspace = _bench(tmp_path / "work")
    target = tmp_path / "assets"
    assert ship(_stages([]), ["first"], workspace, target) == [target / "first.bin"]
    assert (target / "first.bin").read_bytes() == b"first"
    with pytest.raises(InputError, match=r"second: accuracy is 0\.5, at least 0\.6 is needed to ship it"):
        ship(_stages([]), ["second"], workspace, target)
    with pytest.raises(InputError, match=r"'third' has nothing to ship; choose from: first, second"):
        ship(_stages([]), ["third"], workspace, target)
    with pytest.raises(InputError, match="name the stages"):
        ship(_stages([]), [], workspace, target)
    assert {path.name for path in target.rglob("*")} == {"first.bin", "record.json"}
    write_json(tmp_path / "work" / "scores" / "second.json", {})
    with pytest.raises(InputError, match="accuracy is None"):
        ship(_stages([]), ["second"], workspace, target)


def test_shipped_files_stand_for_the_stages_that_made_them(tmp_path: Path) -> None:
    _run((), tmp_path / "work")
    target = tmp_path / "assets"
    ship(_stages([]), ["first"], _bench(tmp_path / "work"), target)
    events: list[str] = []
    stages, other = _stages(events), _bench(tmp_path / "other")
    with pytest.raises(InputError, match="name the stages to run"):
        take_shipped(stages, [], other, target)
    assert take_shipped(stages, ["first"], other, target) == [], "what is to be run is not taken"
    assert take_shipped(stages, ["second"], other, target) == ["first"]
    assert (other.files / "first.bin").read_bytes() == b"first"
    run_stages(stages, ["second"], other)
    assert events == ["second"], "what it needs is there"
    (other.files / "first.bin").write_bytes(b"built here")
    assert take_shipped(stages, ["second"], other, target) == [], "finished stages stay"
    assert (other.files / "first.bin").read_bytes() == b"built here"
    with pytest.raises(InputError, match="choose another --work"):
        take_shipped(
            stages,
            ["second"],
            _bench(tmp_path / "other", settings=dataclasses.replace(SMALL, size=64)),
            target,
        )


# -------------------------------------------------------------------------------------------------------- measures
def test_area_under_curve_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    people = np.array([0, 0, 0, 1, 1, 2, 2])
    alike = np.round(rng.random((7, 7)), 1)  # with ties
    alike = (alike + alike.T) / 2
    pairs = [(i, k) for i in range(7) for k in range(i + 1, 7)]
    same = [alike[i, k] for i, k in pairs if people[i] == people[k]]
    other = [alike[i, k] for i, k in pairs if people[i] != people[k]]
    wins = [(a > b) + 0.5 * (a == b) for a in same for b in other]
    assert area_under_curve(alike, people) == pytest.approx(np.mean(wins))


def test_rank_one_asks_for_the_nearest_other_picture() -> None:
    people = np.array([0, 0, 1, 1])
    alike = np.array([[1, 0.9, 0.8, 0], [0.9, 1, 0, 0], [0.8, 0, 1, 0.1], [0, 0, 0.1, 1]])
    assert rank_one(alike, people) == 0.75
    assert alike[0, 0] == 1, "the caller's values stay"


def test_people_far_apart_are_all_recognised() -> None:
    rng = np.random.default_rng(1)
    people = np.repeat(np.arange(5), 3)
    rows = rng.standard_normal((5, 16))[people] * 3 + 0.1 * rng.standard_normal((15, 16))
    assert recognition(rows, people) == {"auc": 1.0, "rank_one": 1.0}


def test_the_base_model_is_taught_faces_and_expressions_in_later_steps(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of both changes what is learned from its step on, and nothing before; expressions until the last steps."""
    pool = Pool([open_pictures(small, "training")])
    latents = (
        np.random.default_rng(0).standard_normal((len(pool), LATENT_CHANNELS, 16, 16)).astype(np.float16)
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        text, reader = new_text_encoder(), LatentReader().eval().requires_grad_(False)

    def trained(features_from: int, expressions_from: int, finish_from: int = 9) -> Tensor:
        monkeypatch.setattr(train_base, "FEATURES_FROM", features_from)
        monkeypatch.setattr(train_base, "EXPRESSIONS_FROM", expressions_from)
        monkeypatch.setattr(train_base, "FINISH_FROM", finish_from)
        schedule, name = TrainingSchedule(2, 8, 1e-3), f"{features_from}-{expressions_from}-{finish_from}.pt"
        base = train_base.train_base(
            pool, latents, text, reader, schedule, tmp_path / name, seed=0, log=lambda _: None
        )
        return torch.cat([weight.flatten() for weight in base.unet.parameters()])

    plain = trained(2, 2)
    assert torch.equal(trained(9, 9), plain), "not before its step"
    assert not torch.equal(trained(1, 2), plain)
    assert not torch.equal(trained(2, 1), plain)
    assert torch.equal(trained(2, 1, finish_from=1), plain)


def test_tokens_learn_who_is_who_before_they_meet_the_base_model(small: Path, tmp_path: Path) -> None:
    """Their reader finds the photos' people, the new layers change nothing, and what they start with is not nothing."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        base, recognizer = (
            BaseModel().eval(),
            IResNet((1, 1, 1, 1), (8, 8, 8, 8)).eval().requires_grad_(False),
        )
    pool = Pool([open_pictures(small, name) for name in ("training", "shape")])
    photos = Photos(pool, recognizer)
    everybody = np.arange(len(photos))
    adapter = train_start(
        pool, base, recognizer, "f" * 16, TrainingSchedule(300, len(photos), 3e-3),
        tmp_path / "start.pt", seed=0, log=lambda _: None,
    )  # fmt: skip
    teller = Teller(adapter.encoder)
    teller.load_state_dict(torch.load(tmp_path / "start.pt", weights_only=True)["average"])
    with torch.no_grad():
        read, means = teller(photos.stages(everybody)), photos.means(everybody)
    nearest = means[torch.cdist(nn.functional.normalize(read), means).argmin(1)]
    right = (nearest == means).all(1).float().mean()
    assert right >= 0.75, "of 7 people"
    assert adapter.config.recognizer == "f" * 16
    assert adapter.config.stage_widths == (8, 8, 8, 8)
    stages = tuple(torch.rand(2, 8, side, side) for side in (56, 28, 14, 7))
    with torch.no_grad():
        tokens = adapter.encoder(torch.zeros(2, 512), stages)[1]
    assert tokens is not None
    given = torch.randn(2, LATENT_CHANNELS, 16, 16), torch.tensor([500, 20]), torch.randn(2, 77, 128)
    plain = base(*given)
    with inject(base.unet, adapter) as injected:
        with injected.identity(tokens):
            assert torch.equal(base(*given), plain)
        for module in adapter.layers.adapter_modules.values():
            assert module.to_k_ip.weight.any()
            assert not module.to_v_ip.weight.any()


# --------------------------------------------------------------------------------------------------------- the command
def _command(*arguments: str | Path) -> int:
    from idadapter_core.cli.demo_world import main

    return main(["build", *map(str, arguments)])


def test_the_whole_build_goes_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from idadapter_core.demo_world.build.make import STAGES

    before = torch.get_num_threads()
    try:
        write_tokenizer(tmp_path / "tokenizer")
        given = ("--work", tmp_path, "--settings", "tiny", "--tokenizer", tmp_path / "tokenizer")
        assert _command(*given, "--processes", "1") == 0
    finally:
        torch.set_num_threads(before)
    for stage in STAGES.values():
        assert (tmp_path / "done" / f"{stage.name}.json").is_file()
        for file in stage.ships:
            assert (tmp_path / "files" / file).stat().st_size > 100
        if stage.wanted:
            scores = json.loads((tmp_path / "scores" / f"{stage.name}.json").read_text("utf-8"))
            assert set(stage.wanted) <= set(scores), "what is wanted is measured"
            assert all(0 <= scores[name] <= 1 for name in stage.wanted if name != "kept")
    recognizer = tmp_path / "files" / PACKAGE / RECOGNIZER_FILE
    for name in ("uniid", "idadapter", "faceid"):
        config = load_adapter(tmp_path / "files" / "adapters" / f"{name}.safetensors").config
        assert config.recognizer == digest(load_iresnet(recognizer, any_layers=True)), "as nodes load it"
    parts = {
        name: load_adapter(tmp_path / "files" / "adapters" / f"idadapter_{name}.safetensors").config
        for name in ABLATIONS
    }
    assert {name for name, config in parts.items() if config.mixer_depth == 0} == {"no_mff"}
    assert {name for name, config in parts.items() if not config.has_text_branch} == {"no_text"}
    assert read_table(tmp_path / "runs" / "idadapter_no_id_loss" / "config.toml")["loss"]["identity"] == 0
    assert {path.name for path in (tmp_path / "sheets").iterdir()} == {"autoencoder.png", "base.png"}
    _require_the_same_of_two_processes(Workspace(tmp_path, TINY, 2, tokenizer=tmp_path / "tokenizer"))
    capsys.readouterr()
    assert _command("base", "--ship", "--work", tmp_path, "--settings", "tiny") == 1
    assert "is needed to ship it; train it longer" in capsys.readouterr().err
    assert _command("--list", "--work", tmp_path, "--settings", "tiny") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[name, "done"] for name in STAGES]


def test_another_adapter_needs_what_is_shipped_and_the_pictures() -> None:
    """The command in docs/demo_world.md: its stages come in an order in which each finds what it needs."""
    from idadapter_core.demo_world.build.make import STAGES

    run = ["pictures", "photos", "index", "base_folder", "faceid"]
    found = {name for name, stage in STAGES.items() if stage.ships}
    for name in run:
        assert set(STAGES[name].needs) <= found
        found.add(name)


def _require_the_same_of_two_processes(workspace: Workspace) -> None:
    run = train_adapter(workspace, "faceid", run="faceid_of_two")
    one, two = (load_adapter(adapter_file(folder)) for folder in (workspace.home / "runs" / "faceid", run))
    theirs = two.layers.state_dict()
    for name, weight in one.layers.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-4, rtol=1e-2)
    assert json.loads((run / "log.jsonl").read_text("utf-8").splitlines()[-1])["step"] == 2


def test_shipping_does_not_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--again` beside it would be ignored, and the old file shipped."""
    with pytest.raises(SystemExit):
        _command("readers", "--again", "--ship", "--work", tmp_path, "--settings", "tiny")
    assert "argument --ship: not allowed with argument --again" in capsys.readouterr().err


def test_adapters_are_not_trained_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"name a folder with its vocab\.json and merges\.txt as --tokenizer"
    ):
        train_adapter(Workspace(tmp_path, TINY), "uniid_text")


def test_photos_have_their_captions_and_are_written_once(small: Path, tmp_path: Path) -> None:
    """And sketches and paintings are none."""
    pictures = open_pictures(small, "training")
    write_photos(pictures, tmp_path)
    numbers = pictures.where(style="photo")
    assert 0 < len(numbers) < len(pictures)
    assert len(list(tmp_path.glob("*/*.png"))) == len(list(tmp_path.glob("*/*.txt"))) == len(numbers)
    number = int(numbers[-1])
    fact = pictures.facts[number]
    photo = tmp_path / f"{fact.person:06d}" / f"{number % 2:02}.png"
    np.testing.assert_array_equal(np.asarray(Image.open(photo)), pictures.pixels[number])
    person = Person.sample(fact.person)
    assert photo.with_suffix(".txt").read_text("utf-8") == caption(person, fact.factors) + "\n"
    before = photo.stat().st_mtime_ns
    write_photos(pictures, tmp_path)
    assert photo.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "there is no stage 'nothing'; choose from: pictures, second_pictures"),
        (("readers",), "the stage `readers` needs the results of `pictures`"),
        (("--processes", "0"), "--processes must be at least 1, got 0"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--ship",), "name the stages whose files are to be shipped"),
        (("--ship", "readers"), "the stage 'readers' is not finished; run it first, without --ship"),
    ],
)
def test_what_cannot_be_built_is_said(
    arguments: Sequence[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _command(*arguments, "--work", tmp_path) == 1
    assert message in capsys.readouterr().err
