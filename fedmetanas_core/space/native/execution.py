"""Run a supernet by the compiled code: the table that describes it, and its place in autograd."""

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedmetanas_core.space.flat import Layout
from fedmetanas_core.space.spec import PRIMITIVES, SpaceSpec

# Images of one call where nothing is kept for a way back: bounds the memory, and none of them depends on another.
IMAGES_AT_ONCE = 64
# What the C++ knows how to compute; a supernet that holds anything else runs by its modules.
COMPILED_OPERATIONS = frozenset(
    {
        *("none", "skip_connect", "max_pool_3x3", "avg_pool_3x3"),
        *("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"),
    }
)


class Work(Protocol):
    """One operation out of one source, as space.supernet.Task."""

    @property
    def name(self) -> str:
        """A primitive."""
        ...

    @property
    def nodes(self) -> Sequence[int]:
        """The nodes it feeds."""
        ...

    @property
    def positions(self) -> Sequence[int]:
        """Where each one's mixture weight lies among the edges' operations."""
        ...


class Program:
    """A supernet's structure in the form that the compiled code reads.

    ``stem`` are its layers; ``work`` lists, by cell and source, the operations of all cells or of the first ones. The
    layouts say where weights and statistics lie in the flat tensors, ``head`` names the linear layer at the end.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        spec: SpaceSpec,
        stem: nn.Sequential,
        work: Sequence[Sequence[Sequence[Work]]],
        weights: Layout,
        statistics: Layout,
        head: str = "classifier",
    ) -> None:
        self.library, self.spec = library, spec
        self.num_statistics = statistics.size
        self._weights, self._statistics = _offsets(weights), _offsets(statistics)
        self._plan: int | None = None
        table = np.array(
            [
                *(spec.in_channels, spec.height, spec.width, spec.num_classes, spec.num_nodes),
                *(weights.size, statistics.size),
                *(self._weights[f"{head}.weight"], self._weights[f"{head}.bias"]),
                *self._stem(stem),
                *self._cells(work),
            ],
            dtype=np.int64,
        )
        self._plan = library.fmn_plan(table.ctypes.data)

    def __del__(self) -> None:
        if getattr(self, "_plan", None) is not None:
            self.library.fmn_forget_plan(self._plan)

    def begin(self, dtype: torch.dtype, images: int, training: bool, keeps: bool) -> "Pass":
        """One pass over so many images; ``keeps`` what a way back needs."""
        return Pass(
            self, self.library.fmn_run(self._plan, int(dtype == torch.float64), images, int(training), int(keeps))
        )

    def _norm(self, name: str) -> list[int]:
        """Where mean, variance, scale and shift lie; -1 for what the norm does not have."""
        moments = [self._statistics.get(f"{name}.{moment}", -1) for moment in ("running_mean", "running_var")]
        return moments + [self._weights.get(f"{name}.{part}", -1) for part in ("weight", "bias")]

    def _halving(self, name: str) -> list[int]:
        return [self._weights[f"{name}.even.weight"], self._weights[f"{name}.odd.weight"], *self._norm(f"{name}.norm")]

    def _pointwise(self, name: str) -> list[int]:
        return [self._weights[f"{name}.pointwise.weight"], *self._norm(f"{name}.norm")]

    def _stem(self, stem: nn.Sequential) -> list[int]:
        table, layers = [], 0
        for index, module in enumerate(stem):
            if isinstance(module, nn.Conv2d):
                norm = f"stem.{index + 1}"
                table += [
                    module.in_channels,
                    module.out_channels,
                    module.stride[0],
                    self._weights[f"stem.{index}.weight"],
                ]
                # The stem scales and shifts by itself.
                table += [self._weights[f"{norm}.weight"], self._weights[f"{norm}.bias"], *self._norm(norm)[:2], -1, -1]
                layers += 1
        return [layers, *table]

    def _cells(self, work: Sequence[Sequence[Sequence[Work]]]) -> list[int]:
        table = [len(work)]
        for index, (cell, sources) in enumerate(zip(self.spec.cells[: len(work)], work, strict=True)):
            reduces = cell.kind == "reduce"
            table += [cell.channels, int(reduces), int(cell.after_reduction)]
            before = f"cells.{index}.preprocess0"
            table += self._halving(before) if cell.after_reduction else self._pointwise(before)
            table += self._pointwise(f"cells.{index}.preprocess1")
            for source, tasks in enumerate(sources):
                table += self._source(index, source, 2 if reduces and source < 2 else 1, tasks)
        return table

    def _source(self, cell: int, source: int, stride: int, tasks: Sequence[Work]) -> list[int]:
        convolutions, pools, skips = [], [], []
        first = cell * self.spec.num_edges * len(PRIMITIVES)  # each cell has mixture weights of its own here
        for task in tasks:
            ends = [(node, first + position) for node, position in zip(task.nodes, task.positions, strict=True)]
            names = [f"cells.{cell}.edges.{position // len(PRIMITIVES)}.{task.name}" for position in task.positions]
            if "conv" in task.name:
                convolutions += [
                    self._convolution(task.name, name, *end) for name, end in zip(names, ends, strict=True)
                ]
            elif task.name == "skip_connect":
                halves = [self._halving(name) if stride == 2 else [] for name in names]
                skips += [[*end, stride - 1, *half] for end, half in zip(ends, halves, strict=True)]
            else:
                norm = self._norm(f"cells.{cell}.pools.{source}.{task.name}.norm")
                is_max = int(task.name == "max_pool_3x3")
                pools.append([is_max, *norm, len(ends), *(value for end in ends for value in end)])
        groups = (convolutions, pools, skips)
        return [stride, *(value for group in groups for value in [len(group), *(v for row in group for v in row)])]

    def _convolution(self, operation: str, name: str, node: int, mix: int) -> list[int]:
        twice = operation.startswith("sep")
        row = [int(operation[-1]), 1 if twice else 2, int(twice), node, mix]
        for half in ("1", "2") if twice else ("",):
            row += [self._weights[f"{name}.depthwise{half}.weight"], self._weights[f"{name}.pointwise{half}.weight"]]
            row += self._norm(f"{name}.norm{half}")
        return row


class Pass:
    """The memory of one pass forward, which one pass back may use; given back when this object goes."""

    def __init__(self, program: Program, handle: int | None) -> None:
        self.program, self.handle = program, handle
        if handle is None:
            raise MemoryError("not enough memory for a pass of the supernet")

    def __del__(self) -> None:
        if self.handle is not None:
            self.program.library.fmn_forget_run(self.handle)

    def forward(
        self, images: Tensor, weights: Tensor, statistics: Tensor, mix: Tensor | None, moments: Tensor | None
    ) -> Tensor:
        """Logits (batch, classes). ``mix`` and ``moments`` are float64; ``mix`` must live as long as this object."""
        logits = images.new_empty(len(images), self.program.spec.num_classes)
        arguments = (images.contiguous(), weights, statistics, mix, logits, moments)
        _check(self.program.library.fmn_forward(self.handle, *map(_pointer, arguments)))
        return logits

    def backward(self, logit_gradient: Tensor, weight_gradient: Tensor, mix_gradient: Tensor | None) -> None:
        """Add the gradients of weights and of mixture weights to tensors of zeros."""
        arguments = (logit_gradient.contiguous(), weight_gradient, mix_gradient)
        _check(self.program.library.fmn_backward(self.handle, *map(_pointer, arguments)))


class _Compiled(torch.autograd.Function):
    """Logits of a program; the gradient of the images is not computed."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weights: Tensor,
        mix: Tensor | None,
        statistics: Tensor,
        program: Program,
        training: bool,
        moments: Tensor | None,
    ) -> Tensor:
        ctx.mix = None if mix is None else mix.detach().double().contiguous()
        ctx.running = program.begin(images.dtype, len(images), training, True)
        ctx.like = (weights, mix)
        return ctx.running.forward(images, weights.detach(), statistics, ctx.mix, moments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.running is None:
            raise RuntimeError("a pass of the supernet cannot go back a second time")
        weights, mix = ctx.like
        weight_gradient = torch.zeros_like(weights)
        mix_gradient = None if ctx.mix is None else torch.zeros_like(ctx.mix)
        ctx.running.backward(gradient, weight_gradient, mix_gradient)
        ctx.running = None
        return (
            *(None, weight_gradient, None if mix_gradient is None else mix_gradient.to(mix.dtype)),
            *(None, None, None, None),
        )


def execute(
    program: Program,
    images: Tensor,
    weights: Tensor,
    statistics: Tensor,
    mix: Tensor | None,
    training: bool,
    moments: Tensor | None = None,
) -> Tensor:
    """Logits (batch, classes), differentiable in ``weights`` and ``mix``.

    ``mix`` (cells, edges, 8) weighs every operation on every edge; None stands for ones. With ``training`` each batch
    norm normalises by the batch, and ``moments``, float64 and laid out as the statistics, receives what it used.
    """
    if torch.is_grad_enabled() and (weights.requires_grad or (mix is not None and mix.requires_grad)):
        logits: Tensor = _Compiled.apply(images, weights, mix, statistics, program, training, moments)
        return logits
    fixed = None if mix is None else mix.detach().double().contiguous()
    parts = [images] if training else torch.split(images, IMAGES_AT_ONCE)
    found = []
    for part in parts:
        running = program.begin(part.dtype, len(part), training, False)
        found.append(running.forward(part, weights.detach(), statistics, fixed, moments))
    return torch.cat(found)


def _offsets(layout: Layout) -> dict[str, int]:
    starts = [0, *accumulate(prod(shape) for _, shape in layout.entries)]
    return {name: start for (name, _), start in zip(layout.entries, starts, strict=False)}


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("not enough memory for a pass of the supernet")
