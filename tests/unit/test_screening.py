"""What an update must be to enter the average."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import small_spec

from fedmetanas_core.config import Config
from fedmetanas_core.federation.screening import Screening
from fedmetanas_core.federation.update import ClientUpdate, Payload, ServerState
from fedmetanas_core.methods.method import Method
from fedmetanas_core.methods.registry import make_method
from fedmetanas_core.space.models import layouts


def make() -> Method:
    return make_method(Config.from_mapping({"num_rounds": 10}).resolve(8, 8, 100), small_spec())


RUN = "1" * 32


class Scene:
    """A state, what a client gets of it in round 4, and whether its answer is taken."""

    def __init__(self) -> None:
        self.method = make()
        self.state = self.method.initial_state()
        self.sent: Payload = self.method.payload(self.state, 3, self.method.plan(4))

    def screen(self, update: ClientUpdate, sent: Payload | None = None) -> str | None:
        sent = sent or self.sent
        expected, variances = self.method.expected(sent, update), self.method.variances(sent, update)
        return Screening(RUN, {3: 64}).alone(update, sent, expected, variances)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene()


def good(state: ServerState) -> ClientUpdate:
    return ClientUpdate(
        client=3,
        round=4,
        mask_version=0,
        num_examples=7,
        weights=state.weights.clone(),
        statistics=state.statistics.clone(),
        operation_logits=state.architecture.operation_logits.detach().clone(),
        input_logits=state.architecture.input_logits.detach().clone(),
        run_id=RUN,
    )


def test_a_fitting_update_is_accepted(scene: Scene) -> None:
    assert scene.screen(good(scene.state)) is None
    assert scene.screen(replace(good(scene.state), num_examples=1)) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"round": 3}, ("round 3", "round 4")),
        ({"round": 5}, ("round 5", "round 4")),
        ({"mask_version": 1}, ("version 1", "0")),
        ({"num_examples": 0}, ("0 examples",)),
        ({"num_examples": -5}, ("-5 examples",)),
        ({"num_examples": 65}, ("65 examples", "has 64")),
        ({"num_examples": 10**12}, ("1000000000000 examples", "has 64")),
        ({"run_id": "2" * 32}, ("another run",)),
        ({"metrics": {"reward": 1e6}}, ("reward of 1000000.0",)),
        ({"metrics": {"reward": -0.1}}, ("reward of -0.1",)),
    ],
)
def test_figures_that_do_not_fit_are_named(scene: Scene, change: dict[str, Any], words: tuple[str, ...]) -> None:
    reason = scene.screen(replace(good(scene.state), **change))
    assert reason is not None
    assert all(word in reason for word in words)


@pytest.mark.parametrize("name", ["weights", "statistics", "operation_logits", "input_logits"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_single_value_that_is_not_finite_excludes_the_update(scene: Scene, name: str, value: float) -> None:
    update = good(scene.state)
    update.named_tensors()[name].view(-1)[-1] = value
    reason = scene.screen(update)
    assert reason is not None
    assert name in reason
    assert "finite" in reason


@pytest.mark.parametrize("name", ["weights", "statistics", "operation_logits", "input_logits"])
def test_a_wrong_shape_or_type_excludes_the_update(scene: Scene, name: str) -> None:
    tensor = good(scene.state).named_tensors()[name]
    for wrong in (tensor[..., :-1], tensor.unsqueeze(0), tensor.double()):
        reason = scene.screen(replace(good(scene.state), **{name: wrong}))  # type: ignore[arg-type]
        assert reason is not None
        assert name in reason


def test_an_update_of_the_mask_before_a_prune_is_excluded() -> None:
    method = make()
    state = method.initial_state()
    event = next(number for number in range(1, 11) if method.plan(number).prunes)
    late = replace(good(state), round=event)
    method.prune(state, [], method.plan(event))
    sent = method.payload(state, 3, method.plan(event))
    reason = Scene().screen(late, sent)
    assert reason is not None
    assert "mask version 0" in reason


@pytest.mark.parametrize("name", ["operation_logits", "input_logits"])
def test_logits_come_back_where_they_were_sent_and_nowhere_else(scene: Scene, name: str) -> None:
    assert scene.screen(replace(good(scene.state), **{name: None})) == f"{name} is missing"
    sent, update = replace(scene.sent, alphas=False), good(scene.state)
    without = replace(update, operation_logits=None, input_logits=None)
    assert scene.screen(without, sent) is None
    surplus = replace(without, **{name: update.named_tensors()[name]})
    assert scene.screen(surplus, sent) == f"{name} was not asked for"


def test_a_negative_variance_excludes_the_update_and_a_negative_mean_does_not(scene: Scene) -> None:
    update = good(scene.state)
    layout = layouts(scene.state.spec, scene.state.architecture.operation_mask)[1]
    next(view for name, view in layout.views(update.statistics).items() if name.endswith("running_mean"))[0] = -1.0
    assert scene.screen(update) is None
    next(view for name, view in layout.views(update.statistics).items() if name.endswith("running_var"))[0] = -1e-6
    assert scene.screen(update) == "a variance among its statistics is negative"


def test_a_change_many_times_the_medians_stands_out() -> None:
    """Root mean squares 1, 1, 2, 1000 of weights: the median is 1.5; alphas all alike."""
    changes = {client: {"weights": torch.full((4,), size), "alphas": torch.ones(3)}
               for client, size in ((5, 1.0), (6, -1.0), (7, 2.0), (8, 1000.0))}  # fmt: skip
    assert Screening(norm_ratio=10.0).together(changes) == {8: "its weights changed 667 times as much as the median's"}
    assert Screening(norm_ratio=0.0).together(changes) == {}
    assert Screening(norm_ratio=1e3).together(changes) == {}
    two = {client: changes[client] for client in (5, 8)}
    assert Screening(norm_ratio=10.0).together(two) == {}, "of two nobody can say which is the odd one"


def test_where_most_change_nothing_a_change_stands_out_and_rounding_does_not() -> None:
    changes = {client: {"alphas": torch.full((4,), size)}
               for client, size in ((5, 0.0), (6, 1e-11), (7, -1e-9), (8, 0.0), (9, 0.5))}  # fmt: skip
    assert Screening(norm_ratio=10.0).together(changes) == {9: "its alphas changed by 0.5, unlike the median's"}


def test_changes_of_networks_of_different_size_are_compared_by_their_root_mean_square() -> None:
    changes = {0: {"weights": torch.ones(4)}, 1: {"weights": torch.ones(4000)}, 2: {"weights": torch.ones(40)}}
    assert Screening(norm_ratio=1.5).together(changes) == {}


def test_the_change_is_what_came_back_less_what_was_sent(scene: Scene) -> None:
    update = good(scene.state)
    update.weights.add_(2.0)
    update.statistics[0] += 3.0
    assert update.operation_logits is not None
    update.operation_logits[0, 0, 0] += 4.0
    changes = scene.method.changes(scene.sent, update)
    assert changes["weights"].tolist() == pytest.approx([2.0] * len(update.weights))
    assert float(changes["statistics"].sum()) == pytest.approx(3.0)
    assert float(changes["alphas"].abs().sum()) == pytest.approx(4.0, abs=1e-5)
