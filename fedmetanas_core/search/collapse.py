"""Signs that a search is collapsing: operations without weights win because the others have not learned yet."""

import torch

from fedmetanas_core.space.architecture import Architecture, masked_softmax
from fedmetanas_core.space.spec import NONE, SKIP

MOST_SKIPS = 0.5  # of the edges; beyond, DARTS' collapse is under way (Zela et al. 2020)


def skip_share(architecture: Architecture) -> float:
    """The share of alive edges whose strongest operation, ``none`` aside, is the identity."""
    edges = architecture.edge_alive()
    scores = architecture.operation_logits.detach().masked_fill(~architecture.operation_mask, -torch.inf)[edges]
    scores[:, NONE] = -torch.inf
    return float((scores.argmax(-1) == SKIP).double().mean())


def alpha_entropy(architecture: Architecture) -> float:
    """Mean entropy of an edge's distribution over its alive operations: 1 is uniform, 0 settled."""
    mask = architecture.operation_mask[architecture.edge_alive()]
    weights = masked_softmax(architecture.operation_logits.detach()[architecture.edge_alive()].double(), mask)
    entropy = torch.special.entr(weights).sum(-1)
    most = mask.sum(-1).double().log()
    return float(torch.where(most > 0, entropy / most.clamp_min(1e-12), torch.zeros_like(most)).mean())


def collapse_warning(architecture: Architecture) -> str:
    """What there is to warn of, or nothing."""
    share = skip_share(architecture)
    if share <= MOST_SKIPS:
        return ""
    return f"skip_connect leads on {share:.0%} of the edges; a longer warm-up or skip_cap may help"
