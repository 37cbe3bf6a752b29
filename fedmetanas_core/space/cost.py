"""What a network costs: multiply-adds per image, parameters, and bytes of the payload."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from fedmetanas_core.space.operations import Pointwise
from fedmetanas_core.space.spec import SpaceSpec
from fedmetanas_core.space.supernet import Supernet

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """``macs`` per image (convolutions and the classifier), ``parameters``, and floats of running statistics."""

    macs: int
    parameters: int
    statistics: int

    @property
    def payload_bytes(self) -> int:
        """Weights and statistics as float32, without the architecture's few logits."""
        return FLOAT_BYTES * (self.parameters + self.statistics)


def measure_cost(spec: SpaceSpec, operation_mask: Tensor) -> Cost:
    """The cost of one pass through the supernet with these operations alive, counted on shapes alone."""
    supernet = Supernet(spec, operation_mask, device="meta").eval()
    macs = 0

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Conv2d):
            kernel = prod(module.kernel_size) * module.in_channels // module.groups
            macs += prod(output.shape[1:]) * kernel
        elif isinstance(module, Pointwise):
            macs += prod(output.shape[1:]) * module.in_channels
        elif isinstance(module, nn.Linear):
            macs += module.in_features * module.out_features

    for module in supernet.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        supernet(torch.empty(1, spec.in_channels, spec.height, spec.width, device="meta"))
    return Cost(macs, supernet.weights.numel(), supernet.statistics.numel())
