"""One task of the dual learner: adapt on support batches, take the query gradient there, apply it where one began.

Paper, equations 6, 7 and 9, first order; equation 10's support loss is read as equation 7's query loss, and equation
9's gradient is taken at the current values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
        return alpha_optimizer(self.alpha_optimizer, alphas, self.alpha_rate, betas=(0.0, 0.999))


def alpha_optimizer(kind: str, alphas: Sequence[Tensor], rate: float, **adam: Any) -> torch.optim.Optimizer:
    """Adam or plain SGD; on a GPU Adam counts its steps there, so that a recorded task can do so."""
    if kind == "adam":
        return torch.optim.Adam(list(alphas), rate, capturable=alphas[0].device.type != "cpu", **adam)
    return torch.optim.SGD(list(alphas), rate)


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
) -> tuple[Tensor, Tensor]:
    """One first-order MAML step on flat ``weights`` and on ``alphas``, in place; returns (support, query) loss.

    ``support`` has one loss per inner step, each a closure that evaluates the support batch at the present values with
    its own draw of noise; ``query`` likewise. Without an ``alpha_optimizer`` the alphas are frozen, in the task as
    well. The support loss returned is the first one, at the un-adapted values. Nothing waits for the device, and
    all that is changed stays where it is, so that a task can be recorded (``search.tasks``).
    """
    saved = [tensor.detach().clone() for tensor in (weights, *alphas)]
    task_alphas = learner.alpha_optimizer_for(alphas) if alpha_optimizer is not None else None
    first_loss = weights.new_full((), torch.nan)
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


def _backward(loss: Loss, weights: nn.Parameter, alphas: Sequence[nn.Parameter]) -> Tensor:
    clear_gradients((weights, *alphas))
    value = loss()
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach()
