"""What a client does with the final model before its adapted accuracy: plain steps on its own images."""

from dataclasses import replace

import pytest
import torch
from helpers import random_architecture, random_one_hot, random_supernet, small_spec, stream
from torch import Tensor, nn

from fedmetanas_core.config import Config
from fedmetanas_core.federation.update import Payload
from fedmetanas_core.methods.parts import own_training, tuning
from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.search.local_search import local_search
from fedmetanas_core.search.schedule import Schedule
from fedmetanas_core.space.supernet import Supernet

SPEC = small_spec()
PLAN = replace(Schedule(num_rounds=20, num_nodes=SPEC.num_nodes, seed=3).plan(20), adapts_architecture=False)


def config_of(**keys: object) -> Config:
    return Config.from_mapping(keys).resolve(8, 8, 100)


@pytest.mark.parametrize("rate", [0.01, 5.0])
def test_two_epochs_of_one_batch_are_two_steps_of_clipped_sgd_with_the_statistics_that_came(rate: float) -> None:
    architecture = random_one_hot(random_architecture(SPEC, 1, 1.0, torch.float64), stream(5))
    start = random_supernet(SPEC, architecture.operation_mask, 2)
    payload = Payload(start.weights.detach().clone(), start.statistics.clone(), architecture, PLAN)
    images = torch.randn(4, 1, 8, 8, generator=stream(4), dtype=torch.float64)
    data = LocalData(images, torch.arange(4) % SPEC.num_classes, lambda batch, _: batch)
    config = config_of(adapt_epochs=2, task_lr_weights=rate, clip=0.1)
    update = local_search(payload, 0, data, tuning(config))

    def gradient(at: Tensor) -> Tensor:
        network = Supernet(SPEC, architecture.operation_mask, dtype=torch.float64)
        network.load(at, payload.statistics)
        loss = nn.functional.cross_entropy(network.eval()(images), data.labels)
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])
        assert float(flat.norm()) > 0.1
        return flat * (0.1 / float(flat.norm()))

    expected = payload.weights
    for _ in range(2):
        expected = expected - rate * gradient(expected)  # neither momentum nor decay, at a rate that stays
    torch.testing.assert_close(update.weights, expected, rtol=0.0, atol=1e-4 * rate)
    assert torch.equal(update.statistics, payload.statistics)


def test_a_network_of_a_clients_own_is_trained_with_moments_of_its_own() -> None:
    """Two epochs of one batch: momentum SGD from meta_lr_weights down to half of the way to its end; new statistics."""
    architecture = random_one_hot(random_architecture(SPEC, 1, 1.0, torch.float64), stream(5))
    start = random_supernet(SPEC, architecture.operation_mask, 2)
    payload = Payload(start.weights.detach().clone(), start.statistics.clone(), architecture, PLAN)
    images = torch.randn(4, 1, 8, 8, generator=stream(4), dtype=torch.float64)
    data = LocalData(images, torch.arange(4) % SPEC.num_classes, lambda batch, _: batch)
    options = own_training(config_of(adapt_epochs=2, meta_lr_weights=0.2, meta_lr_weights_end=0.1, weight_decay=0.0))
    update = local_search(payload, 0, data, options)

    network = Supernet(SPEC, architecture.operation_mask, dtype=torch.float64)
    network.load(payload.weights, payload.statistics)
    momentum = torch.zeros_like(payload.weights)
    for rate in (0.2, 0.15):
        loss = nn.functional.cross_entropy(network.train()(images), data.labels)
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])
        momentum = 0.9 * momentum + flat * min(1.0, 5.0 / float(flat.norm()))
        network.load((network.weights - rate * momentum).detach(), payload.statistics)
    torch.testing.assert_close(update.weights, network.weights.detach(), rtol=0.0, atol=1e-5)
    assert not torch.equal(update.statistics, payload.statistics)
    assert own_training(config_of(local_epochs=3)).epochs == 3


def test_auto_epochs_are_one_unless_the_method_says_otherwise() -> None:
    assert tuning(config_of()).epochs == 1
    assert tuning(config_of(), epochs=5).epochs == 5
    assert tuning(config_of(adapt_epochs=3), epochs=5).epochs == 3
