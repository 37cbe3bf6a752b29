"""The one round loop: plan, exchange, screen, average, prune, evaluate, record, save."""

import time
from dataclasses import asdict, replace
from typing import Any

import torch
from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from fedmetanas_core.federation import wire
from fedmetanas_core.federation.update import RoundPlan, ServerState
from fedmetanas_core.preflight import Experiment
from fedmetanas_core.run.checkpoint import save_checkpoint
from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.search.evaluation import accuracy, logits_of
from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.search.pruning import PruneReport
from fedmetanas_core.search.relaxation import mixture
from fedmetanas_core.space.cost import Cost, measure_cost
from fedmetanas_core.space.genotype import darts_genotype
from fedmetanas_core.space.network import Network
from server_app.strategy import Exchange, SearchStrategy


class RoundLoop:
    """Drives a strategy from round to round, keeping the run folder complete all the time."""

    def __init__(self, strategy: SearchStrategy, experiment: Experiment, grid: Grid, folder: RunFolder) -> None:
        self.strategy, self.experiment, self.grid, self.folder = strategy, experiment, grid, folder
        self.events: list[dict[str, Any]] = []
        self.uplink_bytes = self.downlink_bytes = 0
        self.client_seconds = 0.0
        self.peak_client_bytes = 0
        self.test_subset = experiment.test_data(experiment.config.evaluation_images)
        self.device = str(self.test_subset.images.device)
        self._cost: tuple[int, Cost] | None = None

    @property
    def state(self) -> ServerState:
        """The present state; the strategy holds it."""
        return self.strategy.state

    def run(self) -> None:
        """All rounds. Raises RunFailedError when one cannot be completed; the folder then holds the last state."""
        self._save()
        for number in range(self.state.round + 1, int(self.experiment.config.num_rounds) + 1):
            started = time.perf_counter()
            plan = self.strategy.method.plan(number)
            self._exchange(number)
            measured = self._prune_and_evaluate(plan)
            self._save()
            self.folder.append_round({**self._row(plan, measured), "seconds": time.perf_counter() - started})

    def _exchange(self, number: int) -> None:
        arrays, config = wire.encode_arrays(self.state), ConfigRecord()
        messages = self.strategy.configure_train(number, arrays, config, self.grid)
        replies = self.grid.send_and_receive(messages, timeout=self.experiment.config.round_timeout_s)
        self.strategy.aggregate_train(number, replies)
        self._count(self.strategy.exchange)

    def _count(self, exchange: Exchange) -> None:
        self.uplink_bytes += exchange.uplink_bytes
        self.downlink_bytes += exchange.downlink_bytes
        for update in exchange.accepted:
            self.client_seconds += update.metrics["seconds"]
            self.peak_client_bytes = max(self.peak_client_bytes, int(update.metrics["peak_memory_bytes"]))

    def _prune_and_evaluate(self, plan: RoundPlan) -> float | None:
        """The round's prune event, if it has one, and the accuracy after it, where it is measured."""
        config, accepted = self.experiment.config, self.strategy.exchange.accepted
        due = plan.round % config.evaluate_every == 0 or plan.round == plan.num_rounds
        before = replace(self.state, architecture=self.state.architecture.clone())
        report = self.strategy.method.prune(self.state, accepted, plan)
        if report is not None:
            self.events.append(self._around_event(before, plan, report))
        if report is None and not due:
            return None
        measured = self.events[-1]["after"] if report is not None else self.global_accuracy(self.state, plan)
        self.state.evaluations.append((plan.round, measured))
        return float(measured)

    def _around_event(self, before: ServerState, plan: RoundPlan, report: PruneReport) -> dict[str, Any]:
        """What a prune event removed and cost, beside what DARTS' hard rule would have cost at the same moment."""
        hard = Network(darts_genotype(before.architecture), before.spec, self.device)
        hard.inherit(before.supernet(self.device))
        return {
            "round": plan.round,
            "before": self.global_accuracy(before, plan),
            "after": self.global_accuracy(self.state, plan),
            "hard_darts_rule": accuracy(hard.eval(), self.test_subset),
            "voluntary": report.voluntary,
            "forced": report.forced,
            "stranded": report.stranded,
            "alive_operations": self.state.architecture.alive_operations(),
        }

    def _logits(self, state: ServerState, plan: RoundPlan, data: LocalData) -> torch.Tensor:
        """Logits of the noise-free global model at the plan's temperature."""
        supernet = state.supernet(self.device)
        with torch.no_grad():
            weights = mixture(state.architecture.clone().to(self.device), plan.temperature)
        return logits_of(lambda images: supernet(images, weights), data)

    def global_accuracy(self, state: ServerState, plan: RoundPlan) -> float:
        """Accuracy on the test images used between rounds."""
        found = self._logits(state, plan, self.test_subset).argmax(1)
        return float((found == self.test_subset.labels).double().mean())

    def cost(self) -> Cost:
        """The cost of the alive network, counted once per version of the masks."""
        version = self.state.architecture.version
        if self._cost is None or self._cost[0] != version:
            self._cost = (version, measure_cost(self.state.spec, self.state.architecture.operation_mask))
        return self._cost[1]

    def _row(self, plan: RoundPlan, measured: float | None) -> dict[str, Any]:
        exchange, cost = self.strategy.exchange, self.cost()
        total = sum(update.num_examples for update in exchange.accepted)

        def mean(metric: str) -> float:
            return sum(update.num_examples * update.metrics[metric] for update in exchange.accepted) / total

        return {
            "round": plan.round,
            "phase": plan.phase,
            "temperature": plan.temperature,
            "noise_scale": plan.noise_scale,
            "clients": exchange.clients,
            "excluded": exchange.excluded,
            "train_loss": mean("train_loss"),
            "support_loss": mean("support_loss"),
            "test_accuracy": measured,
            "alive_operations": self.state.architecture.alive_operations(),
            "macs": cost.macs,
            "parameters": cost.parameters,
            "uplink_bytes": exchange.uplink_bytes,
            "downlink_bytes": exchange.downlink_bytes,
            "client_seconds": sum(update.metrics["seconds"] for update in exchange.accepted),
        }

    def extract(self) -> tuple[Network, dict[str, float]]:
        """The discrete network, and accuracy over the whole test split just before and after cutting it out."""
        plan, test = self.strategy.method.plan(max(1, self.state.round)), self.experiment.test_data()
        network = self.strategy.method.extract(self.state)
        placed = Network(network.genotype, network.spec, self.device)
        placed.load(network.weights.detach(), network.statistics)
        found, mixed = logits_of(placed.eval(), test), self._logits(self.state, plan, test)
        return network, {
            "test_accuracy": float((found.argmax(1) == test.labels).double().mean()),
            "test_accuracy_supernet": float((mixed.argmax(1) == test.labels).double().mean()),
            "max_logit_difference": float((found - mixed).abs().max()),
        }

    def evaluate_clients(self) -> dict[str, Any]:
        """Every client's accuracy with the final model, as it is and after adapting it to the client's own images."""
        number = max(1, self.state.round)
        arrays, config = wire.encode_arrays(self.state), ConfigRecord()
        messages = self.strategy.configure_evaluate(number, arrays, config, self.grid)
        replies = self.grid.send_and_receive(messages, timeout=self.experiment.config.round_timeout_s)
        self._count(self.strategy.exchange)
        metrics = self.strategy.aggregate_evaluate(number, replies)
        return {name: list(values) for name, values in (metrics or {}).items() if isinstance(values, list)}

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
