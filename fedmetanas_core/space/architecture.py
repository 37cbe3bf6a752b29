"""The architecture of a search space: logits ("alphas") that are learned, masks that only ever shrink."""

from typing import Self

import torch
from torch import Tensor, nn

from fedmetanas_core.space.fixed import Space
from fedmetanas_core.space.spec import NONE, PRIMITIVES

CHANGING = ("operation_logits", "input_logits", "operation_mask", "input_mask")  # all that is not given by the space
INITIAL_SCALE = 1e-3  # standard deviation of the initial logits (DARTS)


class Architecture(nn.Module):
    """Logits and masks of every group of cells (0 = normal, 1 = reduce), shared by all cells of the group.

    ``operation_logits`` (groups, edges, 8): per edge, over the primitives.
    ``input_logits`` (groups, nodes, max pairs): per node, over its candidate input pairs; a node with fewer pairs than
    the last one leaves the rest of its row masked for ever. Where nodes read all their inputs there are none. A
    network in which nothing is searched has no group, and all of this is empty.
    ``operation_mask`` and ``input_mask``: boolean, of the same shapes; False means pruned. A prune is never written
    into a logit, or one client among five could delete an operation for everybody by averaging.
    ``version`` counts the changes of the masks.
    """

    operation_mask: Tensor
    input_mask: Tensor
    incidence: Tensor

    def __init__(self, spec: Space) -> None:
        super().__init__()
        self.spec = spec
        self.version = 0
        operations = (len(spec.groups), spec.num_edges, len(PRIMITIVES))
        pairs = (len(spec.groups), spec.num_nodes, spec.max_pairs)
        self.operation_logits = nn.Parameter(torch.zeros(operations))
        self.input_logits = nn.Parameter(torch.zeros(pairs))
        self.register_buffer("operation_mask", torch.ones(operations, dtype=torch.bool))
        self.register_buffer("input_mask", torch.zeros(pairs, dtype=torch.bool))
        self.register_buffer("incidence", torch.zeros(spec.num_nodes, spec.max_pairs, spec.num_edges))
        for node in range(spec.num_nodes):
            for pair, sources in enumerate(spec.candidate_pairs(node)):
                self.input_mask[:, node, pair] = True
                for source in sources:
                    self.incidence[node, pair, spec.edge(node, source)] = 1.0

    def initialise(self, generator: torch.Generator) -> Self:
        """Draw the alive logits from a normal distribution of standard deviation 1e-3 (DARTS)."""
        with torch.no_grad():
            for logits, mask in self.rows():
                noise = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
                logits.copy_((noise * INITIAL_SCALE).masked_fill(~mask, 0.0))
        return self

    def clone(self) -> "Architecture":
        """An independent copy."""
        copy = Architecture(self.spec).to(self.operation_logits.device, self.operation_logits.dtype)
        copy.load_state_dict(self.state_dict())
        copy.version = self.version
        return copy

    def rows(self) -> tuple[tuple[nn.Parameter, Tensor], tuple[nn.Parameter, Tensor]]:
        """(logits, mask) of the operations and of the input pairs; the last dimension is what is chosen among."""
        return (self.operation_logits, self.operation_mask), (self.input_logits, self.input_mask)

    def restrict(self, operation_mask: Tensor, input_mask: Tensor) -> bool:
        """Intersect the masks with these; True, and a new version, if anything was removed.

        Edges of no alive pair lose all their operations. Raises ValueError if that left a node without a pair, or an
        edge of an alive pair without an operation.
        """
        input_mask = self.input_mask & input_mask
        edge_alive = self._edges_of(input_mask)
        operation_mask = self.operation_mask & operation_mask & edge_alive.unsqueeze(-1)
        if self.chooses_pairs and not bool(input_mask.any(-1).all()):
            raise ValueError("a node must keep at least one input pair")
        if not bool((operation_mask.any(-1) == edge_alive).all()):
            raise ValueError("an edge of an alive pair must keep at least one operation")
        if torch.equal(operation_mask, self.operation_mask) and torch.equal(input_mask, self.input_mask):
            return False
        self.operation_mask.copy_(operation_mask)
        self.input_mask.copy_(input_mask)
        self.version += 1
        return True

    def without_none(self) -> bool:
        """Remove ``none`` wherever another operation is alive; True if anything was removed."""
        keep = self.operation_mask.clone()
        keep[..., NONE] &= ~self.operation_mask[..., NONE + 1 :].any(-1)
        return self.restrict(keep, self.input_mask)

    @property
    def chooses_pairs(self) -> bool:
        """Whether nodes choose a pair of inputs; otherwise they read all of them."""
        return self.input_logits.shape[-1] > 0

    def _edges_of(self, input_mask: Tensor) -> Tensor:
        if not self.chooses_pairs:
            return torch.ones_like(self.operation_mask[..., 0])
        pairs = input_mask.to(self.incidence.dtype)
        return torch.einsum("tnp,npe->te", pairs, self.incidence) > 0

    def edge_alive(self) -> Tensor:
        """(groups, edges) boolean: the edge belongs to an alive pair, or its node reads all inputs."""
        return self._edges_of(self.input_mask)

    def alive_operations(self) -> int:
        """Operations that can still be chosen, over all groups."""
        return int(self.operation_mask.sum())

    def is_one_hot(self) -> bool:
        """Nothing is left to choose: one pair per node, and one operation on each of its edges.

        In a pair that operation is not ``none``: nothing says then that the edge is missing.
        """
        single = bool((self.operation_mask.sum(-1)[self.edge_alive()] == 1).all())
        if not self.chooses_pairs:
            return single
        pairs = bool((self.input_mask.sum(-1) == 1).all())
        return single and pairs and not bool(self.operation_mask[..., NONE].any())

    def centre(self) -> None:
        """Subtract from each row the mean of its alive entries.

        Softmax does not see a shift of its row, so without this the rows of different clients would drift apart by
        amounts that mean nothing.
        """
        with torch.no_grad():
            for logits, mask in self.rows():
                alive = mask.sum(-1, keepdim=True).clamp_min(1)
                mean = logits.masked_fill(~mask, 0.0).sum(-1, keepdim=True) / alive
                logits.copy_(torch.where(mask, logits - mean, torch.zeros_like(logits)))


def masked_softmax(logits: Tensor, mask: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Softmax over the last dimension among the alive entries; 0 elsewhere, and on rows with none alive."""
    scores = logits.masked_fill(~mask, -torch.inf)
    scores = scores.masked_fill(~mask.any(-1, keepdim=True), 0.0)  # a row of -inf alone would give NaN
    return torch.softmax(scores / temperature, dim=-1).masked_fill(~mask, 0.0)
