"""The server's own work, measured in this process: averaging, evaluation, saving."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from fedmetanas_core.estimate.course import Course, Segment, client_memory, filled
from fedmetanas_core.federation import wire
from fedmetanas_core.federation.feedback import compressed
from fedmetanas_core.federation.screening import Screening
from fedmetanas_core.federation.update import ClientUpdate, Payload, RoundPlan, ServerState
from fedmetanas_core.methods.client import local_update
from fedmetanas_core.methods.global_model import global_model
from fedmetanas_core.methods.method import Method
from fedmetanas_core.preflight import Experiment
from fedmetanas_core.run.checkpoint import save_state
from fedmetanas_core.run.tally import Tally
from fedmetanas_core.search.evaluation import accuracy

FEW_IMAGES = 8  # what an update holds does not depend on how long it was trained
TURNS, ENOUGH_S = 7, 1.0


@dataclass(frozen=True)
class ServerWork:
    """Seconds: of averaging a round's updates, of one evaluation between rounds, of writing the state."""

    averaging: float
    evaluation: float
    saving: float


def server_work(experiment: Experiment, method: Method, course: Course, segment: Segment) -> ServerWork:
    """Everything in a round of a segment that the server does by itself."""
    state, plan = filled(method, segment.state), method.plan(segment.middle)
    averaging = _averaging(experiment, method, course, segment)
    evaluation = _evaluation(experiment, method, state, plan)
    with tempfile.TemporaryDirectory() as place:
        saving = _usual_time(lambda: save_state(Path(place), state, Tally()), waits=True)
    return ServerWork(averaging, evaluation, saving)


def _evaluation(experiment: Experiment, method: Method, state: ServerState, plan: RoundPlan) -> float:
    data = experiment.test_sample(experiment.config.evaluation_images)
    device = str(data.images.device)
    return _usual_time(lambda: accuracy(global_model(method, state, plan, device), data))


def _averaging(experiment: Experiment, method: Method, course: Course, segment: Segment) -> float:
    """Reading, screening and averaging the updates of as many clients as train in a round."""
    config, plan, state = experiment.config, method.plan(segment.middle), filled(method, segment.state)
    who = course.trainings[segment.middle]
    payloads = {client: method.payload(state, client, plan) for client in who}
    alike = method.recipe.same_for_all
    trained = {
        client: _update(experiment, method, course, payloads[client], client) for client in who[: 1 if alike else None]
    }
    records = [wire.encode_update(trained.get(client) or replace(trained[who[0]], client=client)) for client in who]
    screening = Screening(norm_ratio=config.norm_ratio)

    def average() -> None:
        updates = []
        for client, record in zip(who, records, strict=True):
            sent = payloads[client]
            update = wire.decode_update(record, (sent.weights, sent.statistics), config.compression)
            screening.alone(update, sent, method.expected(sent, update), method.variances(sent, update))
            updates.append(update)
        screening.together({each.client: method.changes(payloads[each.client], each) for each in updates})
        method.aggregate(state, payloads, updates, plan)

    return _usual_time(average)


def _update(experiment: Experiment, method: Method, course: Course, payload: Payload, client: int) -> ClientUpdate:
    data = experiment.training_data(client)
    data = data.subset(torch.arange(min(FEW_IMAGES, len(data))))
    memory = client_memory(method, course, client, payload.plan.round)
    update, _ = local_update(method, payload, client, data, memory)
    if experiment.config.compression != "none":
        update, _ = compressed(update, payload, experiment.config.compression, {})
    said = dict.fromkeys(wire.REPORTED, 0.0)
    return replace(update, metrics={**said, **update.metrics})


def _usual_time(work: Callable[[], object], waits: bool = False) -> float:
    """Seconds of the middle one of a few turns, after one in which what is made once for all is made.

    Of the wall, or of the processors where these are fewer: unless it ``waits`` for a disk, others have worked here.
    """
    work()
    turns = list[float]()
    while len(turns) < TURNS and sum(turns) < ENOUGH_S:
        wall, own = time.perf_counter(), time.process_time()
        work()
        passed, own = time.perf_counter() - wall, time.process_time() - own
        turns.append(passed if waits else min(passed, own))
    return median(turns)
