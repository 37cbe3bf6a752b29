"""Where a client's images come from: its share of the run's dataset, or this machine's own."""

import json
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Context

from fedmetanas_core.config import AUTO, Config
from fedmetanas_core.data.sites import NODES, describe_site, load_site
from fedmetanas_core.errors import RefusalError, RunFailedError
from fedmetanas_core.federation.wire import NodeFacts, SiteQuestion
from fedmetanas_core.methods.budgets import check_budget, node_limits, with_latencies, within_limits
from fedmetanas_core.methods.method import Method
from fedmetanas_core.methods.registry import make_method
from fedmetanas_core.preflight import Experiment, agreed, prepare_experiment
from fedmetanas_core.run.fingerprint import code_fingerprint
from fedmetanas_core.run.processes import available_cores
from fedmetanas_core.space.latency import measure_latencies
from fedmetanas_core.space.spec import SpaceSpec

# Keys of a node's configuration.
PARTITION_ID, DATA_PATH, NAME = "partition-id", "data-path", "name"


def node_facts(question: SiteQuestion, context: Context) -> NodeFacts:
    """This node's answer, from its configuration and its images."""
    own = str(context.node_config.get(DATA_PATH, ""))
    site, refusal, limits, latencies = "", "", dict[str, float](), ""
    try:
        limits = node_limits(context.node_config)
        if question.space:
            latencies = measure_latencies(SpaceSpec(**json.loads(question.space))).to_text()
        elif question.own_images:
            names = question.class_names.split(",") if question.class_names else None
            site = describe_site(own, question.seed, question.image_size or None, names).to_json()
        elif own:
            raise RefusalError("it has images of its own (data-path), which this run does not use", "set dataset=nodes")
    except RefusalError as error:
        refusal = str(error)
    return NodeFacts(
        code_fingerprint(),
        int(context.node_config.get(PARTITION_ID, -1)),
        str(context.node_config.get(NAME, "")),
        site,
        refusal,
        available_cores(),
        torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0,
        json.dumps(limits),
        latencies,
    )


@lru_cache(maxsize=1)
def load_method(config_json: str, partition_hash: str, data_path: str = "", limits: str = "{}") -> Method:
    """The run's method, kept like its data. Where clients have networks of their own, this one keeps to its limits."""
    experiment = load_experiment(config_json, partition_hash, data_path)
    method = make_method(experiment.config, experiment.spec)
    own = json.loads(limits)
    if own and method.recipe.personal.own_limits:
        config = with_latencies(within_limits(experiment.config, [own]), experiment.spec)
        method = make_method(config, experiment.spec)
        check_budget(config, method.recipe)
    method.beginning(0)  # so that whatever its network imports is there before the clock of the first training runs
    return method


@lru_cache(maxsize=1)
def load_experiment(config_json: str, partition_hash: str, data_path: str = "") -> Experiment:
    """The run's data and partition, made anew from its configuration and kept by this worker for all its clients.

    Under ``dataset=nodes`` the data are those at ``data_path``. Raises RunFailedError when the partition differs from
    the server's.
    """
    config, own = Config.from_mapping(json.loads(config_json)), None
    if config.dataset == NODES:
        size = None if config.image_size == AUTO else int(config.image_size)
        own = load_site(data_path, agreed(config), config.seed, size)
    experiment = prepare_experiment(config, Path.cwd(), check=False, own=own)
    found = experiment.partition.hash()
    if found != partition_hash:
        raise RunFailedError(f"this client's partition {found[:12]} is not the server's {partition_hash[:12]}")
    return experiment
