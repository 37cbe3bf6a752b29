"""What the search thought of each choice, round by round: a line of ``architecture.jsonl`` whenever that changed."""

from typing import Any

from torch import Tensor

from fedmetanas_core.space.architecture import Architecture, masked_softmax

DIGITS = 4  # significant ones


def architecture_line(architecture: Architecture) -> dict[str, Any]:
    """Softmax of the alphas among what is alive, by group of cells; None where something was pruned.

    ``operations``: (edges, 8), edges in the order of their nodes; ``inputs``: (nodes, pairs), empty where nodes read
    all their inputs.
    """
    (operations, operation_mask), (inputs, input_mask) = architecture.rows()
    groups = architecture.spec.groups
    return {
        "operations": dict(zip(groups, _shares(operations.detach(), operation_mask), strict=True)),
        "inputs": dict(zip(groups, _shares(inputs.detach(), input_mask), strict=True)),
    }


def _shares(logits: Tensor, mask: Tensor) -> list[list[list[float | None]]]:
    shares = masked_softmax(logits.double(), mask).tolist()
    return [
        [
            [float(f"{share:.{DIGITS}g}") if alive else None for share, alive in zip(row, kept, strict=True)]
            for row, kept in zip(rows, masks, strict=True)
        ]
        for rows, masks in zip(shares, mask.tolist(), strict=True)
    ]
