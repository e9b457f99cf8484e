"""Randomness belongs to what is drawn: the order of drawing changes nothing."""

from __future__ import annotations

import torch

from idadapter_core.randomness import epoch_order, generator, positions, seed_of


def test_the_same_parts_give_the_same_numbers_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = torch.randn(8, generator=generator(7, 0, 42, "noise"))
    torch.randn(100)
    assert torch.equal(first, torch.randn(8, generator=generator(7, 0, 42, "noise")))


def test_other_parts_give_other_numbers() -> None:
    lists = [
        (7, 0, 42),
        (8, 0, 42),
        (7, 1, 42),
        (7, 0, 43),
        (7, 0, 42, "noise"),
        (7, 0, "42"),
        (70, 42),
        (7, 0, 4, 2),
    ]
    assert len({seed_of(*parts) for parts in lists}) == len(lists)
    assert all(0 <= seed_of(*parts) < 2**63 for parts in lists)


def test_seeds_never_change() -> None:
    """A run of today must resume with tomorrow's release."""
    assert seed_of(0, 1, "noise") == seed_of(0, 1, "noise") == FROZEN


def test_an_epoch_shows_everything_once() -> None:
    order = epoch_order(3, 0, 50)
    assert sorted(order.tolist()) == list(range(50))
    assert not torch.equal(order, epoch_order(3, 1, 50))
    assert not torch.equal(order, epoch_order(4, 0, 50))


def test_positions_go_on_across_epochs_from_anywhere() -> None:
    whole = positions(5, 0, 23, 7)
    assert len(whole) == 23
    assert [epoch for epoch, _ in whole] == [position // 7 for position in range(23)]
    assert whole[3:20] == positions(5, 3, 20, 7)
    assert sorted(sample for epoch, sample in whole if epoch == 1) == list(range(7))


FROZEN = 1723907551845910108
