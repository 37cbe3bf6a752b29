"""The one round loop: plan, exchange, screen, average, prune, evaluate, record, save."""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch

from fedmetanas_core.errors import RunFailedError
from fedmetanas_core.federation.screening import screen
from fedmetanas_core.federation.update import ClientUpdate, RoundPlan, ServerState
from fedmetanas_core.methods.method import Method
from fedmetanas_core.preflight import Experiment
from fedmetanas_core.run.checkpoint import save_checkpoint
from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.search.evaluation import accuracy, logits_of
from fedmetanas_core.search.pruning import PruneReport
from fedmetanas_core.search.relaxation import mixture
from fedmetanas_core.seeds import numpy_stream
from fedmetanas_core.space.cost import Cost, measure_cost
from fedmetanas_core.space.genotype import darts_genotype
from fedmetanas_core.space.network import Network


@dataclass
class Answers:
    """What came back from the clients of a round: updates, failures by client, and the bytes of both directions."""

    updates: list[ClientUpdate]
    failures: dict[int, str] = field(default_factory=dict)
    downlink_bytes: int = 0


Exchange = Callable[[ServerState, RoundPlan, Sequence[int]], Answers]


def sample_clients(seed: int, round_number: int, num_clients: int, clients_per_round: int) -> list[int]:
    """Partition ids of one round, ascending: uniform without replacement, a function of seed and round."""
    stream = numpy_stream(seed, "client sampling", round_number)
    return sorted(int(client) for client in stream.choice(num_clients, clients_per_round, replace=False))


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class RoundLoop:
    """Runs a method from its initial state to its last round, keeping the run folder complete all the time."""

    def __init__(self, method: Method, experiment: Experiment, exchange: Exchange, folder: RunFolder) -> None:
        self.method, self.experiment, self.exchange, self.folder = method, experiment, exchange, folder
        self.state = method.initial_state()
        self.events: list[dict[str, Any]] = []
        self.uplink_bytes = self.downlink_bytes = 0
        self.test_subset = experiment.test_data(experiment.config.evaluation_images)
        self._costs: dict[int, Cost] = {}

    def run(self) -> ServerState:
        """All rounds; raises RunFailedError when a round cannot be completed. The folder then holds the last state."""
        self._save()
        for number in range(self.state.round + 1, int(self.experiment.config.num_rounds) + 1):
            self._round(number)
        return self.state

    def _round(self, number: int) -> None:
        started = time.perf_counter()
        config, plan = self.experiment.config, self.method.plan(number)
        clients = sample_clients(config.seed, number, config.num_clients, config.clients_per_round)
        answers = self.exchange(self.state, plan, clients)
        accepted, excluded = self._screened(answers, plan)
        if not accepted:
            reasons = "; ".join(f"client {row['client']}: {row['reason']}" for row in excluded) or "no client answered"
            raise RunFailedError(f"round {number}: no usable update ({reasons})")
        state = self.method.aggregate(self.state, accepted, plan)
        before = state
        if plan.prunes:
            before = ServerState(
                state.spec, state.weights, state.statistics, state.architecture.clone(), state.round
            )
        report = self.method.prune(state, accepted, plan)
        self.state = state
        measured = self._evaluate_round(before, plan, report)
        self.uplink_bytes += sum(update.uplink_bytes for update in answers.updates)
        self.downlink_bytes += answers.downlink_bytes
        cost = self.cost()
        row = {
            "round": number,
            "phase": plan.phase,
            "temperature": plan.temperature,
            "noise_scale": plan.noise_scale,
            "clients": clients,
            "excluded": excluded,
            "train_loss": _weighted(accepted, "train_loss"),
            "support_loss": _weighted(accepted, "support_loss"),
            "test_accuracy": measured,
            "alive_operations": state.architecture.alive_operations(),
            "macs": cost.macs,
            "parameters": cost.parameters,
            "uplink_bytes": sum(update.uplink_bytes for update in answers.updates),
            "downlink_bytes": answers.downlink_bytes,
            "client_seconds": sum(update.metrics.get("seconds", 0.0) for update in accepted),
            "seconds": time.perf_counter() - started,
        }
        self._save()
        self.folder.append_round(row)

    def _screened(self, answers: Answers, plan: RoundPlan) -> tuple[list[ClientUpdate], list[dict[str, Any]]]:
        accepted = []
        excluded = [{"client": client, "reason": reason} for client, reason in sorted(answers.failures.items())]
        for update in sorted(answers.updates, key=lambda update: update.client):
            reason = screen(update, self.state, plan)
            if reason is None:
                accepted.append(update)
            else:
                excluded.append({"client": update.client, "reason": reason})
        return accepted, excluded

    def _evaluate_round(self, before: ServerState, plan: RoundPlan, report: PruneReport | None) -> float | None:
        """Accuracy after the round, where it is measured: every few rounds, at the end, and around prune events."""
        config = self.experiment.config
        due = plan.round % config.evaluate_every == 0 or plan.round == plan.num_rounds
        if plan.prunes:
            self.events.append(self._around_event(before, plan, report))
            measured = float(self.events[-1]["after"])
        elif due:
            measured = self.global_accuracy(self.state, plan)
        else:
            return None
        self.state.evaluations.append((plan.round, measured))
        return measured

    def _around_event(self, before: ServerState, plan: RoundPlan, report: PruneReport | None) -> dict[str, Any]:
        """What a prune event removed and cost, beside what DARTS' hard rule would have cost at the same moment."""
        hard = Network(darts_genotype(before.architecture), before.spec, self._device()).inherit(
            before.supernet(self._device())
        )
        report = report or PruneReport(0, 0)
        return {
            "round": plan.round,
            "before": self.global_accuracy(before, plan),
            "after": self.global_accuracy(self.state, plan),
            "hard_darts_rule": accuracy(hard.eval(), self.test_subset),
            "voluntary": report.voluntary,
            "forced": report.forced,
            "alive_operations": self.state.architecture.alive_operations(),
        }

    def _device(self) -> str:
        return str(self.test_subset.images.device)

    def global_accuracy(self, state: ServerState, plan: RoundPlan) -> float:
        """Accuracy of the noise-free global model on the test images used between rounds."""
        supernet = state.supernet(self._device())
        with torch.no_grad():
            weights = mixture(state.architecture.clone().to(self._device()), plan.temperature)
        return accuracy(lambda images: supernet(images, weights), self.test_subset)

    def cost(self) -> Cost:
        """The cost of the alive network."""
        version = self.state.architecture.version
        if version not in self._costs:
            self._costs = {version: measure_cost(self.state.spec, self.state.architecture.operation_mask)}
        return self._costs[version]

    def extract(self) -> tuple[Network, dict[str, Any]]:
        """The discrete network, and accuracy over the whole test split just before and after cutting it out."""
        plan = self.method.plan(max(1, self.state.round))
        network = self.method.extract(self.state)
        test, supernet = self.experiment.test_data(), self.state.supernet(self._device())
        with torch.no_grad():
            weights = mixture(self.state.architecture.clone().to(self._device()), plan.temperature)
        placed = Network(network.genotype, network.spec, self._device())
        placed.load(network.weights.detach(), network.statistics)
        found = logits_of(placed.eval(), test)
        mixed = logits_of(lambda images: supernet(images, weights), test)
        labels = test.labels
        return network, {
            "test_accuracy": float((found.argmax(1) == labels).double().mean()),
            "test_accuracy_supernet": float((mixed.argmax(1) == labels).double().mean()),
            "max_logit_difference": float((found - mixed).abs().max()),
        }

    def _save(self) -> None:
        """The whole state, written aside and renamed."""
        architecture = self.state.architecture
        tensors = {
            "weights": self.state.weights,
            "statistics": self.state.statistics,
            "operation_logits": architecture.operation_logits.detach(),
            "input_logits": architecture.input_logits.detach(),
            "operation_mask": architecture.operation_mask,
            "input_mask": architecture.input_mask,
        }
        facts = {
            "round": self.state.round,
            "mask_version": architecture.version,
            "space": asdict(self.state.spec),
            "evaluations": [list(pair) for pair in self.state.evaluations],
            "events": self.events,
            "uplink_bytes": self.uplink_bytes,
            "downlink_bytes": self.downlink_bytes,
        }
        save_checkpoint(self.folder.checkpoint_directory, tensors, facts)


def _weighted(updates: Sequence[ClientUpdate], metric: str) -> float:
    """The mean of a metric over clients, weighted by their examples."""
    total = sum(update.num_examples for update in updates)
    return fmean(
        [update.metrics[metric] for update in updates], [update.num_examples / total for update in updates]
    )
