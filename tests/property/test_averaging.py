"""Averages by hand, pooled moments against the pooled data, and order."""

import subprocess
import sys

import pytest
import torch
from helpers import small_spec, stream
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmetanas_core.config import Config
from fedmetanas_core.federation import averaging
from fedmetanas_core.federation.averaging import CHUNK, places, pooled_statistics, weighted_mean
from fedmetanas_core.federation.update import ClientUpdate
from fedmetanas_core.methods.registry import make_method
from fedmetanas_core.space.flat import Layout
from fedmetanas_core.space.supernet import Supernet

LAYOUT = Layout(
    (
        ("a.running_mean", (2,)),
        ("a.running_var", (2,)),
        ("b.running_mean", (3,)),
        ("b.running_var", (3,)),
    )
)
SEEDS = st.integers(0, 2**31)


def test_weighted_mean_by_hand() -> None:
    values = [torch.tensor([1.0, 10.0]), torch.tensor([4.0, 0.0]), torch.tensor([0.0, 2.0])]
    result = weighted_mean(values, [100.0, 300.0, 200.0])
    assert result.tolist() == pytest.approx([1300 / 600, 1400 / 600], rel=1e-6)


def test_weights_are_relative_to_the_participants() -> None:
    values = [torch.tensor([2.0]), torch.tensor([8.0])]
    assert weighted_mean(values, [1.0, 2.0]).item() == weighted_mean(values, [50.0, 100.0]).item() == 6.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_dtype_is_kept_and_the_inputs_too(dtype: torch.dtype) -> None:
    values = [torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor([3.0, 4.0], dtype=dtype)]
    result = weighted_mean(values, [1.0, 1.0])
    assert result.dtype == dtype
    assert result.tolist() == [2.0, 3.0]
    assert values[0].tolist() == [1.0, 2.0]
    assert pooled_statistics([torch.ones(10, dtype=dtype)] * 2, [1.0, 3.0], LAYOUT).dtype == dtype


def test_sums_are_taken_in_float64() -> None:
    # In float32, 2^24 + 1 is 2^24 again, so 1 would vanish each of the four times.
    values = [torch.tensor([2.0**24]), *[torch.tensor([1.0])] * 4]
    assert weighted_mean(values, [1.0] * 5).item() * 5 == 2.0**24 + 4


def test_more_values_than_are_summed_at_a_time() -> None:
    values = [torch.arange(2 * CHUNK + 3, dtype=torch.float64).view(1, -1) * factor for factor in (1.0, 4.0)]
    assert torch.equal(weighted_mean(values, [2.0, 1.0]), 2.0 * values[0])


@st.composite
def held_places(draw: st.DrawFn) -> list[list[int] | None]:
    """What up to four clients hold of 20 values: all, a stretch, scattered ones in some order, or nothing."""
    stretch = st.tuples(st.integers(0, 19), st.integers(1, 20)).map(lambda at: list(range(at[0], min(20, sum(at)))))
    scattered = st.lists(st.integers(0, 19), unique=True, max_size=20)
    return draw(st.lists(st.none() | stretch | scattered, min_size=1, max_size=4))


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS, held=held_places(), chunk=st.integers(1, 25))
def test_every_value_is_averaged_over_those_that_hold_it(seed: int, held: list[list[int] | None], chunk: int) -> None:
    generator = stream(seed)
    before = torch.randn(20, generator=generator)
    values = [torch.randn(20 if where is None else len(where), generator=generator) for where in held]
    weights = [float(size) for size in range(1, len(held) + 1)]
    expected = before.clone().double()
    for place in range(20):
        mine = [
            (float(value[place if where is None else where.index(place)]), weight)
            for value, weight, where in zip(values, weights, held, strict=True)
            if where is None or place in where
        ]
        if mine:
            expected[place] = sum(value * weight for value, weight in mine) / sum(weight for _, weight in mine)
    tensors = [None if where is None else torch.tensor(where, dtype=torch.int64) for where in held]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(averaging, "CHUNK", chunk)
        found = weighted_mean(values, weights, tensors, before)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_places_go_by_the_names_of_tensors() -> None:
    whole = Layout((("a", (2,)), ("b", (2, 2)), ("c", (1,))))
    turned, one = Layout((("c", (1,)), ("a", (2,)))), Layout((("b", (2, 2)),))
    first, second, third, fourth = places([turned, whole, one, Layout(turned.entries)], whole)
    assert first is not None
    assert third is not None
    assert (first.tolist(), second, third.tolist()) == ([6, 0, 1], None, [2, 3, 4, 5])
    assert fourth is first


def test_nothing_to_average_is_an_error_and_so_is_a_missing_weight() -> None:
    with pytest.raises(ValueError, match="0 values"):
        weighted_mean([], [])
    with pytest.raises(ValueError, match="1 values and 3 places"):
        weighted_mean([torch.ones(1)], [1.0], [torch.arange(3)], torch.ones(4))
    with pytest.raises(ValueError, match="1 weights"):
        weighted_mean([torch.ones(1), torch.ones(1)], [1.0])


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, sizes=st.lists(st.integers(1, 600), min_size=1, max_size=6))
def test_the_order_of_clients_does_not_matter(seed: int, sizes: list[int]) -> None:
    generator = stream(seed)
    values = [torch.randn(10, generator=generator, dtype=torch.float64) for _ in sizes]
    weights = [float(size) for size in sizes]
    forward, backward = weighted_mean(values, weights), weighted_mean(values[::-1], weights[::-1])
    torch.testing.assert_close(forward, backward, rtol=1e-13, atol=1e-13)
    positive = [value.abs() for value in values]
    one = pooled_statistics(positive, weights, LAYOUT)
    other = pooled_statistics(positive[::-1], weights[::-1], LAYOUT)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seed=SEEDS, sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), spread=st.sampled_from([0.0, 1.0, 100.0])
)
def test_pooled_moments_are_those_of_the_pooled_data(seed: int, sizes: list[int], spread: float) -> None:
    generator = stream(seed)
    clients = [
        [
            torch.randn(size, channels, generator=generator, dtype=torch.float64)
            + spread * torch.randn(1, channels, generator=generator, dtype=torch.float64)
            for channels in (2, 3)
        ]
        for size in sizes
    ]

    def moments(layers: list[Tensor]) -> Tensor:
        return torch.cat([part for x in layers for part in (x.mean(0), x.var(0, correction=0))])

    expected = moments([torch.cat(layer) for layer in zip(*clients, strict=True)])
    found = pooled_statistics([moments(layers) for layers in clients], [float(size) for size in sizes], LAYOUT)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * max(1.0, spread**2))


def test_averaging_the_variances_alone_loses_the_spread_between_clients() -> None:
    # Two clients of one channel, constant images of value 0 and 4, with 1 and 3 images: mean 3, variance 3.
    layout = Layout((("n.running_mean", (1,)), ("n.running_var", (1,))))
    values = [torch.tensor([0.0, 0.0]), torch.tensor([4.0, 0.0])]
    assert pooled_statistics(values, [1.0, 3.0], layout).tolist() == [3.0, 3.0]
    assert weighted_mean(values, [1.0, 3.0]).tolist() == [3.0, 0.0]


def test_equal_clients_pool_to_themselves_and_no_variance_turns_negative() -> None:
    values = [torch.tensor([1e4, -1e4, 1e-9, 0.0, *[0.1] * 6])] * 3
    result = pooled_statistics(values, [1.0, 7.0, 3.0], LAYOUT)
    torch.testing.assert_close(result, values[0], rtol=1e-6, atol=1e-6)
    assert bool((result[2:4] >= 0).all())


def test_pooling_fits_the_layout_of_a_real_network() -> None:
    spec = small_spec()
    config = Config.from_mapping({"num_rounds": 10}).resolve(8, 8, 100)
    method = make_method(config, spec)
    state = method.initial_state()
    layout = Supernet(spec, state.architecture.operation_mask, "meta").statistic_layout
    names = [name for name, _ in layout.entries]
    assert {name.rpartition(".")[2] for name in names} == {"running_mean", "running_var"}

    def update(client: int, size: int, shift: float) -> ClientUpdate:
        statistics = state.statistics.clone()
        for name, view in layout.views(statistics).items():
            view.fill_(shift if name.endswith("mean") else 2.0)
        logits = state.architecture.operation_logits.detach(), state.architecture.input_logits.detach()
        return ClientUpdate(client, 1, 0, size, state.weights + shift, statistics, logits[0] + shift, logits[1] - shift)

    plan = method.plan(1)
    sent = {client: method.payload(state, client, plan) for client in range(2)}
    result = method.aggregate(state, sent, [update(0, 100, 0.0), update(1, 300, 4.0)], plan)
    torch.testing.assert_close(result.weights, state.weights + 3.0, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        result.architecture.operation_logits, state.architecture.operation_logits + 3.0, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        result.architecture.input_logits, state.architecture.input_logits - 3.0, rtol=0, atol=1e-6
    )
    for name, view in layout.views(result.statistics).items():
        expected = 3.0 if name.endswith("mean") else 2.0 + 3.0  # within 2, between 0.25 * 9 + 0.75 * 1
        torch.testing.assert_close(view, torch.full_like(view, expected), rtol=1e-6, atol=0)
    assert result.round == 1
    assert float(state.architecture.operation_logits.detach().abs().max()) < 0.1  # the old state is untouched
    assert result.weights.dtype == result.statistics.dtype == torch.float32


def test_averaging_many_updates_holds_little_more_than_the_result() -> None:
    """Twenty updates of five million parameters."""
    code = (
        "import resource, torch\n"
        "from fedmetanas_core.federation.averaging import weighted_mean\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "torch.set_num_threads(1)\n"
        "weighted_mean([torch.ones(300_000)] * 2, [1.0, 2.0])\n"
        "updates = [torch.full((5_000_000,), float(n)) for n in range(20)]\n"
        "before = peak()\n"
        "mean = weighted_mean(updates, [1.0] * 20)\n"
        "print((peak() - before) / (4 * 5_000_000), float(mean[-1]))\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(said[0]) <= 1.5  # model sizes; a second copy would make it 2
    assert float(said[1]) == 9.5
