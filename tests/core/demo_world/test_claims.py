"""Measuring claims: people, prompts and cases; what is kept, and what the tables say."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from idadapter_core.demo_world import shipped
from idadapter_core.demo_world.claims import draw, run
from idadapter_core.demo_world.claims.cases import SHORT, Case, all_cases
from idadapter_core.demo_world.claims.draw import Measurement, PictureRow, Plan
from idadapter_core.demo_world.claims.judge import INDEPENDENT, OWN, Judge
from idadapter_core.demo_world.claims.outside import OutsideJudge
from idadapter_core.demo_world.claims.prompts import PROMPTS
from idadapter_core.demo_world.claims.record import Record
from idadapter_core.demo_world.claims.report import METRICS, SECTIONS, summarize
from idadapter_core.demo_world.claims.subjects import asked_factors, make_subjects
from idadapter_core.demo_world.readers import READ_FACTORS
from idadapter_core.demo_world.words import words
from idadapter_core.demo_world.world import RowTokenizer, World, open_world
from idadapter_core.errors import CheckpointError, InputError
from idadapter_core.placeholders import CLASS_WORD
from idadapter_core.statistics import Estimate
from idadapter_core.types import Identity, Mix
from tests.tiny.demo_world import write_demo_world

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return open_world(write_demo_world(tmp_path_factory.mktemp("world") / "files"))


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "STEPS", 2)


def row(**changes: object) -> PictureRow:
    usual = PictureRow(
        person="1",
        prompt=0,
        seed=0,
        likeness={INDEPENDENT: 0.6, OWN: 0.7},
        impostor={INDEPENDENT: 0.5, OWN: 0.4},
        read={"style": "photo", "expression": "sad", "direction": "left", "sex": "man"},
        expected={"style": "photo", "expression": "smiling", "sex": "man"},
        reference={"direction": "left"},
    )
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- definitions
def test_every_word_of_the_prompts_is_known_and_every_class_exists() -> None:
    assert len(PROMPTS) >= 12
    for prompt in PROMPTS:
        for sex in READ_FACTORS["sex"]:
            assert words().unknown not in words().rows(prompt.text.replace(CLASS_WORD, sex))
        for factor, value in prompt.classes.items():
            assert value in READ_FACTORS[factor]
    named = {factor for prompt in PROMPTS for factor in prompt.classes}
    assert named == set(READ_FACTORS) - {"sex"}


def test_cases_have_names_of_their_own_and_are_all_shown() -> None:
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    shown = {case.name for _, cases, _ in SECTIONS for case in cases}
    assert shown == set(names)
    assert {case.name for case in SHORT} <= set(names)
    for _, _, metrics in SECTIONS:
        assert set(metrics) <= set(METRICS)


def test_a_person_does_not_depend_on_the_number_of_people() -> None:
    one, two = make_subjects(1)[0], make_subjects(2)
    assert one.name == two[0].name
    np.testing.assert_array_equal(one.references, two[0].references)
    assert two[0].person.sex == "man" or two[0].person.sex == "woman"
    assert not np.array_equal(two[0].others, two[0].impostor), "the impostor is another person"
    assert all(factors.accessory != "sunglasses" for subject in two for factors in subject.reference_factors)


def test_true_pictures_show_what_is_asked() -> None:
    classes = PROMPTS[2].classes
    factors = asked_factors(classes, 7)
    assert {name: getattr(factors, name) for name in classes} == classes
    assert asked_factors(classes, 7) == factors


# ---------------------------------------------------------------------------------------------------------- measuring
def test_cases_are_measured_and_kept(world: World, tmp_path: Path) -> None:
    plan = Plan(2, 1, PROMPTS[:2])
    lines: list[str] = []
    chosen = [
        case
        for case in all_cases()
        if case.name in ("base", "copy", "uniid_naive", "idadapter_2", "uniid_mean_2_stranger")
    ]
    measurement = Measurement(world, plan, tmp_path)
    for case in chosen:
        rows = measurement.rows(case, lines.append)
        assert rows is not None
        assert [(row.person, row.prompt) for row in rows] == [
            (s.name, p) for s in measurement.subjects for p in (0, 1)
        ]
        assert measurement.rows(case, lines.append) == rows, "read again"
        assert np.load(tmp_path / "cases" / f"{case.name}.npy").shape == (2, 3, 128, 128, 3)
    assert lines == [f"{case.name}: 4 pictures" for case in chosen]
    pictures = {case.name: np.load(tmp_path / "cases" / f"{case.name}.npy") for case in chosen}
    assert not np.array_equal(pictures["base"], pictures["uniid_naive"])
    for place in (0, 1):
        np.testing.assert_array_equal(pictures["copy"][0, place], measurement.subjects[0].references[0])
    adapter = world.files / shipped.adapter_file("uniid")
    before = adapter.read_bytes()
    with adapter.open("ab") as file:
        file.write(b"changed")
    naive = next(case for case in chosen if case.name == "uniid_naive")
    with pytest.raises(CheckpointError):
        Measurement(world, plan, tmp_path).rows(naive, lines.append)  # another file: measured again
    adapter.write_bytes(before)
    other = Measurement(world, dataclasses.replace(plan, people=1), tmp_path)
    again = other.rows(chosen[0], lines.append)
    assert again is not None
    assert len(again) == 2, "of another plan: measured again"
    kept = tmp_path / "cases" / f"{chosen[0].name}.json"
    content = json.loads(kept.read_text("utf-8"))
    content["facts"]["format"] -= 1
    kept.write_text(json.dumps({**content, "rows": [{"likeness_first": 0.5}]}), "utf-8")
    assert other.rows(chosen[0], lines.append) == again, "kept by an older version: measured again"


def test_a_copy_is_like_the_person_and_true_pictures_follow_the_prompt(world: World, tmp_path: Path) -> None:
    """The judges know people and factors: shipped networks, no random ones."""
    measurement = Measurement(world, Plan(4, 1, PROMPTS[1:5]), tmp_path)
    true, copies = (
        summarize(measurement.rows(case, print) or [])
        for case in all_cases()
        if case.anchor in ("copy", "true")
    )
    assert copies["likeness"].mean > 0.3  # type: ignore[union-attr]
    assert copies["beats_impostor"].mean > 0.6  # type: ignore[union-attr]
    assert true["accuracy"].mean > 0.9  # type: ignore[union-attr]
    assert true["likeness"].mean > 0.3  # type: ignore[union-attr]
    assert copies["expression_returns"].mean > 0.9  # type: ignore[union-attr]


def test_a_face_that_is_cut_off_counts_as_none() -> None:
    """A model may draw one, and a recogniser cannot see it."""
    judge, photos = Judge.open(), make_subjects(1)[0].others
    cut = np.stack([np.roll(photo, shift, 1) for photo in photos for shift in range(44, 84, 4)])
    found = [bool(judge.analyzer.detect(picture)) for picture in cut]
    landmarks = judge.landmarks(cut)
    assert sum(found) > sum(points is not None for points in landmarks) > 0
    directions = judge.directions(cut, landmarks, INDEPENDENT)
    assert [points is None for points in landmarks] == list(np.isnan(directions).any(1))


def test_the_outside_judge_tells_people_apart() -> None:
    judge = OutsideJudge.find()
    if judge is None:
        pytest.skip("dlib or its models are not installed: pip install dlib-bin face_recognition_models")
    one, two = make_subjects(2)
    own, other = (judge.directions(some.others, list(some.other_landmarks)) for some in (one, two))
    assert own[0] @ own[1:].mean(0) > own[0] @ other.mean(0)
    assert np.isnan(judge.directions(one.others[:1], [None])).all()


def test_missing_adapters_are_left_out(world: World, tmp_path: Path) -> None:
    lines: list[str] = []
    case = next(case for case in all_cases() if case.name == "idadapter_no_mff_4")
    measurement = Measurement(world, Plan(1, 1, PROMPTS[:1]), tmp_path)
    assert measurement.rows(case, lines.append) is None
    assert lines == ["idadapter_no_mff_4: left out, there is no adapter idadapter_no_mff"]


# ------------------------------------------------------------------------------------------------------------ numbers
def test_what_counts_where() -> None:
    nobody = {INDEPENDENT: None, OWN: None}
    rows = [row(), row(person="2", likeness=nobody, impostor=nobody), row(likeness={INDEPENDENT: 0.4})]
    found = {name: None if value is None else value.mean for name, value in summarize(rows).items()}
    assert found["likeness"] == pytest.approx(0.5)
    assert found["likeness_own"] == pytest.approx(0.7)
    assert found["likeness_outside"] is None, "dlib did not judge"
    assert found["beats_impostor"] == pytest.approx(0.5)
    assert found["found"] == pytest.approx(2 / 3)
    assert found["accuracy"] == pytest.approx(0.5)
    assert (found["style"], found["expression"], found["sex"]) == (1, 0, 1)
    assert found["direction_returns"] == 1
    assert found["direction_diversity"] == 0
    assert found["expression_returns"] is None, "the prompt names it"
    assert found["background"] is None


# ------------------------------------------------------------------------------------------------------------ command
def _claims(*arguments: str | Path) -> int:
    from idadapter_core.cli.demo_world import main

    threads = torch.get_num_threads()
    try:
        return main(["claims", *map(str, arguments)])
    finally:
        torch.set_num_threads(threads)


def test_the_command_writes_tables_and_sheets(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (tmp_path, "--files", world.files, "--people", "2", "--prompts", "2", "--seeds", "1")
    assert _claims(*given, "--cases", "base", "true", "faceid_rescaled") == 0
    text = (tmp_path / "claims.md").read_text("utf-8")
    assert text.startswith("2 people who were not met in training, 2 prompts, one picture of each.")
    assert "| true render as asked (ceiling) | " in text
    assert "## Rescaling a foreign adapter" in text
    assert "## Mixing photos" not in text, "nothing of it was measured"
    measured = {"base", "true", "faceid_rescaled"}
    assert set(json.loads((tmp_path / "claims.json").read_text("utf-8"))["cases"]) == measured
    assert {path.stem for path in (tmp_path / "grids").iterdir()} == measured
    capsys.readouterr()
    for wrong, message in {
        ("--cases", "nothing"): "there is no case 'nothing'; choose from: base, true",
        ("--prompts", "13"): "there are 12 prompts, got 13",
        ("--seeds", "0"): "--seeds must be at least 1, got 0",
    }.items():
        assert _claims(*given, *wrong) == 1
        assert message in capsys.readouterr().err


def test_a_record_is_enough_to_go_on_elsewhere(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ("--files", world.files, "--people", "1", "--prompts", "1", "--seeds", "1")
    assert _claims(tmp_path / "here", *sizes, "--cases", "copy", "uniid") == 0
    before = (tmp_path / "here" / "claims.md").read_text("utf-8")
    (tmp_path / "there").mkdir()
    shutil.copy(tmp_path / "here" / "claims.json", tmp_path / "there")
    measured: list[str] = []
    measure = Measurement.rows

    def rows(self: Measurement, case: Case, log: Callable[[str], None]) -> list[PictureRow] | None:
        measured.append(case.name)
        return measure(self, case, log)

    monkeypatch.setattr(Measurement, "rows", rows)
    same = ["uniid", "uniid_concatenate_1", "uniid_mean_1", "uniid_rescaled_1.8"]
    assert _claims(tmp_path / "there", *sizes, "--cases", *same) == 0
    assert measured == [], "cases of the same pictures are one"
    assert (tmp_path / "there" / "claims.md").read_text("utf-8") == before, "with cases measured before"
    assert _claims(tmp_path / "there", *sizes, "--cases", "uniid_mean_2") == 0
    assert measured == ["uniid_mean_2"]
    capsys.readouterr()
    assert _claims(tmp_path / "there", *sizes, "--dtype", "bfloat16", "--cases", "copy") == 1
    expected = "holds a measurement with other settings (dtype); choose another folder, or delete claims.json"
    assert expected in capsys.readouterr().err


def test_pictures_are_drawn_in_the_dtype_asked_for(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    quiet: list[bool] = []
    logger = logging.getLogger("idadapter_core.faces")

    def rows(self: Measurement, case: Case, log: Callable[[str], None]) -> None:
        seen.append(self.world.base.unet.dtype)
        quiet.append(not logger.isEnabledFor(logging.WARNING))

    monkeypatch.setattr(Measurement, "rows", rows)
    for dtype in ("float32", "bfloat16"):
        given = ("--files", world.files, "--people", "1", "--dtype", dtype, "--cases", "base")
        assert _claims(tmp_path / dtype, *given) == 0
    assert seen == [torch.float32, torch.bfloat16]
    assert quiet == [True, True], "faces are small"
    assert logger.isEnabledFor(logging.WARNING), "afterwards they are told of again"


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"plan": "x", "cases": {}},
        {"plan": {}, "cases": []},
        {"plan": {}, "cases": {"base": {"facts": {"case": "", "judges": [], "files": {}}}}},
        {"plan": {}, "cases": {"base": {"facts": {"case": ""}, "numbers": {}}}},
        {
            "plan": {},
            "cases": {
                "base": {
                    "facts": {"case": "", "judges": [], "files": {}},
                    "numbers": {"likeness": {"mean": 1}},
                }
            },
        },
    ],
)
def test_a_damaged_record_is_named(content: object, tmp_path: Path) -> None:
    (tmp_path / "claims.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(InputError, match=r"claims\.json is no record of a measurement; delete it"):
        Record.open(tmp_path, {})


def test_numbers_of_other_files_metrics_or_judges_do_not_count(tmp_path: Path) -> None:
    adapter = shipped.adapter_file("uniid")
    facts = {"case": "a", "judges": ["independent", "outside"], "files": {shipped.BASE: "1", adapter: "1"}}
    numbers = {"likeness": Estimate(0.25, None, None, 3), "found": None}
    record = Record.open(tmp_path, {"people": 2})
    record.keep("a", facts, numbers)
    metrics = frozenset(numbers)
    again = Record.open(tmp_path, {"people": 2})
    assert again.find("a", facts, metrics) == numbers
    assert again.find("a", {**facts, "judges": ["independent"]}, metrics) is not None, "fewer judges suffice"
    assert again.find("a", {**facts, "judges": ["independent", "own"]}, metrics) is None
    assert again.find("a", {**facts, "files": {shipped.BASE: "2", adapter: "1"}}, metrics) is None
    assert again.find("a", {**facts, "files": {shipped.BASE: "1", adapter: "2"}}, metrics) is None
    assert again.find("a", {**facts, "files": {adapter: "1"}}, metrics) is None
    assert again.find("a", {**facts, "files": {shipped.BASE: "1"}}, metrics) is not None, "not shipped"
    assert again.find("a", facts, metrics | {"accuracy"}) is None
    Record.open(tmp_path, {"people": 2}).keep("b", {**facts, "case": "b"}, {})
    again.keep("c", {**facts, "case": "c"}, {})
    assert set(Record.open(tmp_path, {"people": 2}).cases) == {"a", "b", "c"}, "two processes measure"


def test_of_cases_that_draw_the_same_the_one_with_most_judges_counts(tmp_path: Path) -> None:
    facts = {"case": "a", "judges": ["independent"], "files": {}}
    few, many, own = ({"found": Estimate(mean, None, None, 3)} for mean in (0.1, 0.2, 0.3))
    record = Record.open(tmp_path, {}).keep("a_twin", facts, few)
    record = record.keep("z_twin", {**facts, "judges": ["independent", "outside"]}, many)
    assert record.find("main", facts, frozenset({"found"})) == many
    assert record.keep("main", facts, own).find("main", facts, frozenset({"found"})) == own


def test_modes_that_are_one_case_make_the_same(world: World) -> None:
    features = world.features(list(make_subjects(1)[0].references))
    for name, modes in {
        "uniid": ("concatenate", "mean"),
        "idadapter": ("learned", "concatenate", "mean"),
    }.items():
        adapter = world.adapter(name)
        assert adapter is not None
        for count in (1, 4):
            photos = features.pick(list(range(count)))
            usual = adapter.encode(photos, Mix("auto"))
            for mode in modes:
                is_one_case = Case("", "", name, count, mode).drawn == Case("", "", name, count).drawn
                assert _is_same(adapter.encode(photos, Mix(mode)), usual) == is_one_case, (
                    f"{name}, {mode} of {count}"
                )


def _is_same(one: Identity, other: Identity) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("adapter_tokens", "adapter_bias")]
    pairs += [(tokens, other.text_tokens[name]) for name, tokens in (one.text_tokens or {}).items()]
    return all(
        mine is theirs or (mine is not None and theirs is not None and torch.equal(mine, theirs))
        for mine, theirs in pairs
    )


def test_the_short_form_is_smaller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[dict[str, object]] = []

    def measure(folder: Path, files: Path, **options: object) -> Path:
        given.append(options)
        folder.mkdir(exist_ok=True)
        (folder / "claims.md").touch()
        return folder / "claims.md"

    monkeypatch.setattr(run, "measure", measure)
    assert _claims(tmp_path / "a") == 0
    assert _claims(tmp_path / "b", "--short") == 0
    full, short = ([options[name] for name in run.PLAN_NAMES] for options in given)
    assert full == [100, 12, 2]
    assert all(int(str(small)) < int(str(large)) for small, large in zip(short, full, strict=True))


# -------------------------------------------------------------------------------------------------------------- world
def test_the_tokenizer_of_rows_reads_as_the_base_model_does() -> None:
    tokenizer, text = RowTokenizer(), "a photo of a woolen zebra sks"
    ids: Sequence[int] = tokenizer(text, verbose=False)["input_ids"]
    assert [*ids, *[1] * (77 - len(ids))] == words().rows(text)
    assert tokenizer.convert_ids_to_tokens(ids).count("sks</w>") == 1
    assert len(tokenizer.get_vocab()) == words().unknown + 1


def test_the_world_is_open_without_clip_vision(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.files, tmp_path / "files")
    shutil.rmtree(tmp_path / "files" / shipped.CLIP_VISION)
    opened = open_world(tmp_path / "files")
    features = opened.features(list(make_subjects(1)[0].references[:1]))
    assert opened.vision is None
    assert features.patch_tokens is None
    assert len(features) == 1
