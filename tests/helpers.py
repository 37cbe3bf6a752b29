"""Small spaces, random states, and a supernet written out plainly, against which the real one is judged."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmetanas_core.data.datasets import load_dataset
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.search.relaxation import draw_noise, relax
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.edge_weights import EdgeWeights
from fedmetanas_core.space.operations import BatchNorm
from fedmetanas_core.space.spec import CELL_KINDS, NONE, PRIMITIVES, SpaceSpec
from fedmetanas_core.space.supernet import Cell, Supernet


def small_spec(
    init_channels: int = 2,
    num_cells: int = 3,
    num_nodes: int = 2,
    in_channels: int = 1,
    num_classes: int = 3,
    side: int = 8,
) -> SpaceSpec:
    """A space that takes milliseconds; three cells are a normal one and two reductions in a row."""
    return SpaceSpec(init_channels, num_cells, num_nodes, in_channels, num_classes, side, side)


def stream(seed: int) -> torch.Generator:
    """A generator of this seed."""
    return torch.Generator().manual_seed(seed)


def set_logits(architecture: Architecture, generator: torch.Generator, scale: float = 1.0) -> Architecture:
    """Draw all logits, masked ones too, from a normal distribution."""
    with torch.no_grad():
        for logits, _ in architecture.rows():
            logits.copy_(scale * torch.randn(logits.shape, generator=generator, dtype=logits.dtype))
    return architecture


def random_architecture(
    spec: SpaceSpec, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Architecture:
    """An unpruned architecture with normal logits."""
    return set_logits(Architecture(spec).to(dtype), stream(seed), scale)


def noisy(
    architecture: Architecture,
    temperature: float,
    noise_scale: float,
    generator: torch.Generator,
    sample: str = "per_type",
) -> EdgeWeights:
    """A draw of the Gumbel-Softmax."""
    device = architecture.operation_logits.device
    operations, pairs = (each.to(device) for each in draw_noise(architecture, noise_scale, generator, sample))
    return relax(architecture, temperature, (operations, pairs), sample)


def pick_one(mask: Tensor, generator: torch.Generator) -> Tensor:
    """One alive entry of every row that has one, at random."""
    scores = torch.rand(mask.shape, generator=generator).masked_fill(~mask, -1.0)
    return F.one_hot(scores.argmax(-1), mask.shape[-1]).bool() & mask


def random_masks(architecture: Architecture, generator: torch.Generator, keep: float) -> Architecture:
    """Prune at random with this chance of staying, but keep a pair per node and a real operation per edge."""
    (_, operation_mask), (_, input_mask) = architecture.rows()
    real = operation_mask.clone()
    real[..., NONE] = False
    operations = (torch.rand(real.shape, generator=generator) < keep) | pick_one(real, generator)
    pairs = (torch.rand(input_mask.shape, generator=generator) < keep) | pick_one(input_mask, generator)
    architecture.restrict(operations, pairs)
    return architecture


def random_one_hot(architecture: Architecture, generator: torch.Generator) -> Architecture:
    """Prune to one random pair per node and one random real operation on its edges."""
    return random_masks(architecture, generator, keep=-1.0)


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Random parameters, and running statistics as if something had been trained."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.5)
        for name, buffer in module.named_buffers():
            draw = torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype)
            buffer.copy_(0.5 + draw if name.endswith("running_var") else draw - 0.5)


def random_supernet(spec: SpaceSpec, mask: Tensor, seed: int, dtype: torch.dtype = torch.float64) -> Supernet:
    """A supernet with random weights and statistics, in evaluation mode."""
    supernet = Supernet(spec, mask, dtype=dtype)
    randomise(supernet, stream(seed))
    return supernet.eval()  # type: ignore[return-value]


def plain_norm(x: Tensor, norm: BatchNorm) -> Tensor:
    """Batch norm by its formula: with the batch's own biased moments in training, else with the running ones."""
    if norm.training:
        mean = x.mean(dim=(0, 2, 3))
        variance = (x - mean.view(1, -1, 1, 1)).square().mean(dim=(0, 2, 3))
    else:
        mean, variance = norm.running_mean, norm.running_var
    y = (x - mean.view(1, -1, 1, 1)) / (variance.view(1, -1, 1, 1) + 1e-5).sqrt()
    if norm.weight is not None and norm.bias is not None:
        y = y * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    return y


def plain_reduce(x: Tensor, even: Tensor, odd: Tensor, norm: BatchNorm) -> Tensor:
    """FactorizedReduce with its ReLU: pixels (0, 0), (2, 0), ... and (1, 1), (3, 1), ..., zeros beyond the edge."""
    x = F.relu(x)
    padded = F.pad(x, (0, 1, 0, 1))
    height, width = (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2
    first = F.conv2d(x[:, :, ::2, ::2], even)
    second = F.conv2d(padded[:, :, 1::2, 1::2][:, :, :height, :width], odd)
    return plain_norm(torch.cat((first, second), dim=1), norm)


def plain_operation(name: str, module: nn.Module | None, x: Tensor, stride: int) -> Tensor:
    """One primitive by its definition, ReLU included, with the weights of ``module``."""
    if name == "none":
        return torch.zeros_like(x[:, :, ::stride, ::stride])
    if name == "skip_connect":
        if stride == 1:
            return x
        return plain_reduce(x, module.even.weight, module.odd.weight, module.norm)  # type: ignore[union-attr, arg-type]
    if name == "max_pool_3x3":
        return plain_norm(F.max_pool2d(x, 3, stride, 1), module.norm)  # type: ignore[union-attr, arg-type]
    if name == "avg_pool_3x3":
        ones = torch.ones_like(x)
        total = F.avg_pool2d(x, 3, stride, 1, divisor_override=1)
        return plain_norm(
            total / F.avg_pool2d(ones, 3, stride, 1, divisor_override=1),
            module.norm,  # type: ignore[union-attr, arg-type]
        )
    kernel, channels = int(name[-1]), x.shape[1]

    def block(y: Tensor, depthwise: Tensor, pointwise: Tensor, norm: BatchNorm, step: int, dilation: int) -> Tensor:
        padding = (kernel - 1) // 2 * dilation
        y = F.conv2d(F.relu(y), depthwise, None, step, padding, dilation, groups=channels)
        return plain_norm(F.conv2d(y, pointwise), norm)

    assert module is not None
    weights, children = dict(module.named_parameters()), dict(module.named_children())
    if name.startswith("dil"):
        return block(x, weights["depthwise.weight"], weights["pointwise.weight"], children["norm"], stride, 2)  # type: ignore[arg-type]
    x = block(x, weights["depthwise1.weight"], weights["pointwise1.weight"], children["norm1"], stride, 1)  # type: ignore[arg-type]
    return block(x, weights["depthwise2.weight"], weights["pointwise2.weight"], children["norm2"], 1, 1)  # type: ignore[arg-type]


def plain_cell(cell: Cell, reduces: bool, after_reduction: bool, spec: SpaceSpec, s0: Tensor, s1: Tensor,
               operations: Tensor, pairs: Tensor) -> Tensor:  # fmt: skip
    """Equation 8 as it stands: x_j = sum over pairs p = (i1, i2) of Zin_p (m_i1 + m_i2)."""
    first, second = cell.preprocess0, cell.preprocess1
    if after_reduction:
        states = [plain_reduce(s0, first.even.weight, first.odd.weight, first.norm)]  # type: ignore[union-attr, arg-type]
    else:
        states = [plain_norm(F.conv2d(F.relu(s0), first.pointwise.weight), first.norm)]  # type: ignore[union-attr, arg-type]
    states.append(plain_norm(F.conv2d(F.relu(s1), second.pointwise.weight), second.norm))  # type: ignore[union-attr, arg-type]
    edge = 0
    for node in range(spec.num_nodes):
        mixed = []
        for source in range(2 + node):
            stride = 2 if reduces and source < 2 else 1
            modules = dict(dict(cell.edges).get(str(edge), {}))
            pools = dict(dict(cell.pools).get(str(source), {}))
            total: Tensor | float = 0.0
            for index, name in enumerate(PRIMITIVES):
                owner = pools if "pool" in name else modules
                module = owner.get(name)
                if module is None and not (name == "none" or (name == "skip_connect" and stride == 1)):
                    assert operations[edge, index] == 0, f"{name} on edge {edge} is missing"
                    continue
                total = total + operations[edge, index] * plain_operation(name, module, states[source], stride)
            mixed.append(total)
            edge += 1
        value: Tensor | float = 0.0
        for pair, (one, other) in enumerate(combinations(range(2 + node), 2)):
            value = value + pairs[node, pair] * (mixed[one] + mixed[other])
        states.append(value)  # type: ignore[arg-type]
    return torch.cat(states[2:], dim=1)


def plain_supernet(supernet: Supernet, x: Tensor, operations: Tensor, pairs: Tensor) -> Tensor:
    """The whole network by its definition, from row-wise weights (2, edges, 8) and (2, nodes, max pairs)."""
    spec = supernet.spec
    convolution, norm = supernet.stem
    s0 = s1 = plain_norm(F.conv2d(x, convolution.weight, padding=1), norm)  # type: ignore[arg-type]
    thirds = (spec.num_cells // 3, 2 * spec.num_cells // 3)
    for index, cell in enumerate(supernet.cells):
        reduces, after = index in thirds, index - 1 in thirds
        kind = CELL_KINDS.index("reduce" if reduces else "normal")
        s0, s1 = s1, plain_cell(cell, reduces, after, spec, s0, s1, operations[kind], pairs[kind])  # type: ignore[arg-type]
    return F.linear(s1.mean(dim=(2, 3)), supernet.classifier.weight, supernet.classifier.bias)


def dataset_refusal(name: Any, data_root: Path | str = "nowhere", **options: Any) -> str:
    """The message with which load_dataset refuses, after checking its form."""
    with pytest.raises(RefusalError) as refused:
        load_dataset(str(name), str(data_root), 0, **options)
    message = str(refused.value)
    assert "\n" not in message
    assert "; " in message  # what is wrong; what to do
    return message
