"""The auxiliary classifier of FedPNAS: what it reads, how it learns, that it stays and is not in the result."""

import pytest
import torch
from helpers import random_architecture, random_supernet, stream

from fedmetanas_core.search.relaxation import relax
from fedmetanas_core.space.native import build
from fedmetanas_core.space.parts import in_part
from fedmetanas_core.space.spec import SpaceSpec

build.prepare()  # where there is no compiler, both ways are the modules
SPEC = SpaceSpec(2, 4, 2, 1, 3, 8, 8, inputs="all", personal_cells=1, auxiliary=True)


@pytest.mark.parametrize("training", [True, False])
def test_both_heads_agree_with_a_truncated_network_and_with_the_modules(training: bool) -> None:
    architecture = random_architecture(SPEC, 0, 1.0, torch.float64)
    supernet = random_supernet(SPEC, architecture.operation_mask, 1)
    supernet.train(training)
    x = torch.randn(5, 1, 8, 8, generator=stream(2), dtype=torch.float64)
    weights = relax(architecture, 0.7)
    logits, auxiliary = supernet.both_heads(x, weights)
    plain, plain_auxiliary = supernet._by_modules(x, weights)
    torch.testing.assert_close(logits, plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(auxiliary, plain_auxiliary, rtol=1e-9, atol=1e-9)
    seen = []
    handle = supernet.cells[2].register_forward_hook(lambda module, inputs, out: seen.append(out))
    supernet._by_modules(x, weights)
    handle.remove()
    by_hand = supernet.auxiliary(seen[0].mean(dim=(2, 3)))
    torch.testing.assert_close(auxiliary, by_hand, rtol=1e-9, atol=1e-9)


def test_gradients_reach_the_shared_cells_through_both_heads() -> None:
    architecture = random_architecture(SPEC, 0, 1.0, torch.float64)
    supernet = random_supernet(SPEC, architecture.operation_mask, 1)
    supernet.train()
    x = torch.randn(5, 1, 8, 8, generator=stream(2), dtype=torch.float64)
    found = []
    for compiled in (True, False):
        if not compiled:
            build.forget()
        supernet.weights.grad.zero_()  # type: ignore[union-attr]
        architecture.operation_logits.grad = None
        logits, auxiliary = supernet.both_heads(x, relax(architecture, 0.7))
        (logits.square().sum() + auxiliary.square().sum()).backward()  # type: ignore[no-untyped-call]
        found.append((supernet.weights.grad.clone(), architecture.operation_logits.grad.clone()))  # type: ignore[union-attr]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_the_trunk_is_all_but_the_auxiliary_classifier() -> None:
    supernet = random_supernet(SPEC, random_architecture(SPEC, 0).operation_mask, 1)
    outside = [name for name, _ in supernet.named_parameters() if not in_part(name, "trunk", SPEC)]
    assert outside == ["auxiliary.weight", "auxiliary.bias"]
