"""The optimisers of clients' steps: torch's own update functions, on state that is kept here.

torch's optimiser classes import its compiler, which takes longer than a short training does, and under Flower's process
isolation every message meets a new process. Their update functions do without.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd


class Optimizer(Protocol):
    """What takes a step in place, from the gradients that parameters carry."""

    def step(self) -> None: ...


class Sgd:
    """Stochastic gradient descent with momentum, as ``torch.optim.SGD`` does it; no other options.

    ``fused`` goes through memory once, and can read ``rate`` from where it lies, a tensor.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        rate: float | Tensor,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        fused: bool | None = None,
    ) -> None:
        self.rate, self.momentum, self.weight_decay, self.fused = rate, momentum, weight_decay, fused
        self._parameters = list(parameters)
        self._velocities: dict[int, Tensor] = {}  # by the parameter's place, from its first step on

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters that have a gradient."""
        places = [place for place, parameter in enumerate(self._parameters) if parameter.grad is not None]
        velocities = [self._velocities.get(place) for place in places] if self.momentum else []
        sgd(
            [self._parameters[place] for place in places],
            [gradient for place in places if (gradient := self._parameters[place].grad) is not None],
            velocities,
            fused=self.fused,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=self.rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        for place, velocity in zip(places, velocities, strict=False):
            assert velocity is not None  # made by the first step
            self._velocities[place] = velocity

    def forget(self) -> None:
        """Back to the beginning, every tensor staying where it is."""
        for velocity in self._velocities.values():
            velocity.zero_()


class Adam:
    """Adam, as ``torch.optim.Adam`` does it; no other options.

    With ``capturable`` it counts its steps on the parameters' device, so that a recording can do so.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        rate: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        self.rate, self.betas, self.weight_decay, self.capturable = rate, betas, weight_decay, capturable
        self._parameters = list(parameters)
        self._moments: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # first, second, number of steps

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters that have a gradient."""
        parameters, gradients, moments = [], [], []
        for place, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                if place not in self._moments:
                    device = parameter.device if self.capturable else "cpu"
                    count = torch.zeros((), dtype=torch.float32, device=device)
                    self._moments[place] = torch.zeros_like(parameter), torch.zeros_like(parameter), count
                parameters.append(parameter)
                gradients.append(parameter.grad)
                moments.append(self._moments[place])
        adam(
            parameters,
            gradients,
            [first for first, _, _ in moments],
            [second for _, second, _ in moments],
            [],
            [count for _, _, count in moments],
            capturable=self.capturable,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.rate,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )

    def forget(self) -> None:
        """Back to the beginning, every tensor staying where it is."""
        for tensors in self._moments.values():
            for tensor in tensors:
                tensor.zero_()
