"""Combinations that a minority cannot take over: numbers by hand, and properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmetanas_core.config import Config
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.federation.robust import TrimmedMean, krum
from fedmetanas_core.preflight import prepare_experiment

MEDIAN = TrimmedMean(0.5)


def tensors(*rows: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]


def test_the_median_by_hand() -> None:
    """Odd: the middle one. Even: the mean of the two in the middle. Weights have no say."""
    odd = tensors([1.0, 9.0], [5.0, -1.0], [3.0, 2.0])
    assert MEDIAN(odd, [1.0, 100.0, 1.0]).tolist() == [3.0, 2.0]
    assert MEDIAN([*odd, torch.tensor([100.0, 4.0])], [1.0] * 4).tolist() == [4.0, 3.0]


def test_the_trimmed_mean_by_hand() -> None:
    """A fifth of five is one at each end; a fifth of four is none."""
    values = tensors([0.0], [1.0], [2.0], [6.0], [1000.0])
    assert TrimmedMean(0.2)(values, [1.0] * 5).tolist() == [3.0]
    assert TrimmedMean(0.2)(values[:4], [1.0] * 4).tolist() == [2.25]


def test_only_those_who_hold_a_value_count_and_what_nobody_holds_stays() -> None:
    """Place 0: 1 and 3; place 1: 5 alone; place 2: nobody."""
    values, held = tensors([1.0], [3.0, 5.0]), [torch.tensor([0]), torch.tensor([0, 1])]
    before = torch.tensor([7.0, 7.0, 7.0])
    assert MEDIAN(values, [1.0, 1.0], held, before).tolist() == [2.0, 5.0, 7.0]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), honest=st.integers(3, 9), size=st.integers(1, 5))
def test_what_is_between_the_honest_stays_between_them_whatever_a_minority_sends(
    data: st.DataObject, honest: int, size: int
) -> None:
    numbers = st.lists(st.floats(-10, 10, width=32), min_size=size, max_size=size)
    good = [torch.tensor(data.draw(numbers)) for _ in range(honest)]
    false = [torch.full((size,), data.draw(st.sampled_from([-1e30, 1e30]))) for _ in range((honest - 1) // 2)]
    share = (len(false) + 0.01) / (honest + len(false))
    for rule in (MEDIAN, TrimmedMean(min(0.5, share))):
        found = rule([*good, *false], [1.0] * (honest + len(false)))
        low, high = torch.stack(good).min(0).values, torch.stack(good).max(0).values
        assert bool(((found >= low - 1e-4) & (found <= high + 1e-4)).all())


def test_krum_by_hand() -> None:
    """Five on a line, f = 1: n - f - 2 = 2 are kept, those with the nearest two neighbours.

    Sums of the two smallest squared distances: 1 + 4 = 5 at 0, 1 + 1 = 2 at 1, 1 + 4 = 5 at 2, 4 + 9 = 13 at 4, and far
    more at 100. Of equals the first in order is kept.
    """
    changes = tensors([0.0], [1.0], [2.0], [4.0], [100.0])
    assert krum(changes, 0.2) == [0, 1]
    assert krum(changes[:2], 0.2) == [0]


def test_krum_keeps_no_outlier() -> None:
    stream = torch.Generator().manual_seed(0)
    changes = [torch.randn(50, generator=stream) for _ in range(14)] + [20.0 + torch.randn(50, generator=stream)] * 6
    kept = krum(changes, 0.3)
    assert len(kept) == 20 - 6 - 2
    assert max(kept) < 14


def test_krum_is_refused_where_clients_send_parts(tmp_path: object) -> None:
    config = Config.from_mapping({"method": "fedrlnas", "averaging": "krum"})
    with pytest.raises(RefusalError, match="averaging: krum compares whole networks"):
        prepare_experiment(config, tmp_path)  # type: ignore[arg-type]
