"""What a method promises beside acting in a UNet: how photos are mixed, and how it is trained."""

from __future__ import annotations

import pytest
import torch

from tests.contract.samples import CASES, MIX_MODES, Case, learned, mixed, same_tokens, tokens, trained


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def test_a_mode_of_mixing_is_its_own_or_refused(case: Case) -> None:
    """`auto` is one of the others; of the others no two are the same, or somebody's choice would do nothing."""
    adapter = trained(case)
    found = {mode: mixed(adapter, mode) for mode in MIX_MODES}
    usual = found.pop("auto")
    assert usual is not None, "`auto` must work"
    known = {mode: identity for mode, identity in found.items() if identity is not None}
    assert any(same_tokens(usual, identity) for identity in known.values()), (
        f"`auto` is none of {sorted(known)}"
    )
    for one in known:
        for other in known:
            alike = one != other and same_tokens(known[one], known[other])
            assert not alike, (
                f"`{one}` and `{other}` give the same identity; refuse by name the mode that is not there"
            )


def test_a_recipe_encodes_what_it_is_given(case: Case) -> None:
    """With the identity kept and dropped; the tokens of a dropped one are those of nobody, or act nowhere."""
    adapter = trained(case)
    made = learned(adapter)
    if made is None:
        return
    nobody = tokens(mixed(adapter, "auto")).get("adapter_tokens_uncond")
    assert made.has_gradients, "nothing reaches the encoder's weights"
    assert made.tokens is not None or made.text
    for part in (made.tokens, *made.text.values()):
        assert part is None or (len(part) == 2 and part.isfinite().all())
    if made.tokens is None:
        return
    assert made.acts[0]
    if made.acts[1] and nobody is not None:
        torch.testing.assert_close(made.tokens[1:], nobody, atol=1e-4, rtol=1e-4)
