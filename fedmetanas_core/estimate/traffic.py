"""Bytes that a run would send, counted as a run counts them: the serialised arrays of its messages."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from fedmetanas_core.config import Config
from fedmetanas_core.estimate.course import Course, Segment, client_memory, filled, last_state
from fedmetanas_core.federation import wire
from fedmetanas_core.federation.policy import Shared
from fedmetanas_core.federation.update import Payload
from fedmetanas_core.federation.wire import RunIdentity
from fedmetanas_core.methods.client import completed
from fedmetanas_core.methods.method import Method

SAMPLED_ROUNDS = 6  # of a segment whose clients get, or make, networks of their own
NOBODY = wire.encode_run(RunIdentity("{}", "", "", "", ""))


@dataclass(frozen=True)
class Load:
    """Bytes a client: ``down`` of what it gets; ``whole`` of the network that it trains, encoded alike.

    What it sends is in proportion to the latter.
    """

    down: float
    whole: float


def payload_bytes(payload: Payload) -> int:
    """Of the arrays of a message with this payload."""
    return wire.array_bytes(wire.encode_payload(payload, NOBODY))


def whole_bytes(method: Method, course: Course, payload: Payload, client: int) -> int:
    """Of the network that a client trains with this payload, where its own masks make it another one."""
    if method.recipe.personal.masks is None:
        return payload_bytes(payload)
    memory = client_memory(method, course, client, payload.plan.round)
    return payload_bytes(completed(method, payload, memory, resumes=False))


def segment_load(method: Method, course: Course, segment: Segment) -> Load:
    """Means over the clients of a segment; over those of a few of its rounds where they differ."""
    state, architect = filled(method, segment.state), method.recipe.stages[segment.stage].architect
    alike = isinstance(architect, Shared) and method.recipe.personal.masks is None
    step = max(1, segment.rounds // SAMPLED_ROUNDS)
    rounds = [segment.middle] if alike else range(segment.first, segment.first + segment.rounds, step)
    found = []
    for number in rounds:
        plan, who = method.plan(number), course.trainings[number]
        for client in who[:1] if alike else who:
            payload = method.payload(state, client, plan)
            found.append((payload_bytes(payload), whole_bytes(method, course, payload, client)))
    return Load(fmean(down for down, _ in found), fmean(whole for _, whole in found))


def final_load(method: Method, course: Course, clients: int) -> float:
    """Bytes that a client gets after the last round, mean over the clients."""
    state, plan = last_state(method, course), method.plan(method.num_rounds)
    alike = isinstance(method.recipe.stages[plan.stage].architect, Shared)
    asked = range(1 if alike else clients)
    return fmean(payload_bytes(method.final_payload(state, client, plan)) for client in asked)


@dataclass(frozen=True)
class Traffic:
    """Bytes: of a round's clients together in the first and in the last round, of the run."""

    first_down: float
    first_up: float
    last_down: float
    last_up: float
    down: float
    up: float


def total(
    segments: Sequence[Segment],
    loads: Sequence[Load],
    ratios: Sequence[float],
    final: tuple[float, float],
    config: Config,
) -> Traffic:
    """All rounds, and the evaluation at the end.

    ``ratios`` are the bytes that a client of each segment sends for every byte of its whole network; ``final`` those
    that each client gets and sends at the end.
    """
    count, rounds = config.clients_per_round, [segment.rounds for segment in segments]
    downs = [count * load.down for load in loads]
    ups = [count * ratio * load.whole for ratio, load in zip(ratios, loads, strict=True)]
    down, up = (sum(number * each for number, each in zip(rounds, way, strict=True)) for way in (downs, ups))
    return Traffic(
        *(downs[0], ups[0], downs[-1], ups[-1]),
        down=down + config.num_clients * final[0],
        up=up + config.num_clients * final[1],
    )
