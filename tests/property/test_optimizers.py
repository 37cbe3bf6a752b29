"""Our optimisers against torch's classes: the same bytes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedmetanas_core.search.optimizers import Adam, Sgd

rates = st.floats(0.0, 1.0)
# What arrives as gradients of two parameters, step by step; None: the loss did not depend on the second one.
steps = st.lists(st.one_of(st.none(), st.floats(-10.0, 10.0)), min_size=1, max_size=6)


def values(seed: int) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(7, generator=draws), torch.randn(3, 2, generator=draws)]


def assert_same(ours: Adam | Sgd, theirs: torch.optim.Optimizer, second: list[float | None], rate: float) -> None:
    mine = ours._parameters
    group = theirs.param_groups[0]
    for number, factor in enumerate(second):
        ours.rate = group["lr"] = rate / (number + 1)
        for place, gradient in enumerate(values(number + 1)):
            absent = place == 1 and factor is None
            for parameter in (mine[place], group["params"][place]):
                parameter.grad = None if absent else gradient * (factor or 1.0)
        ours.step()
        theirs.step()
        for one, other in zip(mine, group["params"], strict=True):
            assert torch.equal(one, other)


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(value) for value in values(0)]


@settings(deadline=None)
@given(rates, st.sampled_from([0.0, 0.5, 0.9]), st.floats(0.0, 0.1), st.sampled_from([None, True]), steps)
def test_sgd_is_torchs(
    rate: float, momentum: float, decay: float, fused: bool | None, second: list[float | None]
) -> None:
    # torch's fused form takes velocities of all parameters or of none.
    assume(not fused or all((one is None) == (other is None) for one, other in pairwise(second)))
    theirs = torch.optim.SGD(parameters(), rate, momentum, weight_decay=decay, fused=fused)
    assert_same(Sgd(parameters(), rate, momentum, decay, fused), theirs, second, rate)


@settings(deadline=None)
@given(rates, st.sampled_from([(0.9, 0.999), (0.5, 0.999), (0.0, 0.999)]), st.floats(0.0, 0.1), steps)
def test_adam_is_torchs(rate: float, betas: tuple[float, float], decay: float, second: list[float | None]) -> None:
    theirs = torch.optim.Adam(parameters(), rate, betas=betas, weight_decay=decay)
    assert_same(Adam(parameters(), rate, betas, decay), theirs, second, rate)


def state_of(optimizer: Adam | Sgd) -> list[torch.Tensor]:
    if isinstance(optimizer, Sgd):
        return list(optimizer._velocities.values())
    return [tensor for moments in optimizer._moments.values() for tensor in moments]


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_who_forgets_begins_anew_with_every_tensor_where_it_was(kind: str) -> None:
    """A recording has noted where they lie."""

    def fresh(mine: list[torch.nn.Parameter]) -> Adam | Sgd:
        return Sgd(mine, 0.5, 0.9) if kind == "sgd" else Adam(mine, 0.5)

    used, new = parameters(), parameters()
    veteran = fresh(used)
    for mine, optimizer in ((used, veteran), (new, fresh(new))):
        for parameter, gradient in zip(mine, values(1), strict=True):
            parameter.grad = gradient
        if optimizer is veteran:
            optimizer.step()
            places = [tensor.data_ptr() for tensor in state_of(optimizer)]
            optimizer.forget()
            assert places == [tensor.data_ptr() for tensor in state_of(optimizer)] != []
            with torch.no_grad():
                for parameter, value in zip(mine, values(0), strict=True):
                    parameter.copy_(value)
        optimizer.step()
    for one, other in zip(used, new, strict=True):
        assert torch.equal(one, other)
