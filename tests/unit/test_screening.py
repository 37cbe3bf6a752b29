"""What an update must be to enter the average."""

from dataclasses import replace
from typing import Any

import pytest
from helpers import small_spec

from fedmetanas_core.config import Config
from fedmetanas_core.federation.screening import screen
from fedmetanas_core.federation.update import ClientUpdate, Payload, ServerState
from fedmetanas_core.methods.method import Method
from fedmetanas_core.methods.registry import make_method


def make() -> Method:
    return make_method(Config.from_mapping({"num_rounds": 10}).resolve(8, 8, 100), small_spec())


class Scene:
    """A state, what a client gets of it in round 4, and whether its answer is taken."""

    def __init__(self) -> None:
        self.method = make()
        self.state = self.method.initial_state()
        self.sent: Payload = self.method.payload(self.state, 3, self.method.plan(4))

    def screen(self, update: ClientUpdate) -> str | None:
        return screen(update, self.sent, self.method.expected(self.sent, update))


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
    reason = screen(late, sent, method.expected(sent, late))
    assert reason is not None
    assert "mask version 0" in reason


@pytest.mark.parametrize("name", ["operation_logits", "input_logits"])
def test_logits_come_back_where_they_were_sent_and_nowhere_else(scene: Scene, name: str) -> None:
    assert scene.screen(replace(good(scene.state), **{name: None})) == f"{name} is missing"
    sent, update = replace(scene.sent, alphas=False), good(scene.state)
    without = replace(update, operation_logits=None, input_logits=None)
    assert screen(without, sent, scene.method.expected(sent, without)) is None
    surplus = replace(without, **{name: update.named_tensors()[name]})
    assert screen(surplus, sent, scene.method.expected(sent, surplus)) == f"{name} was not asked for"
