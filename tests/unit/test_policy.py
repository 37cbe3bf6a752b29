"""Who updates the alphas, with numbers worked by hand."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedmetanas_core.federation.averaging import weighted_mean
from fedmetanas_core.federation.policy import Adam, AveragedAlphas, MetaGradient, NoAlphas, Reinforce, mean_alphas
from fedmetanas_core.federation.update import ClientUpdate, Payload, RoundPlan, ServerState
from fedmetanas_core.search.prune_events import EarlyFix, PolicyPruning
from fedmetanas_core.search.schedule import Steady
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.budget import Budget
from fedmetanas_core.space.models import build
from fedmetanas_core.space.spec import PRIMITIVES, SpaceSpec

SPEC = SpaceSpec(2, 3, 1, 1, 3, 8, 8, inputs="all")  # one node with two edges, in each of two groups


def plan(**values: object) -> RoundPlan:
    return replace(Steady(10, "search", adapts=True).plan(1), **values)  # type: ignore[arg-type]


def fresh(spec: SpaceSpec = SPEC) -> ServerState:
    architecture = Architecture(spec)
    network = build(spec, architecture.operation_mask)
    network.initialise(torch.Generator().manual_seed(0))
    return ServerState(spec, network.weights.detach().clone(), network.statistics.clone(), architecture)


def answer(client: int, examples: int = 1, operations: Tensor | None = None, **values: object) -> ClientUpdate:
    return ClientUpdate(client, 1, 0, examples, torch.zeros(0), torch.zeros(0), operations, **values)  # type: ignore[arg-type]


def test_alphas_are_averaged_by_examples() -> None:
    """1 from one example, 5 from three: (1 + 15) / 4 = 4. The reference returned the first client's."""
    state = fresh()
    updates = [
        answer(0, 1, torch.ones_like(state.architecture.operation_logits.detach())),
        answer(1, 3, torch.full_like(state.architecture.operation_logits.detach(), 5.0)),
    ]
    AveragedAlphas().learn(state, {}, updates, plan())
    assert bool((state.architecture.operation_logits == 4.0).all())


def test_by_holder_an_entry_is_averaged_over_those_who_have_it() -> None:
    """Operation 3 is held by the second client alone, 4 by nobody, all others by both."""
    state = fresh()
    logits = state.architecture.operation_logits.detach()
    with torch.no_grad():
        state.architecture.operation_logits.fill_(7.0)
    first, second = torch.ones_like(logits, dtype=torch.bool), torch.ones_like(logits, dtype=torch.bool)
    first[..., 3:5] = False
    second[..., 4] = False
    updates = [
        answer(0, 1, torch.full_like(logits, 1.0), touched=first),
        answer(1, 3, torch.full_like(logits, 5.0), touched=second),
    ]
    operations, _ = mean_alphas(state.architecture, updates, by_holder=True)
    assert bool((operations[..., 3] == 5.0).all())
    assert bool((operations[..., 4] == 7.0).all())
    assert bool((operations[..., [0, 1, 2, 5, 6, 7]] == 4.0).all())


def test_input_pairs_are_held_by_those_who_have_both_edges() -> None:
    spec = replace(SPEC, inputs="pair", num_nodes=2)
    state = fresh(spec)
    (operations, _), (pairs, _) = state.architecture.rows()
    lacks = torch.ones_like(operations, dtype=torch.bool)
    lacks[:, spec.edge(1, 0)] = False  # so that of the pairs of node 1, (0, 1) and (0, 2) are not there
    updates = [
        answer(0, 1, operations.detach(), input_logits=torch.full_like(pairs.detach(), 1.0), touched=lacks),
        answer(1, 1, operations.detach(), input_logits=torch.full_like(pairs.detach(), 5.0)),
    ]
    _, found = mean_alphas(state.architecture, updates, by_holder=True)
    assert found[0, 1].tolist() == [5.0, 5.0, 3.0]
    assert found[0, 0, 0] == 3.0


def test_adam_takes_its_first_two_steps_as_published() -> None:
    """Gradients 1 and 3 with betas (0.5, 0.9), rate 0.1: steps 0.1, then 0.1 (1.75 / 0.75) / sqrt(0.99 / 0.19)."""
    adam, memory = Adam(0.1, (0.5, 0.9)), dict[str, Tensor]()
    value = torch.zeros(1, 1, dtype=torch.float64)
    adam.begin(memory, "x", value)
    value = adam.step(memory, "x", value, torch.ones_like(value), None)
    assert float(value) == pytest.approx(-0.1)
    value = adam.step(memory, "x", value, 3 * torch.ones_like(value), None)
    assert float(value) == pytest.approx(-0.1 - 0.1 * (1.75 / 0.75) / (0.99 / 0.19) ** 0.5)


def test_adam_steps_one_row_and_leaves_the_others() -> None:
    adam, memory = Adam(0.1), dict[str, Tensor]()
    value = torch.zeros(3, 2)
    adam.begin(memory, "x", value)
    value = adam.step(memory, "x", value, torch.ones_like(value), 1)
    assert value[1].tolist() == pytest.approx([-0.1, -0.1], rel=1e-4)
    assert float(value[[0, 2]].abs().max()) == 0.0
    assert memory["x/steps"].tolist() == [0, 1, 0]


def test_the_servers_meta_step_goes_against_the_mean_gradient() -> None:
    """Adam's first step is the rate against the sign; rows are centred afterwards."""
    state = fresh()
    architect = MetaGradient(Adam(1e-3))
    architect.begin(state)
    gradient = torch.zeros_like(state.architecture.operation_logits.detach())
    gradient[..., 5] = 2.0
    architect.learn(state, {}, [answer(0, 1, gradient)], plan())
    row = state.architecture.operation_logits.detach()[0, 0]
    assert float(row[5] - row[4]) == pytest.approx(-1e-3, rel=1e-3)
    assert float(row.sum()) == pytest.approx(0.0, abs=1e-6)


def drawn(state: ServerState, operation: int) -> Payload:
    architecture = state.architecture.clone()
    architecture.operation_mask.zero_()
    architecture.operation_mask[..., operation] = True
    return Payload(torch.zeros(0), torch.zeros(0), architecture, plan())


def test_reinforce_follows_the_reward_less_the_baseline() -> None:
    """Accuracies 0.9 and 0.5 over three classes: b = 1/3 + 0.99 (0.7 - 1/3), so r = 0.2037 and -0.1963.

    The policy is uniform, 1/8: by a of what the first drew, r1 (1/8 - 1) + r2 / 8 < 0; of what the second drew, > 0.
    Adam's first step is its rate against the sign.
    """
    state = fresh()
    policy = Reinforce(Adam(0.01), seed=0, num_clients=4)
    policy.begin(state)
    baseline = 1 / 3 + 0.99 * (0.7 - 1 / 3)
    updates = [answer(0, metrics={"reward": 0.9}), answer(3, metrics={"reward": 0.5})]
    gradient = (0.9 - baseline) * (1 / 8 - 1) / 2 + (0.5 - baseline) / 8 / 2
    assert gradient < 0
    policy.learn(state, {0: drawn(state, 5), 3: drawn(state, 6)}, updates, plan())
    row = state.memory["policy"][0, 0, 0]
    assert float(state.memory["baseline"]) == pytest.approx(baseline)
    assert float(row[5]) == pytest.approx(0.01, rel=1e-3)
    assert float(row[6]) == pytest.approx(-0.01, rel=1e-3)
    assert torch.allclose(state.architecture.operation_logits[0, 0], row)
    moment = state.memory["policy/first"][0, 0, 0, 5]
    assert float(moment) == pytest.approx(0.5 * gradient, rel=1e-4)


def test_every_client_has_a_policy_of_its_own_where_it_is_personal() -> None:
    """One client answers; its best is the mean best, so that its reward is 0, and nobody's policy moves.

    Then it gets better: 0.8 against a mean best of 0.8 is 0 again; then worse: 0.6 - 0.8 < 0.
    """
    state = fresh()
    policy = Reinforce(Adam(0.5), seed=0, num_clients=3, per_client=True)
    policy.begin(state)
    for accuracy in (0.5, 0.8):
        policy.learn(state, {1: drawn(state, 5)}, [answer(1, metrics={"reward": accuracy})], plan())
        assert float(state.memory["policy"].abs().max()) == 0.0
    policy.learn(state, {1: drawn(state, 5)}, [answer(1, metrics={"reward": 0.6})], plan())
    assert float(state.memory["policy"][1, 0, 0, 5]) < 0.0
    assert float(state.memory["policy"][[0, 2]].abs().max()) == 0.0
    assert state.memory["best"].nan_to_num(-1.0).tolist() == [-1.0, 0.8, -1.0]


def test_reduction_cells_use_their_own_probabilities() -> None:
    """The reference takes the normal cells'. A policy that is sure in one group only moves in the other."""
    state = fresh()
    policy = Reinforce(Adam(0.1), seed=0, num_clients=1)
    policy.begin(state)
    state.memory["policy"][0, 0, :, 5] = 50.0  # sure in the normal cell
    policy.learn(state, {0: drawn(state, 5)}, [answer(0, metrics={"reward": 1.0})], plan())
    assert float(state.memory["policy/first"][0, 0].abs().max()) == pytest.approx(0.0, abs=1e-9)
    assert float(state.memory["policy/first"][0, 1].abs().max()) > 0.0


def test_subnets_are_drawn_from_the_policy_the_same_way_each_time() -> None:
    state = fresh()
    policy = Reinforce(Adam(0.1), seed=3, num_clients=9)
    policy.begin(state)
    state.memory["policy"][..., 2] = 60.0
    state.memory["policy"][0, 1, 0, 2] = 0.0
    one = policy.assign(state, 4, plan())
    assert torch.equal(one.operation_mask, policy.assign(state, 4, plan()).operation_mask)
    assert one.operation_mask.sum(-1).eq(1).all()
    assert one.operation_mask[0, :, 2].all()
    assert one.version == state.architecture.version
    others = [policy.assign(state, client, plan(round=2)).operation_mask[1, 0] for client in range(9)]
    assert len({tuple(mask.tolist()) for mask in others}) > 2


def test_dsnas_fixes_an_edge_whose_best_operation_leads_far_enough() -> None:
    """Odds 2 : 1 : 1 : ... among eight, 0.22 against 0.11, leave it; e^2 : 1 among eight, 0.51 - 0.07, fix it."""
    state = fresh()
    with torch.no_grad():
        state.architecture.operation_logits[0, 0, 5] = torch.tensor(2.0).log()
        state.architecture.operation_logits[0, 1, 6] = 2.0
    report = EarlyFix(0.3)(state, [], plan())
    assert report is not None
    assert report.voluntary == 7
    assert int(state.architecture.operation_mask[0, 0].sum()) == 8
    assert state.architecture.operation_mask[0, 1].nonzero().flatten().tolist() == [6]
    assert EarlyFix(0.3)(state, [], plan()) is None


def test_dsnas_fixes_the_surest_edges_that_a_budget_pays_for() -> None:
    """Room for one separable convolution: the surer edge gets it, the other stays open; pooling costs nothing."""
    state, separable, pooling = fresh(), PRIMITIVES.index("sep_conv_5x5"), PRIMITIVES.index("avg_pool_3x3")
    with torch.no_grad():
        for group, edge, operation, logit in ((0, 0, separable, 4.0), (0, 1, separable, 5.0), (1, 0, pooling, 3.0)):
            state.architecture.operation_logits[group, edge, operation] = logit
    free = Budget(SPEC, (("macs", 0.0),))
    limit = float(free.demands()[0].costs[0, 1, separable]) - free.room("macs", 0.0)
    report = EarlyFix(0.3, Budget(SPEC, (("macs", limit),)))(state, [], plan())
    assert report is not None
    assert report.voluntary == 2 * 7
    alive = state.architecture.operation_mask
    assert alive[0, 1].nonzero().item() == separable
    assert alive[1, 0].nonzero().item() == pooling
    assert alive[0, 0].all()
    assert alive[1, 1].all()


def test_policies_lose_what_they_hardly_draw_and_the_supernet_what_nobody_draws() -> None:
    state = fresh()
    Reinforce(Adam(0.1), seed=0, num_clients=2, per_client=True).begin(state)
    state.memory["policy"][:, ..., 1] = -20.0  # nobody
    state.memory["policy"][0, ..., 2] = -20.0  # the first client
    assert PolicyPruning(0.01)(state, [], plan(prunes=False)) is None
    report = PolicyPruning(0.01)(state, [], plan(prunes=True))
    assert report is not None
    assert report.voluntary == 3 * 2 * 2
    assert not state.architecture.operation_mask[..., 1].any()
    assert state.architecture.operation_mask[..., 2].all()
    assert not state.memory["policy_mask"][0, ..., 2].any()
    assert state.memory["policy_mask"][1, ..., 2].all()


def test_nothing_learns_where_nothing_is_searched() -> None:
    state = fresh()
    before = state.architecture.operation_logits.clone()
    NoAlphas().learn(state, {}, [answer(0)], plan())
    assert torch.equal(before, state.architecture.operation_logits)
    assert not NoAlphas().travels


def test_a_mean_over_holders_worked_by_hand() -> None:
    """Five places. The first value lies at 0 and 3, the second at 3 and 1, in that order; 2 and 4 are nobody's."""
    before = torch.tensor([9.0, 9.0, 9.0, 9.0, 9.0])
    values = [torch.tensor([1.0, 2.0]), torch.tensor([6.0, 4.0])]
    places = [torch.tensor([0, 3]), torch.tensor([3, 1])]
    assert weighted_mean(values, [1.0, 3.0], places, before).tolist() == [1.0, 4.0, 9.0, 5.0, 9.0]
