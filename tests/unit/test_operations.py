"""Every operation against its definition, written out in helpers, in float64 (tolerance 1e-10)."""

import pytest
import torch
from helpers import plain_norm, plain_operation, plain_reduce, randomise, stream
from torch import Tensor

from fedmetanas_core.space.base import Moments
from fedmetanas_core.space.flat import Layout
from fedmetanas_core.space.operations import (
    BatchNorm,
    FactorizedReduce,
    Pooling,
    Preprocess,
    make_weighted_operation,
)
from fedmetanas_core.space.spec import PRIMITIVES

WEIGHTED = ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def images(batch: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=stream(seed), dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (7, 8), (8, 5)])
@pytest.mark.parametrize("name", WEIGHTED)
def test_convolutions_equal_their_definition(name: str, size: tuple[int, int], stride: int, training: bool) -> None:
    module = make_weighted_operation(name, 4, stride)
    assert module is not None
    module = module.double().train(training)
    randomise(module, stream(1))
    x = images(3, 4, *size)
    kept = x.clone()
    result = module(x.relu())
    assert result.shape == (3, 4, -(-size[0] // stride), -(-size[1] // stride))
    torch.testing.assert_close(result, plain_operation(name, module, x, stride), **EXACT)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (7, 8)])
@pytest.mark.parametrize("name", ["max_pool_3x3", "avg_pool_3x3"])
def test_poolings_equal_their_definition(name: str, size: tuple[int, int], stride: int, training: bool) -> None:
    module = Pooling(name, 4, stride).double().train(training)
    randomise(module, stream(1))
    x = images(3, 4, *size) - 5.0  # negative everywhere: a ReLU, or zeros counted in, would show
    result = module(x)
    assert result.shape == (3, 4, -(-size[0] // stride), -(-size[1] // stride))
    torch.testing.assert_close(result, plain_operation(name, module, x, stride), **EXACT)


def test_average_pooling_leaves_padding_out_of_the_count() -> None:
    module = Pooling("avg_pool_3x3", 1, 1).double().eval()
    x = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    expected = torch.full_like(x, (1.0 + 1e-5) ** -0.5)  # running mean 0 and variance 1
    torch.testing.assert_close(module(x), expected, **EXACT)


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (7, 8), (8, 5)])
def test_factorized_reduce_equals_its_definition(size: tuple[int, int]) -> None:
    module = FactorizedReduce(3, 5).double().eval()
    randomise(module, stream(1))
    x = images(2, 3, *size)
    result = module(x.relu())
    assert result.shape == (2, 5, -(-size[0] // 2), -(-size[1] // 2))
    torch.testing.assert_close(result, plain_reduce(x, module.even.weight, module.odd.weight, module.norm), **EXACT)


def test_factorized_reduce_pads_odd_maps_with_one_zero_row_and_column() -> None:
    module = FactorizedReduce(1, 2).double().eval()
    with torch.no_grad():
        module.even.weight.fill_(1.0)
        module.odd.weight.fill_(1.0)
    x = torch.arange(1.0, 10.0, dtype=torch.float64).view(1, 1, 3, 3)  # 1 2 3 / 4 5 6 / 7 8 9
    even, odd = module(x)[0] * (1.0 + 1e-5) ** 0.5
    torch.testing.assert_close(even, torch.tensor([[1.0, 3.0], [7.0, 9.0]], dtype=torch.float64), **EXACT)
    torch.testing.assert_close(odd, torch.tensor([[5.0, 0.0], [0.0, 0.0]], dtype=torch.float64), **EXACT)


def test_preprocess_is_a_pointwise_convolution_and_batch_norm() -> None:
    module = Preprocess(3, 4).double().train()
    randomise(module, stream(1))
    x = images(2, 3, 5, 5)
    expected = plain_norm(torch.nn.functional.conv2d(x.relu(), module.pointwise.weight), module.norm)
    torch.testing.assert_close(module(x.relu()), expected, **EXACT)


@pytest.mark.parametrize("name", WEIGHTED)
def test_gradients_equal_those_of_the_definition(name: str) -> None:
    module = make_weighted_operation(name, 3, 2)
    assert module is not None
    module = module.double().train()
    randomise(module, stream(1))
    x = images(2, 3, 6, 6).requires_grad_()
    target = images(2, 3, 3, 3, seed=5)
    inputs = [x, *module.parameters()]
    found = torch.autograd.grad((module(x.relu()) * target).sum(), inputs)
    expected = torch.autograd.grad((plain_operation(name, module, x, 2) * target).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_only_convolutions_and_the_strided_skip_have_modules_of_their_own() -> None:
    owners = {1: set(WEIGHTED), 2: {*WEIGHTED, "skip_connect"}}
    for stride, expected in owners.items():
        assert {name for name in PRIMITIVES if make_weighted_operation(name, 4, stride) is not None} == expected


def test_no_operation_has_a_bias_or_an_affine_norm() -> None:
    for name in (*WEIGHTED, "skip_connect"):
        module = make_weighted_operation(name, 4, 2)
        assert module is not None
        assert all(parameter.dim() == 4 for parameter in module.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_scale_multiplies_the_normalised_result_and_gets_its_gradient(training: bool) -> None:
    norm = BatchNorm(3).double().train(training)
    randomise(norm, stream(2))
    x, scale = images(2, 3, 4, 4), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    result = norm(x, scale)
    torch.testing.assert_close(result, 0.3 * plain_norm(x, norm), **EXACT)
    (gradient,) = torch.autograd.grad(result.square().sum(), scale)
    torch.testing.assert_close(gradient, 2 * 0.3 * plain_norm(x, norm).square().sum(), **EXACT)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels", [2, 16])
def test_gradients_pass_a_scaled_norm_in_either_memory_layout(
    channels: int, training: bool, layout: torch.memory_format
) -> None:
    # torch reads batch norm's scale as a dense vector on channels-last tensors, so a broadcast scalar will not do.
    norm = BatchNorm(channels).double().train(training)
    x = images(3, channels, 5, 5).contiguous(memory_format=layout).requires_grad_()
    target = images(3, channels, 5, 5, seed=1).contiguous(memory_format=layout)
    scale = torch.tensor([9.0, 0.3, -7.0], dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad((norm(x, scale.unbind()[1]) * target).sum(), [x, scale])
    expected = torch.autograd.grad((scale[1] * plain_norm(x, norm) * target).sum(), [x, scale])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_an_affine_norm_scales_and_shifts() -> None:
    norm = BatchNorm(3, affine=True).double().train()
    randomise(norm, stream(2))
    x = images(2, 3, 4, 4)
    torch.testing.assert_close(norm(x), plain_norm(x, norm), **EXACT)


def test_training_passes_leave_the_running_statistics_alone_unless_collected() -> None:
    norm = BatchNorm(2).train()
    before = norm.running_mean.clone(), norm.running_var.clone()
    norm(images(4, 2, 3, 3).float() + 7.0)
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])


def test_a_collecting_norm_writes_the_moments_of_its_batch() -> None:
    norm = BatchNorm(2).double().train()
    mean, variance = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    norm.collector = mean, variance
    x = images(7, 2, 3, 5) * torch.tensor([2.0, 30.0]).view(1, 2, 1, 1) + 100.0
    norm(x)
    torch.testing.assert_close(mean, x.mean(dim=(0, 2, 3)), **EXACT)
    torch.testing.assert_close(variance, x.var(dim=(0, 2, 3), correction=0), rtol=1e-9, atol=1e-9)
    norm.eval()(x + 1.0)
    torch.testing.assert_close(mean, x.mean(dim=(0, 2, 3)), **EXACT)


def one_norm_moments() -> Moments:
    layout = Layout((("a.running_mean", (1,)), ("a.running_var", (1,))))
    return Moments(layout, torch.device("cpu"))


def test_moments_by_hand() -> None:
    moments = one_norm_moments()
    moments.batch.copy_(torch.tensor([2.0, 1.0]))  # 1 and 3
    moments.add(2)
    moments.batch.copy_(torch.tensor([8.0, 0.0]))
    moments.add(1)
    mean, variance = moments.statistics().tolist()
    assert mean == pytest.approx(4.0, abs=1e-12)
    assert variance == pytest.approx((9 + 1 + 16) / 3, abs=1e-12)


def test_moments_of_nothing_are_an_error() -> None:
    with pytest.raises(ValueError, match="no batch"):
        one_norm_moments().statistics()


@pytest.mark.parametrize("name", [*WEIGHTED, "skip_connect"])
def test_a_batch_of_one_image_is_normalised_by_its_own_pixels(name: str) -> None:
    module = make_weighted_operation(name, 2, 2)
    assert module is not None
    module = module.double().train()
    randomise(module, stream(3))
    x = images(1, 2, 4, 4)
    result = module(x.relu())
    torch.testing.assert_close(result, plain_operation(name, module, x, 2), **EXACT)
    torch.testing.assert_close(result.mean(dim=(0, 2, 3)), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-10)
