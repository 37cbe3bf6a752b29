"""The candidate operations of an edge (DARTS, operations.py), each from C channels to C channels.

Every operation with weights begins with ReLU in DARTS. Here the cell applies that ReLU once per source and hands the
result to all operations that read it, so these modules take their input already rectified; pooling takes it as it is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-5


class Moments:
    """Mean and second moment per channel, accumulated over batches of any size in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Add a batch of shape (batch, channels, height, width)."""
        variance, mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
        fraction = len(x) / (self.count + len(x))
        self.count += len(x)
        self.mean = self.mean + fraction * (mean - self.mean)
        self.square = self.square + fraction * (variance + mean.square() - self.square)

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """The moments of everything added so far; the variance is the biased one, of the whole population."""
        if not isinstance(self.mean, Tensor) or not isinstance(self.square, Tensor):
            raise ValueError("no batch was added")
        return self.mean, (self.square - self.mean.square()).clamp_min(0.0)


class BatchNorm(nn.Module):
    """Batch normalisation whose running statistics change only when somebody collects them.

    During local search the statistics of a batch belong to adapted weights and to a noisy architecture, so updating
    running averages there would record the wrong network. While ``collector`` is set, a training pass adds its
    moments to it; ``store`` then writes them into the buffers.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, affine: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.collector: Moments | None = None

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Normalise (batch, channels, height, width); ``scale``, a scalar, multiplies the result (not if affine).

        Passing the mixture weight here, as batch norm's own scale, saves a pass over the activations and gives the
        gradient of the mixture weight for nothing.
        """
        # Dense on purpose: torch's channels-last backward reads this vector without regard to its stride.
        weight = self.weight if scale is None else scale.expand(x.shape[1]).contiguous()
        if self.training:
            if self.collector is not None:
                self.collector.add(x)
            return F.batch_norm(x, None, None, weight, self.bias, True, 0.0, EPSILON)
        return F.batch_norm(x, self.running_mean, self.running_var, weight, self.bias, False, 0.0, EPSILON)

    def store(self) -> None:
        """Write the collected moments into the running statistics and stop collecting."""
        if self.collector is None:
            raise ValueError("no moments are being collected")
        mean, variance = self.collector.mean_and_variance()
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)
        self.collector = None


def _depthwise(channels: int, kernel: int, stride: int, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False)


class Pointwise(nn.Module):
    """1x1 convolution without bias, as a matrix product over pixels.

    On channels-last tensors that is the same memory read in the same order, at a fraction of a convolution's fixed
    cost, which is most of the time on small maps.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)


class DilatedConvolution(nn.Module):
    """Depthwise kxk with dilation 2, pointwise, batch norm."""

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.depthwise = _depthwise(channels, kernel, stride, dilation=2)
        self.pointwise = Pointwise(channels, channels)
        self.norm = BatchNorm(channels)

    def forward(self, rectified: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.norm(self.pointwise(self.depthwise(rectified)), scale)


class SeparableConvolution(nn.Module):
    """Depthwise kxk, pointwise, batch norm, ReLU, and the same once more with stride 1."""

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.depthwise1 = _depthwise(channels, kernel, stride)
        self.pointwise1 = Pointwise(channels, channels)
        self.norm1 = BatchNorm(channels)
        self.depthwise2 = _depthwise(channels, kernel, 1)
        self.pointwise2 = Pointwise(channels, channels)
        self.norm2 = BatchNorm(channels)

    def forward(self, rectified: Tensor, scale: Tensor | None = None) -> Tensor:
        x = F.relu(self.norm1(self.pointwise1(self.depthwise1(rectified))), inplace=True)
        return self.norm2(self.pointwise2(self.depthwise2(x)), scale)


class FactorizedReduce(nn.Module):
    """Halve the map: two 1x1 convolutions of stride 2, the second on the input shifted by one pixel.

    A map of odd side is padded by one zero row and column for the shifted branch, so that both halves agree.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.even = Pointwise(in_channels, out_channels // 2)
        self.odd = Pointwise(in_channels, out_channels - out_channels // 2)
        self.norm = BatchNorm(out_channels)

    def forward(self, rectified: Tensor, scale: Tensor | None = None) -> Tensor:
        height, width = rectified.shape[-2:]
        shifted = F.pad(rectified, (0, width % 2, 0, height % 2))[:, :, 1:, 1:]
        halves = self.even(rectified[:, :, ::2, ::2]), self.odd(shifted[:, :, ::2, ::2])
        return self.norm(torch.cat(halves, dim=1), scale)


class Preprocess(nn.Module):
    """Pointwise convolution and batch norm: brings a cell's input to the cell's channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pointwise = Pointwise(in_channels, out_channels)
        self.norm = BatchNorm(out_channels)

    def forward(self, rectified: Tensor) -> Tensor:
        return self.norm(self.pointwise(rectified))


class Pooling(nn.Module):
    """3x3 max or average pooling, then batch norm.

    DARTS' final network drops this batch norm; a network that is to compute what the supernet computed must keep it.
    """

    def __init__(self, name: str, channels: int, stride: int) -> None:
        super().__init__()
        self.is_max = name == "max_pool_3x3"
        self.stride = stride
        self.norm = BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_max:
            return self.norm(F.max_pool2d(x, 3, self.stride, padding=1))
        return self.norm(F.avg_pool2d(x, 3, self.stride, padding=1, count_include_pad=False))


def make_weighted_operation(name: str, channels: int, stride: int) -> nn.Module | None:
    """The module of an operation with weights of its own, None for one without (none, pooling, identity)."""
    if name.startswith("sep_conv"):
        return SeparableConvolution(channels, int(name[-1]), stride)
    if name.startswith("dil_conv"):
        return DilatedConvolution(channels, int(name[-1]), stride)
    if name == "skip_connect" and stride == 2:
        return FactorizedReduce(channels, channels)
    return None
