"""Relaxations of operations and input pairs: Gumbel-Softmax (paper, equations 1, 2 and 8) and the others."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from fedmetanas_core.space.architecture import Architecture, masked_softmax
from fedmetanas_core.space.edge_weights import EdgeWeights, as_tuples
from fedmetanas_core.space.fixed import Space
from fedmetanas_core.space.spec import SpaceSpec

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
    """Shapes of one draw; the first dimension has the groups of alphas, or the cells."""
    spec = architecture.spec
    per_cell = sample == PER_CELL and isinstance(spec, SpaceSpec)
    groups = len(cast(SpaceSpec, spec).cells) if per_cell else len(spec.groups)
    return [(groups, *logits.shape[1:]) for logits, _ in architecture.rows()]


def relax(
    architecture: Architecture, temperature: float | Tensor, noise: Noise | None = None, sample: str = "per_type"
) -> EdgeWeights:
    """Mixture weights softmax((a + noise) / temperature) over the alive entries of every row.

    The paper's log(alpha) with alpha = softmax(a) differs from ``a`` by a constant per row, which softmax ignores.
    Without ``noise``, which ``draw_noise`` draws in the manner of ``sample``, this is the form used for evaluation and
    for pruning. Differentiable in the logits; float32 at least, autocast off.
    """
    return _edge_weights(architecture, lambda scores, mask: masked_softmax(scores, mask, temperature), noise, sample)


def _edge_weights(
    architecture: Architecture, choose: Callable[[Tensor, Tensor], Tensor], noise: Noise | None, sample: str
) -> EdgeWeights:
    """What ``choose`` makes of scores and mask, row by row, as weights of operations and inputs."""
    per_cell = sample == PER_CELL and noise is not None
    weights = []
    with torch.autocast(architecture.operation_logits.device.type, enabled=False):
        for index, (logits, mask) in enumerate(architecture.rows()):
            scores, alive = logits.to(_score_type(logits)), mask
            if per_cell:
                scores, alive = (_of_cells(tensor, architecture.spec) for tensor in (scores, alive))
            if noise is not None:
                scores = scores + noise[index]
            weights.append(choose(scores, alive))
        operations, pairs = weights
        if architecture.chooses_pairs:
            inputs = torch.einsum("gnp,npe->ge", pairs, architecture.incidence.to(pairs.dtype))
        else:
            inputs = torch.ones_like(operations[..., 0])
    return EdgeWeights(operations, inputs, per_cell)


def _score_type(logits: Tensor) -> torch.dtype:
    return logits.dtype if logits.dtype in (torch.float32, torch.float64) else torch.float32


def _of_cells(tensor: Tensor, spec: Space) -> Tensor:
    """The rows of each cell's group: (groups, ...) to (cells, ...)."""
    return tensor[[cell.group for cell in cast(SpaceSpec, spec).cells]]


class _ScoreGradient(torch.autograd.Function):
    """One-hot samples; back, DSNAS' estimate: dL/dz of what was sampled, times the gradient of its log-probability."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, mask: Tensor, sampled: Tensor) -> Tensor:
        ctx.save_for_backward(masked_softmax(logits, mask), sampled)
        return sampled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        probability, sampled = ctx.saved_tensors
        credit = (gradient * sampled).sum(-1, keepdim=True)
        return credit * (sampled - probability), None, None


def concentration(logits: Tensor) -> Tensor:
    """The positive parameters of DrNAS' Dirichlet distribution: elu(a) + 1 (Chen et al. 2021)."""
    return torch.nn.functional.elu(logits) + 1.0


@dataclass(frozen=True)
class Relaxation:
    """How logits become the weights of a forward pass.

    ``gumbel``: softmax of noisy logits (paper, equation 2); ``gumbel_st``: the same made one-hot, with the soft
    gradient (straight through); ``softmax``: without noise (DARTS); ``dirichlet``: a draw of DrNAS' distribution;
    ``path``: one operation of every edge, sampled, alone computed (DSNAS). ``sample`` as in ``draw_noise``. With
    ``evaluated`` = ``path`` the noise-free form is the likeliest path, as a ``path`` relaxation has it anyhow.
    """

    kind: str = "gumbel"
    sample: str = "per_type"
    evaluated: str = "mixture"

    @property
    def noisy(self) -> bool:
        """Whether a pass takes Gumbel noise."""
        return self.kind in ("gumbel", "gumbel_st", "path")

    @property
    def recordable(self) -> bool:
        """Whether the same work is done whatever is drawn, all of it from noise that was given."""
        return self.kind in ("gumbel", "gumbel_st", "softmax")

    def sampled(self, architecture: Architecture, temperature: float | Tensor, noise: Noise | None) -> EdgeWeights:
        """Weights of one training pass, differentiable in the logits; without ``noise``, at the middle of all draws.

        A Dirichlet draw comes from torch's global generator, whatever the noise.
        """
        if self.kind == "softmax":
            return relax(architecture, temperature)
        if self.kind == "gumbel":
            return relax(architecture, temperature, noise, self.sample)
        if self.kind == "gumbel_st":

            def harden(scores: Tensor, mask: Tensor) -> Tensor:
                soft = masked_softmax(scores, mask, temperature)
                return _one_hot(soft, mask) + soft - soft.detach()

            return _edge_weights(architecture, harden, noise, self.sample)
        if self.kind == "dirichlet":
            return _edge_weights(architecture, dirichlet_mean if noise is None else _dirichlet_draw, None, self.sample)
        return _path(architecture, noise)

    def expected(self, architecture: Architecture, temperature: float) -> EdgeWeights | None:
        """Noise-free weights, for evaluation; None where nothing is left to choose: every weight is then exactly 1."""
        return None if architecture.is_one_hot() else self.mean(architecture, temperature)

    def mean(self, architecture: Architecture, temperature: float) -> EdgeWeights:
        """The same, whatever is left to choose: for a network that holds more operations than the architecture."""
        if self.kind == "dirichlet":
            return _edge_weights(architecture, dirichlet_mean, None, self.sample)
        if "path" in (self.kind, self.evaluated):
            return _path(architecture, None)
        return relax(architecture, temperature)


def _one_hot(scores: Tensor, mask: Tensor) -> Tensor:
    """1 at the largest alive score of every row, the first among equals; 0 elsewhere, and in rows with none alive."""
    if not scores.shape[-1]:
        return scores.detach()
    best = scores.detach().masked_fill(~mask, -torch.inf).argmax(-1)
    return torch.nn.functional.one_hot(best, scores.shape[-1]).to(scores.dtype).masked_fill(~mask, 0.0)


def _path(architecture: Architecture, noise: Noise | None) -> EdgeWeights:
    """The operation of every edge with the largest score, the logit plus the noise: a sample of softmax(a)."""

    def choose(scores: Tensor, mask: Tensor) -> Tensor:
        return _one_hot(scores, mask)

    weights = _edge_weights(architecture, choose, noise, "per_type")
    path = as_tuples(weights.operations > 0)
    if noise is None:
        return replace(weights, path=path)
    operations = _ScoreGradient.apply(architecture.operation_logits, architecture.operation_mask, weights.operations)
    return replace(weights, operations=operations, path=path)


def _dirichlet_draw(scores: Tensor, mask: Tensor) -> Tensor:
    """Gamma draws of the alive entries, normalised: the Dirichlet distribution among them."""
    draws = torch.distributions.Gamma(concentration(scores), 1.0).rsample().masked_fill(~mask, 0.0)
    return draws / draws.sum(-1, keepdim=True).clamp_min(torch.finfo(draws.dtype).tiny)


def dirichlet_mean(scores: Tensor, mask: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """The mean of that distribution; the temperature has no say in it."""
    alive = concentration(scores).masked_fill(~mask, 0.0)
    return alive / alive.sum(-1, keepdim=True).clamp_min(torch.finfo(alive.dtype).tiny)
