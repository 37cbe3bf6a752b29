"""The one round loop: plan, exchange, screen, average, prune, evaluate, record, save."""

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import fmean, pstdev
from typing import Any, cast

import torch
from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from fedmetanas_core.federation import wire
from fedmetanas_core.federation.update import RoundPlan, ServerState
from fedmetanas_core.preflight import Experiment, peak_gpu_memory_bytes
from fedmetanas_core.run.checkpoint import save_checkpoint
from fedmetanas_core.run.folder import RunFolder, peak_memory_bytes
from fedmetanas_core.run.stopwatch import Stopwatch
from fedmetanas_core.search.evaluation import accuracy, count_correct, logits_of
from fedmetanas_core.search.pruning import PruneReport
from fedmetanas_core.search.relaxation import mixture, relax
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.cost import Cost, measure_cost
from fedmetanas_core.space.genotype import darts_genotype
from fedmetanas_core.space.network import Network
from fedmetanas_core.space.supernet import EdgeWeights
from server_app.strategy import Exchange, SearchStrategy

LAST_EVALUATIONS = 10  # of the global model; the paper's tables are read as a mean over the end of a run


class RoundLoop:
    """Drives a strategy from round to round, keeping the run folder complete all the time."""

    def __init__(self, strategy: SearchStrategy, experiment: Experiment, grid: Grid, folder: RunFolder) -> None:
        self.strategy, self.experiment, self.grid, self.folder = strategy, experiment, grid, folder
        self.events: list[dict[str, Any]] = []
        self.uplink_bytes = self.downlink_bytes = self.updates_excluded = 0
        self.client_seconds = self.client_seconds_timed = 0.0  # the latter in rounds that the stopwatch counts
        self.stopwatch = Stopwatch()
        self.peak_client_bytes = self.peak_client_gpu_bytes = 0
        self.test_subset = experiment.test_sample(experiment.config.evaluation_images)
        self.device = str(self.test_subset.images.device)
        self._cost: tuple[int, Cost] | None = None

    @property
    def state(self) -> ServerState:
        """The present state; the strategy holds it."""
        return self.strategy.state

    def run(self, tell: Callable[[dict[str, Any]], object] = lambda row: None) -> None:
        """All rounds; ``tell`` gets each one's row. Raises RunFailedError when one cannot be completed.

        The folder then holds the last state.
        """
        self._save()
        for number in range(self.state.round + 1, int(self.experiment.config.num_rounds) + 1):
            with self.stopwatch.round():
                row = self._round(self.strategy.method.plan(number))
            tell(row)

    def _round(self, plan: RoundPlan) -> dict[str, Any]:
        started = time.perf_counter()
        self._exchange(plan.round)
        with self.stopwatch.part("evaluation"):
            measured = self._prune_and_evaluate(plan)
        row = {**self._row(plan, measured), "seconds": time.perf_counter() - started}
        with self.stopwatch.part("saving"):
            self.folder.append_round(row)
            self._save()
        return row

    def _exchange(self, number: int) -> None:
        arrays, config = wire.encode_arrays(self.state), ConfigRecord()
        messages = self.strategy.configure_train(number, arrays, config, self.grid)
        with self.stopwatch.part("exchange"):
            replies = self.grid.send_and_receive(messages, timeout=self.experiment.config.round_timeout_s)
        with self.stopwatch.part("averaging"):
            self.strategy.aggregate_train(number, replies)
        self.updates_excluded += len(self.strategy.exchange.excluded)
        self._count(self.strategy.exchange)
        if self.stopwatch.counts:
            self.client_seconds_timed += self.strategy.exchange.client_seconds

    def _count(self, exchange: Exchange) -> None:
        self.uplink_bytes += exchange.uplink_bytes
        self.downlink_bytes += exchange.downlink_bytes
        self.client_seconds += exchange.client_seconds
        self.peak_client_bytes = max(self.peak_client_bytes, exchange.peak_client_bytes)
        self.peak_client_gpu_bytes = max(self.peak_client_gpu_bytes, exchange.peak_client_gpu_bytes)

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
        measured = float(self.events[-1]["after"] if report is not None else self.global_accuracy(self.state, plan))
        if due:
            self.state.evaluations.append((plan.round, measured))
        return measured

    def _around_event(self, before: ServerState, plan: RoundPlan, report: PruneReport) -> dict[str, Any]:
        """What a prune event removed and cost, beside what DARTS' hard rule would have cost at the same moment."""
        hard = Network(darts_genotype(before.architecture), before.spec, self.device)
        hard.inherit(before.supernet(self.device))
        return {
            "round": plan.round,
            "before": self.global_accuracy(before, plan),
            "after": self.global_accuracy(self.state, plan),
            "hard_darts_rule": accuracy(hard.eval(), self.test_subset),
            **asdict(report),
            "alive_operations": self.state.architecture.alive_operations(),
        }

    def _model(
        self,
        state: ServerState,
        plan: RoundPlan,
        weigh: Callable[[Architecture, float], EdgeWeights | None] = mixture,
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The noise-free global model at the plan's temperature: normalised images to logits."""
        supernet = state.supernet(self.device)
        with torch.no_grad():
            weights = weigh(state.architecture.clone().to(self.device), plan.temperature)
        return lambda images: supernet(images, weights)

    def global_accuracy(self, state: ServerState, plan: RoundPlan) -> float:
        """Accuracy on the test images used between rounds."""
        return accuracy(self._model(state, plan), self.test_subset)

    def cost(self) -> Cost:
        """The cost of the alive network, counted once per version of the masks."""
        version = self.state.architecture.version
        if self._cost is None or self._cost[0] != version:
            self._cost = (version, measure_cost(self.state.spec, self.state.architecture.operation_mask))
        return self._cost[1]

    def _row(self, plan: RoundPlan, measured: float | None) -> dict[str, Any]:
        exchange, cost = self.strategy.exchange, self.cost()
        return {
            "round": plan.round,
            "phase": plan.phase,
            "temperature": plan.temperature,
            "noise_scale": plan.noise_scale,
            "clients": exchange.clients,
            "excluded": exchange.excluded,
            "notes": exchange.notes,
            "train_loss": exchange.mean("train_loss"),
            "support_loss": exchange.mean("support_loss"),
            "test_accuracy": measured,
            "alive_operations": self.state.architecture.alive_operations(),
            "macs": cost.macs,
            "parameters": cost.parameters,
            "uplink_bytes": exchange.uplink_bytes,
            "downlink_bytes": exchange.downlink_bytes,
        }

    def compare(self, network: Network) -> dict[str, float]:
        """Accuracy over the whole test split of the extracted network and of the supernet it was cut from.

        The supernet computes its mixture also where the masks are one-hot, so that the two are computed differently.
        """
        supernet = self._model(self.state, self.strategy.method.plan(max(1, self.state.round)), relax)
        placed = copy.deepcopy(network).to(self.device).eval()
        right, right_before, images, difference = 0, 0, 0, 0.0
        for chunk in self.experiment.test_chunks():
            found, before = logits_of(placed, chunk), logits_of(supernet, chunk)
            right, right_before = right + count_correct(found, chunk), right_before + count_correct(before, chunk)
            images += len(chunk)
            difference = max(difference, float((found - before).abs().max()))
        return {
            "test_accuracy": right / images,
            "test_accuracy_supernet": right_before / images,
            "max_logit_difference": difference,
        }

    def adopt(self, network: Network) -> None:
        """Let the state be the extracted network's; it is already, unless the masks are not one-hot."""
        before = self.state.architecture.operation_mask.clone()
        if self.state.architecture.restrict(*network.genotype.masks(self.state.spec)):
            self.state.prune_weights(before)

    def evaluate_clients(self) -> dict[str, Any]:
        """All clients' accuracy with the final model, as it is and after adapting it to the client's own images."""
        number = max(1, self.state.round)
        arrays, config = wire.encode_arrays(self.state), ConfigRecord()
        messages = self.strategy.configure_evaluate(number, arrays, config, self.grid)
        replies = self.grid.send_and_receive(messages, timeout=self.experiment.config.round_timeout_s)
        self._count(self.strategy.exchange)
        metrics = dict(self.strategy.aggregate_evaluate(number, replies) or {})
        plain, adapted = (cast(list[float], metrics[name]) for name in ("accuracy", "accuracy_adapted"))
        return {
            "client_accuracy_mean": fmean(plain),
            "client_accuracy_std": pstdev(plain),
            "client_accuracy_adapted_mean": fmean(adapted),
            "client_accuracy_adapted_std": pstdev(adapted),
            "client_accuracy": plain,
            "client_accuracy_adapted": adapted,
            "clients_evaluated": len(plain),
            "clients_not_evaluated": self.strategy.exchange.excluded,
        }

    def totals(self) -> dict[str, Any]:
        """What the run has cost and measured so far."""
        cost, last = self.cost(), [value for _, value in self.state.evaluations[-LAST_EVALUATIONS:]]
        return {
            "test_accuracy_last_evaluations": fmean(last) if last else None,
            "pruning_events": self.events,
            "parameters": cost.parameters,
            "macs": cost.macs,
            "uplink_bytes": self.uplink_bytes,
            "downlink_bytes": self.downlink_bytes,
            "updates_excluded": self.updates_excluded,
            "client_seconds": self.client_seconds,
            # Those of the clients pass side by side, in the exchange.
            "seconds_by_part": {"clients": self.client_seconds_timed, **self.stopwatch.seconds()},
            "peak_memory_bytes": max(peak_memory_bytes(), self.peak_client_bytes),
            "peak_gpu_memory_bytes": max(peak_gpu_memory_bytes(), self.peak_client_gpu_bytes),
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
            "updates_excluded": self.updates_excluded,
            "client_seconds": self.client_seconds,
            "peak_client_bytes": self.peak_client_bytes,
            "peak_client_gpu_bytes": self.peak_client_gpu_bytes,
        }
        save_checkpoint(self.folder.checkpoint_directory, tensors, facts)
