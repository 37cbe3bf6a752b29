"""One first-order MAML step, against numbers worked by hand and against autograd (float64)."""

import pytest
import torch
from helpers import stream
from torch import Tensor, nn

from fedmetanas_core.search.steps import Bench, Fomaml

CLOSE = {"rel": 0.0, "abs": 1e-12}


class Quadratic:
    """Support loss w^2 / 2 + w a with gradient (w + a, w); query loss (w - 2 a)^2 / 2 with gradient (d, -2 d)."""

    def __init__(self, weight: float = 2.0, alpha: float = 1.0) -> None:
        self.w = nn.Parameter(torch.tensor([weight], dtype=torch.float64))
        self.a = nn.Parameter(torch.tensor([alpha], dtype=torch.float64))

    def support(self) -> Tensor:
        return (self.w.square() / 2 + self.w * self.a).sum()

    def query(self) -> Tensor:
        return ((self.w - 2 * self.a).square() / 2).sum()

    def bench(self, weights: torch.optim.Optimizer, alphas: torch.optim.Optimizer | None) -> Bench:
        return Bench(self.w, [self.a], weights, alphas, lambda batch: (self.support, self.query)[batch]())

    def step(self, learner: Fomaml, decay: float = 0.0, frozen: bool = False) -> tuple[Tensor, Tensor]:
        outer_w = torch.optim.SGD([self.w], 0.5, weight_decay=decay)
        return learner(self.bench(outer_w, None if frozen else torch.optim.SGD([self.a], 0.25)))


def sgd(steps: int, alternate: bool = False, clip: float = 1e9) -> Fomaml:
    return Fomaml(0.1, 0.5, "sgd", steps, alternate, clip)


@pytest.mark.parametrize(
    ("learner", "weight", "alpha", "query_loss"),
    [
        # Joint, M=1: (w, a) = (2 - 0.3, 1 - 0.5 * 2) = (1.7, 0); d = 1.7; w = 2 - 0.85; a = 1 + 0.25 * 3.4.
        (sgd(1), 1.15, 1.85, 1.7**2 / 2),
        # Joint, M=2: at (1.7, 0) the gradient is (1.7, 1.7), so (1.53, -0.85); d = 3.23.
        (sgd(2), 0.385, 2.615, 3.23**2 / 2),
        # Alternate, M=1: w = 1.7 first, then a = 1 - 0.5 * 1.7 = 0.15; d = 1.4.
        (sgd(1, alternate=True), 1.3, 1.7, 1.4**2 / 2),
        # Alternate, M=2: w = 1.7 - 0.185 = 1.515, a = 0.15 - 0.7575 = -0.6075; d = 2.73.
        (sgd(2, alternate=True), 0.635, 2.365, 2.73**2 / 2),
    ],
)
def test_a_meta_step_by_hand(learner: Fomaml, weight: float, alpha: float, query_loss: float) -> None:
    problem = Quadratic()
    losses = problem.step(learner)
    assert problem.w.item() == pytest.approx(weight, **CLOSE)
    assert problem.a.item() == pytest.approx(alpha, **CLOSE)
    assert losses == pytest.approx((4.0, query_loss), **CLOSE)  # the support loss is the un-adapted one


def test_adam_in_the_task_moves_alphas_by_their_rate_whatever_the_gradient() -> None:
    # M=1: the first step of Adam is the rate times the sign, a = 0.5; d = 1.7 - 1 = 0.7.
    problem = Quadratic()
    problem.step(Fomaml(0.1, 0.5, "adam", 1, False, 1e9))
    assert problem.w.item() == pytest.approx(2 - 0.35, abs=1e-7)
    assert problem.a.item() == pytest.approx(1 + 0.25 * 1.4, abs=1e-7)


def test_adam_in_the_task_has_no_first_moment() -> None:
    # Gradients of a: 2, then 1.7. v = 0.001 * 4, then 0.999 v + 0.001 * 1.7^2, corrected by 1 - 0.999^2.
    problem = Quadratic()
    problem.step(Fomaml(0.1, 0.5, "adam", 2, False, 1e9))
    second = 0.5 * 1.7 / ((0.999 * 0.004 + 0.001 * 1.7**2) / (1 - 0.999**2)) ** 0.5
    distance = (1.7 - 0.1 * (1.7 + 0.5)) - 2 * (0.5 - second)
    assert problem.w.item() == pytest.approx(2 - 0.5 * distance, abs=1e-6)
    assert problem.a.item() == pytest.approx(1 + 0.25 * 2 * distance, abs=1e-6)


def test_a_second_task_starts_with_a_fresh_optimiser() -> None:
    learner = Fomaml(0.1, 0.5, "adam", 1, False, 1e9)
    once, twice = Quadratic(), Quadratic()
    twice.step(learner)
    with torch.no_grad():
        twice.w.copy_(once.w)
        twice.a.copy_(once.a)
    assert twice.step(learner) == once.step(learner)
    assert twice.a.item() == once.a.item()


def test_the_clip_bounds_both_weight_gradients_but_no_alpha_gradient() -> None:
    # Support gradient 3 -> 1: w = 1.9, a = 1 - 0.5 * 2 = 0. Query gradient 1.9 -> 1: w = 2 - 0.5, a = 1 + 0.25 * 3.8.
    problem = Quadratic()
    problem.step(sgd(1, clip=1.0))
    assert problem.w.item() == pytest.approx(1.5, abs=1e-5)  # torch divides by the norm plus 1e-6
    assert problem.a.item() == pytest.approx(1.95, abs=1e-5)


def test_a_clip_above_the_gradient_changes_nothing() -> None:
    bounded, free = Quadratic(), Quadratic()
    bounded.step(sgd(1, clip=3.5))
    free.step(sgd(1))
    assert bounded.w.item() == free.w.item()


@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_frozen_alphas_move_neither_in_the_task_nor_outside(optimizer: str, alternate: bool) -> None:
    # w = 1.7 with a = 1: d = -0.3, so w = 2 + 0.15.
    problem = Quadratic()
    losses = problem.step(Fomaml(0.1, 0.5, optimizer, 1, alternate, 1e9), frozen=True)
    assert problem.a.item() == 1.0
    assert problem.w.item() == pytest.approx(2.15, **CLOSE)
    assert losses == pytest.approx((4.0, 0.045), **CLOSE)


def test_values_are_restored_before_the_outer_step_so_decay_acts_on_the_unadapted_weight() -> None:
    # w = 2 - 0.5 * (1.7 + 0.1 * 2); from the adapted weight it would be 1.7 - 0.5 * (1.7 + 0.17).
    problem = Quadratic()
    problem.step(sgd(1), decay=0.1)
    assert problem.w.item() == pytest.approx(1.05, **CLOSE)


def test_an_outer_rate_of_zero_leaves_everything_bit_for_bit() -> None:
    problem = Quadratic(0.1, 0.3)
    before = problem.w.item(), problem.a.item()
    outer = torch.optim.SGD([problem.w], 0.0), torch.optim.SGD([problem.a], 0.0)
    sgd(1)(problem.bench(*outer))
    assert (problem.w.item(), problem.a.item()) == before


def test_momentum_runs_over_the_tasks_of_a_round() -> None:
    problem = Quadratic()
    outer_w = torch.optim.SGD([problem.w], 0.5, 0.9)
    outer_a = torch.optim.SGD([problem.a], 0.25)
    for _ in range(2):
        sgd(1)(problem.bench(outer_w, outer_a))
    # Task 1: gradient 1.7, (w, a) = (1.15, 1.85). Task 2: adapted (0.85, 1.275), d = -1.7; velocity 0.9 * 1.7 - 1.7.
    assert problem.w.item() == pytest.approx(1.15 - 0.5 * (0.9 * 1.7 - 1.7), **CLOSE)
    assert problem.a.item() == pytest.approx(1.85 + 0.25 * 2 * -1.7, **CLOSE)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("alternate", [False, True])
def test_a_meta_step_equals_autograd_taken_by_hand_on_random_quadratics(steps: int, alternate: bool) -> None:
    generator = stream(steps)
    matrices = [torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(steps + 1)]
    w = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))
    alphas = [nn.Parameter(torch.randn(1, generator=generator, dtype=torch.float64)) for _ in range(2)]

    def value(matrix: Tensor, at_w: Tensor, at_a: list[Tensor]) -> Tensor:
        return (matrix @ torch.cat((at_w, *at_a))).square().sum() / 2 + torch.sin(torch.cat((at_w, *at_a))).sum()

    at_w, at_a = w.detach().clone().requires_grad_(), [a.detach().clone().requires_grad_() for a in alphas]
    for matrix in matrices[:-1]:
        gradient, *alpha_gradients = torch.autograd.grad(value(matrix, at_w, at_a), [at_w, *at_a])
        new_w = (at_w - 0.01 * gradient).detach().requires_grad_()
        if alternate:
            alpha_gradients = list(torch.autograd.grad(value(matrix, new_w, at_a), at_a))
        at_a = [(a - 0.02 * g).detach().requires_grad_() for a, g in zip(at_a, alpha_gradients, strict=True)]
        at_w = new_w
    gradient, *alpha_gradients = torch.autograd.grad(value(matrices[-1], at_w, at_a), [at_w, *at_a])
    expected_w = w.detach() - 0.1 * gradient
    expected_a = [a.detach() - 0.2 * g for a, g in zip(alphas, alpha_gradients, strict=True)]

    # Another support loss in every inner step, as another draw of noise makes it; the last one is the query's.
    each = 2 if alternate else 1
    supports = iter([matrix for matrix in matrices[:-1] for _ in range(each)])

    def loss(batch: int) -> Tensor:
        return value(matrices[-1] if batch else next(supports), w, list(alphas))

    learner = Fomaml(0.01, 0.02, "sgd", steps, alternate, 1e9)
    learner(Bench(w, alphas, torch.optim.SGD([w], 0.1), torch.optim.SGD(alphas, 0.2), loss))
    assert next(supports, None) is None
    torch.testing.assert_close(w.detach(), expected_w, rtol=1e-11, atol=1e-11)
    for found, expected in zip(alphas, expected_a, strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("steps", "alternate", "passes"), [(1, False, 1), (3, False, 3), (1, True, 2), (2, True, 4)])
def test_passes_joint_takes_one_per_inner_step_and_alternate_two(steps: int, alternate: bool, passes: int) -> None:
    problem, calls = Quadratic(), list[int]()

    def loss(batch: int) -> Tensor:
        calls.append(batch)
        return (problem.support, problem.query)[batch]()

    outer = torch.optim.SGD([problem.w], 0.1), torch.optim.SGD([problem.a], 0.1)
    sgd(steps, alternate)(Bench(problem.w, [problem.a], *outer, loss))
    assert calls == [0] * passes + [1]
    assert sgd(steps, alternate).passes(adapts=True) == passes + 1
