"""The plain form of the supernet and of its search step: what every benchmark compares with, and an oracle in tests.

One module per operation per edge, as in DARTS (quark0/darts, model_search.py): channels-first, eager, nothing shared
between edges, ``none`` computed as a product with zero, a deep copy of the model for the inner step, and optimisers
that go through the parameters one by one. Nothing of fedmetanas_core computes anything here; only the geometry and
the names of weights come from there.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.spec import CELL_KINDS, PRIMITIVES, STEM_STRIDE, CellGeometry, SpaceSpec

EPSILON = 1e-5


class Zero(nn.Module):
    """``none``: zeros of the right shape."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride] * 0.0


class FactorizedReduce(nn.Module):
    """ReLU, two 1x1 convolutions of stride 2 on the map and on the map shifted by one pixel, batch norm."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(in_channels, out_channels // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(in_channels, out_channels - out_channels // 2, 1, 2, bias=False)
        self.norm = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        padded = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
        return self.norm(torch.cat([self.even(x), self.odd(padded[:, :, 1:, 1:])], dim=1))


def norm(channels: int, affine: bool = False) -> nn.BatchNorm2d:
    """Batch norm that always uses the batch's own statistics."""
    return nn.BatchNorm2d(channels, eps=EPSILON, affine=affine, track_running_stats=False)


def convolution(channels: int, kernel: int, stride: int, dilation: int) -> list[nn.Module]:
    """ReLU, depthwise and pointwise convolution, batch norm."""
    padding = dilation * (kernel - 1) // 2
    depthwise = nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False)
    return [nn.ReLU(), depthwise, nn.Conv2d(channels, channels, 1, bias=False), norm(channels)]


def operation(name: str, channels: int, stride: int) -> nn.Module:
    """One primitive on one edge."""
    if name == "none":
        return Zero(stride)
    if name == "max_pool_3x3":
        return nn.Sequential(nn.MaxPool2d(3, stride, 1), norm(channels))
    if name == "avg_pool_3x3":
        return nn.Sequential(nn.AvgPool2d(3, stride, 1, count_include_pad=False), norm(channels))
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels)
    kernel = int(name[-1])
    if name.startswith("dil"):
        return nn.Sequential(*convolution(channels, kernel, stride, 2))
    return nn.Sequential(*convolution(channels, kernel, stride, 1), *convolution(channels, kernel, 1, 1))


class MixedEdge(nn.ModuleDict):
    """All alive operations of one edge, each weighed with its probability (paper, equation 2)."""

    def __init__(self, channels: int, stride: int, alive: Sequence[bool]) -> None:
        names = [name for name, is_alive in zip(PRIMITIVES, alive, strict=True) if is_alive]
        super().__init__({name: operation(name, channels, stride) for name in names})

    def forward(self, x: Tensor, probabilities: Tensor) -> Tensor:
        terms = [probabilities[PRIMITIVES.index(name)] * module(x) for name, module in self.items()]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total


class Cell(nn.Module):
    """One cell; every node is the mean over its input pairs, weighed with their probabilities (paper, equation 8)."""

    def __init__(self, geometry: CellGeometry, spec: SpaceSpec, mask: Sequence[Sequence[bool]]) -> None:
        super().__init__()
        self.spec = spec
        before, channels = geometry.channels_before_previous, geometry.channels
        self.preprocess0: nn.Module = (
            FactorizedReduce(before, channels) if geometry.after_reduction else preprocess(before, channels)
        )
        self.preprocess1 = preprocess(geometry.channels_previous, channels)
        self.edges = nn.ModuleDict()
        for node in range(spec.num_nodes):
            for source in range(2 + node):
                index = spec.edge(node, source)
                if any(mask[index]):
                    stride = 2 if geometry.kind == "reduce" and source < 2 else 1
                    self.edges[str(index)] = MixedEdge(channels, stride, mask[index])

    def forward(self, s0: Tensor, s1: Tensor, operations: Tensor, pairs: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node in range(self.spec.num_nodes):
            edges = [self.spec.edge(node, source) for source in range(2 + node)]
            alive = [index for index in edges if str(index) in self.edges]
            mixed = {e: self.edges[str(e)](states[e - edges[0]], operations[e]) for e in alive}
            total: Tensor | None = None
            for position, sources in enumerate(self.spec.pairs(node)):
                chosen = [mixed[edges[source]] for source in sources if edges[source] in mixed]
                if len(chosen) == 2:  # otherwise a pruned pair
                    term = pairs[node, position] * (chosen[0] + chosen[1])
                    total = term if total is None else total + term
            assert total is not None, "a node without an alive pair"
            states.append(total)
        return torch.cat(states[2:], dim=1)


def preprocess(in_channels: int, channels: int) -> nn.Sequential:
    """ReLU, 1x1 convolution, batch norm."""
    return nn.Sequential(nn.ReLU(), nn.Conv2d(in_channels, channels, 1, bias=False), norm(channels))


def stem(spec: SpaceSpec) -> nn.Sequential:
    """As fedmetanas_core.space.supernet.Stem, so that the names of its weights are the same."""

    def layer(into: int, out: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(into, out, 3, stride, 1, bias=False), norm(out, affine=True)]

    full = spec.stem_channels
    if spec.stem != "imagenet":
        return nn.Sequential(*layer(spec.in_channels, full, STEM_STRIDE[spec.stem]))
    return nn.Sequential(
        *layer(spec.in_channels, full // 2, 2),
        nn.ReLU(),
        *layer(full // 2, full, 2),
        nn.ReLU(),
        *layer(full, full, 2),
    )


class ReferenceSupernet(nn.Module):
    """Logits of images (batch, channels, height, width) for given logits of operations and of input pairs."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.spec = spec = architecture.spec
        masks = architecture.operation_mask.tolist()
        self.stem = stem(spec)
        self.cells = nn.ModuleList(Cell(cell, spec, masks[CELL_KINDS.index(cell.kind)]) for cell in spec.cells)
        self.classifier = nn.Linear(spec.out_channels, spec.num_classes)

    def forward(self, images: Tensor, operations: Tensor, pairs: Tensor) -> Tensor:
        """``operations`` (2, edges, 8) and ``pairs`` (2, nodes, pairs) are probabilities."""
        s0 = s1 = self.stem(images)
        for cell, geometry in zip(self.cells, self.spec.cells, strict=True):
            kind = CELL_KINDS.index(geometry.kind)
            s0, s1 = s1, cell(s0, s1, operations[kind], pairs[kind])
        return self.classifier(s1.mean(dim=(2, 3)))

    def load(self, weights: dict[str, Tensor]) -> None:
        """Copy weights in by the names they have in fedmetanas_core.space.supernet.Supernet."""
        own = dict(self.named_parameters())
        for name, parameter in own.items():
            with torch.no_grad():
                parameter.copy_(weights[product_name(name)])
        if missing := set(weights) - set(map(product_name, own)):
            raise ValueError(f"the plain supernet has no place for {sorted(missing)}")

    def export(self) -> dict[str, Tensor]:
        """The weights under those names."""
        return {product_name(name): parameter.detach() for name, parameter in self.named_parameters()}


POSITIONS = {"1": "depthwise", "2": "pointwise", "5": "depthwise2", "6": "pointwise2"}


def product_name(name: str) -> str:
    """The name in the product of a parameter here: convolutions inside sequences are named there by what they do."""
    parts = name.split(".")
    if parts[0] != "cells" or not parts[-2].isdigit():
        return name
    if parts[2].startswith("preprocess"):
        return ".".join([*parts[:3], "pointwise", "weight"])
    called, position = parts[-3], parts[-2]
    twice = called.startswith("sep") and position in ("1", "2")
    return ".".join([*parts[:-2], POSITIONS[position] + ("1" if twice else ""), "weight"])


Noise = tuple[Tensor, Tensor]


def probabilities(logits: Sequence[Tensor], masks: Sequence[Tensor], noise: Noise, temperature: float) -> list[Tensor]:
    """Gumbel-Softmax (paper, equation 1) over the alive entries of every row; zeros in rows that have none."""
    found = []
    for row, mask, gumbel in zip(logits, masks, noise, strict=True):
        scores = ((torch.log_softmax(row, -1) + gumbel) / temperature).masked_fill(~mask, -1e30)
        found.append(torch.softmax(scores, -1) * mask)
    return found


@dataclass
class ReferenceLearner:
    """The first-order MAML task (paper, equations 3 to 5, joint step) with one inner step and deep copies."""

    model: ReferenceSupernet
    logits: list[nn.Parameter]
    masks: list[Tensor]
    temperature: float
    weight_optimizer: torch.optim.Optimizer
    alpha_optimizer: torch.optim.Optimizer
    inner_weight_rate: float
    inner_alpha_rate: float
    clip: float

    def task(self, support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor], noises: tuple[Noise, Noise]) -> float:
        """One inner step on a copy, the query loss at what it gives, its gradient applied here; the query loss."""
        learner, logits = deepcopy(self.model), [nn.Parameter(each.detach().clone()) for each in self.logits]
        inner_weights = torch.optim.SGD(learner.parameters(), self.inner_weight_rate, foreach=False)
        inner_alphas = torch.optim.Adam(logits, self.inner_alpha_rate, betas=(0.0, 0.999), foreach=False)
        self._loss(learner, logits, support, noises[0]).backward()
        nn.utils.clip_grad_norm_(learner.parameters(), self.clip, foreach=False)
        inner_weights.step()
        inner_alphas.step()
        inner_weights.zero_grad()
        inner_alphas.zero_grad()
        loss = self._loss(learner, logits, query, noises[1])
        loss.backward()
        for own, adapted in zip(
            (*self.model.parameters(), *self.logits), (*learner.parameters(), *logits), strict=True
        ):
            own.grad = adapted.grad
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip, foreach=False)
        self.weight_optimizer.step()
        self.alpha_optimizer.step()
        return float(loss.detach())

    def _loss(
        self, model: ReferenceSupernet, logits: Sequence[Tensor], batch: tuple[Tensor, Tensor], noise: Noise
    ) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images, *probabilities(logits, self.masks, noise, self.temperature)), labels)
