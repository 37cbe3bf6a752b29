"""Losses, steps, rewards and policies of the personal searches, with numbers worked by hand."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log

import pytest
import torch
import torch.nn.functional as F
from helpers import small_spec, stream
from torch import Tensor, nn

from fedmetanas_core.config import Config
from fedmetanas_core.federation.policy import MetaGradient, Reinforce
from fedmetanas_core.federation.update import ClientUpdate, Payload, RoundPlan, ServerState
from fedmetanas_core.methods.method import Method
from fedmetanas_core.methods.registry import make_method
from fedmetanas_core.search.prune_events import PolicyPruning
from fedmetanas_core.search.relaxation import Noise
from fedmetanas_core.search.schedule import Steady
from fedmetanas_core.search.steps import Bench, Fomaml, RankOne, SingleLevel
from fedmetanas_core.search.tasks import OuterOptions, TaskKind, TaskRunner
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.supernet import Supernet

SPEC = small_spec(num_nodes=1)  # cells of one node with two edges: a normal one on 8x8, reductions to 4x4 and to 2x2
TINY = {"num_clients": 4, "clients_per_round": 2, "num_rounds": 20, "local_epochs": 1, "batch_size": 8, "seed": 5}
MAX_POOL, SKIP, SEP3, SEP5, DIL3 = 1, 3, 4, 5, 6
# Multiply-adds of an operation on both edges of all three cells (channels and side of the output: 2 and 8, 4 and 4,
# 8 and 2). Twice depthwise and pointwise: 2 * (2 * 2 * (25 * 64 + 2 * 64) + 2 * 4 * (25 * 16 + 4 * 16)
# + 2 * 8 * (25 * 4 + 8 * 4)); once, with kernel 3: 2 * (2 * (9 * 64 + 2 * 64) + 4 * (9 * 16 + 4 * 16) + ...).
MACS = {SEP5: 25472, DIL3: 5568, MAX_POOL: 0}


def made(name: str, **values: object) -> Method:
    return make_method(Config.from_mapping({"method": name, **TINY, **values}).resolve(8, 8, 100), SPEC)


def policy_of(name: str) -> tuple[Method, Reinforce, ServerState]:
    """A method with policies of its clients, its architect, and its first state."""
    method = made(name)
    policy = method.recipe.stages[0].architect
    assert isinstance(policy, Reinforce)
    return method, policy, method.initial_state()


def plan_at(temperature: float, number: int = 1, prunes: bool = False) -> RoundPlan:
    return replace(Steady(20, "search").plan(number), temperature=temperature, prunes=prunes)


def answer(client: int, reward: float) -> ClientUpdate:
    return ClientUpdate(client, 1, 0, 1, torch.zeros(0), torch.zeros(0), metrics={"reward": reward})


def drew(state: ServerState, operation: int, plan: RoundPlan) -> Payload:
    """What a client got that drew this operation on every edge."""
    architecture = state.architecture.clone()
    architecture.operation_mask.zero_()
    architecture.operation_mask[..., operation] = True
    return Payload(torch.zeros(0), torch.zeros(0), architecture, plan)


# ---- FedPNAS


def runner_of(samples: int, auxiliary: str, rule: SingleLevel | RankOne) -> TaskRunner:
    """For batches of two images of two classes."""
    spec = replace(small_spec(num_classes=2), inputs="all", personal_cells=1, auxiliary=True)
    architecture = Architecture(spec).initialise(stream(0))
    network = Supernet(spec, architecture.operation_mask)
    network.initialise(stream(1))
    outer = OuterOptions(samples=samples, auxiliary=auxiliary)
    runner = TaskRunner(network, architecture, TaskKind(2, True, True, False, 0.0, rule, outer))
    plan = replace(Steady(1, "search").plan(1), noise_scale=1.0)
    runner.begin(Payload(network.weights.detach().clone(), network.statistics.clone(), architecture.clone(), plan))
    return runner


@pytest.mark.parametrize("auxiliary", ["none", "learns", "followed"])
def test_a_pass_averages_samples_in_probability_and_follows_the_auxiliary(
    auxiliary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image 1, of class 0: (0.5, 0.5) and (0.9, 0.1), in the mean (0.7, 0.3); auxiliary (0.3, 0.7).

    Image 2, of class 1: (0.25, 0.75) and (0.75, 0.25), in the mean (0.5, 0.5); auxiliary (0.5, 0.5). NLL:
    -(ln 0.7 + ln 0.5) / 2. Followed: + 0.5 * (0.16 + 0.16 + 0 + 0) / 4. While it learns: - (ln 0.3 + ln 0.5) / 2.
    """
    own = [[[0.5, 0.5], [0.25, 0.75]], [[0.9, 0.1], [0.75, 0.25]]]
    other = [[[0.2, 0.8], [0.4, 0.6]], [[0.4, 0.6], [0.6, 0.4]]]
    outputs = iter(zip(torch.tensor(own).log() + 3.0, torch.tensor(other).log() - 2.0, strict=True))

    def predict(self: TaskRunner, images: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
        mine, auxiliarys = next(outputs)
        return mine, None if auxiliary == "none" else auxiliarys

    monkeypatch.setattr(TaskRunner, "_predict", predict)
    runner = runner_of(2, auxiliary, SingleLevel())
    nothing = (torch.zeros(0), torch.zeros(0))
    loss = float(runner._loss(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), [nothing, nothing]))
    extra = {"none": 0.0, "followed": 0.04, "learns": -(log(0.3) + log(0.5)) / 2}[auxiliary]
    assert loss == pytest.approx(-(log(0.7) + log(0.5)) / 2 + extra, rel=1e-6)


def test_every_sample_of_a_pass_has_noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three samples before and three after the step ahead, over both classifiers."""
    drawn, outputs = list[Tensor](), list[Tensor]()
    original = TaskRunner._predict

    def predict(self: TaskRunner, images: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
        own, other = original(self, images, noise)
        assert other is not None
        drawn.append(noise[0].clone())
        outputs.append(own.detach())
        return own, other

    monkeypatch.setattr(TaskRunner, "_predict", predict)
    runner = runner_of(3, "followed", RankOne())
    runner([(torch.rand(2, 1, 8, 8, generator=stream(2)), torch.tensor([0, 1]))], stream(3))
    assert len(drawn) == 6
    for first in (0, 3):
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert not torch.equal(drawn[first + one], drawn[first + other])
            assert not torch.equal(outputs[first + one], outputs[first + other])


def rank_one(alpha_rate: float | None) -> tuple[list[float], list[float], tuple[float, float]]:
    """One step on f = w a1 + a0 a1 + a0^2 / 2 from w = 1, a = (1, 2), w and a1 personal; SGD outside at 0.5."""
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    a = nn.Parameter(torch.tensor([[1.0], [2.0]], dtype=torch.float64))  # a shared and a personal group
    w.grad = torch.zeros_like(w)
    bench = Bench(
        weights=w,
        alphas=[a],
        weight_optimizer=torch.optim.SGD([w], 0.5),
        alpha_optimizer=None if alpha_rate is None else torch.optim.SGD([a], alpha_rate),
        loss=lambda batch: (w * a[1] + a[0] * a[1] + a[0] ** 2 / 2).sum(),
        part=lambda name: (torch.tensor([True]), 1 if name == "personal" else 0),
    )
    first, last = RankOne(rate=0.1)(bench)
    return w.tolist(), a.flatten().tolist(), (float(first), float(last))


def test_rank_one_looks_ahead_on_personal_alphas_and_corrects_them_with_the_weights() -> None:
    """g1 = (w: 2, a0: 3, a1: 2), of which w and a1 are personal; ahead at w = 0.8, a1 = 1.8.

    g2 = (1.8, 2.8, 1.8); g1 . g2 = 3.6 + 3.6; w and a1: 1.8 - 0.1 * 2 * 7.2 = 0.36; a0 keeps its 2.8.
    """
    weights, alphas, losses = rank_one(0.5)
    assert weights == pytest.approx([1 - 0.5 * 0.36])
    assert alphas == pytest.approx([1 - 0.5 * 2.8, 2 - 0.5 * 0.36])
    assert losses == pytest.approx((4.5, 0.8 * 1.8 + 1.8 + 0.5))


def test_rank_one_leaves_frozen_alphas_out_of_the_step_ahead() -> None:
    """g1 = 2 by w alone; ahead at w = 0.8; g2 = 2; g1 . g2 = 4; w: 2 - 0.1 * 2 * 4 = 1.2."""
    weights, alphas, losses = rank_one(None)
    assert weights == pytest.approx([1 - 0.5 * 1.2])
    assert alphas == [1.0, 2.0]
    assert losses == pytest.approx((4.5, 0.8 * 2 + 2 + 0.5))


# ---- PerFedRLNAS


def test_a_personal_reward_is_accuracy_less_the_mean_best_less_a_thousandth_of_the_extra_compute() -> None:
    """Bests of clients 0, 1 and 2 so far: 0.6, 0.9, 0.8. Now 0 gets 0.7 with 25,472, and 2 gets 0.4 with 5,568.

    Bests are then 0.7, 0.9, 0.8, in the mean 0.8; the mean of the multiply-adds is 15,520. Rewards: 0.7 - 0.8 - 0.001 *
    19,904 / 15,520 and 0.4 - 0.8. The gradient by the alpha of what was drawn, among eight: reward * (1/8 - 1); by
    another's, reward / 8. Adam's first moment is half of it.
    """
    _, policy, state = policy_of("perfedrlnas")
    plan = plan_at(0.3)  # which has no say: policies are not annealed here
    state.memory["best"] = torch.tensor([0.6, 0.9, 0.8, torch.nan], dtype=torch.float64)
    with torch.no_grad():
        state.memory["policy"].zero_()
    sent = {0: drew(state, SEP5, plan), 2: drew(state, DIL3, plan)}
    policy.learn(state, sent, [answer(0, 0.7), answer(2, 0.4)], plan)
    assert state.memory["best"].nan_to_num(-1.0).tolist() == pytest.approx([0.7, 0.9, 0.8, -1.0])
    extra = (MACS[SEP5] - MACS[DIL3]) / ((MACS[SEP5] + MACS[DIL3]) / 2)
    first = state.memory["policy/first"]
    for client, operation, reward in ((0, SEP5, -0.1 - 0.001 * extra), (2, DIL3, -0.4)):
        rest = [place for place in range(8) if place != operation]
        assert first[client, ..., operation].flatten().tolist() == pytest.approx([0.5 * reward * (1 / 8 - 1)] * 4)
        assert first[client, ..., rest].flatten().tolist() == pytest.approx([0.5 * reward / 8] * 28)
    assert not first[[1, 3]].any()


@pytest.mark.parametrize(("other", "extra"), [(SEP5, 2.0), (MAX_POOL, 0.0)])
def test_rewards_are_small_and_finite_where_a_subnet_costs_nothing(other: int, extra: float) -> None:
    """Poolings alone cost 0; (25,472 - 0) / 12,736 = 2, and where all cost 0 nobody has more. Mean best: 0.5."""
    _, policy, state = policy_of("perfedrlnas")
    plan = plan_at(1.0)
    sent = {0: drew(state, MAX_POOL, plan), 1: drew(state, other, plan)}
    rewards = policy._rewards(state, sent, [answer(0, 0.5), answer(1, 0.5)])
    assert rewards == pytest.approx([0.0, -0.001 * extra], abs=1e-12)


# ---- meta-PerFedRLNAS


def two_choices(state: ServerState) -> None:
    """Of every policy, with odds of 1 : 3 at temperature 1 and of 1 : 9 at 0.5."""
    state.memory["policy_mask"].zero_()
    state.memory["policy_mask"][..., [SKIP, SEP3]] = True
    state.memory["policy"].zero_()
    state.memory["policy"][..., SEP3] = log(3.0)


@pytest.mark.parametrize(("name", "share"), [("perfedrlnas", 0.75), ("meta_perfedrlnas", 0.9)])
def test_only_annealed_policies_are_drawn_from_at_the_plans_temperature(name: str, share: float) -> None:
    """300 rounds of four edges, within four deviations."""
    _, policy, state = policy_of(name)
    two_choices(state)
    drawn = [policy.assign(state, 2, plan_at(0.5, number)).operation_mask for number in range(1, 301)]
    masks = torch.stack(drawn)
    assert bool((masks.sum(-1) == 1).all())
    assert not masks[..., [0, 1, 2, 5, 6, 7]].any()
    found = float(masks[..., SEP3].double().mean())
    assert abs(found - share) < 4 * (share * (1 - share) / 1200) ** 0.5


@pytest.mark.parametrize(("name", "gradient"), [("perfedrlnas", 0.3 * 0.25), ("meta_perfedrlnas", 0.3 * 0.1 / 0.5)])
def test_the_score_of_an_annealed_policy_is_that_of_what_it_draws_from(name: str, gradient: float) -> None:
    """Reward 0.6 - 0.9; the likelier of two was drawn: d log p / da = (1 - p) / T, so -0.3 * -(1 - p) / T = +."""
    _, policy, state = policy_of(name)
    two_choices(state)
    state.memory["best"][1] = 0.9
    plan = plan_at(0.5)
    policy.learn(state, {1: drew(state, SEP3, plan)}, [answer(1, 0.6)], plan)
    first = state.memory["policy/first"]
    assert first[1, ..., SEP3].flatten().tolist() == pytest.approx([0.5 * gradient] * 4, rel=1e-5)
    assert first[1, ..., SKIP].flatten().tolist() == pytest.approx([-0.5 * gradient] * 4, rel=1e-5)
    assert not first[1, ..., [0, 1, 2, 5, 6, 7]].any()
    assert not first[[0, 2, 3]].any()


def test_policies_are_pruned_for_good_at_the_published_threshold_and_keep_one_choice_of_every_row() -> None:
    """Six events on policies that are drawn anew each time, sharper and colder, until all chances but one underflow."""
    method, _, state = policy_of("meta_perfedrlnas")
    pruning, generator = method.recipe.stages[0].pruning, stream(7)
    assert pruning == PolicyPruning(0.01)
    before, alive = state.memory["policy_mask"], list[int]()
    for event, temperature in enumerate((1.0, 0.7, 0.5, 0.3, 0.1, 0.001)):
        state.memory["policy"] = torch.randn(before.shape, generator=generator) * (event + 1.0)
        pruning(state, [], plan_at(temperature, prunes=True))
        chances = torch.softmax((state.memory["policy"].double() / temperature).masked_fill(~before, -torch.inf), -1)
        after = state.memory["policy_mask"]
        best = F.one_hot(chances.argmax(-1), 8).bool()
        assert torch.equal(after, before & ((chances >= 0.01) | best))
        assert bool(after.any(-1).all())
        assert torch.equal(state.architecture.operation_mask, after.any(0))
        before = after
        alive.append(int(after.sum()))
    rows = 4 * 2 * 2
    assert 8 * rows > alive[0] > alive[2] > alive[4] >= alive[5] == rows


def test_what_a_policy_has_lost_it_is_not_drawn_again() -> None:
    """Its logit may rise as it likes; the other clients keep theirs."""
    method, policy, state = policy_of("meta_perfedrlnas")
    pruning = method.recipe.stages[0].pruning
    assert pruning is not None
    state.memory["policy"][0, ..., SEP5] = -10.0
    pruning(state, [], plan_at(0.5, prunes=True))
    state.memory["policy"][..., SEP5] = 60.0
    plans = [plan_at(0.5, number) for number in range(1, 6)]
    assert not any(bool(policy.assign(state, 0, plan).operation_mask[..., SEP5].any()) for plan in plans)
    assert all(bool(policy.assign(state, 1, plan).operation_mask[..., SEP5].all()) for plan in plans)
    assert not policy.final(state, 0).operation_mask[..., SEP5].any()


# ---- Meta-DNAS


def test_the_server_steps_along_the_weighted_mean_of_the_clients_gradients() -> None:
    """One example and three. Operation 5: (4, 4), then 1; operation 6: 3 and -1, in the mean 0, both times.

    Adam with betas (0.5, 0.999): the rate, then the rate * (1.5 / 0.75) / sqrt(0.016984 / 0.001999) = 0.68615 of it.
    """
    method = made("meta_dnas", meta_dnas_lr=0.02)
    architect, state = method.recipe.stages[0].architect, method.initial_state()
    assert isinstance(architect, MetaGradient)
    operations, inputs = (torch.zeros_like(logits.detach()) for logits, _ in state.architecture.rows())
    with torch.no_grad():
        state.architecture.operation_logits.zero_()
    plan = Steady(20, "search", adapts=True).plan(1)
    moved = 0.0
    for (one, other), step in (((7.0, 3.0), 1.0), ((-2.0, 2.0), (1.5 / 0.75) / (0.016984 / 0.001999) ** 0.5)):
        updates = []
        for client, examples, gradient, against in ((0, 1, one, 3.0), (3, 3, other, -1.0)):
            sent = operations.clone()
            sent[..., 5], sent[..., 6] = gradient, against
            update = ClientUpdate(client, 1, 0, examples, torch.zeros(0), torch.zeros(0), sent, inputs)
            updates.append(update)
        architect.learn(state, {}, updates, plan)
        moved -= 0.02 * step
        rows = state.architecture.operation_logits.detach()
        assert (rows[..., 5] - rows[..., 4]).flatten().tolist() == pytest.approx([moved] * 4, rel=1e-4)
        assert (rows[..., 6] - rows[..., 4]).flatten().tolist() == pytest.approx([0.0] * 4, abs=1e-8)
    assert float(state.memory["operations/first"][0, 0, 5]) == pytest.approx(1.5)


# ---- Per-FedAvg


def hessian_free(
    functions: Sequence[Callable[[Tensor], Tensor]], steps: int = 1
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Weights before and after, with rates 0.1 inside and 0.5 outside, and what each pass kept of w, doubled."""
    w = nn.Parameter(torch.randn(64, generator=stream(0), dtype=torch.float64))
    before, kept = w.detach().clone(), list[Tensor]()
    w.grad = torch.zeros_like(w)

    def loss(batch: int) -> Tensor:
        draw = F.dropout(torch.ones_like(w), 0.5)
        kept.append(draw)
        return functions[batch](draw * w)

    bench = Bench(w, [], torch.optim.SGD([w], 0.5), None, loss)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for _ in range(steps):
            Fomaml(weight_rate=0.1, clip=1e9, hessian_delta=1e-3)(bench)
    return before, w.detach(), kept


def linear(w: Tensor) -> Tensor:
    """Slopes 1, 2, ..., 64."""
    return (w * torch.arange(1.0, 65.0, dtype=torch.float64)).sum()


def square(w: Tensor) -> Tensor:
    """Hessian 4 kept, of kept w."""
    return w.square().sum() / 2


def test_a_linear_loss_with_dropout_has_no_second_order_term() -> None:
    """The step is then 0.5 times the query gradient; two draws would differ by 0.1 / 0.002 of a slope of up to 128."""
    before, after, kept = hessian_free([linear] * 3)
    slopes = torch.arange(1.0, 65.0, dtype=torch.float64)
    assert len(kept) == 4
    torch.testing.assert_close(after, before - 0.5 * kept[1] * slopes, rtol=0, atol=1e-8)


def test_the_second_order_term_is_that_of_one_fixed_draw() -> None:
    """Draws k of 0 and 2. Adapted: w - 0.1 k0^2 w; query gradient g = k1^2 times that; w - 0.5 (g - 0.1 k2^2 g)."""
    before, after, kept = hessian_free([square] * 3)
    gradient = kept[1] ** 2 * (before - 0.1 * kept[0] ** 2 * before)
    torch.testing.assert_close(after, before - 0.5 * (gradient - 0.1 * kept[2] ** 2 * gradient), rtol=1e-9, atol=1e-9)


def test_only_the_two_sides_of_a_difference_share_a_draw() -> None:
    """Eight passes of two steps: the third and the fourth, the seventh and the eighth."""
    *_, kept = hessian_free([square] * 3, steps=2)
    same = {(i, j) for j in range(8) for i in range(j) if torch.equal(kept[i], kept[j])}
    assert same == {(2, 3), (6, 7)}
