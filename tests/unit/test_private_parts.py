"""Whole rounds of single clients: what is trained, what stays to the last bit, what is kept, and what travels."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from math import cos, pi

import pytest
import torch
import torch.nn.functional as F
from flwr.app import ConfigRecord
from helpers import set_logits, stream
from torch import Tensor, nn
from watching import SHARED, SPEC, TINY, Watch, data_of, head_mask, made, named, which

from fedmetanas_core.federation import wire
from fedmetanas_core.federation.update import ClientUpdate, Payload, RoundPlan
from fedmetanas_core.methods.client import local_update, personal_model
from fedmetanas_core.methods.method import Method
from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.search.local_search import local_search
from fedmetanas_core.search.penalties import ComputeBudgets, largest_cost
from fedmetanas_core.search.relaxation import relax
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.cost import edge_costs
from fedmetanas_core.space.spec import NONE, SpaceSpec
from fedmetanas_core.space.supernet import Supernet


def test_fedrep_trains_the_head_for_four_epochs_and_then_the_body_for_one(watch: Watch) -> None:
    """E = 5 and one batch an epoch; what does not train stays to the last bit, weight decay and momentum or not."""
    method = made("fedrep", local_epochs=5)
    head, state = head_mask(method), method.initial_state()
    update, _ = local_update(method, method.payload(state, 0, method.plan(1)), 0, data_of(4))
    assert [step.part for step in watch.steps] == ["head"] * 4 + ["body"]
    before = state.weights
    for step in watch.steps[:4]:
        assert torch.equal(step.weights[~head], state.weights[~head])
        assert not torch.equal(step.weights[head], before[head])
        before = step.weights
    last = watch.steps[4].weights
    assert torch.equal(last[head], before[head])
    assert not torch.equal(last[~head], before[~head])
    assert torch.equal(update.weights, last)


def test_a_fedrep_client_goes_on_with_its_own_head_and_the_servers_body(watch: Watch) -> None:
    """By its second round the server has another body and another head, the mean of many."""
    method = made("fedrep", local_epochs=1)
    head, state = head_mask(method), method.initial_state()
    first, memory = local_update(method, method.payload(state, 0, method.plan(1)), 0, data_of(8))
    assert torch.equal(memory["weights"], first.weights[head])
    assert not torch.equal(memory["weights"], state.weights[head])
    later = replace(state, weights=state.weights + 0.01)
    payload = method.payload(later, 0, method.plan(2))
    assert torch.equal(payload.weights, later.weights[~head])
    second, kept = local_update(method, payload, 0, data_of(8), memory)
    begun = watch.begun[2].weights  # of the second round's head phase
    assert torch.equal(begun[head], memory["weights"])
    assert torch.equal(begun[~head], later.weights[~head])
    assert torch.equal(kept["weights"], second.weights[head])
    assert not torch.equal(kept["weights"], memory["weights"])
    tuned = personal_model(method, payload, 0, data_of(8), kept)
    assert torch.equal(watch.begun[-1].weights[head], kept["weights"])
    assert torch.equal(tuned.weights[~head], later.weights[~head])
    assert not torch.equal(tuned.weights[head], kept["weights"])
    local_update(method, payload, 1, data_of(8, 1))  # one that has no head yet takes the one that all begin with
    assert torch.equal(watch.begun[-2].weights[head], state.weights[head])


def test_fedbabu_trains_sends_and_averages_the_body_around_the_head_it_was_drawn_with(watch: Watch) -> None:
    method = made("fedbabu")
    head, state = head_mask(method), method.initial_state()
    payload = method.payload(state, 0, method.plan(1))
    assert torch.equal(payload.weights, state.weights[~head])
    updates = []
    for client in (0, 1):
        update, memory = local_update(method, payload, client, data_of(8, client))
        assert memory == {}
        assert torch.equal(watch.begun[-1].weights, state.weights)
        assert torch.equal(watch.steps[-1].weights[head], state.weights[head])
        assert torch.equal(update.weights, watch.steps[-1].weights[~head])
        assert not torch.equal(update.weights, payload.weights)
        updates.append(update)
    after = method.aggregate(state, {0: payload, 1: payload}, updates, method.plan(1))
    assert torch.equal(after.weights[head], state.weights[head])
    torch.testing.assert_close(after.weights[~head], (updates[0].weights + updates[1].weights) / 2)


def test_rates_of_fednas_restart_in_every_round_of_the_search_and_run_through_the_retraining(watch: Watch) -> None:
    """From 0.1 to 0.02 in two epochs: 0.1, 0.06. In four: 0.06 + 0.04 cos(k pi / 4)."""
    method = made("fednas", meta_lr_weights=0.1, meta_lr_weights_end=0.02)
    state = method.initial_state()
    for number in (1, 2, 3, 4):
        state = method.enter(state, method.plan(number))
        local_update(method, method.payload(state, 0, method.plan(number)), 0, data_of(8))
    assert watch.rates[:4] == pytest.approx([0.1, 0.06, 0.1, 0.06])
    assert watch.rates[4:] == pytest.approx([0.06 + 0.04 * cos(k * pi / 4) for k in range(4)])


def test_fednas_never_trains_on_what_it_validates_with(watch: Watch) -> None:
    """Nine images, halves of 4 and 5, in both rounds the same ones; the retraining takes all nine."""
    method, data = made("fednas", batch_size=4), data_of(9)
    state, halves = method.initial_state(), []
    for number in (1, 2):
        watch.steps.clear()
        local_update(method, method.payload(state, 0, method.plan(number)), 0, data)
        trained, validated = (
            set[int]().union(*(which(step.batches[place], data) for step in watch.steps)) for place in (0, 1)
        )
        assert (len(trained), len(validated)) == (5, 4)
        assert not trained & validated
        assert trained | validated == set(range(9))
        halves.append(validated)
    assert halves[0] == halves[1]
    watch.steps.clear()
    state = method.enter(state, method.plan(3))
    local_update(method, method.payload(state, 0, method.plan(3)), 0, data)
    assert set[int]().union(*(which(batch, data) for step in watch.steps for batch in step.batches)) == set(range(9))


def is_personal(name: str) -> bool:
    return name.startswith(("cells.3.", "classifier."))


def assert_shared_stay(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """All but the last cell and the classifier to the last bit, statistics of all of them; these two do move."""
    for name, value in after.items():
        if not is_personal(name) or "running" in name:
            assert torch.equal(value, before[name]), name
    for owner in ("cells.3.", "classifier."):
        moved = [name for name, value in after.items() if name.startswith(owner) and not value.equal(before[name])]
        assert moved, owner


@pytest.mark.parametrize("name", ["fedpnas", "meta_fedpnas"])
def test_shared_cells_stay_to_the_last_bit_while_personal_ones_are_tuned(name: str, watch: Watch) -> None:
    method = made(name, fedpnas_samples=2)
    state = method.initial_state()
    payload = method.final_payload(state, 0, method.plan(4))
    own = personal_model(method, payload, 0, data_of(8), {})
    assert {step.part for step in watch.steps} == {"personal"}
    assert len(own.weights) < len(payload.weights)
    assert_shared_stay(named(payload, payload.architecture), named(own, own.architecture))
    for begun, step in zip(watch.begun, watch.steps, strict=True):
        for (logits, _), after in zip(begun.architecture.rows(), (step.operations, step.inputs), strict=True):
            assert torch.equal(after[:SHARED], logits[:SHARED])
    assert not torch.equal(watch.steps[0].operations[SHARED:], state.architecture.operation_logits[SHARED:])


def test_personal_cells_of_fedpnas_are_tuned_at_the_published_rates(watch: Watch) -> None:
    """Adam's first step is its rate: 1e-3 on weights, 1e-5 on alphas, where there is a gradient."""
    method = made("fedpnas")
    state = method.initial_state()
    personal_model(method, method.final_payload(state, 0, method.plan(4)), 0, data_of(8), {})
    (step,) = watch.steps
    assert float((step.weights - state.weights).abs().max()) == pytest.approx(1e-3, rel=1e-2)
    moved = (step.operations - state.architecture.operation_logits.detach()).abs()
    assert float(moved.max()) == pytest.approx(1e-5, rel=1e-2)


@pytest.mark.parametrize("name", ["fedpnas", "meta_fedpnas"])
def test_the_auxiliary_classifier_learns_in_the_first_stage_and_is_frozen_in_the_second(name: str) -> None:
    method = made(name, num_rounds=10, local_epochs=1, fedpnas_samples=2)
    state = method.initial_state()
    for number, frozen in ((1, False), (2, True), (3, True)):
        plan = method.plan(number)
        assert plan.stage == int(frozen)
        state = method.enter(state, plan)
        payload = method.payload(state, 0, plan)
        update, _ = local_update(method, payload, 0, data_of(8))
        before, after = (named(each, state.architecture) for each in (payload, update))
        for leaf in ("auxiliary.weight", "auxiliary.bias"):
            assert torch.equal(before[leaf], after[leaf]) == frozen
        for leaf in ("stem.0.weight", "classifier.weight"):
            assert not torch.equal(before[leaf], after[leaf])
        state = method.aggregate(state, {0: payload}, [update], plan)


def test_a_client_prunes_its_personal_cells_for_good_and_the_server_only_the_shared_ones(watch: Watch) -> None:
    """Rounds 4 to 9 of 20 have an event: ``none`` goes after the first, and after the last one choice is left."""
    method, data = made("meta_fedpnas", num_rounds=20, local_epochs=1), data_of(8)
    state, memory = method.initial_state(), dict[str, Tensor]()
    whole, pairs = (mask[SHARED:].clone() for _, mask in state.architecture.rows())
    own: list[tuple[Tensor, Tensor]] = [(whole, pairs)]
    for number in range(1, 11):
        plan = method.plan(number)
        state = method.enter(state, plan)
        payload = method.payload(state, 0, plan)
        update, memory = local_update(method, payload, 0, data, memory)
        for kept, (_, begun), (_, server) in zip(
            own[-1], watch.begun[-1].architecture.rows(), state.architecture.rows(), strict=True
        ):
            assert torch.equal(begun[SHARED:], kept)
            assert torch.equal(begun[:SHARED], server[:SHARED])
        own.append((memory["operation_mask"][SHARED:], memory["input_mask"][SHARED:]))
        state = method.aggregate(state, {0: payload}, [update], plan)
        method.prune(state, [update], plan)
        assert torch.equal(state.architecture.operation_mask[SHARED:], whole)
        assert torch.equal(state.architecture.input_mask[SHARED:], pairs)
        assert bool(state.architecture.operation_mask[:SHARED, :, NONE].any()) == (number < 4)
    for old, new in pairwise(own):
        assert not any(bool((late & ~early).any()) for early, late in zip(old, new, strict=True))
    alive = [int(operations.sum()) for operations, _ in own]
    assert alive[:4] == [5 * 8] * 4
    assert [bool(operations[..., NONE].any()) for operations, _ in own[1:6]] == [True] * 3 + [False] * 2
    assert alive[4] >= alive[6] > alive[8] > alive[9] == alive[10] == 4
    assert [int(inputs.sum()) for _, inputs in own[9:]] == [2, 2]
    assert method.plan(10).phase == "one-hot"
    assert watch.begun[-1].architecture.is_one_hot()


def test_a_client_that_comes_after_an_event_prunes_by_it(watch: Watch) -> None:
    """The first event follows round 4 of 20; whoever trains for the first time in round 6 has lost ``none`` then."""
    method = made("meta_fedpnas", num_rounds=20, local_epochs=1)
    plan = replace(method.plan(6), prunes=False)
    state = method.enter(method.initial_state(), plan)
    _, memory = local_update(method, method.payload(state, 1, plan), 1, data_of(8))
    assert not memory["operation_mask"][SHARED:, :, NONE].any()


def test_meta_dnas_clients_send_the_query_gradient_at_their_adapted_values(watch: Watch) -> None:
    """The gradient is found anew, by torch's own operations, at what the last step has left.

    Loss: cross-entropy of the half that was never trained on, noise-free, + relu(cost / budget - 1) + 0.01 cost / most.
    """
    method, data = made("meta_dnas"), data_of(12, dtype=torch.float64)
    state = method.initial_state()
    plan = next(plan for plan in map(method.plan, range(1, 5)) if plan.adapts_architecture)
    client = next(client for client in range(99) if budget_of(client) < 0.5 * largest_cost(SPEC))
    architecture = set_logits(state.architecture.double(), stream(1))
    with torch.no_grad():
        architecture.operation_logits[..., 5] += 4.0  # the dearest operation: a budget of three tenths is passed
    payload = Payload(state.weights.double(), state.statistics.double(), architecture, plan)
    update, _ = local_update(method, payload, client, data)
    adapted, last = architecture.clone(), watch.steps[-1]
    with torch.no_grad():
        adapted.operation_logits.copy_(last.operations)
        adapted.input_logits.copy_(last.inputs)
    trained = set[int]().union(*(which(step.batches[0], data) for step in watch.steps))
    assert (len(trained), {len(step.batches) for step in watch.steps}) == (6, {1})
    query = data.subset(torch.tensor(sorted(set(range(12)) - trained)))
    plain, whole = (alpha_gradients(payload, last.weights, adapted, query, client, budget) for budget in (False, True))
    assert update.operation_logits is not None
    assert update.input_logits is not None
    for found, expected, without in zip((update.operation_logits, update.input_logits), whole, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)
        assert float((without - expected).abs().max()) > 1e-4  # the budget counts
    before = alpha_gradients(payload, payload.weights, architecture, query, client, True)
    assert float((before[0] - whole[0]).abs().max()) > 1e-4  # and so does where the gradient is taken
    assert torch.equal(update.weights, last.weights)


def budget_of(client: int) -> float:
    return ComputeBudgets(TINY["seed"]).of(client, SPEC).budget


def alpha_gradients(
    payload: Payload, weights: Tensor, architecture: Architecture, query: LocalData, client: int, budget: bool
) -> tuple[Tensor, ...]:
    """Of the query loss by the alphas at these values, with the cost of the mixture or without."""
    network = Supernet(SPEC, architecture.operation_mask, dtype=torch.float64)
    network.load(weights, payload.statistics)
    network.train()
    mixture = relax(architecture, payload.plan.temperature)
    loss = F.cross_entropy(network.forward_by_modules(query.images, mixture), query.labels)
    if budget:
        chances = mixture.inputs.unsqueeze(-1) * mixture.operations
        table = zip(SPEC.cells, edge_costs(SPEC), strict=True)
        cost = torch.stack([(chances[cell.group] * costs).sum() for cell, costs in table]).sum()
        loss = loss + torch.relu(cost / budget_of(client) - 1) + 0.01 * cost / largest_cost(SPEC)
    return torch.autograd.grad(loss, [architecture.operation_logits, architecture.input_logits])


def darts_payload(method: Method, plan: RoundPlan) -> Payload:
    """What the server of local DARTS sends: its own state, as it began, goes through the stages for itself."""
    return method.payload(method.enter(method.initial_state(), plan), 0, plan)


def test_nothing_of_local_darts_travels_but_the_plan() -> None:
    method = made("local_darts")
    for number in (1, 3):
        plan = method.plan(number)
        payload = darts_payload(method, plan)
        update, _ = local_update(method, payload, 0, data_of(8))
        assert not len(wire.encode_payload(payload, ConfigRecord({})).array_records[wire.ARRAYS])
        assert not len(wire.encode_update(with_seconds(update)).array_records[wire.ARRAYS])
        state = method.enter(method.initial_state(), plan)
        after = method.aggregate(state, {0: payload}, [update], plan)
        assert torch.equal(after.weights, state.weights)
        for one, other in zip(after.architecture.rows(), state.architecture.rows(), strict=True):
            assert torch.equal(one[0], other[0])


def with_seconds(update: ClientUpdate) -> ClientUpdate:
    """With the figures that the client app adds."""
    return replace(update, metrics={**dict.fromkeys(wire.REPORTED, 0.0), **update.metrics})


@pytest.mark.parametrize("number", [1, 3])
def test_a_local_darts_client_goes_on_from_its_own_state(number: int, watch: Watch) -> None:
    """In the search and in the retraining alike: weights, statistics, alphas and masks of the round before."""
    method, data = made("local_darts"), data_of(8)
    first, memory = local_update(method, darts_payload(method, method.plan(number)), 0, data)
    local_update(method, darts_payload(method, method.plan(number + 1)), 0, data, memory)
    begun = watch.begun[1]
    assert torch.equal(begun.weights, watch.steps[1].weights)  # after the second epoch
    assert torch.equal(begun.weights, memory["weights"])
    assert torch.equal(begun.statistics, memory["statistics"])
    assert torch.equal(begun.architecture.operation_logits.detach(), memory["operation_logits"])
    assert torch.equal(begun.architecture.operation_mask, memory["operation_mask"])
    learned = watch.steps[1].operations.masked_fill(~memory["operation_mask"], 0.0)
    mean = learned.sum(-1, keepdim=True) / memory["operation_mask"].sum(-1, keepdim=True).clamp_min(1)
    centred = (learned - mean).masked_fill(~memory["operation_mask"], 0.0)
    torch.testing.assert_close(memory["operation_logits"], centred, rtol=0, atol=1e-7)
    assert not torch.equal(begun.weights, watch.begun[0].weights)
    assert first.weights.numel() == 0


@pytest.mark.parametrize("operation", [4, 7])
def test_a_local_darts_client_retrains_the_genotype_of_its_own_alphas(operation: int, watch: Watch) -> None:
    """Its strongest: this operation on edges 0 and 1 of each first node, 2 and 4 of each second one."""
    method, data = made("local_darts"), data_of(8)
    memory = dict[str, Tensor]()
    for number in (1, 2):
        _, memory = local_update(method, darts_payload(method, method.plan(number)), 0, data, memory)
    assert int(memory["stage"]) == 0
    logits = torch.zeros_like(memory["operation_logits"])
    logits[:, [0, 1, 2, 4], operation] = 3.0
    memory["operation_logits"] = logits
    payload = darts_payload(method, method.plan(3))
    expected = torch.zeros_like(memory["operation_mask"])
    expected[:, [0, 1, 2, 4], operation] = True
    assert not torch.equal(payload.architecture.operation_mask, expected)
    _, memory = local_update(method, payload, 0, data, memory)
    begun = watch.begun[-1]
    assert torch.equal(begun.architecture.operation_mask, expected)
    assert isinstance(begun.architecture.spec, SpaceSpec)
    assert begun.architecture.spec.norm == "affine"
    assert torch.equal(memory["operation_mask"], expected)
    assert int(memory["stage"]) == 1


def test_both_sides_of_the_hessians_difference_drop_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of four passes: support, query, and two for the difference, with one draw in common."""
    dropped: list[Tensor] = []
    original = nn.Dropout.forward

    def seen(self: nn.Dropout, x: Tensor) -> Tensor:
        kept = original(self, torch.ones_like(x))
        if self.training and torch.is_grad_enabled():
            dropped.append(kept.detach() > 0)
        return x * kept

    monkeypatch.setattr(nn.Dropout, "forward", seen)
    method = made("per_fedavg", per_fedavg="hessian_free")
    payload = method.payload(method.initial_state(), 0, method.plan(1))
    local_search(payload, 0, data_of(6), method.stage(payload.plan).local)
    assert len(dropped) == 8
    same = {(i, j) for j in range(8) for i in range(j) if torch.equal(dropped[i], dropped[j])}
    assert same == {(2, 3), (6, 7)}
