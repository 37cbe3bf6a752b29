"""How much every operation of every edge counts in one forward pass."""

from dataclasses import dataclass

from torch import Tensor

from fedmetanas_core.space.spec import SpaceSpec

Masks = tuple[tuple[tuple[bool, ...], ...], ...]


def as_tuples(operation_mask: Tensor) -> Masks:
    """The mask as a value by which things can be kept."""
    return tuple(tuple(map(tuple, kind)) for kind in operation_mask.tolist())


@dataclass(frozen=True)
class EdgeWeights:
    """Mixture weights: ``operations`` (groups, edges, 8) and input marginals ``inputs`` (groups, edges).

    A group is one of SpaceSpec.groups or, with ``per_cell``, a cell. The marginal of an edge is the summed weight of
    the pairs that contain it, and the marginals of a node sum to 2; where a node reads all its inputs, each is 1.
    ``path``, a mask of the shape of ``operations``, says which weights may differ from 0; what it leaves out is not
    computed.
    """

    operations: Tensor
    inputs: Tensor
    per_cell: bool = False
    path: Masks | None = None

    def coefficients(self) -> list[tuple[Tensor, ...]]:
        """Per group, the products of both weights as scalars in the order (edge, operation)."""
        return [group.flatten().unbind() for group in self._products().unbind()]

    def of_cells(self, spec: SpaceSpec) -> Tensor:
        """Those products for every cell: (cells, edges, 8)."""
        products = self._products()
        return products if self.per_cell else products[[cell.group for cell in spec.cells]]

    def _products(self) -> Tensor:
        return self.operations * self.inputs.unsqueeze(-1)
