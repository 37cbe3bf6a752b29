"""How long a run takes: its rounds by phase, and what comes before and after them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmetanas_core.estimate import fixed
from fedmetanas_core.estimate.clients import ClientWork
from fedmetanas_core.estimate.course import Course
from fedmetanas_core.estimate.makespan import alike, between
from fedmetanas_core.estimate.server import ServerWork
from fedmetanas_core.estimate.traffic import Load
from fedmetanas_core.methods.method import Method
from fedmetanas_core.preflight import Experiment


@dataclass(frozen=True)
class Setting:
    """A run, and what it runs on: so many workers on so many cores."""

    experiment: Experiment
    method: Method
    course: Course
    workers: int
    cores: int


@dataclass(frozen=True)
class End:
    """After the last round: multiply-adds of the network that was found, bytes of the evaluation by all clients."""

    macs: float
    travelled: float


@dataclass
class Phase:
    """Rounds of one phase of one stage, and their seconds."""

    stage: str
    phase: str
    rounds: int = 0
    seconds: float = 0.0


@dataclass
class Duration:
    """Seconds. ``parts`` add up the rounds: the clients' training, Flower, and what the server does by itself.

    ``compute`` are the clients' own together, as if one after the other, without the evaluation by all of them.
    ``final`` is what follows the last round: measuring, and the evaluation by all clients. ``start`` and ``end`` are
    those of the programs.
    """

    start: float = 0.0
    loading: float = 0.0
    compute: float = 0.0
    phases: list[Phase] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    final: float = 0.0
    end: float = 0.0

    @property
    def run(self) -> float:
        """From the first round to the last measurement, as the server counts."""
        return self.loading + sum(phase.seconds for phase in self.phases) + self.final

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        phases = [{**vars(each), "seconds_a_round": each.seconds / each.rounds} for each in self.phases]
        return {
            "command": self.start + self.run + self.end,
            "run": self.run,
            "start": self.start,
            "loading": self.loading,
            "phases": phases,
            "rounds_by_part": self.parts,
            "compute": self.compute,
            "final": self.final,
            "end": self.end,
        }


def exchange_s(setting: Setting, seconds: float, clients: int, travelled: float) -> tuple[float, float]:
    """What so many clients take side by side, and what Flower and Ray add for their messages; bytes of them all."""
    working = alike(seconds, clients, setting.workers, setting.cores)
    return working, fixed.ROUND_S + clients * fixed.MESSAGE_S + travelled * fixed.BYTE_S


def duration(
    setting: Setting,
    clients: ClientWork,
    servers: Mapping[int, ServerWork],
    macs: Sequence[float],
    loads: Sequence[Load],
    end: End,
) -> Duration:
    """Of the whole run. ``servers`` are the server's own seconds in some of the segments."""
    course, config, method = setting.course, setting.experiment.config, setting.method
    crowd = max(1.0, setting.workers / setting.cores)
    parts = dict.fromkeys(("clients", "flower", "averaging", "evaluation", "saving"), 0.0)
    spent = Duration(
        start=fixed.START_S + config.num_clients * fixed.MESSAGE_S,
        loading=clients.prepared * crowd,
        parts=parts,
        end=fixed.END_S,
    )
    server = _Server(setting, servers, macs, loads)
    evaluations = server.evaluations(end.macs)
    for place, segment in enumerate(course.segments):
        work, load = clients.segments[place], loads[place]
        travelled = config.clients_per_round * (load.down + work.ratio * load.whole)
        working, flower = exchange_s(setting, work.seconds, config.clients_per_round, travelled)
        now = {
            "clients": segment.rounds * working + work.first * crowd,
            "flower": segment.rounds * flower,
            "averaging": segment.rounds * server.averaging(place),
            "evaluation": evaluations[place],
            "saving": segment.rounds * server.saving(place),
        }
        for name, seconds in now.items():
            parts[name] += seconds
        name, phase = method.recipe.stages[segment.stage].name, segment.phase
        if not spent.phases or (spent.phases[-1].stage, spent.phases[-1].phase) != (name, phase):
            spent.phases.append(Phase(name, phase))
        spent.phases[-1].rounds += segment.rounds
        spent.phases[-1].seconds += sum(now.values())
    working, flower = exchange_s(setting, clients.final.seconds, config.num_clients, end.travelled)
    each_round = [
        segment.rounds * work.seconds for segment, work in zip(course.segments, clients.segments, strict=True)
    ]
    spent.compute = config.clients_per_round * sum(each_round)
    spent.final = working + clients.final.first * crowd + flower + server.last(end.macs)
    return spent


class _Server:
    """The server's own seconds in every segment, from those that were measured."""

    def __init__(
        self, setting: Setting, servers: Mapping[int, ServerWork], macs: Sequence[float], loads: Sequence[Load]
    ) -> None:
        self.setting, self.servers, self.macs, self.loads = setting, servers, macs, loads
        test, sample = len(setting.experiment.dataset.test), setting.experiment.config.evaluation_images
        self.whole_split = test / min(sample, test)  # in evaluations between rounds

    def averaging(self, place: int) -> float:
        """Of a round."""
        return between(
            self.loads[place].whole, [(self.loads[at].whole, work.averaging) for at, work in self._like(place)]
        )

    def saving(self, place: int) -> float:
        """Of a round."""
        return between(self.loads[place].whole, [(self.loads[at].whole, work.saving) for at, work in self._like(place)])

    def _like(self, place: int) -> list[tuple[int, ServerWork]]:
        segments = self.setting.course.segments
        return [(at, work) for at, work in self.servers.items() if segments[at].stage == segments[place].stage]

    def evaluation(self, macs: float) -> float:
        """One between rounds, of a network of this size."""
        return between(macs, [(self.macs[at], work.evaluation) for at, work in self.servers.items()])

    def evaluations(self, final_macs: float) -> list[float]:
        """Of all rounds of each segment: where it is time, around prunes, and at the ends of stages."""
        course, config = self.setting.course, self.setting.experiment.config
        found, prunes, ends = [], set(course.prunes), set(course.stage_ends)
        cut = self.evaluation(final_macs)
        for place, segment in enumerate(course.segments):
            one, seconds = self.evaluation(self.macs[place]), 0.0
            for number in range(segment.first, segment.first + segment.rounds):
                due = number % config.evaluate_every == 0 or number == self.setting.method.num_rounds
                if number in prunes:
                    after = self.evaluation(self.macs[min(place + 1, len(self.macs) - 1)])
                    seconds += one + after + cut  # before, after, and what DARTS' rule would have left
                elif due:
                    seconds += one
                if number in ends:  # before, after, and with renewed statistics
                    seconds += (one + 2 * cut) * self.whole_split + self._renewal()
            found.append(0.0 if self.setting.method.recipe.is_local else seconds)
        return found

    def last(self, final_macs: float) -> float:
        """After the last round: the extracted network and what it was cut out of, on all test images."""
        course, cut = self.setting.course, self.evaluation(final_macs)
        if self.setting.method.recipe.is_local:  # the mean over the networks of all that have trained
            return cut * len(set().union(*course.trainings.values()))
        seconds = (cut + self.evaluation(self.macs[-1])) * self.whole_split
        searched = bool(course.last.spec.groups)
        if searched and not course.last.architecture.is_one_hot():
            seconds += cut * self.whole_split + self._renewal()
        return seconds

    def _renewal(self) -> float:
        """Clients of a round are asked for the statistics of a network, which takes them next to nothing."""
        return exchange_s(self.setting, 0.0, self.setting.experiment.config.clients_per_round, 0.0)[1]
