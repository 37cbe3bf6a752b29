"""Who points against the others: numbers by hand, and reversed updates among nearly orthogonal ones."""

import pytest
import torch

from fedmetanas_core.federation.direction import agreement, opposed


def test_agreement_by_hand() -> None:
    # For the first: the others' mean is 0.5, their variance 6.25, its weight 0.08, and 1 * 0.08 / sqrt(0.04) = 0.4.
    assert agreement([torch.tensor([value]) for value in (1.0, 3.0, -2.0)]) == pytest.approx([0.4, -2.0, -2.0])
    # Against the first two alone: for the third, m = 2 and v = 1 as before; for the others, one value has no variance.
    among = [True, True, False]
    assert agreement([torch.tensor([value]) for value in (1.0, 3.0, -2.0)], among) == pytest.approx([0.0, 0.0, -2.0])
    # A coordinate in which the others do not differ says nothing.
    twice = [torch.tensor([value, 7.0]) for value in (1.0, 3.0, -2.0)]
    assert agreement(twice) == pytest.approx([0.4, -2.0, -2.0])


def test_coordinates_count_in_any_unit() -> None:
    generator = torch.Generator().manual_seed(0)
    changes = torch.randn(8, 50, generator=generator) + 0.2
    units = 10 ** (4 * torch.rand(50, generator=generator) - 2)
    assert agreement(list(changes)) == pytest.approx(agreement(list(changes * units)), rel=1e-4)


def test_reversed_updates_are_found_over_rounds_and_no_other_is() -> None:
    generator, history = torch.Generator().manual_seed(1), dict[str, float]()
    common = torch.randn(2000, generator=generator)
    excluded: dict[int, str] = {}
    for _ in range(12):  # cosines of honest updates: 0.04
        changes = {client: 0.2 * common + torch.randn(2000, generator=generator) for client in range(20)}
        excluded = opposed({client: -change if client < 6 else change for client, change in changes.items()}, history)
    assert sorted(excluded) == list(range(6))
    assert all("points against what the others have in common (-" in reason for reason in excluded.values())


def test_few_updates_are_not_judged() -> None:
    history = dict[str, float]()
    assert opposed({client: torch.ones(3) for client in range(4)}, history) == {}
    assert history == {}
