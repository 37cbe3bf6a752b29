"""What runs on a GPU computes what runs on a processor; a recorded task computes what the task does."""

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import noisy, random_architecture, random_masks, random_one_hot, random_supernet, small_spec, stream
from torch import Tensor

from fedmetanas_core.federation.update import ClientUpdate, Payload
from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.search.local_search import LocalOptions, Phase, local_search
from fedmetanas_core.search.pruning import PruneRule
from fedmetanas_core.search.schedule import Schedule
from fedmetanas_core.search.steps import Fomaml
from fedmetanas_core.search.tasks import (
    OuterOptions,
    TaskKind,
    TaskRunner,
    Work,
    as_graph,
    borrow_runner,
    recordings,
)
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.models import borrow
from fedmetanas_core.space.supernet import Supernet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SPEC = small_spec(init_channels=4, num_nodes=3, side=16)
SCHEDULE = Schedule(num_rounds=20, num_nodes=SPEC.num_nodes, seed=3)
PLAN = SCHEDULE.plan(5)
CUDA = torch.device("cuda", 0)
SIZE = 4


def masked(keep: float) -> Architecture:
    return random_masks(random_architecture(SPEC, 1, 1.0, torch.float64), stream(5), keep)


def payload_of(architecture: Architecture, seed: int = 2, **plan: float) -> Payload:
    supernet = random_supernet(SPEC, architecture.operation_mask, seed, torch.float64)
    planned = replace(PLAN, **plan)  # type: ignore[arg-type]
    return Payload(supernet.weights.detach().clone(), supernet.statistics.clone(), architecture, planned)


def images_and_labels(generator: torch.Generator, count: int = SIZE) -> tuple[Tensor, Tensor]:
    images = torch.randn(count, 1, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.randint(SPEC.num_classes, (count,), generator=generator)


@pytest.mark.parametrize("keep", [1.0, 0.4])
@pytest.mark.parametrize("training", [True, False])
def test_logits_and_gradients_are_those_of_a_processor(keep: float, training: bool) -> None:
    architecture = masked(keep)
    payload, (images, labels) = payload_of(architecture), images_and_labels(stream(4))
    found = []
    for device in (torch.device("cpu"), CUDA):
        own = architecture.clone().to(device)
        supernet = Supernet(SPEC, architecture.operation_mask, device, torch.float64)
        supernet.load(payload.weights, payload.statistics)
        supernet.train(training)
        logits = supernet(images.to(device), noisy(own, 0.5, 1.0, stream(6)))
        torch.nn.functional.cross_entropy(logits, labels.to(device)).backward()
        grads = (supernet.weights.grad, own.operation_logits.grad, own.input_logits.grad)
        found.append([tensor.detach().cpu() for tensor in (logits, *grads)])  # type: ignore[union-attr]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


RULES = {
    "joint": Fomaml(),
    "three inner steps": Fomaml(inner_steps=3),
    "alternate, plain SGD": Fomaml(alternate=True, inner_steps=2, alpha_optimizer="sgd"),
}


def rounds(
    kind: TaskKind, record: Callable[[Work], Work] | None, payloads: list[Payload], dtype: torch.dtype
) -> list[Tensor]:
    """Three tasks in each of two rounds on the GPU; losses and what was learned."""
    architecture = payloads[0].architecture
    supernet = Supernet(SPEC, architecture.operation_mask, CUDA, dtype)
    runner = TaskRunner(supernet, Architecture(SPEC).to(CUDA, dtype), kind, record)
    found: list[Tensor] = []
    for number, payload in enumerate(payloads):
        runner.begin(payload)
        generator = stream(20 + number)
        for step in range(3):
            runner.set_rate(2.0 ** -(6 + step))
            found.append(runner([images_and_labels(generator) for _ in range(2)], generator))
        found.append(runner.network.weights.detach().clone())
        found += [logits.detach().clone() for logits, _ in runner.architecture.rows()]
    return found


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("adapts", "trains"), [(True, True), (False, True), (True, False)])
def test_a_recording_serves_later_rounds(rule: Fomaml, adapts: bool, trains: bool) -> None:
    first = masked(0.6)
    second = first.clone()
    with torch.no_grad():
        second.operation_logits.mul_(-0.5)
    payloads = [payload_of(first, 2, temperature=0.8, noise_scale=0.7), payload_of(second, 3, temperature=0.3)]
    kind = TaskKind(SIZE, trains, True, adapts, 1e-3, rule, OuterOptions())
    sides = [rounds(kind, record, payloads, torch.float64) for record in (None, as_graph)]
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert float((sides[0][3].cpu() - payloads[0].weights).abs().max()) > 1e-4


def test_reduced_precision_is_recorded_as_well() -> None:
    payload = payload_of(masked(1.0))
    found = {}
    for precision in ("float32", "bfloat16"):
        kind = TaskKind(SIZE, True, True, True, 0.0, Fomaml(), OuterOptions(precision=precision))
        found[precision] = rounds(kind, as_graph, [payload], torch.float32)
    losses = [torch.stack(each[:3]) for each in found.values()]
    torch.testing.assert_close(*losses, rtol=0.2, atol=0.2)
    assert not torch.equal(*losses)


def update_on(device: torch.device, architecture: Architecture, options: LocalOptions) -> ClientUpdate:
    images, labels = images_and_labels(stream(7), 20)
    data = LocalData(images.to(device), labels.to(device), lambda batch, _: batch)
    update = local_search(payload_of(architecture), 3, data, options)
    network = borrow(SPEC, architecture.operation_mask, device, torch.float64)  # as evaluation does in between
    network.load(torch.zeros_like(network.weights), torch.ones_like(network.statistics))
    network.eval()
    return update


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("vote", [None, PruneRule()])
def test_a_client_returns_what_it_returns_on_a_processor(one_hot: bool, vote: PruneRule | None) -> None:
    architecture = random_one_hot(masked(1.0), stream(8)) if one_hot else masked(0.7)
    options = LocalOptions(phases=(Phase(Fomaml(), 5),), batch_size=SIZE, vote=vote)
    sides = [update_on(device, architecture, options) for device in (torch.device("cpu"), CUDA)]
    again = update_on(CUDA, architecture, options)
    assert recordings.failure == ""
    for name, tensor in sides[1].named_tensors().items():
        torch.testing.assert_close(again.named_tensors()[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
    # Rates are float32 in a recording, and Adam magnifies what rounding makes of small gradients.
    for name, tensor in sides[0].named_tensors().items():
        torch.testing.assert_close(sides[1].named_tensors()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_one_recording_serves_all_clients_of_a_round() -> None:
    architecture = masked(0.5)
    kind = TaskKind(SIZE, True, True, True, 0.0, Fomaml(), OuterOptions())
    runner = borrow_runner(payload_of(architecture), kind, CUDA, 100)
    assert borrow_runner(payload_of(architecture, 5), kind, CUDA, 100) is runner
    fewer = random_masks(architecture, stream(9), 0.5)
    assert borrow_runner(payload_of(fewer), kind, CUDA, 100) is not runner
    assert recordings.failure == ""


def test_memory_does_not_grow_with_prune_events() -> None:
    """Each event makes new recordings; old ones are let go."""
    held = []
    for seed in range(6):
        architecture = random_masks(random_architecture(SPEC, 1, 1.0, torch.float64), stream(seed), 0.5)
        update_on(CUDA, architecture, LocalOptions(phases=(Phase(Fomaml(), 5),), batch_size=SIZE))
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())  # a recording's maps count as reserved, not as allocated
    assert held[-1] <= 1.5 * max(held[1:3])
