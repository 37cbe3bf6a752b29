"""Found networks with random weights, alone and in run folders as a completed search leaves them."""

from pathlib import Path

import numpy as np
import torch
from helpers import stream

from fedmetanas_core.config import Config
from fedmetanas_core.output.classifier import image_shape
from fedmetanas_core.preflight import prepare_experiment
from fedmetanas_core.runs import begin_run
from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.genotype import Genotype, random_genotype
from fedmetanas_core.space.network import CLIENTS, ImageFormat, Network, save_network
from fedmetanas_core.space.spec import SpaceSpec

NAMES = ("cat, small", "Käuzchen", "犬")  # what a separator or an encoding could break


def trained(network: TrainableNetwork, seed: int) -> TrainableNetwork:
    """With fresh weights, and running statistics near those of random images, so that images can be told apart."""
    network.initialise(stream(seed))
    images = torch.from_numpy(pixels(32, image_shape(network), seed))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:  # norms that do more than nothing
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=stream(seed + len(name))))
        network.train()
        network.collect_moments()
        network(image_format(images.shape[1]).normalise(images))
        network.store_moments()
        for buffer in network.buffers():
            buffer.mul_(0.8 + 0.4 * torch.rand(buffer.shape, generator=stream(seed)))
    return network.eval()  # type: ignore[return-value]


def found_network(spec: SpaceSpec, seed: int, genotype: Genotype | None = None) -> TrainableNetwork:
    """A network of this genotype, or of a random one."""
    return trained(Network(genotype or random_genotype(spec, stream(seed)), spec), seed)


def image_format(channels: int, names: tuple[str, ...] = NAMES) -> ImageFormat:
    """A mean and a deviation that no network does without by luck."""
    return ImageFormat((0.3, 0.5, 0.6)[:channels], (0.2, 0.25, 0.4)[:channels], names)


def pixels(count: int, shape: tuple[int, int, int], seed: int = 0) -> "np.typing.NDArray[np.float32]":
    """(count, channels, height, width) in [0, 1]."""
    return np.random.default_rng(seed).random((count, *shape), dtype=np.float32)


def completed_run(place: Path, clients: tuple[int, ...] = (), **keys: object) -> Path:
    """A run folder with a network, and one of their own for some clients; on digits, unless the keys say otherwise."""
    small = {"num_clients": 4, "clients_per_round": 2, "init_channels": 2, "num_cells": 3, "num_nodes": 2}
    experiment = prepare_experiment(Config.from_mapping({**small, **keys}), place)
    run = begin_run(place, "run", experiment, place)
    for seed, folder in enumerate(["", *(f"{CLIENTS}/{client}" for client in clients)], start=1):
        save_network(found_network(experiment.spec, seed), run.folder.model_directory / folder, experiment.images)
    return run.folder.path
