"""Gumbel-Softmax relaxation of operations and input pairs (paper, equations 1, 2 and 8)."""

import torch
from torch import Tensor

from fedmetanas_core.space.architecture import Architecture, masked_softmax
from fedmetanas_core.space.spec import CELL_KINDS, SpaceSpec
from fedmetanas_core.space.supernet import EdgeWeights

SMALLEST_EXPONENTIAL = 1e-10  # keeps the Gumbel variable below 23
PER_CELL = "per_cell"

Noise = tuple[Tensor, Tensor]  # for the operations and for the input pairs


def gumbel(shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent standard Gumbel variables, float32: -log of an exponential variable."""
    exponential = torch.empty(shape, dtype=torch.float32).exponential_(generator=generator)
    return -exponential.clamp_min(SMALLEST_EXPONENTIAL).log()


def draw_noise(
    architecture: Architecture, noise_scale: float, generator: torch.Generator, sample: str = "per_type"
) -> Noise:
    """``noise_scale`` times one draw of Gumbel variables for every score; on the processor, whose stream it is.

    ``sample`` decides whether cells of one type share a draw (``per_type``) or have one each (``per_cell``).
    """
    operations, pairs = (
        noise_scale * gumbel(shape, generator).to(_score_type(logits))
        for shape, (logits, _) in zip(noise_shapes(architecture, sample), architecture.rows(), strict=True)
    )
    return operations, pairs


def noise_shapes(architecture: Architecture, sample: str) -> list[tuple[int, ...]]:
    """Shapes of one draw; the first dimension has 2 groups or one for each cell."""
    groups = len(architecture.spec.cells) if sample == PER_CELL else len(CELL_KINDS)
    return [(groups, *logits.shape[1:]) for logits, _ in architecture.rows()]


def relax(
    architecture: Architecture,
    temperature: float,
    noise_scale: float = 0.0,
    generator: torch.Generator | None = None,
    sample: str = "per_type",
) -> EdgeWeights:
    """Mixture weights softmax((a + noise_scale * Gumbel) / temperature) over the alive entries of every row.

    The paper's log(alpha) with alpha = softmax(a) differs from ``a`` by a constant per row, which softmax ignores.
    ``noise_scale`` 0 is the noise-free form used for evaluation and for pruning; see ``draw_noise`` for ``sample``.
    Raises ValueError when noise is asked for without a generator.
    """
    if noise_scale == 0:
        return relax_with(architecture, temperature)
    if generator is None:
        raise ValueError("Gumbel noise needs a generator")
    device = architecture.operation_logits.device
    operations, pairs = (draw.to(device) for draw in draw_noise(architecture, noise_scale, generator, sample))
    return relax_with(architecture, temperature, (operations, pairs), sample)


def relax_with(
    architecture: Architecture, temperature: float | Tensor, noise: Noise | None = None, sample: str = "per_type"
) -> EdgeWeights:
    """``relax`` with noise that has been drawn. Differentiable in the logits; float32 at least, autocast off."""
    per_cell = sample == PER_CELL and noise is not None
    weights = []
    with torch.autocast(architecture.operation_logits.device.type, enabled=False):
        for index, (logits, mask) in enumerate(architecture.rows()):
            scores, alive = logits.to(_score_type(logits)), mask
            if per_cell:
                scores, alive = (_of_cells(tensor, architecture.spec) for tensor in (scores, alive))
            if noise is not None:
                scores = scores + noise[index]
            weights.append(masked_softmax(scores, alive, temperature))
        operations, pairs = weights
        marginals = torch.einsum("gnp,npe->ge", pairs, architecture.incidence.to(pairs.dtype))
    return EdgeWeights(operations, marginals, per_cell)


def _score_type(logits: Tensor) -> torch.dtype:
    return logits.dtype if logits.dtype in (torch.float32, torch.float64) else torch.float32


def _of_cells(tensor: Tensor, spec: SpaceSpec) -> Tensor:
    """The rows of each cell's type: (2, ...) to (cells, ...)."""
    return torch.stack([tensor[CELL_KINDS.index(cell.kind)] for cell in spec.cells])


def mixture(architecture: Architecture, temperature: float) -> EdgeWeights | None:
    """The noise-free mixture weights, or None once the masks are one-hot: every weight is then exactly 1."""
    return None if architecture.is_one_hot() else relax(architecture, temperature)
