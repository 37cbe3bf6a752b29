"""What one step of a client's training does with its batches, for every method.

FedMetaNAS' dual learner is Fomaml: paper, equations 6, 7 and 9, first order; equation 10's support loss is read as
equation 7's query loss, and equation 9's gradient is taken at the current values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedmetanas_core.search.optimizers import Adam, Optimizer, Sgd


@dataclass
class Bench:
    """What a step works on: flat ``weights``, ``alphas``, their optimisers, and the loss of each of its batches.

    ``loss(index)`` is evaluated at the values that hold when it is called, with a draw of noise of its own. Without an
    ``alpha_optimizer`` the alphas are frozen. ``part`` gives the mask of a part of the weights (flat), and the first
    group of alphas that belongs to it.
    """

    weights: nn.Parameter
    alphas: Sequence[nn.Parameter]
    weight_optimizer: Optimizer
    alpha_optimizer: Optimizer | None
    loss: Callable[[int], Tensor]
    part: Callable[[str], tuple[Tensor, int]] | None = None

    def tensors(self) -> list[nn.Parameter]:
        """Everything that may change."""
        return [self.weights, *self.alphas]

    def backward(self, batch: int, factor: float = 1.0, fresh: bool = True) -> Tensor:
        """The loss of a batch; its gradients, times ``factor``, replace the ones before or add to them."""
        if fresh:
            clear_gradients(self.tensors())
        loss = self.loss(batch)
        (loss if factor == 1.0 else factor * loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        """Copies of the gradients of ``tensors``."""
        return [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in self.tensors()]


class StepRule(Protocol):
    """One step, in place; returns two losses to report, before and after what it learns within the step.

    Nothing waits for the device, and all that is changed stays where it is, so that a step can be recorded
    (``search.tasks``).
    """

    @property
    def batches(self) -> int:
        """Batches of one step."""
        ...

    @property
    def recordable(self) -> bool:
        """Whether it does the same work whenever it is called, all of it on the device."""
        ...

    def passes(self, adapts: bool) -> int:
        """Forward passes of one step, each with its own noise, when alphas learn or not."""
        ...

    def __call__(self, bench: Bench) -> tuple[Tensor, Tensor]: ...


def alpha_optimizer(kind: str, alphas: Sequence[Tensor], rate: float, **adam: Any) -> Adam | Sgd:
    """Adam or plain SGD; on a GPU Adam counts its steps there, so that a recorded task can do so."""
    if kind == "adam":
        return Adam(alphas, rate, capturable=alphas[0].device.type != "cpu", **adam)
    return Sgd(alphas, rate)


def clear_gradients(tensors: Sequence[Tensor]) -> None:
    """Zero the gradients in place, keeping their storage (weights' gradients are views of one buffer)."""
    for tensor in tensors:
        if tensor.grad is not None:
            tensor.grad.zero_()


def restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values back."""
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def descend(bench: Bench, clip: float, part: str = "all") -> None:
    """The outer step on weights, their gradient clipped, and on alphas; what is not in ``part`` stays as it is."""
    if part == "all" or bench.part is None:
        nn.utils.clip_grad_norm_([bench.weights], clip)
        bench.weight_optimizer.step()
        if bench.alpha_optimizer is not None:
            bench.alpha_optimizer.step()
        return
    chosen, first_group = bench.part(part)
    before = [tensor.detach().clone() for tensor in bench.tensors()]
    bench.weights.grad.mul_(chosen)  # type: ignore[union-attr]
    descend(bench, clip)
    with torch.no_grad():  # weight decay and momentum know nothing of parts
        bench.weights.copy_(torch.where(chosen, bench.weights, before[0]))
        for alphas, value in zip(bench.alphas, before[1:], strict=True):
            alphas[:first_group].copy_(value[:first_group])


@dataclass(frozen=True)
class Fomaml:
    """First-order MAML: adapt on the support batch, take the query gradient there, apply it where one began.

    ``weight_rate``: SGD step on weights, after clipping their gradient to norm ``clip``. ``alpha_rate``: step on
    alphas, of Adam with beta1 = 0 (``adam``; their raw gradient is so small that plain steps are inert) or of plain
    SGD (``sgd``, equation 9 as printed). ``alternate`` takes equation 6: weights first, then alphas at the new
    weights, with two backward passes; otherwise one pass serves both (section 4.5). ``inner_steps`` is M.
    ``hessian_delta`` adds the second-order term of the weights without a Hessian, from a third batch (Per-FedAvg (HF),
    Fallah et al. 2020): g - rate (grad(w + delta g) - grad(w - delta g)) / (2 delta), w not adapted.
    """

    weight_rate: float = 0.01
    alpha_rate: float = 1e-3
    alpha_optimizer: str = "adam"
    inner_steps: int = 1
    alternate: bool = False
    clip: float = 5.0
    hessian_delta: float | None = None
    part: str = "all"  # what changes

    @property
    def recordable(self) -> bool:
        """See StepRule. A recording can neither set a generator back, for the Hessian's term, nor look up a part."""
        return self.hessian_delta is None and self.part == "all"

    @property
    def batches(self) -> int:
        """Support and query, and a third one for the Hessian."""
        return 2 if self.hessian_delta is None else 3

    def passes(self, adapts: bool) -> int:
        """See StepRule."""
        each = 2 if self.alternate and adapts else 1
        return self.inner_steps * each + 1 + (0 if self.hessian_delta is None else 2)

    def __call__(self, bench: Bench) -> tuple[Tensor, Tensor]:
        """(support, query) loss; the first one at the un-adapted values. Frozen alphas are so in the task as well."""
        saved = [tensor.detach().clone() for tensor in bench.tensors()]
        task_alphas = None
        if bench.alpha_optimizer is not None:  # fresh: a task starts without memory of the one before
            task_alphas = alpha_optimizer(self.alpha_optimizer, bench.alphas, self.alpha_rate, betas=(0.0, 0.999))
        first_loss = bench.weights.new_full((), torch.nan)
        for index in range(self.inner_steps):
            value = bench.backward(0)
            first_loss = value if index == 0 else first_loss
            self._mask(bench)
            nn.utils.clip_grad_norm_([bench.weights], self.clip)
            with torch.no_grad():
                bench.weights.add_(bench.weights.grad, alpha=-self.weight_rate)  # type: ignore[arg-type]
            if task_alphas is not None:
                if self.alternate:
                    bench.backward(0)
                task_alphas.step()
        query_loss = bench.backward(1)
        restore(bench.tensors(), saved)
        if self.hessian_delta is not None:
            self._correct(bench, self.hessian_delta)
        descend(bench, self.clip, self.part)
        return first_loss, query_loss

    def _mask(self, bench: Bench) -> None:
        """No gradient for weights that do not change."""
        if self.part != "all" and bench.part is not None:
            bench.weights.grad.mul_(bench.part(self.part)[0])  # type: ignore[union-attr]

    def _correct(self, bench: Bench, delta: float) -> None:
        """Add the second-order term to the gradient of the weights.

        Both sides get the same dropout: the noise of two different draws, divided by ``delta``, would drown the term.
        """
        weights, gradients = bench.weights.detach().clone(), bench.gradients()
        draws = _generator(bench.weights.device)
        ends, beginning = [], draws.get_state()
        for sign in (1.0, -1.0):
            draws.set_state(beginning)
            with torch.no_grad():
                bench.weights.copy_(weights + sign * delta * gradients[0])
            bench.backward(2)
            ends.append(bench.gradients()[0])
        restore([bench.weights], [weights])
        gradients[0] -= self.weight_rate / (2.0 * delta) * (ends[0] - ends[1])
        _set_gradients(bench, gradients)


def _generator(device: torch.device) -> torch.Generator:
    """What layers that draw by themselves, such as dropout, take their numbers from."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


def _set_gradients(bench: Bench, gradients: Sequence[Tensor]) -> None:
    for tensor, gradient in zip(bench.tensors(), gradients, strict=True):
        if tensor.grad is not None:
            tensor.grad.copy_(gradient)


@dataclass(frozen=True)
class SingleLevel:
    """A plain step on one batch: weights, and alphas by the same gradient pass if they learn; only in ``part``."""

    clip: float = 5.0
    part: str = "all"
    batches: int = 1

    @property
    def recordable(self) -> bool:
        """See StepRule."""
        return self.part == "all"

    def passes(self, adapts: bool) -> int:
        """One."""
        return 1

    def __call__(self, bench: Bench) -> tuple[Tensor, Tensor]:
        """The loss of the batch, twice."""
        loss = bench.backward(0)
        descend(bench, self.clip, self.part)
        return loss, loss


@dataclass(frozen=True)
class Bilevel:
    """FedNAS' mixed-level step (MiLeNAS, He et al. 2020): alphas by L_val + ``balance`` L_train, weights by L_train.

    The first batch trains, the second validates. The gradient that is clipped is that of the weights.
    """

    balance: float = 1.0
    clip: float = 5.0
    batches: int = 2
    recordable: bool = True

    def passes(self, adapts: bool) -> int:
        """Two for the alphas, one for the weights."""
        return 3 if adapts else 1

    def __call__(self, bench: Bench) -> tuple[Tensor, Tensor]:
        """(validation, training) loss; while alphas are frozen, the training loss twice."""
        validation = None
        if bench.alpha_optimizer is not None:
            validation = bench.backward(1)
            bench.backward(0, factor=self.balance, fresh=False)
            bench.alpha_optimizer.step()
        loss = bench.backward(0)
        nn.utils.clip_grad_norm_([bench.weights], self.clip)
        bench.weight_optimizer.step()
        return loss if validation is None else validation, loss


@dataclass(frozen=True)
class RankOne:
    """FedPNAS' step (Hoang and Kingsford 2021): look one personal step ahead, on the same batch.

    g1 at the present values; the personal part goes down it by ``rate``; g2 there; back again. The gradient used is
    g2 - rate g1 (g1 . g2) on the personal part, the rank-one g1 g1' in place of the Hessian; on the rest it is g2.
    """

    rate: float = 0.01
    clip: float = 5.0
    part: str = "all"  # what changes
    batches: int = 1
    recordable: bool = False

    def passes(self, adapts: bool) -> int:
        """Before and after the step ahead."""
        return 2

    def __call__(self, bench: Bench) -> tuple[Tensor, Tensor]:
        """The losses before and after the step ahead."""
        assert bench.part is not None
        chosen, first_group = bench.part("personal")
        saved = [tensor.detach().clone() for tensor in bench.tensors()]
        first_loss = bench.backward(0)
        nn.utils.clip_grad_norm_([bench.weights], self.clip)
        ahead = bench.gradients()
        ahead[0] *= chosen
        for gradient in ahead[1:]:
            gradient[:first_group] = 0.0
            if bench.alpha_optimizer is None:
                gradient.zero_()
        with torch.no_grad():
            for tensor, gradient in zip(bench.tensors(), ahead, strict=True):
                tensor.sub_(gradient, alpha=self.rate)
        last_loss = bench.backward(0)
        restore(bench.tensors(), saved)
        gradients = bench.gradients()
        overlap = sum(((one * other).sum() for one, other in zip(ahead, gradients, strict=True)), torch.zeros(()))
        for gradient, first in zip(gradients, ahead, strict=True):
            gradient -= self.rate * first * overlap
        _set_gradients(bench, gradients)
        descend(bench, self.clip, self.part)
        return first_loss, last_loss
