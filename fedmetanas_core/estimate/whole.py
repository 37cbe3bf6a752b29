"""The estimate of a whole run, put together from its course and what was measured."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch

from fedmetanas_core.config import Config
from fedmetanas_core.estimate import fixed
from fedmetanas_core.estimate.clients import ClientWork, measure_clients
from fedmetanas_core.estimate.course import HEAVIEST, LIGHTEST, Course, Segment, end_cost, take_course
from fedmetanas_core.estimate.duration import End, Setting, duration
from fedmetanas_core.estimate.partition import about_partition
from fedmetanas_core.estimate.probe import own_peak_bytes
from fedmetanas_core.estimate.server import server_work
from fedmetanas_core.estimate.team import Crew, Team
from fedmetanas_core.estimate.traffic import Load, Traffic, final_load, segment_load, total
from fedmetanas_core.launch import GPU_CLIENTS, worker_count
from fedmetanas_core.methods.method import Method
from fedmetanas_core.methods.registry import make_method
from fedmetanas_core.preflight import Experiment, pick_device
from fedmetanas_core.run.hardware import describe_hardware
from fedmetanas_core.run.processes import available_cores
from fedmetanas_core.space.cost import Cost, measure_cost
from fedmetanas_core.space.spec import SpaceSpec

DRAWS = 5  # of alphas, the run's own among them
# Which operations stay is learned. The networks that were found lie between random ones and the heaviest that caps
# allow, so the middle of these is told: on the way from the lightest to the heaviest, in parameters, the digits
# searches of the README came 0.30 to 0.47 far, that of MNIST 0.97, that of CIFAR-10 0.92; random operations 0.1 to 0.3.
LEARNED = 0.5
GPU_SHARE = 0.9  # of a GPU's memory that may be planned for


@dataclass(frozen=True)
class Sizes:
    """Multiply-adds and bytes of each segment, bytes that a client gets at the end, and the network at the end."""

    macs: list[float]
    loads: list[Load]
    final: float
    end: Cost

    @classmethod
    def between(cls, low: "Sizes", high: "Sizes", share: float) -> "Sizes":
        """So far on the way from the one to the other."""

        def mix(one: float, other: float) -> float:
            return one + share * (other - one)

        pairs = zip(low.loads, high.loads, strict=True)
        figures = zip(astuple(low.end), astuple(high.end), strict=True)
        return cls(
            [mix(*each) for each in zip(low.macs, high.macs, strict=True)],
            [Load(mix(one.down, other.down), mix(one.whole, other.whole)) for one, other in pairs],
            mix(low.final, high.final),
            Cost(*(round(mix(*each)) for each in figures)),
        )


def estimate(
    experiment: Experiment, team_of: Callable[[Config, int], AbstractContextManager[Crew]] = Team
) -> dict[str, Any]:
    """Everything that is told, by name. ``team_of`` makes so many probes."""
    config = experiment.config
    method = make_method(config, experiment.spec)
    device, cores = pick_device(config), available_cores()
    workers = worker_count(config, device == "cuda")
    torch.set_num_threads(cores)  # as the run's server does
    course = take_course(config, method)
    lightest, sizes, heaviest = _sizes(experiment, method, course)
    own = [float(_cost(segment).macs) for segment in course.segments]
    with team_of(config, workers if device == "cuda" else min(workers, cores)) as team:
        clients = measure_clients(team, experiment, course, own, sizes.macs)
    servers = {place: server_work(experiment, method, course, course.segments[place]) for place in _ends(course)}
    ratios = [work.ratio for work in clients.segments]
    low, traffic, high = (
        total(course.segments, each.loads, ratios, (each.final, clients.final.sent), config)
        for each in (lightest, sizes, heaviest)
    )
    setting = Setting(experiment, method, course, workers, workers if device == "cuda" else cores)
    end = End(sizes.end.macs, config.num_clients * (sizes.final + clients.final.sent))
    spent = duration(setting, clients, servers, sizes.macs, sizes.loads, end)
    found = {
        "method": config.method,
        "preset": config.preset,
        "dataset": experiment.dataset.name,
        "image_shape": list(experiment.dataset.image_shape),
        "classes": experiment.dataset.num_classes,
        "rounds": method.num_rounds,
        "seed": config.seed,
        "hardware": describe_hardware(device),
        "device": device,
        "cores": cores,
        "workers": workers,
        "clients_per_round": config.clients_per_round,
        "partition": about_partition(experiment, course.trainings),
        "network": _network(course, lightest.end, sizes.end, heaviest.end),
        "bytes": _traffic(low, traffic, high),
        "memory": _memory(clients, workers),
        "seconds": spent.to_dict(),
        "gpu": _gpu(clients) if device == "cuda" else None,
        "measured_segments": [clients.measured, len(course.segments)],
    }
    return {**found, "notes": _notes(experiment, method, course, found)}


def _sizes(experiment: Experiment, method: Method, course: Course) -> tuple[Sizes, Sizes, Sizes]:
    """(lightest, expected, heaviest), by what is learned of the operations."""
    plain = _sizes_of(experiment, method, course, course)
    if not any(isinstance(stage.space, SpaceSpec) for stage in method.recipe.stages):
        return plain, plain, plain
    mean = plain
    for draw in range(1, DRAWS):
        mean = Sizes.between(mean, _drawn_sizes(experiment, method, course, draw), 1 / (draw + 1))
    lightest, heaviest = (_drawn_sizes(experiment, method, course, draw) for draw in (LIGHTEST, HEAVIEST))
    return lightest, Sizes.between(mean, heaviest, LEARNED), heaviest


def _drawn_sizes(experiment: Experiment, method: Method, course: Course, draw: int) -> Sizes:
    return _sizes_of(experiment, method, course, take_course(experiment.config, method, draw))


def _sizes_of(experiment: Experiment, method: Method, course: Course, other: Course) -> Sizes:
    """Of another course, in the segments of this one: where its prunes remove nothing it has fewer."""
    segments = [
        replace(other.segment_of(segment.first), first=segment.first, rounds=segment.rounds)
        for segment in course.segments
    ]
    return Sizes(
        [float(_cost(segment).macs) for segment in segments],
        [segment_load(method, other, segment) for segment in segments],
        final_load(method, other, experiment.config.num_clients),
        end_cost(method, other),
    )


def _cost(segment: Segment) -> Cost:
    return measure_cost(segment.state.spec, segment.state.architecture.operation_mask)


def _ends(course: Course) -> list[int]:
    """The first and the last segment of every stage."""
    stages = [segment.stage for segment in course.segments]
    return sorted(
        {place for stage in stages for place in (stages.index(stage), len(stages) - 1 - stages[::-1].index(stage))}
    )


def _network(course: Course, lightest: Cost, expected: Cost, heaviest: Cost) -> dict[str, Any]:
    first = _cost(course.segments[0])
    ends = {"least": lightest, "mean": expected, "most": heaviest}
    return {
        "first_parameters": first.parameters,
        "first_macs": first.macs,
        "final_parameters": {name: cost.parameters for name, cost in ends.items()},
        "final_macs": {name: cost.macs for name, cost in ends.items()},
    }


def _traffic(low: Traffic, traffic: Traffic, high: Traffic) -> dict[str, Any]:
    return {
        "first_round": {"down": round(traffic.first_down), "up": round(traffic.first_up)},
        "last_round": {"down": round(traffic.last_down), "up": round(traffic.last_up)},
        "run": {"down": round(traffic.down), "up": round(traffic.up)},
        "least": {"down": round(low.down), "up": round(low.up)},
        "most": {"down": round(high.down), "up": round(high.up)},
    }


def _memory(clients: ClientWork, workers: int) -> dict[str, Any]:
    client, server = clients.memory + fixed.WORKER_BYTES, own_peak_bytes() + fixed.SERVER_BYTES
    return {
        "client": client,
        "server": server,
        "others": fixed.OTHERS_BYTES,
        "total": workers * client + server + fixed.OTHERS_BYTES,
        "machine": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


def _gpu(clients: ClientWork) -> dict[str, Any]:
    """What a client takes of the GPU, and how many could share it."""
    fit = max(1, int(GPU_SHARE * clients.gpu_total / max(1, clients.gpu_bytes)))
    return {
        "client": clients.gpu_bytes,
        "total": clients.gpu_total,
        "clients_that_fit": fit,
        "share_per_client": round(1 / fit, 4),
        "clients_at_once": GPU_CLIENTS,
    }


def _notes(experiment: Experiment, method: Method, course: Course, found: dict[str, Any]) -> list[str]:
    """What these figures do not know."""
    config, memory, gpu = experiment.config, found["memory"], found["gpu"]
    load = os.getloadavg()[0] - 1.0 if hasattr(os, "getloadavg") else 0.0
    measured, segments = found["measured_segments"]
    texts = (
        (
            not course.is_settled(method),
            "what is pruned depends on what is learned; nothing is taken to go, so bytes "
            "and time are the most to expect",
        ),
        (
            found["network"]["final_parameters"]["least"] < found["network"]["final_parameters"]["most"],
            "which operations stay depends on what is learned; the middle between random ones and the heaviest is told",
        ),
        (measured < segments, f"{measured} of {segments} kinds of rounds were tried, the others follow from these"),
        (config.ray_cluster != "", "the clients will run on a Ray cluster; time and memory are told as if here"),
        (memory["total"] > memory["machine"], "this is more memory than the machine has"),
        (
            gpu is not None and gpu["clients_that_fit"] < GPU_CLIENTS,
            f"{GPU_CLIENTS} clients at a time do not fit into the GPU's memory",
        ),
        (
            load > found["cores"] / 2,
            f"other programs are busy here (load {load:.1f} beside this one); the times are those of cores of its own",
        ),
    )
    return [text for holds, text in texts if holds]
