"""What is going to run, in words, before it does."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedmetanas_core.config import AUTO, Config
from fedmetanas_core.data.datasets import DATASETS
from fedmetanas_core.data.sites import NODES
from fedmetanas_core.data.splits import Dataset
from fedmetanas_core.methods.registry import make_method
from fedmetanas_core.preflight import Experiment
from fedmetanas_core.search.local_data import task_size
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.cost import FLOAT_BYTES, measure_cost
from fedmetanas_core.space.fixed import FixedSpec, Space
from fedmetanas_core.text import describe_bytes, describe_macs

FEWEST_IN_A_BATCH = 4  # below, the moments of a batch say little about those of the data
ARRAY_HEADER_BYTES = 128  # numpy's, before the data of an array


def describe_experiment(experiment: Experiment, sizes: Sequence[tuple[int, int]] = ()) -> str:
    """What is going to run, in a few lines: clients, data, model size, payload, and the bytes to expect at most.

    ``sizes``: how many training and test images each node has, where they have their own.
    """
    config, dataset = experiment.config, experiment.dataset
    channels, height, width = dataset.image_shape
    shares = experiment.partition.shares
    trains, tests = zip(*(sizes or [(len(share.train), len(share.evaluation)) for share in shares]), strict=True)
    recipe = make_method(config, experiment.spec).recipe
    spec = recipe.stages[0].space
    cost = measure_cost(spec, Architecture(spec).operation_mask)
    rounds, at_once = int(config.num_rounds), config.clients_per_round
    skew = {
        "dirichlet": f"Dirichlet {config.dir_alpha:g}",
        "label_skew": f"{config.classes_per_client} classes each",
        "iid": "evenly",
    }[config.partition]
    skew = "each with its own images" if config.dataset == NODES else skew
    return "\n".join(
        (
            f"method    {config.method} ({config.preset}), {rounds} round{'s'[: rounds > 1]}, seed {config.seed}",
            f"clients   {config.num_clients}, {at_once} a round; {skew}, {_span(trains)} training and "
            f"{_span(tests)} test images each",
            *_about_small_shares(config, min(trains)),
            *_about_data(config, dataset),
            f"          {channels}x{height}x{width}, {dataset.num_classes} classes{_about_side(config)}",
            *_about_empty_classes(config, dataset),
            f"{_about_network(spec)}: {cost.parameters:,} parameters",
            f"          {describe_macs(cost.macs)} an image",
            *_about_payload(experiment),
        )
    )


def _about_payload(experiment: Experiment) -> list[str]:
    """What a client gets in the first round, and what travels in all where that can be said."""
    method = make_method(experiment.config, experiment.spec)
    recipe = method.recipe
    if recipe.is_local:
        return ["payload   none; every client is on its own, and sends its network at the end"]
    first = method.payload(method.initial_state(), 0, method.plan(1))
    lines = [
        f"payload   {describe_bytes(FLOAT_BYTES * (len(first.weights) + len(first.statistics)))} to a client at first"
    ]
    if recipe.compressible and not recipe.personal.own_architecture:
        less = ", less as operations are pruned" if recipe.stages[0].pruning is not None else ""
        lines.append(f"          at most {describe_bytes(most_bytes(experiment))} in all{less}")
    return lines


def _about_network(spec: Space) -> str:
    if isinstance(spec, FixedSpec):
        return f"network   {spec.name}"
    return f"supernet  {spec.num_cells} cells, {spec.num_nodes} nodes, {spec.init_channels} channels"


def _about_small_shares(config: Config, fewest: int) -> list[str]:
    batch = task_size(fewest, int(config.batch_size))
    if batch >= FEWEST_IN_A_BATCH:
        return []
    return [f"          note: batches of {batch} make batch norm unreliable; more images a client help"]


def _about_data(config: Config, dataset: Dataset) -> list[str]:
    if config.dataset != NODES:
        return [f"data      {dataset.name}: {len(dataset.train):,} training and {len(dataset.test):,} test images"]
    measured = f"measured here on {len(dataset.test):,} images" if len(dataset.test) else "measured there at the end"
    return [f"data      stays on the nodes; the network is {measured}"]


def _about_side(config: Config) -> str:
    """Why images of a folder have the size that they have: nobody asked for it."""
    in_folder = config.dataset not in (*DATASETS, NODES) and Path(config.dataset).is_dir()
    return "; image_size=N makes them NxN" if in_folder and config.image_size == AUTO else ""


def _about_empty_classes(config: Config, dataset: Dataset) -> list[str]:
    if config.dataset == NODES:
        return []
    counts = np.bincount(dataset.train.labels, minlength=dataset.num_classes)
    empty = [str(name) for name in np.flatnonzero(counts == 0)]
    if not empty:
        return []
    more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
    return [f"          note: no training image of class {', '.join(empty[:3])}{more}; labels count from 0"]


def most_bytes(experiment: Experiment) -> int:
    """What travels if nothing is ever pruned: every round both ways, and the final model to all clients."""
    config, spec = experiment.config, make_method(experiment.config, experiment.spec).recipe.stages[0].space
    architecture = Architecture(spec)
    choices = sum(mask.numel() for _, mask in architecture.rows())
    learned = measure_cost(spec, architecture.operation_mask).payload_bytes + FLOAT_BYTES * choices
    # Masks and votes take a byte a choice; each of the at most six arrays of a message has a header.
    message = learned + choices + 6 * ARRAY_HEADER_BYTES
    return message * (2 * int(config.num_rounds) * config.clients_per_round + config.num_clients)


def _span(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return f"{low}" if low == high else f"{low} to {high}"
