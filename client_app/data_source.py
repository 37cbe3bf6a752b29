"""Where a client's images come from: its share of the run's dataset."""

import json
from functools import lru_cache
from pathlib import Path

import torch

from fedmetanas_core.config import Config
from fedmetanas_core.errors import RunFailedError
from fedmetanas_core.methods.method import Method
from fedmetanas_core.methods.registry import make_method
from fedmetanas_core.preflight import Experiment, prepare_experiment


@lru_cache(maxsize=1)
def load_method(config_json: str, partition_hash: str) -> Method:
    """The run's method, kept like its data."""
    experiment = load_experiment(config_json, partition_hash)
    method = make_method(experiment.config, experiment.spec)
    method.beginning(0)  # so that whatever its network imports is there before the clock of the first training runs
    return method


@lru_cache(maxsize=1)
def load_experiment(config_json: str, partition_hash: str) -> Experiment:
    """The run's data and partition, made anew from its configuration and kept by this worker for all its clients.

    Raises RunFailedError when the partition differs from the server's.
    """
    # torch imports its compiler with the first optimiser. That takes seconds and is not training.
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    experiment = prepare_experiment(Config.from_mapping(json.loads(config_json)), Path.cwd(), check=False)
    found = experiment.partition.hash()
    if found != partition_hash:
        raise RunFailedError(f"this client's partition {found[:12]} is not the server's {partition_hash[:12]}")
    return experiment
