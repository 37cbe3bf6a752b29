"""A client's whole round, watched: small methods, images that can all be told apart, and every step that is taken."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from helpers import small_spec, stream
from torch import Tensor

from fedmetanas_core.config import Config
from fedmetanas_core.federation.update import ClientUpdate, Payload
from fedmetanas_core.methods.method import Method
from fedmetanas_core.methods.registry import make_method
from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.search.tasks import Batch, TaskRunner
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.models import layouts

SPEC = small_spec(num_cells=4, num_classes=10)  # normal, two reductions, normal; where one is personal, the last
HEAD = 1280 * 10 + 10  # weights of MobileNetV3-Large's last layer
TINY = {"num_clients": 4, "clients_per_round": 2, "num_rounds": 4, "local_epochs": 2, "batch_size": 8, "seed": 5}
SHARED = 2  # groups of alphas; those after them are personal


def made(name: str, **values: Any) -> Method:
    return make_method(Config.from_mapping({"method": name, **TINY, **values}).resolve(8, 8, 100), SPEC)


def data_of(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> LocalData:
    """All images differ, and come to the network as they are."""
    images = torch.rand(count, 1, 8, 8, generator=stream(seed), dtype=dtype)
    return LocalData(images, torch.arange(count) % 10, lambda batch, generator: batch)


def which(batch: Batch, data: LocalData) -> set[int]:
    """The places of a batch's images in the data."""
    same = (batch[0].unsqueeze(1) == data.images).flatten(2).all(-1)
    assert bool((same.sum(1) == 1).all())
    return set(same.nonzero()[:, 1].tolist())


@dataclass
class Step:
    """What one step was given, and what it left."""

    part: str
    batches: list[Batch]
    weights: Tensor
    operations: Tensor
    inputs: Tensor


@dataclass
class Watch:
    """With what training began, once for each phase, its steps, and the rates of its epochs."""

    begun: list[Payload] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def watch_training(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """What all training of a test is given and leaves, until ``monkeypatch`` ends."""
    seen = Watch()
    begin, call, set_rate = TaskRunner.begin, TaskRunner.__call__, TaskRunner.set_rate

    def begun(self: TaskRunner, payload: Payload) -> None:
        seen.begun.append(replace(payload, weights=payload.weights.clone(), architecture=payload.architecture.clone()))
        begin(self, payload)

    def called(self: TaskRunner, batches: list[Batch], generator: torch.Generator) -> Tensor:
        losses = call(self, batches, generator)
        logits = [each.detach().clone() for each, _ in self.architecture.rows()]
        part = getattr(self.kind.rule, "part", "all")
        seen.steps.append(Step(part, list(batches), self.network.weights.detach().clone(), logits[0], logits[1]))
        return losses

    def rated(self: TaskRunner, rate: float) -> None:
        seen.rates.append(rate)
        set_rate(self, rate)

    monkeypatch.setattr(TaskRunner, "begin", begun)
    monkeypatch.setattr(TaskRunner, "__call__", called)
    monkeypatch.setattr(TaskRunner, "set_rate", rated)
    return seen


def named(payload: Payload | ClientUpdate, architecture: Architecture) -> dict[str, Tensor]:
    """Weights and statistics by name."""
    weights, statistics = layouts(architecture.spec, architecture.operation_mask)
    return {**weights.views(payload.weights), **statistics.views(payload.statistics)}


def head_mask(method: Method) -> Tensor:
    """Which of a fixed model's weights are its last layer's."""
    state = method.initial_state()
    layout = layouts(state.spec, state.architecture.operation_mask)[0]
    mask = torch.zeros(layout.size, dtype=torch.bool)
    for name, view in layout.views(mask).items():
        view.fill_(name in ("classifier.3.weight", "classifier.3.bias"))
    assert int(mask.sum()) == HEAD
    return mask
