"""The clients' work, measured by probes: seconds of a round in every segment, bytes sent, memory."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median

from fedmetanas_core.estimate.course import Course, Segment
from fedmetanas_core.estimate.makespan import between
from fedmetanas_core.estimate.team import Answer, Crew
from fedmetanas_core.preflight import Experiment

BUDGET_S = 15.0  # of measuring; what the first and last segment of each kind take is taken in any case
SHORT_S = 0.3  # what takes less is measured on further clients
REPEATS = 3
FEW_BATCHES = 4  # of images: enough for a step of each kind of batch

Order = Callable[[int, int], dict[str, object]]  # (probe, images) to what it is told


@dataclass(frozen=True)
class Work:
    """What a client takes: seconds of a core (of the wall, on a GPU), bytes sent, and those for a byte of its whole
    network. ``first``: seconds more that a worker takes when it comes to such a network for the first time."""

    seconds: float
    sent: float
    ratio: float = 0.0
    first: float = 0.0


@dataclass
class ClientWork:
    """Of every segment, and of the evaluation at the end. ``measured`` counts the segments that were really tried.

    ``prepared``: seconds in which a worker loads the data. ``memory``: bytes of the largest worker; on a GPU also what
    one of them takes there, and what there is.
    """

    segments: list[Work] = field(default_factory=list)
    final: Work = field(default_factory=lambda: Work(0.0, 0.0))
    measured: int = 0
    prepared: float = 0.0
    memory: int = 0
    gpu_bytes: int = 0
    gpu_total: int = 0


def measure_clients(
    team: Crew, experiment: Experiment, course: Course, macs: Sequence[float], wanted: Sequence[float]
) -> ClientWork:
    """Let the probes do what a run's clients do.

    ``macs`` are the multiply-adds of the course's segments, ``wanted`` those for which seconds are told.
    """
    measuring = _Measuring(team, experiment, course)
    found: dict[int, Work] = {}
    started, must = time.monotonic(), _extremes(course.segments)
    for place in [*must, *_spread(len(course.segments), must)]:
        if place not in must and time.monotonic() - started > BUDGET_S:
            break
        found[place] = measuring.segment(course.segments[place], len(must))
    final, answers = measuring.final(), measuring.answers
    return ClientWork(
        segments=[_of(place, wanted[place], course.segments, macs, found) for place in range(len(wanted))],
        final=final,
        measured=len(found),
        prepared=fmean(answer["seconds"] for answer in team.ready),
        memory=max(answer["memory"] for answer in answers),
        gpu_bytes=_on_gpu(answers, team.count),
        gpu_total=max(answer.get("gpu_total", 0) for answer in answers),
    )


def _extremes(segments: Sequence[Segment]) -> list[int]:
    """The first and the last one of every kind: between them the rest can be told."""
    found: dict[int, None] = {}
    for kind in dict.fromkeys(segment.kind for segment in segments):
        places = [place for place, segment in enumerate(segments) if segment.kind == kind]
        found[places[0]] = found[places[-1]] = None
    return list(found)


def _spread(count: int, done: Sequence[int]) -> list[int]:
    """All other places, each as far as can be from those before it."""
    taken, left = list(done), [place for place in range(count) if place not in done]
    order = []
    while left:
        place = max(left, key=lambda each: min(abs(each - other) for other in taken))
        left.remove(place)
        taken.append(place)
        order.append(place)
    return order


def _of(place: int, wanted: float, segments: Sequence[Segment], macs: Sequence[float], found: dict[int, Work]) -> Work:
    """What the measured segments of the same kind say of so many multiply-adds."""
    points = [(macs[each], work) for each, work in found.items() if segments[each].kind == segments[place].kind]
    seconds = between(wanted, [(at, work.seconds) for at, work in points])
    if place in found:
        return replace(found[place], seconds=seconds)
    later = [work.first for each, work in found.items() if each] or [0.0]  # the very first network makes more
    return Work(seconds, 0.0, fmean(work.ratio for _, work in points), fmean(later))


def _on_gpu(answers: Sequence[Answer], count: int) -> int:
    """Bytes that a client takes of the GPU: a probe's share of all that is in use there, its context included."""
    return max(
        (answer["gpu_total"] - answer["gpu_free"]) // count if "gpu_total" in answer else 0 for answer in answers
    )


class _Measuring:
    """Orders to a team, and what they answered."""

    def __init__(self, team: Crew, experiment: Experiment, course: Course) -> None:
        self.team, self.experiment, self.course = team, experiment, course
        self.answers: list[Answer] = list(team.ready)
        self.most = max(len(share.train) for share in experiment.partition.shares)
        self.few = min(self.most, FEW_BATCHES * int(experiment.config.batch_size))

    def segment(self, segment: Segment, shares: int) -> Work:
        """A client's training in the middle of a segment, after one that does not count: of its first round."""

        def order(number: int, turn: int) -> Order:
            who = self.course.trainings[number]
            return lambda probe, images: {
                "do": "update",
                "client": who[(self.team.count * turn + probe) % len(who)],
                "number": number,
                "images": images,
            }

        return self._work(order(segment.first, 0), lambda turn: order(segment.middle, turn), shares)

    def final(self) -> Work:
        """A client's part of the evaluation."""

        def order(turn: int) -> Order:
            return lambda probe, images: {
                "do": "evaluate",
                "client": (self.team.count * turn + probe) % self.experiment.config.num_clients,
                "images": images,
            }

        return self._work(order(0), lambda turn: order(turn + 1), 1)

    def _work(self, before: Order, order: Callable[[int], Order], shares: int) -> Work:
        """``before`` is not counted. Where all images would take too long, so many segments sharing what time there is,
        seconds follow from two smaller numbers of images."""
        first = fmean(answer["seconds"] for answer in self._ask(before, self.few))
        wide = self.most > 2 * self.few and shares * first * self.most / self.few > BUDGET_S
        answers = self._ask(order(0), 2 * self.few if wide else self.most)
        seconds = median(answer["seconds"] for answer in answers)
        if wide:
            less = median(answer["seconds"] for answer in self._ask(order(0), self.few))
            seconds += max(0.0, seconds - less) * (self.most - 2 * self.few) / self.few
        elif seconds < SHORT_S:
            for turn in range(1, REPEATS):
                answers += self._ask(order(turn), self.most)
            seconds = median(answer["seconds"] for answer in answers)
        once = max(0.0, first - seconds * self.few / self.most)
        ratios = [answer["sent"] / answer["whole"] for answer in answers if answer.get("whole")]
        return Work(seconds, fmean(answer["sent"] for answer in answers), fmean(ratios) if ratios else 0.0, once)

    def _ask(self, order: Order, images: int) -> list[Answer]:
        answers = self.team.ask([order(probe, images) for probe in range(self.team.count)])
        self.answers += answers
        return answers
