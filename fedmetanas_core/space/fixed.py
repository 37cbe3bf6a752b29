"""Networks in which nothing is searched: the fixed models of the paper's Table 1."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.edge_weights import EdgeWeights
from fedmetanas_core.space.operations import BatchNorm
from fedmetanas_core.space.spec import SpaceSpec

# The second is the fairer comparison on small images: strides 1 where the model has its first two of 2, so that 32x32
# pixels leave the last layer a 4x4 map instead of a single pixel.
FIXED_MODELS = ("mobilenet_v3_large", "mobilenet_v3_large_s4")
EPSILON = 1e-3  # of its batch norms (torchvision)
LINEAR_DEVIATION = 0.01  # of a fresh linear layer's weights (torchvision)


@dataclass(frozen=True)
class FixedSpec:
    """A model by name and what fixes its shapes; seen as a search space, one with no choice in it."""

    name: str
    in_channels: int
    num_classes: int
    height: int
    width: int

    groups: ClassVar[tuple[str, ...]] = ()
    num_edges: ClassVar[int] = 0
    num_nodes: ClassVar[int] = 0
    max_pairs: ClassVar[int] = 0

    def candidate_pairs(self, node: int) -> list[tuple[int, int]]:
        """None: there are no nodes."""
        return []

    def edge(self, node: int, source: int) -> int:
        """There are no edges to number."""
        raise IndexError(f"{self.name} has no edges")


Space = SpaceSpec | FixedSpec


class PixelConv2d(nn.Conv2d):
    """A convolution of odd kernel, padded by half of it with zeros: only its middle touches a map of one pixel.

    On small images most of MobileNet's layers work on a single pixel, where torch's convolutions, a depthwise one above
    all, take several times as long as this product.
    """

    @classmethod
    def like(cls, layer: nn.Conv2d) -> "PixelConv2d":
        """The same layer with weights of its own; assertions hold what a single pixel needs."""
        height, width = layer.kernel_size
        assert height % 2 == width % 2 == 1, f"the kernel of {layer} has no middle"
        assert layer.padding_mode == "zeros", f"{layer} pads with more than zeros"
        assert layer.padding == (height // 2, width // 2), f"{layer} does not keep its map"
        assert layer.dilation == (1, 1), f"{layer} has gaps"
        return cls(
            layer.in_channels,
            layer.out_channels,
            (height, width),
            cast(tuple[int, int], layer.stride),
            padding=(height // 2, width // 2),
            groups=layer.groups,
            bias=layer.bias is not None,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to maps of the same size over the stride."""
        depthwise = self.groups == self.in_channels == self.out_channels
        if x.shape[-2:] != (1, 1) or not (depthwise or self.groups == 1):
            return super().forward(x)
        kernel = self.weight.flatten(2)  # its middle is taken only where there is more: a gradient's zeros take time
        middle = kernel.squeeze(2) if kernel.shape[2] == 1 else kernel[:, :, kernel.shape[2] // 2]
        pixel = x.flatten(1)
        if not depthwise:
            return F.linear(pixel, middle, self.bias)[:, :, None, None]
        pixel = pixel * middle[:, 0].to(pixel.dtype)  # under autocast the map is of the smaller type
        return (pixel if self.bias is None else pixel + self.bias)[:, :, None, None]


class FixedNetwork(TrainableNetwork):
    """torchvision's MobileNetV3-Large, not pretrained (Howard et al. 2019)."""

    head = "classifier.3."

    def __init__(self, spec: FixedSpec, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from torchvision.models import mobilenet_v3_large  # half a second, which no other method should pay

        super().__init__()
        self.spec = spec
        norm = partial(BatchNorm, affine=True, epsilon=EPSILON)
        with torch.device("meta"):
            model = mobilenet_v3_large(weights=None, num_classes=spec.num_classes, norm_layer=norm)
            first = model.features[0][0]
            stride = 1 if spec.name.endswith("_s4") else 2
            model.features[0][0] = nn.Conv2d(spec.in_channels, first.out_channels, 3, stride, padding=1, bias=False)
            for name, layer in list(model.named_modules()):
                if isinstance(layer, nn.Conv2d):
                    model.set_submodule(name, PixelConv2d.like(layer))
        self.features, self.pool, self.classifier = model.features, model.avgpool, model.classifier
        if spec.name.endswith("_s4"):
            self._first_strided_block().stride = (1, 1)
        self.allocate(device, dtype)

    def _first_strided_block(self) -> nn.Conv2d:
        return next(
            module
            for block in list(self.features)[1:]
            for module in block.modules()
            if isinstance(module, nn.Conv2d) and module.stride == (2, 2)
        )

    def initialise(self, generator: torch.Generator) -> None:
        """As torchvision does: He's normal draw by fan-out, small linear layers, no biases."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 1:
                    owner = self.get_submodule(name.rpartition(".")[0])
                    parameter.fill_(1.0 if isinstance(owner, BatchNorm) and name.endswith("weight") else 0.0)
                    continue
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                fan_out = parameter.shape[0] * parameter[0, 0].numel()
                if parameter.dim() == 4:  # torch counts the fan-out of a grouped convolution so, too
                    parameter.copy_(draw * (2.0 / fan_out) ** 0.5)
                else:
                    parameter.copy_(draw * LINEAR_DEVIATION)
            for name, buffer in self.named_buffers():
                buffer.fill_(1.0 if name.endswith("running_var") else 0.0)

    def forward(self, x: Tensor, edge_weights: EdgeWeights | None = None) -> Tensor:
        """Logits (batch, classes) of normalised images (batch, channels, height, width); there are no edges to weigh.

        Dropout, in training, draws from torch's global generator.
        """
        maps = self.features(x.contiguous(memory_format=torch.channels_last))
        logits = self.classifier(torch.flatten(self.pool(maps), 1))
        if self.moments is not None and self.training:
            self.moments.add(len(x))
        return cast(Tensor, logits)
