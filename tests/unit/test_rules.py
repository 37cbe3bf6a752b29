"""Every step rule on functions small enough to work out on paper."""

from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import random_architecture, small_spec
from torch import Tensor, nn

from fedmetanas_core.search.relaxation import Relaxation, draw_noise
from fedmetanas_core.search.steps import Bench, Bilevel, Fomaml, RankOne, SingleLevel, StepRule
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.spec import PRIMITIVES, SpaceSpec

Function = Callable[[Tensor, Tensor], Tensor]


def run(
    rule: StepRule,
    functions: Sequence[Function],
    weights: Sequence[float],
    alphas: Sequence[float] = (0.0,),
    rate: float = 0.1,
    alpha_rate: float | None = None,
    decay: float = 0.0,
    part: Sequence[bool] | None = None,
) -> tuple[list[float], list[float], tuple[float, float]]:
    """Weights and alphas after one step of plain SGD outside, and the losses; batch i has the i-th function."""
    w = nn.Parameter(torch.tensor(weights, dtype=torch.float64))
    a = nn.Parameter(torch.tensor(alphas, dtype=torch.float64))
    w.grad, calls = torch.zeros_like(w), list[int]()

    def loss(batch: int) -> Tensor:
        calls.append(batch)
        return functions[batch](w, a)

    bench = Bench(
        weights=w,
        alphas=[a],
        weight_optimizer=torch.optim.SGD([w], rate, weight_decay=decay),
        alpha_optimizer=None if alpha_rate is None else torch.optim.SGD([a], alpha_rate),
        loss=loss,
        part=None if part is None else lambda name: (torch.tensor(part), 0),
    )
    first, last = rule(bench)
    assert len(calls) == rule.passes(alpha_rate is not None)
    assert max(calls) < rule.batches
    return w.tolist(), a.tolist(), (float(first), float(last))


def test_a_single_step_descends_weights_and_alphas_by_one_gradient() -> None:
    """f = w^2 + w a at w = 1, a = 2: 4 by w, 1 by a."""
    weights, alphas, losses = run(
        SingleLevel(), [lambda w, a: (w * w + w * a).sum()], [1.0], [2.0], rate=0.1, alpha_rate=0.5
    )
    assert weights == pytest.approx([0.6])
    assert alphas == pytest.approx([1.5])
    assert losses == (3.0, 3.0)


def test_what_is_not_in_the_part_stays_to_the_last_bit() -> None:
    """f = 2 w0 + 3 w1, weight decay 0.5, rate 0.1: w0 = 1 - 0.1 (2 + 0.5), w1 is frozen, decay and all."""
    weights, _, _ = run(
        SingleLevel(part="head"), [lambda w, a: 2 * w[0] + 3 * w[1]], [1.0, 1.0], decay=0.5, part=[True, False]
    )
    assert weights[0] == pytest.approx(0.75)
    assert weights[1] == 1.0


def test_first_order_maml_takes_the_query_gradient_at_the_adapted_point() -> None:
    """Support w^2, query 3 w^2, from w = 1: 1 - 0.1 * 2 = 0.8, query gradient 6 * 0.8 = 4.8, w = 1 - 0.05 * 4.8."""
    weights, _, losses = run(
        Fomaml(weight_rate=0.1), [lambda w, a: (w * w).sum(), lambda w, a: 3 * (w * w).sum()], [1.0], rate=0.05
    )
    assert weights == pytest.approx([0.76])
    assert losses == pytest.approx((1.0, 3 * 0.64))


def test_the_hessian_free_gradient_is_exact_on_a_parabola() -> None:
    """f = w^2 in all batches, from w = 1 with alpha 0.1: (1 - 0.1 * 2) * 2 * 0.8 = 1.28, w = 1 - 0.5 * 1.28."""

    def square(w: Tensor, a: Tensor) -> Tensor:
        return (w * w).sum()

    weights, _, _ = run(Fomaml(weight_rate=0.1, hessian_delta=1e-3), [square] * 3, [1.0], rate=0.5)
    assert weights == pytest.approx([0.36])


def test_the_hessian_comes_from_the_third_batch_at_the_unadapted_weights() -> None:
    """Third batch w^4: its second derivative at w = 1 is 12, at the adapted 0.8 it would be 7.68."""

    def square(w: Tensor, a: Tensor) -> Tensor:
        return (w * w).sum()

    weights, _, _ = run(
        Fomaml(weight_rate=0.1, hessian_delta=1e-4), [square, square, lambda w, a: (w**4).sum()], [1.0], rate=1.0
    )
    assert weights == pytest.approx([1 - 1.6 * (1 - 0.1 * 12)], abs=1e-6)


def test_bilevel_moves_alphas_first_by_both_losses_then_weights_by_the_training_loss() -> None:
    """Train w a + w^2, validate 3 w a + a^2, at w = 1, a = 2.

    By a: 3 w + 2 a + balance * w = 7 + 0.5; a = 2 - 0.1 * 7.5 = 1.25. Then by w: a + 2 w = 3.25; w = 1 - 0.2 * 3.25.
    """
    functions: list[Function] = [lambda w, a: (w * a + w * w).sum(), lambda w, a: (3 * w * a + a * a).sum()]
    weights, alphas, losses = run(Bilevel(balance=0.5), functions, [1.0], [2.0], rate=0.2, alpha_rate=0.1)
    assert alphas == pytest.approx([1.25])
    assert weights == pytest.approx([0.35])
    assert losses == pytest.approx((10.0, 2.25))


def test_bilevel_clips_the_weights_gradient_and_not_the_alphas() -> None:
    """The reference clips the wrong one. Gradients 100 by w and 100 by a, clip 1, rates 1."""
    functions: list[Function] = [lambda w, a: 100 * w.sum(), lambda w, a: 100 * a.sum()]
    weights, alphas, _ = run(Bilevel(clip=1.0), functions, [0.0], [0.0], rate=1.0, alpha_rate=1.0)
    assert weights == pytest.approx([-1.0], abs=1e-5)
    assert alphas == pytest.approx([-100.0])


def test_bilevel_with_frozen_alphas_only_trains() -> None:
    functions: list[Function] = [lambda w, a: (w * w).sum(), lambda w, a: a.sum()]
    weights, alphas, losses = run(Bilevel(), functions, [1.0], [2.0], rate=0.1)
    assert weights == pytest.approx([0.8])
    assert alphas == [2.0]
    assert losses == (1.0, 1.0)


def test_the_dual_learner_keeps_to_its_part() -> None:
    """f = w1^2 + w2^2 at (1, 1): ahead to (0.8, 1), where the gradient is (1.6, 2); w1 goes to 1 - 0.5 x 1.6."""

    def square(w: Tensor, a: Tensor) -> Tensor:
        return (w * w).sum()

    rule = Fomaml(weight_rate=0.1, clip=100.0, part="trunk")
    weights, _, losses = run(rule, [square, square], [1.0, 1.0], rate=0.5, decay=0.5, part=[True, False])
    assert weights == pytest.approx([1.0 - 0.5 * (1.6 + 0.5), 1.0])
    assert weights[1] == 1.0
    assert losses == pytest.approx((2.0, 1.64))
    assert not rule.recordable


def test_rank_one_looks_ahead_on_the_personal_part_alone() -> None:
    """f = w0^2 / 2 + w1^2 + w0 w1 at (1, 1): g1 = (2, 3), of which (0, 3) is personal; ahead at w1 = 0.7.

    g2 = (1.7, 2.4); g1 . g2 = 7.2; the personal gradient is 2.4 - 0.1 * 3 * 7.2 = 0.24, the other stays 1.7.
    """
    weights, _, losses = run(
        RankOne(rate=0.1),
        [lambda w, a: 0.5 * w[0] ** 2 + w[1] ** 2 + w[0] * w[1]],
        [1.0, 1.0],
        rate=1.0,
        part=[False, True],
    )
    assert weights == pytest.approx([-0.7, 0.76])
    assert losses == pytest.approx((2.5, 0.5 + 0.49 + 0.7))


def path_space() -> SpaceSpec:
    return SpaceSpec(2, 3, 1, 1, 3, 8, 8, inputs="all")


def test_a_sampled_path_passes_back_the_score_of_what_was_sampled() -> None:
    """DSNAS: dL/da = dL/dz (one_hot - softmax(a)). Two alive operations with odds 1 : 3, the second one sampled."""
    architecture = Architecture(path_space()).double()
    keep = torch.zeros_like(architecture.operation_mask)
    keep[..., 3:5] = True
    architecture.restrict(keep, architecture.input_mask)
    with torch.no_grad():
        architecture.operation_logits[..., 4] = torch.tensor(3.0).log()
    noise = torch.zeros_like(architecture.operation_logits)
    weights = Relaxation("path").sampled(architecture, 1.0, (noise, architecture.input_logits.detach()))
    assert weights.operations[0, 0].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert weights.path is not None
    assert weights.path[0][0] == tuple(index == 4 for index in range(len(PRIMITIVES)))
    (5.0 * weights.operations[0, 0, 4] + 7.0 * weights.operations[0, 0, 3]).backward()  # type: ignore[no-untyped-call]
    gradient = architecture.operation_logits.grad
    assert gradient is not None
    assert gradient[0, 0, 3:5].tolist() == pytest.approx([-1.25, 1.25])
    assert float(gradient[1].abs().sum()) == 0.0


def test_paths_are_drawn_as_often_as_their_probability_says() -> None:
    """Two alive operations with odds 1 : 3; 500 draws of four edges, within five deviations of three quarters."""
    architecture = Architecture(path_space())
    keep = torch.zeros_like(architecture.operation_mask)
    keep[..., 3:5] = True
    architecture.restrict(keep, architecture.input_mask)
    with torch.no_grad():
        architecture.operation_logits[..., 4] = torch.tensor(3.0).log()
    generator, relaxation = torch.Generator().manual_seed(0), Relaxation("path")
    drawn = [
        relaxation.sampled(architecture, 1.0, draw_noise(architecture, 1.0, generator)).operations.detach()
        for _ in range(500)
    ]
    share = float(torch.stack(drawn)[..., 4].mean())
    assert abs(share - 0.75) < 5 * (0.75 * 0.25 / 2000) ** 0.5


def test_straight_through_is_one_hot_forward_and_soft_back() -> None:
    architecture = Architecture(path_space()).double()
    with torch.no_grad():
        architecture.operation_logits[..., 5] = 2.0
    zero = tuple(torch.zeros_like(logits) for logits, _ in architecture.rows())
    hard = Relaxation("gumbel_st").sampled(architecture, 0.5, zero)  # type: ignore[arg-type]
    assert sorted(hard.operations[0, 0].tolist())[-1] == pytest.approx(1.0)
    assert float(hard.operations[0, 0].detach().abs().sum()) == pytest.approx(1.0)
    hard.operations[0, 0, 5].backward()  # type: ignore[no-untyped-call]
    found = architecture.operation_logits.grad[0, 0].clone()  # type: ignore[index]
    architecture.operation_logits.grad = None
    soft = Relaxation("gumbel").sampled(architecture, 0.5, zero)  # type: ignore[arg-type]
    soft.operations[0, 0, 5].backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(found, architecture.operation_logits.grad[0, 0])  # type: ignore[index]


@pytest.mark.parametrize("kind", ["gumbel", "softmax", "dirichlet"])
def test_without_noise_a_pass_is_what_is_evaluated(kind: str) -> None:
    """And no generator is touched, or the same seed would not give the same gradient."""
    architecture = random_architecture(small_spec(), 0)
    before = torch.random.get_rng_state()
    found, expected = (Relaxation(kind).sampled(architecture, 0.5, None), Relaxation(kind).expected(architecture, 0.5))
    assert expected is not None
    assert torch.equal(found.operations, expected.operations)
    assert torch.equal(found.inputs, expected.inputs)
    assert found.operations.requires_grad
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_dirichlet_draw_is_a_distribution_over_the_alive_with_the_right_mean() -> None:
    """Concentration elu(a) + 1: logits 2 and 0 give 3 : 1 in the mean."""
    architecture = Architecture(path_space()).double()
    keep = torch.zeros_like(architecture.operation_mask)
    keep[..., 3:5] = True
    architecture.restrict(keep, architecture.input_mask)
    with torch.no_grad():
        architecture.operation_logits[..., 3] = 2.0
    zero = tuple(torch.zeros_like(logits) for logits, _ in architecture.rows())
    relaxation = Relaxation("dirichlet")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = torch.stack([relaxation.sampled(architecture, 1.0, zero).operations for _ in range(2000)])  # type: ignore[arg-type]
    assert torch.allclose(draws.sum(-1), torch.ones_like(draws.sum(-1)))
    assert not bool(draws[..., :3].any())
    assert float(draws.detach()[:, 0, 0, 3].mean()) == pytest.approx(0.75, abs=0.03)
    expected = relaxation.expected(architecture, 1.0)
    assert expected is not None
    assert expected.operations[0, 0, 3:5].tolist() == pytest.approx([0.75, 0.25])
