"""The one round loop: plan, exchange, screen, average, prune, evaluate, record, save."""

import time
from collections.abc import Callable
from statistics import fmean
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord

from fedmetanas_core.federation.privacy import epsilon
from fedmetanas_core.federation.update import Evaluation, RoundPlan, ServerState
from fedmetanas_core.preflight import Experiment, peak_gpu_memory_bytes
from fedmetanas_core.run.checkpoint import save_state
from fedmetanas_core.run.folder import RunFolder, peak_memory_bytes
from fedmetanas_core.run.history import architecture_line
from fedmetanas_core.run.stopwatch import Stopwatch
from fedmetanas_core.search.collapse import alpha_entropy, collapse_warning, skip_share
from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.cost import Cost, measure_cost
from fedmetanas_core.space.network import Network
from server_app.courier import Courier
from server_app.measuring import Measuring
from server_app.roster import Roster
from server_app.strategy import Exchange, SearchStrategy

LAST_EVALUATIONS = 10  # of the global model; the paper's tables are read as a mean over the end of a run


class RoundLoop:
    """Drives a strategy from round to round, keeping the run folder complete all the time."""

    def __init__(self, strategy: SearchStrategy, experiment: Experiment, roster: Roster, folder: RunFolder) -> None:
        self.strategy, self.experiment, self.roster, self.folder = strategy, experiment, roster, folder
        self.tally = strategy.tally
        self._noted = self._last_noted()
        self.stopwatch = Stopwatch(before=self.tally.seconds_by_part)
        self._started, self._seconds_before = time.perf_counter(), self.tally.seconds
        self.measuring = Measuring(strategy.method, experiment)
        self._cost: tuple[tuple[int, int], Cost] | None = None
        self.cost_of_result: Cost | None = None  # where what is handed over is not the state itself

    @property
    def courier(self) -> Courier:
        """Through whom messages go."""
        return self.roster.courier

    @property
    def state(self) -> ServerState:
        """The present state; the strategy holds it."""
        return self.strategy.state

    def run(self, tell: Callable[[dict[str, Any]], object] = lambda row: None) -> None:
        """All rounds; ``tell`` gets each one's row. Raises RunFailedError when one cannot be completed.

        The folder then holds the last state.
        """
        for number in range(self.state.round + 1, int(self.experiment.config.num_rounds) + 1):
            with self.stopwatch.round():
                row = self._round(self.strategy.method.plan(number))
            tell(row)

    def _round(self, plan: RoundPlan) -> dict[str, Any]:
        started = time.perf_counter()
        with self.stopwatch.part("exchange"):
            self.roster.wait(plan.round)
        self._exchange(plan.round)
        self._tell()
        if self.tally.resumed_after[-1:] == [plan.round - 1]:
            note = f"resumed with the state of round {plan.round - 1}"
            self.strategy.exchange.notes.append({"client": None, "note": note})
        with self.stopwatch.part("evaluation"):
            measured = self._prune_and_evaluate(plan)
        row = {**self._row(plan, measured), "seconds": time.perf_counter() - started}
        with self.stopwatch.part("saving"):
            self._note_architecture(plan.round)
            self.folder.rounds.append(row)
            self._save()
        return row

    def _last_noted(self) -> dict[str, Any]:
        """What the last line of architecture.jsonl says, whichever round it is of."""
        lines = self.folder.architecture.read()
        return {key: value for key, value in lines[-1].items() if key != "round"} if lines else {}

    def _note_architecture(self, number: int) -> None:
        """Write down what the search thinks of its choices, if there are any and that has changed."""
        line = architecture_line(self.state.architecture)
        if self.state.spec.groups and line != self._noted:
            self.folder.architecture.append({"round": number, **line})
            self._noted = line

    def _exchange(self, number: int) -> None:
        messages = self.strategy.configure_train(number, ArrayRecord(), ConfigRecord(), self.courier.grid)
        with self.stopwatch.part("exchange"):
            replies = self.courier.exchange(messages, self.experiment.config.round_timeout_s)
        with self.stopwatch.part("averaging"):
            self.strategy.aggregate_train(number, replies)
        self.tally.updates_excluded += len(self.strategy.exchange.excluded)
        self._count(self.strategy.exchange)
        if self.stopwatch.counts:
            self.tally.client_seconds_timed += self.strategy.exchange.client_seconds

    def _tell(self) -> None:
        """Put what became of nodes, late replies and the SuperLink among the round's notes."""
        roster, courier, exchange = self.roster, self.courier, self.strategy.exchange
        roster.events += [(None, note) for note in courier.notes]
        exchange.notes += [{"client": client, "note": what} for client, what in roster.events]
        roster.events, courier.notes = [], []
        if not roster.virtual:
            roster.used_gpu(exchange.gpu_bytes)
            self.tally.roster = roster.to_list()

    def _count(self, exchange: Exchange) -> None:
        self.tally.uplink_bytes += exchange.uplink_bytes
        self.tally.downlink_bytes += exchange.downlink_bytes
        self.tally.compute_seconds += exchange.compute_seconds
        self.tally.client_seconds += exchange.client_seconds
        self.tally.peak_client_bytes = max(self.tally.peak_client_bytes, exchange.peak_client_bytes)
        self.tally.peak_client_gpu_bytes = max(self.tally.peak_client_gpu_bytes, exchange.peak_client_gpu_bytes)

    def _prune_and_evaluate(self, plan: RoundPlan) -> float | None:
        """The round's prune event, if it has one, and the accuracy after it, where it is measured."""
        config, accepted = self.experiment.config, self.strategy.exchange.accepted
        due = plan.round % config.evaluate_every == 0 or plan.round == plan.num_rounds
        before = self.state.copy()
        report = self.strategy.method.prune(self.state, accepted, plan)
        if report is not None:
            self.tally.events.append(self.measuring.prune_event(before, self.state, plan, report))
        if self.strategy.method.ends_stage(plan) and not self.is_local:
            self.tally.events.append(self.measuring.derivation_event(self.state, plan, self.renewed(plan.round)))
        if report is None and not due:
            return None
        measured = (
            self.tally.events[-1]["after"] if report is not None else self.measuring.global_accuracy(self.state, plan)
        )
        if due and measured is not None:
            self.state.evaluations.append((plan.round, measured))
        return cast(float | None, measured)

    @property
    def is_local(self) -> bool:
        """Whether the clients share nothing."""
        return self.strategy.method.recipe.is_local

    def cost(self) -> Cost:
        """The cost of the alive network, counted once per version of the masks."""
        version = (self.state.stage, self.state.architecture.version)
        if self._cost is None or self._cost[0] != version:
            self._cost = (version, measure_cost(self.state.spec, self.state.architecture.operation_mask))
        return self._cost[1]

    def _collapse(self, plan: RoundPlan) -> dict[str, Any]:
        """Signs of a collapse, where they are watched for; a warning once among the notes."""
        if self.experiment.config.collapse_watch == "off" or not plan.adapts_architecture:
            return {}
        architecture = self.state.architecture
        warning = collapse_warning(architecture)
        if warning and not self.tally.warned_of_collapse:
            self.tally.warned_of_collapse = True
            self.strategy.exchange.notes.append({"client": None, "note": f"round {plan.round}: {warning}"})
        return {"skip_share": skip_share(architecture), "alpha_entropy": alpha_entropy(architecture)}

    def _row(self, plan: RoundPlan, measured: float | None) -> dict[str, Any]:
        exchange, cost = self.strategy.exchange, self.cost()
        collapse = self._collapse(plan)
        return {
            "round": plan.round,
            "stage": plan.stage,
            "phase": plan.phase,
            "temperature": plan.temperature,
            "noise_scale": plan.noise_scale,
            "clients": exchange.clients,
            "excluded": exchange.excluded,
            "notes": exchange.notes,
            "train_loss": exchange.mean("train_loss"),
            "support_loss": exchange.mean("support_loss"),
            "test_accuracy": measured,
            "alive_operations": self.state.architecture.alive_operations() if self.state.spec.groups else None,
            "macs": cost.macs,
            "parameters": cost.parameters,
            "uplink_bytes": exchange.uplink_bytes,
            "downlink_bytes": exchange.downlink_bytes,
            **collapse,
            "compute_seconds": exchange.compute_seconds,
            "longest_compute_seconds": exchange.longest_compute_seconds,
            **self._privacy(),
        }

    def _privacy(self) -> dict[str, Any]:
        """What the averages so far have given away, where clients protect themselves; they do not tell their losses."""
        if self.experiment.privacy is None:
            return {}
        self.tally.averaged.append(len(self.strategy.exchange.accepted))
        self.tally.fewest_candidates = min(self.tally.fewest_candidates or 10**9, self.strategy.candidates)
        return {"epsilon": self._epsilon(), "train_loss": None, "support_loss": None}

    def _epsilon(self) -> float | None:
        privacy, config = self.experiment.privacy, self.experiment.config
        if privacy is None:
            return None
        candidates = self.tally.fewest_candidates or config.num_clients - config.unseen_clients
        return epsilon(privacy, self.tally.averaged, candidates, config.dp_delta)

    def renewed(self, number: int) -> TrainableNetwork | None:
        """The network that would be cut out now, its running statistics renewed by the round's clients.

        This is a measurement: no method has it, so what it sends counts nowhere.
        """
        if self.experiment.privacy is not None:
            return None  # nobody sends statistics without noise for a mere measurement
        exchange = self.strategy.exchange
        messages = self.strategy.configure_renewal(number)
        replies = self.courier.exchange(messages, self.experiment.config.round_timeout_s)
        network = self.strategy.aggregate_renewal(replies)
        self.strategy.exchange = exchange
        return network

    @property
    def _last_plan(self) -> RoundPlan:
        return self.strategy.method.plan(max(1, self.state.round))

    def compare(self, network: TrainableNetwork) -> dict[str, Any]:
        """See Measuring.compare."""
        return self.measuring.compare(network, self.state, self._last_plan)

    def adopt(self, network: TrainableNetwork) -> None:
        """Let the state be the extracted network's; it is already, unless the masks are not one-hot."""
        if isinstance(network, Network):
            self.state.restrict(*network.genotype.masks(network.spec))

    def evaluate_clients(self) -> list[Evaluation]:
        """All clients' answers about the model that they would use."""
        number = self._last_plan.round
        self.roster.wait(number)
        messages = self.strategy.configure_evaluate(number, ArrayRecord(), ConfigRecord(), self.courier.grid)
        replies = self.courier.exchange(messages, self.experiment.config.round_timeout_s)
        self.strategy.aggregate_evaluate(number, replies)
        self._count(self.strategy.exchange)
        return self.strategy.evaluations

    def totals(self) -> dict[str, Any]:
        """What the run has cost and measured so far."""
        self._bring_up_to_date()
        cost, plan = self.cost_of_result or self.cost(), self._last_plan
        begun = plan.round - plan.stage_round  # what was evaluated before belongs to a network that was given up
        last = [value for number, value in self.state.evaluations if number > begun][-LAST_EVALUATIONS:]
        return {
            "test_accuracy_last_evaluations": fmean(last) if last else None,
            "pruning_events": self.tally.events,
            "parameters": cost.parameters,
            "macs": cost.macs,
            "uplink_bytes": self.tally.uplink_bytes,
            "downlink_bytes": self.tally.downlink_bytes,
            "updates_excluded": self.tally.updates_excluded,
            "compute_seconds": self.tally.compute_seconds,
            "client_seconds": self.tally.client_seconds,
            # Those of the clients pass side by side, in the exchange.
            "seconds_by_part": {"clients": self.tally.client_seconds_timed, **self.tally.seconds_by_part},
            "seconds": self.tally.seconds,
            "resumed_after": self.tally.resumed_after,
            "epsilon": self._epsilon(),
            "hardware": self.tally.hardware,
            "nodes": None if self.roster.virtual else self.tally.roster,
            "peak_memory_bytes": max(peak_memory_bytes(), self.tally.peak_client_bytes),
            "peak_gpu_memory_bytes": max(peak_gpu_memory_bytes(), self.tally.peak_client_gpu_bytes),
        }

    def _save(self) -> None:
        """The whole state, written aside and renamed."""
        self._bring_up_to_date()
        save_state(self.folder.checkpoint_directory, self.state, self.tally)

    def _bring_up_to_date(self) -> None:
        self.tally.seconds = self._seconds_before + time.perf_counter() - self._started
        self.tally.seconds_by_part = self.stopwatch.seconds()
