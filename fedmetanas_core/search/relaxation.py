"""Gumbel-Softmax relaxation of operations and input pairs (paper, equations 1, 2 and 8)."""

import torch
from torch import Tensor

from fedmetanas_core.space.architecture import Architecture, masked_softmax
from fedmetanas_core.space.spec import CELL_KINDS
from fedmetanas_core.space.supernet import EdgeWeights

SMALLEST_EXPONENTIAL = 1e-10  # keeps the Gumbel variable below 23


def gumbel(shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent standard Gumbel variables, float32: -log of an exponential variable."""
    exponential = torch.empty(shape, dtype=torch.float32).exponential_(generator=generator)
    return -exponential.clamp_min(SMALLEST_EXPONENTIAL).log()


def relax(
    architecture: Architecture,
    temperature: float,
    noise_scale: float = 0.0,
    generator: torch.Generator | None = None,
    sample: str = "per_type",
) -> EdgeWeights:
    """Mixture weights softmax((a + noise_scale * Gumbel) / temperature) over the alive entries of every row.

    The paper's log(alpha) with alpha = softmax(a) differs from ``a`` by a constant per row, which softmax ignores.
    ``noise_scale`` 0 is the noise-free form used for evaluation and for pruning. ``sample`` decides whether cells of
    one type share a draw (``per_type``) or have one each (``per_cell``). Differentiable in the logits; computed in
    float32 at least, autocast off. Raises ValueError when noise is asked for without a generator.
    """
    per_cell = sample == "per_cell" and noise_scale > 0
    kinds = [CELL_KINDS.index(cell.kind) for cell in architecture.spec.cells] if per_cell else [0, 1]
    with torch.autocast(architecture.operation_logits.device.type, enabled=False):
        weights = []
        for logits, mask in architecture.rows():
            scores, alive = logits[kinds], mask[kinds]
            if scores.dtype not in (torch.float32, torch.float64):
                scores = scores.float()
            if noise_scale > 0:
                if generator is None:
                    raise ValueError("Gumbel noise needs a generator")
                scores = scores + noise_scale * gumbel(scores.shape, generator).to(scores.device, scores.dtype)
            weights.append(masked_softmax(scores, alive, temperature))
        operations, pairs = weights
        marginals = torch.einsum("gnp,npe->ge", pairs, architecture.incidence.to(pairs.dtype))
    return EdgeWeights(operations, marginals, per_cell)


def mixture(architecture: Architecture, temperature: float) -> EdgeWeights | None:
    """The noise-free mixture weights, or None once the masks are one-hot: every weight is then exactly 1."""
    return None if architecture.is_one_hot() else relax(architecture, temperature)
