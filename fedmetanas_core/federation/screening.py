"""Each update is looked at before it is averaged; what does not fit is left out, with the reason.

First every update for itself, then all that fit beside each other: one whose change is many times as large as the
others' would decide the average alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from fedmetanas_core.federation.update import ClientUpdate, Evaluation, Payload

ACCURACIES = ("accuracy", "accuracy_adapted", "accuracy_used")
FEWEST_TO_COMPARE = 3  # of two, nobody can say which one is the odd one out
# What rounding leaves of a change where nothing is learned: frozen alphas, centred anew, differ by 1e-11.
UNCHANGED = 1e-7


@dataclass(frozen=True)
class Screening:
    """What is known of a run's clients: its id, how many examples each said to have, and how far changes may differ.

    ``norm_ratio``: an update counts if the root mean square of its change is at most so many times the round's median;
    0 switches that off. Clients that are missing in ``declared`` may report any number of examples, those that are
    missing in ``held_out``, the sizes of their test sets, any number of images in an evaluation.
    """

    run_id: str = ""
    declared: Mapping[int, int] = field(default_factory=dict)
    norm_ratio: float = 0.0
    held_out: Mapping[int, int] = field(default_factory=dict)

    def alone(
        self, update: ClientUpdate, sent: Payload, expected: Mapping[str, Tensor], variances: Tensor
    ) -> str | None:
        """Why this update cannot be averaged, or None if it can.

        ``sent`` is what its client got, ``expected`` tensors of the shapes and dtypes that have to come back, by name;
        ``variances`` are the positions of variances among the statistics.
        """
        reason = self._origin(update, sent) or _tensors(update, expected) or _choices(update, sent)
        if reason is None and bool((update.statistics[variances] < 0).any()):
            reason = "a variance among its statistics is negative"
        return reason

    def answer(self, evaluation: Evaluation, client: int) -> str | None:
        """Why this client's evaluation cannot be used, or None if it can."""
        if evaluation.client != client:
            return f"answers as client {evaluation.client}"
        most = self.held_out.get(client, evaluation.num_examples)
        if not 1 <= evaluation.num_examples <= most:
            return f"reports {evaluation.num_examples} test images, it has {most}"
        for name in ACCURACIES:
            if not 0.0 <= evaluation.metrics.get(name, -1.0) <= 1.0:
                return f"reports an {name} of {evaluation.metrics.get(name)}, which is none"
        if not evaluation.metrics.get("compute_seconds", -1.0) >= 0.0:
            return "reports no compute_seconds"
        return None

    def _origin(self, update: ClientUpdate, sent: Payload) -> str | None:
        plan, architecture = sent.plan, sent.architecture
        if update.run_id != self.run_id:
            return "answers another run"
        if update.round != plan.round:
            return f"answers round {update.round}, this is round {plan.round}"
        if update.mask_version != architecture.version:
            return f"trained under mask version {update.mask_version}, the current one is {architecture.version}"
        if update.num_examples < 1:
            return f"reports {update.num_examples} examples"
        most = self.declared.get(update.client)
        if most is not None and update.num_examples > most:
            return f"reports {update.num_examples} examples, it has {most}"
        if not 0.0 <= update.metrics.get("reward", 0.0) <= 1.0:
            return f"reports a reward of {update.metrics['reward']}, which is no accuracy"
        return None

    def together(self, changes: Mapping[int, Mapping[str, Tensor]]) -> dict[int, str]:
        """Which clients' changes stand out, and how; ``changes`` are those of a round, by client and by name."""
        found: dict[int, str] = {}
        if self.norm_ratio <= 0 or len(changes) < FEWEST_TO_COMPARE:
            return found
        for name in dict.fromkeys(name for each in changes.values() for name in each):
            sizes = {client: root_mean_square(each[name]) for client, each in changes.items() if name in each}
            middle = median(sizes.values())
            for client, size in sizes.items():
                if size > self.norm_ratio * max(middle, UNCHANGED):
                    times = f"{size / middle:.3g} times as much as" if middle > UNCHANGED else f"by {size:.3g}, unlike"
                    found.setdefault(client, f"its {name} changed {times} the median's")
        return found


def root_mean_square(values: Tensor) -> float:
    """Of all values, in float64; comparable between networks of different size."""
    return float(values.double().square().mean().sqrt()) if values.numel() else 0.0


def _tensors(update: ClientUpdate, expected: Mapping[str, Tensor]) -> str | None:
    tensors = update.named_tensors()
    for name, like in expected.items():
        if name not in tensors:
            return f"{name} is missing"
        tensor = tensors[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            return f"{name} has shape {tuple(tensor.shape)} and type {tensor.dtype}, not {tuple(like.shape)}"
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} is not finite"
    surplus = sorted(tensors.keys() - expected.keys())
    return f"{surplus[0]} was not asked for" if surplus else None


def _choices(update: ClientUpdate, sent: Payload) -> str | None:
    architecture, scores = sent.architecture, update.scores
    if scores is not None and (scores.shape != architecture.operation_mask.shape or not bool(scores.isfinite().all())):
        return f"scores have shape {tuple(scores.shape)} or are not finite"
    masks = (architecture.operation_mask, architecture.input_mask)
    for vote, mask in zip(update.votes or masks, masks, strict=True):
        if vote.shape != mask.shape:
            return f"a vote has shape {tuple(vote.shape)}, not {tuple(mask.shape)}"
    return None
