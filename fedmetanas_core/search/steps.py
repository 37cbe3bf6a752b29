"""One task of the dual learner: adapt on support batches, take the query gradient there, apply it where one began.

Paper, equations 6, 7 and 9, first order; equation 10's support loss is read as equation 7's query loss, and equation
9's gradient is taken at the current values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class TaskLearner:
    """How a task is adapted to.

    ``weight_rate``: SGD step on weights, after clipping their gradient to norm ``clip``. ``alpha_rate``: step on
    alphas, of Adam with beta1 = 0 (``adam``; their raw gradient is so small that plain steps are inert) or of plain
    SGD (``sgd``, equation 9 as printed). ``alternate`` takes equation 6: weights first, then alphas at the new
    weights, with two backward passes; otherwise one pass serves both (section 4.5). ``inner_steps`` is M.
    """

    weight_rate: float = 0.01
    alpha_rate: float = 1e-3
    alpha_optimizer: str = "adam"
    inner_steps: int = 1
    alternate: bool = False
    clip: float = 5.0

    def alpha_optimizer_for(self, alphas: Sequence[Tensor]) -> torch.optim.Optimizer:
        """A fresh optimiser: a task starts without memory of the one before."""
        if self.alpha_optimizer == "adam":
            return torch.optim.Adam(list(alphas), lr=self.alpha_rate, betas=(0.0, 0.999))
        return torch.optim.SGD(list(alphas), lr=self.alpha_rate)


def clear_gradients(tensors: Sequence[Tensor]) -> None:
    """Zero the gradients in place, keeping their storage (weights' gradients are views of one buffer)."""
    for tensor in tensors:
        if tensor.grad is not None:
            tensor.grad.zero_()


def meta_step(
    weights: nn.Parameter,
    alphas: Sequence[nn.Parameter],
    support: Sequence[Loss],
    query: Loss,
    learner: TaskLearner,
    weight_optimizer: torch.optim.Optimizer,
    alpha_optimizer: torch.optim.Optimizer | None,
) -> tuple[float, float]:
    """One first-order MAML step on flat ``weights`` and on ``alphas``, in place; returns (support, query) loss.

    ``support`` has one loss per inner step, each a closure that evaluates the support batch at the present values with
    its own draw of noise; ``query`` likewise. Without an ``alpha_optimizer`` the alphas are frozen, in the task as
    well. The support loss returned is the first one, at the un-adapted values.
    """
    saved = [tensor.detach().clone() for tensor in (weights, *alphas)]
    task_alphas = learner.alpha_optimizer_for(alphas) if alpha_optimizer is not None else None
    first_loss = float("nan")
    for index, loss in enumerate(support):
        value = _backward(loss, weights, alphas)
        first_loss = value if index == 0 else first_loss
        nn.utils.clip_grad_norm_([weights], learner.clip)
        with torch.no_grad():
            weights.add_(weights.grad, alpha=-learner.weight_rate)  # type: ignore[arg-type]
        if task_alphas is not None:
            if learner.alternate:
                _backward(loss, weights, alphas)
            task_alphas.step()
    query_loss = _backward(query, weights, alphas)
    with torch.no_grad():
        for tensor, value_before in zip((weights, *alphas), saved, strict=True):
            tensor.copy_(value_before)
    nn.utils.clip_grad_norm_([weights], learner.clip)
    weight_optimizer.step()
    if alpha_optimizer is not None:
        alpha_optimizer.step()
    return first_loss, query_loss


def _backward(loss: Loss, weights: nn.Parameter, alphas: Sequence[nn.Parameter]) -> float:
    clear_gradients((weights, *alphas))
    value = loss()
    value.backward()  # type: ignore[no-untyped-call]
    return float(value.detach())
