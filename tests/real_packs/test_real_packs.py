"""Beside the real packs in the folder that `PACKS_PATH` names, with small models and weights of the right shapes.

Each pack is measured once, in a process of its own (`measure.py`); the tests look at the figures. Without the folder, or where a
pack of it cannot run here by itself, tests are skipped and say why. docs/other_packs.md has the figures.
"""

from __future__ import annotations

import functools

import pytest

from tests.real_packs.cases import CASES, COMFYUI, Case
from tests.real_packs.hosting import FOLDER, packs_folder
from tests.real_packs.measure import METHODS, Figures, PackFigures, measure_apart

if packs_folder() is None:
    pytest.skip(f"{FOLDER} is not set: name a folder with checkouts of other packs", allow_module_level=True)

# What floating point leaves of a difference that should not be there, after two or more steps.
ROUNDING = 2e-5
VISIBLE = 0.01


@functools.cache
def figures_of(pack: str) -> PackFigures:
    """What was measured of a pack; measured at the first call."""
    return measure_apart(pack)


@pytest.fixture
def figures(case: Case, comfyui: object) -> Figures:
    """What was measured of a case; skips where nothing could be."""
    pack = figures_of(case.pack)
    if pack.missing:
        pytest.skip(pack.missing)
    found = pack.cases[case.name]
    if found.broken:
        pytest.skip(f"{case.name} of {case.pack} does not run here without our nodes either: {found.broken}")
    return found


def cases(*effects: str) -> pytest.MarkDecorator:
    """Parametrises with the cases of these effects."""
    return named([case for case in CASES if case.effect in effects])


def named(chosen: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


@cases("nothing", "adds", "changes", "hides")
def test_the_order_of_the_nodes_does_not_matter(case: Case, figures: Figures) -> None:
    assert figures.order == dict.fromkeys(METHODS, 0.0)


@cases("nothing", "adds", "changes")
def test_both_act(case: Case, figures: Figures) -> None:
    assert min(figures.ours_act.values()) > VISIBLE
    if case.visible:
        assert min(figures.alone, *figures.theirs_acts.values()) > VISIBLE
    else:
        assert max(figures.alone, *figures.theirs_acts.values()) < ROUNDING


@cases("nothing", "adds", "changes", "hides")
def test_weight_0_is_their_picture(case: Case, figures: Figures) -> None:
    assert figures.weight_0 == dict.fromkeys(METHODS, 0.0)


@cases("nothing", "adds", "changes", "hides")
def test_the_models_before_are_left_as_they_were(case: Case, figures: Figures) -> None:
    assert figures.upstream == 0


@cases("nothing", "adds", "changes", "hides")
def test_nothing_of_ours_stays_from_run_to_run(case: Case, figures: Figures) -> None:
    assert figures.growth <= 0


@cases("adds")
def test_their_addition_gets_the_asked_strength_where_it_lives(case: Case, figures: Figures) -> None:
    assert set(figures.local_ratio) == {"1", "0.25", "0.0625"}
    for ratios in figures.local_ratio.values():
        assert ratios == pytest.approx((1, 1), abs=0.02)


@cases("adds")
def test_below_the_cap_their_dials_act_as_without_the_node(case: Case, figures: Figures) -> None:
    assert figures.below_cap < ROUNDING
    assert figures.dial > VISIBLE


@cases("changes")
def test_what_changes_the_text_itself_is_left_alone(case: Case, figures: Figures) -> None:
    assert figures.rescaled < ROUNDING


@cases("hides")
def test_an_identity_that_cannot_act_is_told(case: Case, figures: Figures) -> None:
    assert figures.ours_act["uniid"] == 0
    # Of an IDAdapter the changed K and V weights act all the same, and the message says so.
    for silence in ("the identity did not act", "its gated layers did not"):
        told = [text for text in figures.said if silence in text and case.pack in text]
        assert len(told) == 2  # once for each of the sampled pictures, in both orders


@named([case for case in CASES if case.windowed])
def test_masks_follow_windows_of_a_batch(case: Case, figures: Figures) -> None:
    assert figures.framed == [[number] for number in range(6)]


@cases("refused")
def test_where_no_identity_can_act_the_run_ends_with_a_sentence(case: Case, figures: Figures) -> None:
    assert figures.refusal.startswith("InputError: another node")


def test_the_folder_holds_a_known_pack() -> None:
    """Else everything would be skipped, for a folder one level too high or too low."""
    folder = packs_folder()
    assert folder is not None
    known = {case.pack for case in CASES} - {COMFYUI}
    present = {path.name for path in folder.iterdir() if (path / "__init__.py").is_file()}
    assert known & present, f"none of the known packs is in {folder}: {', '.join(sorted(known))}"
