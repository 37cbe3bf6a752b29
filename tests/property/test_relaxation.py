"""The relaxation against equation 8 written out, and what must hold for any logits, masks and noise."""

from itertools import pairwise

import pytest
import torch
from helpers import (
    noisy,
    plain_supernet,
    random_architecture,
    random_masks,
    random_one_hot,
    random_supernet,
    set_logits,
    small_spec,
    stream,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmetanas_core.search.relaxation import Relaxation, gumbel, relax
from fedmetanas_core.space.architecture import Architecture, masked_softmax
from fedmetanas_core.space.edge_weights import EdgeWeights
from fedmetanas_core.space.spec import PRIMITIVES

SEEDS = st.integers(0, 2**31)
NODES = st.integers(1, 4)
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def pruned(nodes: int, seed: int, keep: float, dtype: torch.dtype = torch.float64) -> Architecture:
    return random_masks(random_architecture(small_spec(num_nodes=nodes), seed, 3.0, dtype), stream(seed), keep)


@settings(max_examples=40, deadline=None)
@given(nodes=NODES, seed=SEEDS, keep=st.sampled_from([0.0, 0.3, 1.0]), temperature=st.floats(0.1, 2.0))
def test_marginals_are_the_sums_of_the_pairs_that_hold_the_edge(
    nodes: int, seed: int, keep: float, temperature: float
) -> None:
    architecture = pruned(nodes, seed, keep)
    spec = architecture.spec
    weights = relax(architecture, temperature)
    for kind in range(2):
        for node in range(nodes):
            alive = architecture.input_mask[kind, node]
            logits = architecture.input_logits[kind, node][alive] / temperature
            share = dict(zip(alive.nonzero().flatten().tolist(), logits.softmax(0).tolist(), strict=True))
            for source in range(2 + node):
                expected = sum(share.get(p, 0.0) for p, pair in enumerate(spec.pairs(node)) if source in pair)
                found = float(weights.inputs[kind, spec.edge(node, source)].detach())
                assert found == pytest.approx(expected, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(nodes=NODES, seed=SEEDS, keep=st.sampled_from([0.0, 0.3, 1.0]), noise=st.sampled_from([0.0, 0.5, 1.0]))
def test_marginals_of_a_node_sum_to_two_and_operations_of_an_alive_edge_to_one(
    nodes: int, seed: int, keep: float, noise: float
) -> None:
    architecture = pruned(nodes, seed, keep, torch.float32)
    weights = noisy(architecture, 0.3, noise, stream(seed))
    alive = architecture.edge_alive()
    for first, last in pairwise([architecture.spec.first_edge(node) for node in range(nodes + 1)]):
        torch.testing.assert_close(weights.inputs[:, first:last].sum(1), torch.full((2,), 2.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(weights.operations.sum(-1), alive.float(), rtol=0, atol=1e-5)
    assert bool((weights.operations[~architecture.operation_mask] == 0).all())
    assert bool((weights.inputs[~alive] == 0).all())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("keep", [0.3, 1.0])
@pytest.mark.parametrize("cells", [1, 2, 3, 4])
def test_the_supernet_equals_equation_8_written_out_and_so_do_its_gradients(
    cells: int, keep: float, training: bool
) -> None:
    spec = small_spec(num_cells=cells, num_nodes=3, side=9)
    architecture = random_masks(random_architecture(spec, cells, 1.0, torch.float64), stream(cells), keep)
    supernet = random_supernet(spec, architecture.operation_mask, seed=7).train(training)
    x = torch.randn(3, 1, 9, 9, generator=stream(3), dtype=torch.float64)
    target = torch.randn(3, 3, generator=stream(4), dtype=torch.float64)
    logits = [architecture.operation_logits, architecture.input_logits]

    expected = plain_supernet(supernet, x, *(masked_softmax(values, mask, 0.4) for values, mask in architecture.rows()))
    expected_gradients = torch.autograd.grad((expected * target).sum(), logits)
    found = supernet(x, relax(architecture, 0.4))
    found_gradients = torch.autograd.grad((found * target).sum(), logits)
    torch.testing.assert_close(found, expected, **EXACT)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        assert float(other.abs().max()) > 1e-6
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_weight_gradients_of_the_supernet_lie_in_the_flat_gradient() -> None:
    spec = small_spec(num_nodes=2)
    architecture = random_architecture(spec, 0, 1.0, torch.float64)
    supernet = random_supernet(spec, architecture.operation_mask, seed=1).train()
    weights = relax(architecture, 1.0)
    x = torch.randn(2, 1, 8, 8, generator=stream(3), dtype=torch.float64)
    supernet(x, weights).square().sum().backward(retain_graph=True)
    named = dict(supernet.named_parameters())
    expected = torch.autograd.grad(supernet(x, weights).square().sum(), list(named.values()))
    assert supernet.weights.grad is not None
    flat = torch.cat([gradient.flatten() for gradient in expected])
    torch.testing.assert_close(supernet.weights.grad, flat, rtol=1e-8, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    nodes=NODES,
    seed=SEEDS,
    temperature=st.sampled_from([1.0, 0.1, 1e-3]),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
    noise=st.sampled_from([0.0, 1.0]),
)
def test_neither_weights_nor_gradients_are_ever_nan(
    nodes: int, seed: int, temperature: float, scale: float, noise: float
) -> None:
    architecture = random_masks(random_architecture(small_spec(num_nodes=nodes), seed, scale), stream(seed), 0.2)
    weights = noisy(architecture, temperature, noise, stream(seed))
    assert bool(torch.isfinite(weights.operations).all())
    assert bool(torch.isfinite(weights.inputs).all())
    (weights.operations.square().sum() + weights.inputs.square().sum()).backward()
    for logits, mask in architecture.rows():
        assert logits.grad is not None
        assert bool(torch.isfinite(logits.grad).all())
        assert bool((logits.grad[~mask] == 0).all())


def test_a_row_with_everything_pruned_weighs_nothing_and_has_no_gradient() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, -1.0]], requires_grad=True)
    mask = torch.tensor([[False, False], [True, True]])
    weights = masked_softmax(logits, mask, 0.5)
    assert weights[0].tolist() == [0.0, 0.0]
    (weights * torch.tensor([1.0, 3.0])).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == [0.0, 0.0]
    p = 1 / (1 + torch.tensor(-8.0).exp())  # gap 4 at temperature 0.5
    torch.testing.assert_close(logits.grad[1], torch.tensor([-1.0, 1.0]) * 2 * p * (1 - p) / 0.5, rtol=1e-4, atol=1e-7)


def test_a_masked_entry_has_no_influence_whatever_its_logit() -> None:
    mask = torch.tensor([True, False, True])
    small, large = (masked_softmax(torch.tensor([0.0, value, 1.0]), mask) for value in (-50.0, 1e30))
    assert torch.equal(small, large)
    assert float(small[2]) == pytest.approx(0.7310586, abs=1e-6)


def test_softmax_by_hand_at_two_temperatures() -> None:
    logits, mask = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]), torch.ones(8, dtype=torch.bool)
    assert float(masked_softmax(logits, mask, 1.0)[0]) == pytest.approx(0.27970, abs=1e-5)  # e / (e + 7)
    assert float(masked_softmax(logits, mask, 0.1)[0]) == pytest.approx(0.99968, abs=1e-5)  # e^10 / (e^10 + 7)


@settings(max_examples=30, deadline=None)
@given(nodes=NODES, seed=SEEDS, shift=st.floats(-5, 5), temperature=st.floats(0.1, 2.0))
def test_gumbel_softmax_does_not_see_a_shift_of_its_row(
    nodes: int, seed: int, shift: float, temperature: float
) -> None:
    architecture = pruned(nodes, seed, 0.5)
    before = noisy(architecture, temperature, 1.0, stream(seed))
    with torch.no_grad():
        for logits, _ in architecture.rows():
            logits.add_(shift * torch.arange(logits.shape[1], dtype=logits.dtype).unsqueeze(-1))  # another one per row
    after = noisy(architecture, temperature, 1.0, stream(seed))
    torch.testing.assert_close(before.operations, after.operations, **EXACT)
    torch.testing.assert_close(before.inputs, after.inputs, **EXACT)


@settings(max_examples=20, deadline=None)
@given(nodes=NODES, seed=SEEDS)
def test_centring_changes_no_weight_and_leaves_a_zero_mean_over_the_alive(nodes: int, seed: int) -> None:
    architecture = pruned(nodes, seed, 0.5)
    before = relax(architecture, 0.3)
    architecture.centre()
    after = relax(architecture, 0.3)
    torch.testing.assert_close(before.operations, after.operations, **EXACT)
    torch.testing.assert_close(before.inputs, after.inputs, **EXACT)
    for logits, mask in architecture.rows():
        assert float(logits.detach().masked_fill(~mask, 0.0).sum(-1).abs().max()) < 1e-10
        assert bool((logits[~mask] == 0).all())


def test_log_of_the_probabilities_gives_the_same_weights_as_the_logits() -> None:
    architecture = random_architecture(small_spec(), 4, 2.0, torch.float64)
    logs = architecture.clone()
    with torch.no_grad():
        logs.operation_logits.copy_(architecture.operation_logits.softmax(-1).log())
    one, other = (noisy(each, 0.5, 1.0, stream(9)).operations for each in (architecture, logs))
    torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("sample", ["per_type", "per_cell"])
def test_noise_is_reproducible_and_moves_on(sample: str) -> None:
    architecture = random_architecture(small_spec(), 0)
    first, again = (noisy(architecture, 1.0, 1.0, stream(5), sample) for _ in range(2))
    assert torch.equal(first.operations, again.operations)
    assert torch.equal(first.inputs, again.inputs)
    generator = stream(5)
    draws = [noisy(architecture, 1.0, 1.0, generator, sample).operations for _ in range(2)]
    assert torch.equal(draws[0], first.operations)
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(first.operations, noisy(architecture, 1.0, 1.0, stream(6), sample).operations)


def test_noise_touches_no_global_generator() -> None:
    architecture = random_architecture(small_spec(), 0)
    before = torch.random.get_rng_state()
    noisy(architecture, 1.0, 1.0, stream(5))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_per_type_gives_one_draw_per_type_and_per_cell_one_per_cell() -> None:
    spec = small_spec(num_cells=6)
    architecture = random_architecture(spec, 0, 0.0)  # equal logits: all differences are noise
    assert noisy(architecture, 1.0, 1.0, stream(1)).operations.shape == (2, spec.num_edges, 8)
    cells = noisy(architecture, 1.0, 1.0, stream(1), "per_cell")
    assert cells.per_cell
    assert cells.operations.shape == (6, spec.num_edges, 8)
    assert cells.inputs.shape == (6, spec.num_edges)
    assert len(set(cells.operations[:, 0, 0].tolist())) == 6
    without = relax(architecture, 1.0, sample="per_cell")
    assert not without.per_cell
    assert len(without.operations) == 2


def test_noise_is_independent_over_rows_and_types() -> None:
    architecture = random_architecture(small_spec(num_nodes=4), 0, 0.0)
    assert len(set(noisy(architecture, 1.0, 1.0, stream(1)).operations[..., 0].flatten().tolist())) == 2 * 14


def test_the_supernet_gives_each_cell_its_own_group_when_there_is_one_per_cell() -> None:
    spec = small_spec(num_cells=4)
    architecture = random_architecture(spec, 0, 1.0, torch.float64)
    supernet = random_supernet(spec, architecture.operation_mask, seed=2)
    x = torch.randn(2, 1, 8, 8, generator=stream(3), dtype=torch.float64)
    shared = noisy(architecture, 0.5, 1.0, stream(4))
    kinds = [0, 1, 1, 0]  # cells 4 // 3 and 2 * 4 // 3 are reductions
    spread = EdgeWeights(shared.operations[kinds], shared.inputs[kinds], per_cell=True)
    torch.testing.assert_close(supernet(x, spread), supernet(x, shared), **EXACT)
    other = EdgeWeights(spread.operations.clone(), spread.inputs.clone(), per_cell=True)
    other.operations[3] = other.operations[3].flip(0)
    assert float((supernet(x, other) - supernet(x, shared)).abs().max().detach()) > 1e-6


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_winner_of_a_gumbel_draw_is_distributed_as_softmax_at_any_temperature(temperature: float) -> None:
    architecture = Architecture(small_spec(num_nodes=4))
    row = torch.tensor([1.0, 0.0, 0.0, 0.5, -1.0, 0.0, 0.2, 0.0])
    with torch.no_grad():
        architecture.operation_logits.copy_(row.expand_as(architecture.operation_logits))
    generator, counts, draws = stream(11), torch.zeros(len(PRIMITIVES)), 700
    for _ in range(draws):
        winners = noisy(architecture, temperature, 1.0, generator).operations.argmax(-1)
        counts += torch.bincount(winners.flatten(), minlength=len(PRIMITIVES))
    total = draws * 28  # rows are independent
    expected = row.softmax(0)
    sigma = (expected * (1 - expected) / total).sqrt()
    assert bool(((counts / total - expected).abs() < 3 * sigma).all())


def test_gumbel_has_the_moments_of_its_distribution() -> None:
    sample = gumbel((200_000,), stream(2)).double()
    sigma = (torch.pi**2 / 6) ** 0.5
    assert abs(float(sample.mean()) - 0.5772157) < 4 * sigma / 200_000**0.5
    assert abs(float(sample.std()) - sigma) < 0.02
    assert float(sample.max()) < 24.0


def test_noise_scale_scales_the_noise() -> None:
    architecture = random_architecture(small_spec(), 3, 1.0, torch.float64)
    noise = gumbel(architecture.operation_logits.shape, stream(8)).double()
    found = noisy(architecture, 0.5, 0.25, stream(8)).operations
    expected = ((architecture.operation_logits + 0.25 * noise) / 0.5).softmax(-1)
    torch.testing.assert_close(found, expected, **EXACT)


@settings(max_examples=15, deadline=None)
@given(nodes=NODES, seed=SEEDS)
def test_one_hot_masks_make_every_weight_exactly_one_noise_or_not(nodes: int, seed: int) -> None:
    architecture = random_one_hot(random_architecture(small_spec(num_nodes=nodes), seed, 5.0), stream(seed))
    assert architecture.is_one_hot()
    assert Relaxation().expected(architecture, 0.1) is None
    for noise in (0.0, 1.0):
        weights = noisy(architecture, 0.1, noise, stream(seed))
        assert torch.equal(weights.operations, architecture.operation_mask.float())
        assert torch.equal(weights.inputs, architecture.edge_alive().float())


def test_the_expected_weights_are_those_of_relax_while_there_is_a_choice() -> None:
    architecture = set_logits(Architecture(small_spec()), stream(0))
    weights = Relaxation().expected(architecture, 0.5)
    assert weights is not None
    assert torch.equal(weights.operations, relax(architecture, 0.5).operations)
