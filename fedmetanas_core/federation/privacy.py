"""Differential privacy of clients: bounded, noisy updates, and what the published averages then give away.

Every client clips the whole change of its update (weights, batch-norm moments, alphas) to one length and adds its part
of the noise, so that the sum over a round's n clients carries Gaussian noise of ``noise`` times that length (McMahan et
al. 2018, with the noise drawn by the clients). The guarantee is for whoever sees averages, such as the other clients
and the users of the network; the server itself sees single updates with a part of the noise only.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from fedmetanas_core.errors import RefusalError
from fedmetanas_core.federation.update import ClientUpdate, Payload

REPLACED_CLIENT = 2.0  # a client's update replaced by another's moves the sum by up to twice the clipping length


@dataclass(frozen=True)
class Privacy:
    """``clip``: the largest L2 norm of a client's change. ``noise``: deviation of the sum's noise, in clips.

    ``clients``: how many share in a round's noise.
    """

    clip: float
    noise: float
    clients: int

    def protect(
        self, update: ClientUpdate, sent: Payload, variances: Tensor, generator: torch.Generator | None = None
    ) -> ClientUpdate:
        """The update with a clipped and noisy change, and without figures that say more about the images.

        ``variances`` are the positions of variances among the statistics, which stay above zero. The noise comes from
        the operating system's entropy: one that can be drawn again can be subtracted again. ``generator`` is for tests.
        """
        before = {
            "weights": sent.weights,
            "statistics": sent.statistics,
            "operation_logits": sent.architecture.operation_logits.detach().cpu(),
            "input_logits": sent.architecture.input_logits.detach().cpu(),
        }
        after = update.named_tensors()
        changes = {name: (tensor - before[name]).double() for name, tensor in after.items()}
        norm = sqrt(sum(float(change.square().sum()) for change in changes.values()))
        if generator is None:
            generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(8), "big") >> 1)
        scale, deviation = min(1.0, self.clip / max(norm, 1e-30)), self.noise * self.clip / sqrt(self.clients)
        noisy = {}
        for name, change in changes.items():
            protected = before[name].double() + scale * change + deviation * _normal(change, generator)
            noisy[name] = protected.to(after[name].dtype)
        noisy["statistics"][variances] = noisy["statistics"][variances].clamp_min(0.0)
        metrics = {**update.metrics, "train_loss": 0.0, "support_loss": 0.0}
        return replace(update, num_examples=1, metrics=metrics, **noisy)  # type: ignore[arg-type]


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def epsilon(privacy: Privacy, averaged: Sequence[int], population: int, delta: float) -> float:
    """The (epsilon, delta) guarantee of one client after rounds whose averages had so many updates each.

    By Renyi accounting of the Gaussian mechanism on clients sampled without replacement, neighbours being federations
    in which one client is another. Clients that were left out have taken their part of the noise with them, which this
    counts. It assumes that who took part in a round stays secret.
    """
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    for count, rounds in _tally(averaged).items():
        multiplier = privacy.noise * sqrt(count / privacy.clients) / REPLACED_CLIENT
        mechanism = dp_accounting.GaussianDpEvent(multiplier)
        event = dp_accounting.SampledWithoutReplacementDpEvent(population, privacy.clients, mechanism)
        accountant.compose(event, rounds)
    return float(accountant.get_epsilon(delta))


def _tally(averaged: Sequence[int]) -> Mapping[int, int]:
    return {count: averaged.count(count) for count in sorted(set(averaged)) if count > 0}


def check_accountant() -> None:
    """RefusalError where the accountant is not installed."""
    try:
        import dp_accounting  # noqa: F401
    except ImportError as error:
        raise RefusalError("dp_clip: dp-accounting is not installed", "pip install 'fedmetanas[dp]'") from error
