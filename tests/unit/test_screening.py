"""What an update must be to enter the average."""

from dataclasses import replace
from typing import Any

import pytest
from helpers import small_spec

from fedmetanas_core.config import Config
from fedmetanas_core.federation.screening import screen
from fedmetanas_core.federation.update import ClientUpdate, RoundPlan, ServerState
from fedmetanas_core.methods.fedmetanas import FedMetaNAS


@pytest.fixture(scope="module")
def scene() -> tuple[ServerState, RoundPlan]:
    method = FedMetaNAS(Config.from_mapping({"num_rounds": 10}).resolve(8, 8, 100), small_spec())
    return method.initial_state(), method.plan(4)


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


def test_a_fitting_update_is_accepted(scene: tuple[ServerState, RoundPlan]) -> None:
    state, plan = scene
    assert screen(good(state), state, plan) is None
    assert screen(replace(good(state), num_examples=1), state, plan) is None


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
def test_figures_that_do_not_fit_are_named(
    scene: tuple[ServerState, RoundPlan], change: dict[str, Any], words: tuple[str, ...]
) -> None:
    state, plan = scene
    reason = screen(replace(good(state), **change), state, plan)
    assert reason is not None
    assert all(word in reason for word in words)


@pytest.mark.parametrize("name", ["weights", "statistics", "operation_logits", "input_logits"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_single_value_that_is_not_finite_excludes_the_update(
    scene: tuple[ServerState, RoundPlan], name: str, value: float
) -> None:
    state, plan = scene
    update = good(state)
    update.named_tensors()[name].view(-1)[-1] = value
    reason = screen(update, state, plan)
    assert reason is not None
    assert name in reason
    assert "finite" in reason


@pytest.mark.parametrize("name", ["weights", "statistics", "operation_logits", "input_logits"])
def test_a_wrong_shape_or_type_excludes_the_update(scene: tuple[ServerState, RoundPlan], name: str) -> None:
    state, plan = scene
    tensor = good(state).named_tensors()[name]
    for wrong in (tensor[..., :-1], tensor.unsqueeze(0), tensor.double()):
        reason = screen(replace(good(state), **{name: wrong}), state, plan)  # type: ignore[arg-type]
        assert reason is not None
        assert name in reason


def test_an_update_of_the_mask_before_a_prune_is_excluded() -> None:
    method = FedMetaNAS(Config.from_mapping({"num_rounds": 10}).resolve(8, 8, 100), small_spec())
    state = method.initial_state()
    late = good(state)
    event = next(number for number in range(1, 11) if method.plan(number).prunes)
    method.prune(state, [], method.plan(event))
    reason = screen(replace(late, round=event), state, method.plan(event))
    assert reason is not None
    assert "mask version 0" in reason
