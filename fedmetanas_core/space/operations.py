"""The candidate operations of an edge (DARTS, operations.py), each from C channels to C channels.

Every operation with weights begins with ReLU in DARTS. Here the cell applies that ReLU once per source and hands the
result to all operations that read it, so these modules take their input already rectified; pooling takes it as it is.
Operations of one kind that read the same source run ``together``, side by side in the channel dimension.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-5
GROUP_CHANNELS = 4  # channels that group norm normalises together, where they divide evenly


class BatchNorm(nn.Module):
    """Batch normalisation whose running statistics change only when somebody collects them.

    During local search the statistics of a batch belong to adapted weights and to a noisy architecture, so updating
    running averages there would record the wrong network. While ``collector`` is set, a training pass writes the mean
    and the biased variance of its batch into it, two float64 tensors of shape (channels,).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, affine: bool = False, epsilon: float = EPSILON) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.collector: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Normalise (batch, channels, height, width); ``scale``, a scalar, multiplies the result.

        Passing the mixture weight here, as batch norm's own scale, saves a pass over the activations and gives the
        gradient of the mixture weight for nothing.
        """
        weight, bias = self._affine(scale, x.shape[1])
        if self.training:
            if self.collector is not None:
                variance, mean = torch.var_mean(x.detach().double(), dim=(0, 2, 3), correction=0)
                self.collector[0].copy_(mean)
                self.collector[1].copy_(variance)
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.epsilon)
        return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.epsilon)

    def _affine(self, scale: Tensor | None, channels: int) -> tuple[Tensor | None, Tensor | None]:
        if scale is None:
            return self.weight, self.bias
        if self.weight is None or self.bias is None:
            # Dense on purpose: torch's channels-last backward reads this vector without regard to its stride.
            return scale.expand(channels).contiguous(), None
        return self.weight * scale, self.bias * scale


class GroupNorm(nn.Module):
    """Normalises every image by itself, over groups of channels (Wu and He 2018): no statistics to federate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = channels // GROUP_CHANNELS if channels % GROUP_CHANNELS == 0 else 1
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """As BatchNorm.forward."""
        weight, bias = (self.weight, self.bias) if scale is None else (self.weight * scale, self.bias * scale)
        return F.group_norm(x, self.groups, weight, bias, EPSILON)


Norm = BatchNorm | GroupNorm


def make_norm(channels: int, kind: str, affine: bool = False) -> Norm:
    """By SpaceSpec.norm; ``affine`` gives batch norm its scale and shift whatever the kind."""
    return GroupNorm(channels) if kind == "group" else BatchNorm(channels, affine or kind == "affine")


def normalise_together(norms: Sequence[Norm], x: Tensor, scales: Sequence[Tensor] | None) -> Tensor:
    """Each norm on its own share of the channels of ``x``; see BatchNorm.forward for ``scales``."""
    each_scale: Sequence[Tensor | None] = [None] * len(norms) if scales is None else scales
    if len(norms) == 1:
        return norms[0](x, each_scale[0])
    share = x.shape[1] // len(norms)
    first = norms[0]
    if isinstance(first, GroupNorm) or first.weight is not None or first.collector is not None:
        parts = zip(norms, torch.split(x, share, dim=1), each_scale, strict=True)
        return torch.cat([norm(part, scale) for norm, part, scale in parts], dim=1)
    weight = None if scales is None else torch.stack(list(scales)).repeat_interleave(share)
    if first.training:
        return F.batch_norm(x, None, None, weight, None, True, 0.0, EPSILON)
    mean = torch.cat([cast(BatchNorm, norm).running_mean for norm in norms])
    variance = torch.cat([cast(BatchNorm, norm).running_var for norm in norms])
    return F.batch_norm(x, mean, variance, weight, None, False, 0.0, EPSILON)


class Pointwise(nn.Module):
    """1x1 convolution without bias, as a matrix product over pixels.

    On channels-last tensors that is the same memory read in the same order, at a fraction of a convolution's fixed
    cost, which is most of the time on small maps.
    """

    # Up to this many channels one product with a block-diagonal matrix beats one product per block.
    WIDEST_BLOCKS = 64

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.together([self], x)

    @staticmethod
    def together(convolutions: Sequence["Pointwise"], x: Tensor) -> Tensor:
        """Each convolution on its own share of the channels of ``x``."""
        pixels, weights = x.permute(0, 2, 3, 1), [convolution.weight.flatten(1) for convolution in convolutions]
        if len(weights) == 1:
            out = F.linear(pixels, weights[0])
        elif x.shape[1] <= Pointwise.WIDEST_BLOCKS:
            out = F.linear(pixels, torch.block_diag(*weights))  # type: ignore[no-untyped-call]
        else:
            parts = torch.split(pixels, convolutions[0].in_channels, dim=-1)
            out = torch.cat([F.linear(part, weight) for part, weight in zip(parts, weights, strict=True)], dim=-1)
        return out.permute(0, 3, 1, 2)


class Depthwise(nn.Module):
    """kxk convolution of every channel with a filter of its own, without bias."""

    def __init__(self, channels: int, kernel: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        self.channels, self.stride, self.dilation = channels, stride, dilation
        self.padding = dilation * (kernel - 1) // 2
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel, kernel))

    def forward(self, x: Tensor) -> Tensor:
        return self.together([self], x)

    @staticmethod
    def together(convolutions: Sequence["Depthwise"], x: Tensor) -> Tensor:
        """Each convolution, all of one shape, on its own share of the channels of ``x``.

        The library works on blocks of 16 channels, so four convolutions of four channels cost hardly more than one.
        """
        first = convolutions[0]
        weight = first.weight if len(convolutions) == 1 else torch.cat([each.weight for each in convolutions])
        return F.conv2d(x, weight, None, first.stride, first.padding, first.dilation, groups=x.shape[1])


class WeightedOperation(nn.Module, ABC):
    """An operation of an edge that has weights: (batch, channels, height, width), rectified, to its output."""

    def forward(self, rectified: Tensor, scale: Tensor | None = None) -> Tensor:
        """The operation alone; ``scale``, a scalar, multiplies the result."""
        return self.together([self], rectified, None if scale is None else [scale])

    @classmethod
    @abstractmethod
    def together(cls, operations: Sequence[Any], x: Tensor, scales: Sequence[Tensor] | None) -> Tensor:
        """Operations of one kind, each on its own share of the channels of ``x``, which is rectified already."""


class DilatedConvolution(WeightedOperation):
    """Depthwise kxk with dilation 2, pointwise, batch norm."""

    def __init__(self, channels: int, kernel: int, stride: int, norm: str = "batch") -> None:
        super().__init__()
        self.depthwise = Depthwise(channels, kernel, stride, dilation=2)
        self.pointwise = Pointwise(channels, channels)
        self.norm = make_norm(channels, norm)

    @classmethod
    def together(cls, operations: Sequence[Any], x: Tensor, scales: Sequence[Tensor] | None) -> Tensor:
        """See WeightedOperation."""
        x = Depthwise.together([each.depthwise for each in operations], x)
        x = Pointwise.together([each.pointwise for each in operations], x)
        return normalise_together([each.norm for each in operations], x, scales)


class SeparableConvolution(WeightedOperation):
    """Depthwise kxk, pointwise, batch norm, ReLU, and the same once more with stride 1."""

    def __init__(self, channels: int, kernel: int, stride: int, norm: str = "batch") -> None:
        super().__init__()
        self.depthwise1 = Depthwise(channels, kernel, stride)
        self.pointwise1 = Pointwise(channels, channels)
        self.norm1 = make_norm(channels, norm)
        self.depthwise2 = Depthwise(channels, kernel, 1)
        self.pointwise2 = Pointwise(channels, channels)
        self.norm2 = make_norm(channels, norm)

    @classmethod
    def together(cls, operations: Sequence[Any], x: Tensor, scales: Sequence[Tensor] | None) -> Tensor:
        """See WeightedOperation."""
        x = Depthwise.together([each.depthwise1 for each in operations], x)
        x = Pointwise.together([each.pointwise1 for each in operations], x)
        x = F.relu(normalise_together([each.norm1 for each in operations], x, None), inplace=True)
        x = Depthwise.together([each.depthwise2 for each in operations], x)
        x = Pointwise.together([each.pointwise2 for each in operations], x)
        return normalise_together([each.norm2 for each in operations], x, scales)


class FactorizedReduce(WeightedOperation):
    """Halve the map: two 1x1 convolutions of stride 2, the second on the input shifted by one pixel.

    A map of odd side is padded by one zero row and column for the shifted branch, so that both halves agree.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: str = "batch") -> None:
        super().__init__()
        self.even = Pointwise(in_channels, out_channels // 2)
        self.odd = Pointwise(in_channels, out_channels - out_channels // 2)
        self.norm = make_norm(out_channels, norm)

    @classmethod
    def together(cls, operations: Sequence[Any], x: Tensor, scales: Sequence[Tensor] | None) -> Tensor:
        """See WeightedOperation."""
        parts = torch.split(x, x.shape[1] // len(operations), dim=1)
        halves = torch.cat([half for each, part in zip(operations, parts, strict=True) for half in each.halve(part)], 1)
        return normalise_together([each.norm for each in operations], halves, scales)

    def halve(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both halves of the output channels before batch norm; height and width halved and rounded up."""
        height, width = x.shape[-2:]
        shifted = F.pad(x, (0, width % 2, 0, height % 2))[:, :, 1:, 1:]
        return self.even(x[:, :, ::2, ::2]), self.odd(shifted[:, :, ::2, ::2])


class Preprocess(nn.Module):
    """Pointwise convolution and batch norm: brings a cell's input to the cell's channels."""

    def __init__(self, in_channels: int, out_channels: int, norm: str = "batch") -> None:
        super().__init__()
        self.pointwise = Pointwise(in_channels, out_channels)
        self.norm = make_norm(out_channels, norm)

    def forward(self, rectified: Tensor) -> Tensor:
        return self.norm(self.pointwise(rectified))


class Pooling(nn.Module):
    """3x3 max or average pooling, then the norm.

    DARTS' final network (``affine``) drops this one; a network that is to compute what the supernet computed keeps it.
    """

    def __init__(self, name: str, channels: int, stride: int, norm: str = "batch") -> None:
        super().__init__()
        self.is_max = name == "max_pool_3x3"
        self.stride = stride
        self.norm = nn.Identity() if norm == "affine" else make_norm(channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_max:
            return self.norm(F.max_pool2d(x, 3, self.stride, padding=1))
        return self.norm(F.avg_pool2d(x, 3, self.stride, padding=1, count_include_pad=False))


def make_weighted_operation(name: str, channels: int, stride: int, norm: str = "batch") -> WeightedOperation | None:
    """The module of an operation with weights of its own, None for one without (none, pooling, identity).

    ``norm`` as in SpaceSpec.
    """
    if name.startswith("sep_conv"):
        return SeparableConvolution(channels, int(name[-1]), stride, norm)
    if name.startswith("dil_conv"):
        return DilatedConvolution(channels, int(name[-1]), stride, norm)
    if name == "skip_connect" and stride == 2:
        return FactorizedReduce(channels, channels, norm)
    return None
