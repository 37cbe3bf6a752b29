"""What a network costs: multiply-adds per image, parameters, and bytes of the payload."""

from dataclasses import dataclass
from math import ceil

from torch import Tensor, nn

from fedmetanas_core.space.spec import SpaceSpec
from fedmetanas_core.space.supernet import Cell, Supernet

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
    """The cost of one pass through the supernet with these operations alive, from shapes alone.

    Every weight of a convolution is used once for each pixel that the convolution puts out.
    """
    supernet = Supernet(spec, operation_mask, device="meta")
    height, width, macs = spec.height, spec.width, 0
    for layer in supernet.stem:
        if isinstance(layer, nn.Conv2d):
            height, width = ceil(height / layer.stride[0]), ceil(width / layer.stride[1])
            macs += _weights(layer) * height * width
    for cell, geometry in zip(supernet.cells, spec.cells, strict=True):
        assert isinstance(cell, Cell)
        macs += (_weights(cell.preprocess0) + _weights(cell.preprocess1)) * height * width
        if geometry.kind == "reduce":
            height, width = ceil(height / 2), ceil(width / 2)
        macs += _weights(cell.edges) * height * width
    macs += supernet.classifier.weight.numel()
    return Cost(macs, supernet.weights.numel(), supernet.statistics.numel())


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
