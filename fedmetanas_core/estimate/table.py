"""The estimate for people: a few labelled lines, the last one says it all."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedmetanas_core.text import describe, describe_bytes, describe_macs

Facts = Mapping[str, Any]


def summary_line(found: Facts) -> str:
    """The whole estimate in one line."""
    seconds, memory, travelled = found["seconds"], found["memory"], found["bytes"]["run"]
    return (
        f"about {describe(seconds['command'])} on this machine, {describe_bytes(memory['total'])} of memory at most, "
        f"{describe_bytes(travelled['up'])} up, {describe_bytes(travelled['down'])} down"
    )


def as_table(found: Facts) -> str:
    """Everything, in lines."""
    lines = [*_about_data(found), *_about_network(found), *_about_bytes(found), *_about_memory(found)]
    lines += [*_about_time(found), *_about_gpu(found)]
    lines += _labelled("notes", found["notes"]) if found["notes"] else []
    return "\n".join([*lines, *_labelled("in short", [found["summary"]])])


def _labelled(label: str, texts: Sequence[str]) -> list[str]:
    return [f"{label if not place else '':10}{text}" for place, text in enumerate(texts)]


def _about_data(found: Facts) -> Iterator[str]:
    rounds, partition, shape = found["rounds"], found["partition"], "x".join(map(str, found["image_shape"]))
    yield from _labelled(
        "run",
        [
            f"{found['method']} ({found['preset']}) on {found['dataset']}, {rounds} rounds, seed {found['seed']}",
            f"images of {shape}, {found['classes']} classes",
        ],
    )
    classes = _span(partition["classes_per_client"])
    yield from _labelled(
        "partition",
        [
            f"{partition['clients']} clients, {found['clients_per_round']} a round: "
            f"{_span(partition['train_images'])} training and {_span(partition['evaluation_images'])} test images, "
            f"{classes} classes each",
            *(f"note: {text}" for text in partition["warnings"]),
        ],
    )


def _about_network(found: Facts) -> Iterator[str]:
    network = found["network"]
    parameters, macs = network["final_parameters"], network["final_macs"]
    first = f"{network['first_parameters']:,} parameters, {describe_macs(network['first_macs'])} an image at first"
    if parameters["least"] == parameters["most"] == network["first_parameters"]:
        yield from _labelled("network", [first.removesuffix(" at first")])
        return
    span = f"{parameters['least']:,} to {parameters['most']:,} parameters, about {parameters['mean']:,.0f}"
    one = f"{parameters['least']:,} parameters"
    end = one if parameters["least"] == parameters["most"] else span
    yield from _labelled("network", [first, f"{end}, {describe_macs(macs['mean'])} at the end"])


def _about_bytes(found: Facts) -> Iterator[str]:
    ways = {
        name: f"{describe_bytes(each['down'])} down, {describe_bytes(each['up'])} up"
        for name, each in found["bytes"].items()
    }
    run = found["bytes"]["run"]
    yield from _labelled(
        "bytes",
        [
            f"{ways['first_round']} in the first round, {ways['last_round']} in the last",
            f"{ways['run']} in all, the evaluation by all clients included",
            *([f"{ways['least']} at least, {ways['most']} at most"] if found["bytes"]["least"] != run else []),
        ],
    )


def _about_memory(found: Facts) -> Iterator[str]:
    memory = {name: describe_bytes(count) for name, count in found["memory"].items()}
    yield from _labelled(
        "memory",
        [
            f"{memory['client']} a client's process, {found['workers']} of them; {memory['server']} the server; "
            f"{memory['others']} Flower and Ray",
            f"{memory['total']} in all, libraries counted in each process; this machine has {memory['machine']}",
        ],
    )


def _about_time(found: Facts) -> Iterator[str]:
    seconds, cores = found["seconds"], found["cores"]
    where = "sharing its GPU" if found["device"] == "cuda" else f"on {cores} core{'s'[: cores > 1]}"
    several = len({phase["stage"] for phase in seconds["phases"]}) > 1
    lines = [f"this machine: {found['hardware']}; {found['workers']} clients side by side {where}"]
    lines.append(_row("start of Flower and Ray", None, None, seconds["start"] + seconds["loading"]))
    for phase in seconds["phases"]:
        differs = several and phase["stage"] != phase["phase"]
        name = f"{phase['stage']}, {phase['phase']}" if differs else phase["phase"]
        lines.append(_row(name, phase["rounds"], phase["seconds_a_round"], phase["seconds"]))
    lines.append(_row("measuring, all clients", None, None, seconds["final"]))
    lines.append(_row("report and end", None, None, seconds["end"]))
    parts = seconds["rounds_by_part"]
    whole = max(1e-9, sum(parts.values()))
    lines.append("of the rounds: " + ", ".join(f"{name} {value / whole:.0%}" for name, value in parts.items()))
    yield from _labelled("time", lines)


def _row(name: str, rounds: int | None, each: float | None, seconds: float) -> str:
    middle = "" if rounds is None else f"{rounds:5} round{'s'[: rounds > 1]} of {each:.2f} s"
    return f"{name:24}{middle:24}{describe(seconds):>12}"


def _about_gpu(found: Facts) -> Iterator[str]:
    gpu = found["gpu"]
    if gpu is None:
        yield from _labelled(
            "GPU", ["none is used here, so its time, its memory and the share a client needs are unknown"]
        )
        return
    yield from _labelled(
        "GPU",
        [
            f"{describe_bytes(gpu['client'])} of {describe_bytes(gpu['total'])} a client, "
            f"{gpu['clients_at_once']} at a time",
            f"{gpu['clients_that_fit']} would fit: num-gpus = {gpu['share_per_client']:g} in flwr.toml",
        ],
    )


def _span(pair: Sequence[int]) -> str:
    return f"{pair[0]}" if pair[0] == pair[1] else f"{pair[0]} to {pair[1]}"
