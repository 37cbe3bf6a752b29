"""Pruning: what holds for any logits, and the counts of small examples worked by hand."""

from dataclasses import replace
from math import log

import pytest
import torch
from helpers import random_architecture, random_masks, set_logits, small_spec, stream
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmetanas_core.config import Config
from fedmetanas_core.federation.update import ServerState
from fedmetanas_core.methods.method import Method
from fedmetanas_core.methods.registry import make_method
from fedmetanas_core.search.pruning import PruneReport, PruneRule, keep_bits, propose, removed, tally
from fedmetanas_core.search.relaxation import dirichlet_mean
from fedmetanas_core.search.schedule import Schedule
from fedmetanas_core.space.architecture import Architecture, masked_softmax
from fedmetanas_core.space.spec import NONE, PRIMITIVES

SEEDS = st.integers(0, 2**31)
NODES = st.integers(1, 4)
FULL = torch.tensor(8)


def alive(architecture: Architecture) -> int:
    return int(architecture.operation_mask.sum() + architecture.input_mask.sum())


def check_feasible(architecture: Architecture) -> None:
    """A pair at every node, a real operation on every alive edge, none on a dead one."""
    edges = architecture.edge_alive()
    assert bool(architecture.input_mask.any(-1).all())
    assert torch.equal(architecture.operation_mask[..., NONE + 1 :].any(-1), edges)
    assert not bool(architecture.operation_mask[~edges].any())


@settings(max_examples=60, deadline=None)
@given(
    nodes=NODES,
    seed=SEEDS,
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    temperature=st.sampled_from([1.0, 0.3, 0.1]),
    policy=st.sampled_from(["drop_first", "absent", "legal"]),
    caps=st.lists(st.integers(1, 8), min_size=3, max_size=3),
)
def test_masks_never_regrow_stay_feasible_and_keep_to_the_caps(
    nodes: int, seed: int, scale: float, temperature: float, policy: str, caps: list[int]
) -> None:
    generator = stream(seed)
    architecture = Architecture(small_spec(num_nodes=nodes))
    if policy == "absent":
        architecture.without_none()
    for cap in sorted(caps, reverse=True):
        set_logits(architecture, generator, scale)
        before, count = architecture.clone(), alive(architecture)
        kept, report = propose(architecture, temperature, PruneRule(0.01, policy), cap, [cap] * nodes)
        assert alive(architecture) == count  # a proposal changes nothing
        changed = architecture.restrict(*kept)
        for (_, old), (_, new) in zip(before.rows(), architecture.rows(), strict=True):
            assert not bool((new & ~old).any())
        check_feasible(architecture)
        assert changed == (alive(architecture) < count)
        assert architecture.version == before.version + int(changed)
        assert int(architecture.input_mask.sum(-1).max()) <= cap
        real = architecture.operation_mask[..., NONE + 1 :].sum(-1)
        assert int(real.max()) <= cap
        if policy != "legal":
            assert int(architecture.operation_mask.sum(-1).max()) <= cap
            assert report.total == count - alive(architecture)
            assert not bool(architecture.operation_mask[..., NONE].any())


@settings(max_examples=40, deadline=None)
@given(nodes=NODES, seed=SEEDS, temperature=st.sampled_from([1.0, 0.3, 0.1]))
def test_the_best_of_every_row_stays_and_what_stays_ranks_above_what_goes(
    nodes: int, seed: int, temperature: float
) -> None:
    architecture = random_masks(random_architecture(small_spec(num_nodes=nodes), seed, 2.0), stream(seed), 0.7)
    for logits, mask in architecture.rows():
        keep, _ = keep_bits(logits, mask, temperature, PruneRule(), torch.tensor(3))
        weights = masked_softmax(logits.detach().double(), mask, temperature)
        rows = mask.any(-1)
        assert torch.equal(keep.any(-1), rows)
        assert bool(keep.gather(-1, weights.argmax(-1, keepdim=True)).squeeze(-1)[rows].all())
        gone = (mask & ~keep).double()
        lowest_kept = weights.masked_fill(~keep, 2.0).min(-1).values
        assert bool((lowest_kept >= (weights * gone).max(-1).values)[rows].all())


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
@pytest.mark.parametrize("policy", ["drop_first", "absent"])
def test_masks_are_one_hot_after_the_last_event_of_runs_of_1_to_60_rounds(nodes: int, policy: str) -> None:
    spec, rule = small_spec(num_nodes=nodes), PruneRule(0.01, policy)
    for num_rounds in range(1, 61):
        schedule, generator = Schedule(num_rounds, nodes, seed=0), stream(num_rounds)
        architecture = Architecture(spec)
        if policy == "absent":
            architecture.without_none()
        for number in range(1, num_rounds + 1):
            plan = schedule.plan(number)
            if plan.prunes:
                set_logits(architecture, generator, 0.05)  # near-ties: only the caps can decide
                kept, _ = propose(architecture, plan.temperature, rule, plan.operation_cap, plan.pair_caps)
                architecture.restrict(*kept)
        assert architecture.is_one_hot(), f"{num_rounds} rounds"
        check_feasible(architecture)


def test_is_one_hot_refuses_a_surviving_none() -> None:
    architecture = Architecture(small_spec(num_nodes=1))
    only = torch.zeros_like(architecture.operation_mask)
    only[..., NONE] = True
    architecture.restrict(only, architecture.input_mask)
    assert not architecture.is_one_hot()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.2, 0.1])
def test_the_threshold_is_on_the_softmax_at_the_current_temperature(temperature: float) -> None:
    # One of eight falls below 0.01 when x / (7 + x) < 0.01, that is at a deficit of log(99 / 7) = 2.649 temperatures.
    deficit = log(99 / 7) * temperature
    for factor, stays in ((0.99, True), (1.01, False)):
        logits = torch.zeros(1, 8)
        logits[0, 5] = -deficit * factor
        mask = torch.ones(1, 8, dtype=torch.bool)
        keep, above = keep_bits(logits, mask, temperature, PruneRule(), FULL)
        assert keep[0].tolist() == [True] * 5 + [stays] + [True] * 2
        assert removed(mask, keep, above) == PruneReport(voluntary=int(not stays))


def test_the_threshold_is_on_the_weights_that_the_model_is_evaluated_with() -> None:
    """Logits 0 and -0.5 at temperature 0.1: the second has 0.0067, in DrNAS' mean e^-0.5 / (1 + e^-0.5) = 0.38."""
    logits, mask = torch.tensor([[0.0, -0.5]]), torch.ones(1, 2, dtype=torch.bool)
    assert keep_bits(logits, mask, 0.1, PruneRule(), FULL)[0].tolist() == [[True, False]]
    drnas = PruneRule(weigh=dirichlet_mean)
    assert keep_bits(logits, mask, 0.1, drnas, FULL)[0].tolist() == [[True, True]]
    assert float(dirichlet_mean(logits, mask)[0, 1]) == pytest.approx(0.37754, abs=1e-5)
    assert keep_bits(logits, mask, 0.1, replace(drnas, threshold=0.378), FULL)[0].tolist() == [[True, False]]


def test_an_entry_exactly_at_the_threshold_stays() -> None:
    keep, _ = keep_bits(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), 1.0, PruneRule(0.25), FULL)
    assert keep.all()


def test_a_masked_entry_neither_counts_in_the_softmax_nor_comes_back() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0]])
    mask = torch.tensor([[False, True, True]])
    keep, above = keep_bits(logits, mask, 1.0, PruneRule(), torch.tensor(1))
    assert keep.tolist() == [[False, True, False]]
    assert removed(mask, keep, above) == PruneReport(forced=1)


def test_an_alive_entry_whose_weight_underflows_ranks_before_a_masked_one() -> None:
    logits = torch.tensor([[0.0, 0.0, 1e6]])
    mask = torch.tensor([[False, True, True]])
    keep, above = keep_bits(logits, mask, 0.1, PruneRule(), torch.tensor(2))
    assert keep.tolist() == [[False, False, True]]
    assert removed(mask, keep, above) == PruneReport(voluntary=1)


def one_node_example(weights: list[float]) -> Architecture:
    """One node, two edges, both cell types: four rows with these operation weights at temperature 1."""
    architecture = Architecture(small_spec(num_nodes=1))
    with torch.no_grad():
        architecture.operation_logits.copy_(torch.tensor(weights).log().expand(2, 2, 8))
    return architecture


ROW = [0.200, 0.500, 0.200, 0.060, 0.030, 0.005, 0.003, 0.002]  # none first


def test_voluntary_and_forced_removals_by_hand() -> None:
    # Without none the rest is divided by 0.8: 0.625 0.25 0.075 0.0375 | 0.00625 0.00375 0.0025 are below 0.01.
    architecture = one_node_example(ROW)
    kept, report = propose(architecture, 1.0, PruneRule(), operation_cap=3)
    assert kept[0].tolist() == [[[False, True, True, True, False, False, False, False]] * 2] * 2
    assert report == PruneReport(voluntary=4 * 3, forced=4, none=4)  # the fourth is over the cap


def test_voluntary_alone_without_caps() -> None:
    kept, report = propose(one_node_example(ROW), 1.0, PruneRule())
    assert kept[0].sum().item() == 4 * 4
    assert report == PruneReport(voluntary=4 * 3, none=4)


def test_none_goes_first_even_if_it_is_the_strongest() -> None:
    row = [0.93, *[0.01] * 7]
    kept, report = propose(one_node_example(row), 1.0, PruneRule(none_policy="drop_first"))
    assert kept[0].tolist() == [[[False] + [True] * 7] * 2] * 2  # each 1/7 once none is gone
    assert report == PruneReport(none=4)


def test_legal_keeps_none_at_the_first_event_beside_a_real_operation() -> None:
    row = [0.930, 0.020, 0.020, 0.015, 0.006, 0.004, 0.003, 0.002]
    kept, report = propose(one_node_example(row), 1.0, PruneRule(none_policy="legal"))
    assert kept[0].tolist() == [[[True] * 4 + [False] * 4] * 2] * 2
    assert report == PruneReport(voluntary=4 * 4, forced=0)
    dominant, _ = propose(one_node_example([0.99, *[0.01 / 7] * 7]), 1.0, PruneRule(none_policy="legal"))
    assert dominant[0][..., NONE].all()
    assert (dominant[0][..., NONE + 1 :].sum(-1) == 1).all()  # the strongest, though below the threshold


def test_a_forced_removal_of_none_leaves_nothing_for_a_second_event() -> None:
    architecture = one_node_example([0.3, *[0.1] * 7])
    kept, first = propose(architecture, 1.0, PruneRule())
    architecture.restrict(*kept)
    _, second = propose(architecture, 1.0, PruneRule())
    assert (first, second) == (PruneReport(none=4), PruneReport())


def test_edges_of_no_alive_pair_lose_all_their_operations() -> None:
    architecture = Architecture(small_spec(num_nodes=2))
    with torch.no_grad():
        architecture.input_logits[:, 1] = torch.tensor([0.5, 0.0, -9.0])  # (0,1), (0,2), (1,2)
    kept, _ = propose(architecture, 1.0, PruneRule(), pair_caps=[1, 1])
    architecture.restrict(*kept)
    assert architecture.edge_alive().tolist() == [[True, True, True, True, False]] * 2
    assert not architecture.operation_mask[:, 4].any()
    check_feasible(architecture)


def test_a_prune_is_never_written_into_a_logit() -> None:
    architecture = random_architecture(small_spec(num_nodes=3), 0, 3.0)
    before = [logits.detach().clone() for logits, _ in architecture.rows()]
    kept, _ = propose(architecture, 0.1, PruneRule(), 1, [1, 1, 1])
    architecture.restrict(*kept)
    for (logits, _), old in zip(architecture.rows(), before, strict=True):
        assert torch.equal(logits.detach(), old)


def test_restrict_refuses_masks_that_leave_a_row_empty_and_changes_nothing() -> None:
    architecture = Architecture(small_spec(num_nodes=2))
    nothing = torch.zeros_like(architecture.operation_mask)
    with pytest.raises(ValueError, match="operation"):
        architecture.restrict(nothing, architecture.input_mask)
    with pytest.raises(ValueError, match="pair"):
        architecture.restrict(architecture.operation_mask, torch.zeros_like(architecture.input_mask))
    assert alive(architecture) == 2 * (5 * 8 + 1 + 3)
    assert architecture.version == 0
    assert not architecture.restrict(architecture.operation_mask, architecture.input_mask)


def ballots(architecture: Architecture, count: int) -> list[tuple[Tensor, Tensor]]:
    """As many clients who keep everything."""
    return [(architecture.operation_mask.clone(), architecture.input_mask.clone()) for _ in range(count)]


def test_one_client_among_five_cannot_delete_an_operation() -> None:
    architecture = Architecture(small_spec(num_nodes=2))
    votes = ballots(architecture, 5)
    votes[0][0][0, 0, 3] = False
    votes[0][1][0, 1, 2] = False
    assert tally(votes, [600.0] * 5, architecture) == PruneReport(0, 0)
    assert architecture.version == 0
    for vote in votes[1:3]:
        vote[0][0, 0, 3] = False
    assert tally(votes, [600.0] * 5, architecture) == PruneReport(1, 0)  # now three of five agree
    assert not architecture.operation_mask[0, 0, 3]
    assert architecture.input_mask[0, 1].tolist() == [True, True, True]
    assert architecture.version == 1


def test_votes_weigh_by_examples_and_exactly_half_keeps() -> None:
    architecture = Architecture(small_spec(num_nodes=1))
    votes = ballots(architecture, 3)
    votes[0][0][0, 0, 2] = False  # 300 of 600 against: stays
    votes[0][0][0, 0, 5] = votes[1][0][0, 0, 5] = False  # 400 of 600 against: goes
    votes[1][0][0, 0, 6] = votes[2][0][0, 0, 6] = False  # two clients, but 300 of 600: stays
    tally(votes, [300.0, 100.0, 200.0], architecture)
    assert architecture.operation_mask[0, 0].tolist() == [True] * 5 + [False] + [True] * 2


def test_a_row_in_which_nothing_got_half_keeps_the_entry_with_most_votes() -> None:
    architecture = Architecture(small_spec(num_nodes=1))
    with torch.no_grad():
        architecture.operation_logits[0, 1, 4] = 9.0
        architecture.operation_logits[0, 0, 7] = 1.0
    votes = ballots(architecture, 5)
    for vote in votes:
        vote[0][0] = False
    for client, operation in enumerate([1, 1, 4, 5, 6]):
        votes[client][0][0, 1, operation] = True  # most votes win over the larger logit
    for client, operation in enumerate([1, 3, 4, 5, 7]):
        votes[client][0][0, 0, operation] = True  # a draw: the larger logit wins
    tally(votes, [1.0] * 5, architecture)
    assert architecture.operation_mask[0, 1].nonzero().flatten().tolist() == [1]
    assert architecture.operation_mask[0, 0].nonzero().flatten().tolist() == [7]
    assert architecture.operation_mask[1].all()


@settings(max_examples=40, deadline=None)
@given(nodes=NODES, seed=SEEDS, clients=st.integers(1, 5), keep=st.sampled_from([0.1, 0.5, 0.9]))
def test_any_votes_leave_a_feasible_smaller_architecture(nodes: int, seed: int, clients: int, keep: float) -> None:
    generator = stream(seed)
    architecture = random_masks(random_architecture(small_spec(num_nodes=nodes), seed), generator, 0.8)
    before = architecture.clone()
    votes = []
    for _ in range(clients):
        voter = random_masks(architecture.clone(), generator, keep)
        votes.append((voter.operation_mask, voter.input_mask))
    report = tally(votes, [float(client + 1) for client in range(clients)], architecture)
    check_feasible(architecture)
    for (_, old), (_, new) in zip(before.rows(), architecture.rows(), strict=True):
        assert not bool((new & ~old).any())
    assert report.forced == 0
    assert report.total == alive(before) - alive(architecture)
    # Stranded are those that an edge lost with its last pair, whatever its own row was voted to.
    lost_edges = before.operation_mask.any(-1) & ~architecture.operation_mask.any(-1)
    assert report.stranded == int(before.operation_mask[lost_edges].sum())


def searched_state(**keys: object) -> tuple[Method, ServerState]:
    spec = small_spec(num_nodes=1)
    config = Config.from_mapping({"num_rounds": 100, "search_fraction": 0.8, **keys}).resolve(8, 8, 100)
    method = make_method(config, spec)
    state = method.initial_state()
    with torch.no_grad():
        state.architecture.operation_logits.zero_()
        state.architecture.operation_logits[..., 7] = -1.0
    return method, state


@pytest.mark.parametrize(("keys", "goes"), [({}, False), ({"prune_temperature": "min"}, True)])
def test_the_server_prunes_at_the_temperature_of_the_round_or_at_the_lowest(keys: dict[str, str], goes: bool) -> None:
    # Round 30 has temperature 0.609: a deficit of 1 weighs exp(-1.64) / 6.19 = 0.031, at 0.1 it weighs 0.0000076.
    method, state = searched_state(**keys)
    report = method.prune(state, [], method.plan(30))
    assert report == PruneReport(voluntary=4 if goes else 0, none=4)
    assert bool(state.architecture.operation_mask[..., 7].any()) != goes
    assert state.network().weights.shape == state.weights.shape  # the weights went with the operations


def test_the_server_prunes_in_no_other_round() -> None:
    method, state = searched_state()
    assert method.prune(state, [], method.plan(31)) is None
    assert state.architecture.version == 0
    assert state.architecture.operation_mask.all()


def test_absent_starts_without_none_and_legal_and_drop_first_with_it() -> None:
    for policy, expected in (("absent", 7), ("legal", 8), ("drop_first", 8)):
        _, state = searched_state(none_policy=policy)
        assert state.architecture.operation_mask.sum(-1).unique().tolist() == [expected]
        assert state.architecture.version == 0
        assert len(PRIMITIVES) == 8
