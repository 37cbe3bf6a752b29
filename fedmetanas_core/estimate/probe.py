"""A process that works like one of a run's workers, and says what that takes.

Run as ``python -m fedmetanas_core.estimate.probe``, it reads the configuration and then one order a line from its
standard input, as JSON, and answers each with a line. A process of its own, because its memory is to be that of a
worker, and because several of them at once show what they cost each other.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedmetanas_core.config import Config
from fedmetanas_core.estimate.course import Course, client_memory, last_state, payload_of, take_course
from fedmetanas_core.estimate.traffic import NOBODY, whole_bytes
from fedmetanas_core.federation import wire
from fedmetanas_core.federation.feedback import compressed
from fedmetanas_core.federation.update import ClientUpdate, Evaluation, Payload
from fedmetanas_core.methods.client import Memory, evaluate_client, local_update
from fedmetanas_core.methods.method import Method
from fedmetanas_core.methods.registry import make_method
from fedmetanas_core.preflight import Experiment, peak_gpu_memory_bytes, pick_device, prepare_experiment
from fedmetanas_core.run.folder import peak_memory_bytes
from fedmetanas_core.run.stopwatch import Compute
from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.space.native import build

Answer = dict[str, Any]


class Worker:
    """One worker's part of a run: its data, its method, and the course that the run will take."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.device = experiment, pick_device(experiment.config)
        self.method: Method = make_method(experiment.config, experiment.spec)
        self.method.beginning(0)
        self.course: Course = take_course(experiment.config, self.method)

    def update(self, client: int, number: int, images: int) -> Answer:
        """A client's part of a round, with so many of its images at most: seconds, and bytes that it would send."""
        payload = payload_of(self.method, self.course, client, number)
        whole = whole_bytes(self.method, self.course, payload, client)
        memory, record = client_memory(self.method, self.course, client, number), wire.encode_payload(payload, NOBODY)
        update: ClientUpdate | None = None

        def work() -> None:
            nonlocal update
            came = wire.decode_payload(record, self.method.space_of)
            update = self._train(came, client, memory, images)

        seconds = self._seconds(work)
        assert update is not None
        sent = wire.array_bytes(wire.encode_update(update))
        return {**seconds, "sent": sent, "whole": whole, "images": min(images, self._size(client))}

    def _train(self, payload: Payload, client: int, memory: Memory, images: int) -> ClientUpdate:
        """What the client app does between message and reply."""
        data = self._some(self.experiment.training_data(client), images)
        update, _ = local_update(self.method, payload, client, data, memory)
        if self.experiment.config.compression != "none":
            update, _ = compressed(update, payload, self.experiment.config.compression, {})
        if self.experiment.privacy is not None:
            update = self.experiment.privacy.protect(update, payload, self.method.variances(payload, update))
        return update

    def evaluate(self, client: int, images: int) -> Answer:
        """A client's part of the evaluation at the end."""
        plan = self.method.plan(self.method.num_rounds)
        payload = self.method.final_payload(last_state(self.method, self.course), client, plan)
        memory = client_memory(self.method, self.course, client, self.method.num_rounds + 1)
        record, evaluation = wire.encode_payload(payload, NOBODY), None

        def work() -> None:
            nonlocal evaluation
            came = wire.decode_payload(record, self.method.space_of)
            data = self._some(self.experiment.training_data(client), images)
            held_out = self.experiment.evaluation_data(client)
            evaluation = evaluate_client(self.method, came, client, data, held_out, memory)

        seconds = self._seconds(work)
        assert isinstance(evaluation, Evaluation)
        sent = wire.array_bytes(wire.encode_evaluation(evaluation))
        return {**seconds, "sent": sent, "images": min(images, self._size(client))}

    def _size(self, client: int) -> int:
        return len(self.experiment.partition.shares[client].train)

    @staticmethod
    def _some(data: LocalData, images: int) -> LocalData:
        return data if images >= len(data) else data.subset(torch.arange(images))

    def _seconds(self, work: Callable[[], None]) -> Answer:
        """Seconds of computing, and the largest sizes of this process so far."""
        with Compute(self.device) as compute:
            work()
        return {"seconds": compute.seconds, **sizes()}


def sizes() -> Answer:
    """The largest size of this process so far; on a GPU also what torch holds of it, and what is free there."""
    found: Answer = {"memory": own_peak_bytes(), "gpu_memory": peak_gpu_memory_bytes()}
    if torch.cuda.is_available():
        found["gpu_free"], found["gpu_total"] = torch.cuda.mem_get_info()
    return found


def own_peak_bytes() -> int:
    """The largest resident size of this program.

    What the system counts for a process includes the one that started it, up to the start; /proc tells them apart.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return peak_memory_bytes()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Obey until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    torch.set_num_threads(1)
    config = Config.from_mapping(json.loads(sys.stdin.readline()))
    with Compute("cpu") as preparing:
        experiment = prepare_experiment(config, Path.cwd(), check=False)
    build.prepare(device=pick_device(config))
    worker = Worker(experiment)
    _say(answers, {"seconds": preparing.seconds, **sizes()})
    for line in sys.stdin:
        order = json.loads(line)
        _say(answers, getattr(worker, order.pop("do"))(**order))


def _say(answers: Any, answer: Answer) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
