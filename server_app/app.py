"""The Flower server: reads the configuration, meets the nodes, runs the rounds, writes the result."""

import json
import os
import sys
import time
from dataclasses import astuple
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedmetanas_core.config import Config
from fedmetanas_core.errors import FedMetaNASError, ProcessDiedError, RunFailedError
from fedmetanas_core.federation.wire import RunIdentity
from fedmetanas_core.output.drawing import draw_genotype
from fedmetanas_core.output.words import genotype_in_words
from fedmetanas_core.preflight import Experiment, describe_experiment, pick_device, prepare_experiment
from fedmetanas_core.run.fingerprint import code_fingerprint
from fedmetanas_core.run.folder import RunFolder, blank_summary, default_run_name, resolve_runs_dir, write_atomically
from fedmetanas_core.run.ownership import PREDECESSOR_S, WRITER, owned
from fedmetanas_core.run.processes import available_cores
from fedmetanas_core.run.progress import Progress
from fedmetanas_core.runs import Run, begin_run, going_on, reopen_run
from fedmetanas_core.space.cost import Cost, network_cost
from fedmetanas_core.space.native import build
from fedmetanas_core.space.network import CLIENTS, Network, save_network
from fedmetanas_core.space.spec import SpaceSpec
from server_app.loop import RoundLoop
from server_app.measuring import describe_clients, heard, personal_network
from server_app.strategy import SearchStrategy, error_line

NODE_WAIT_S = 5.0  # without a new node; those of a simulation appear all at once, at its start
QUERY_TIMEOUT_S = 300.0  # every worker imports torch before it answers
SETUP_HINT = "run `fedmetanas setup --nodes {count}`, then end the SuperLink that is running and start again"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, from the configuration to the summary. Whatever goes wrong is raised, so that Flower sees it failed."""
    try:
        _run(grid, context)
    except FedMetaNASError as error:
        print(f"fedmetanas: {error}", flush=True)  # in Flower's log a traceback follows
        raise


def _run(grid: Grid, context: Context) -> None:
    torch.set_num_threads(available_cores())  # the clients' workers are other processes, idle while this one works
    launch_directory = Path(os.environ.get("FEDMETANAS_LAUNCH_DIR", os.getcwd()))
    config = Config.from_mapping(context.run_config)
    if config.resume:
        run = reopen_run(launch_directory / config.resume)
        nodes = meet_nodes(grid, run.experiment.config.num_clients)
    else:
        wait_for_nodes(grid, config.num_clients)  # before what may take a while
        build.prepare(lambda line: print(line, flush=True), pick_device(config))
        experiment = prepare_experiment(config, launch_directory)
        nodes = meet_nodes(grid, config.num_clients)
        runs_dir = resolve_runs_dir(config.runs_dir, os.environ, launch_directory)
        run_name = config.run_name or default_run_name(config.method, config.dataset)
        run = begin_run(runs_dir, run_name, experiment, launch_directory)
    print(f"run folder: {run.folder.path}", flush=True)
    print(describe_experiment(run.experiment), flush=True)
    with owned(run.folder.path, WRITER, patience_s=PREDECESSOR_S):
        _session(grid, run, nodes)


def _session(grid: Grid, run: Run, nodes: dict[int, int]) -> None:
    """From the newest state to the end of the run, or to what stops it."""
    build.prepare(lambda line: print(line, flush=True), pick_device(run.experiment.config))
    summary = blank_summary(run.experiment.config)
    try:
        search(grid, run, nodes, summary)
        summary["status"] = "completed"
    except Exception as error:
        reason = str(error) if isinstance(error, FedMetaNASError) else f"{type(error).__name__}: {error}"
        summary.update({"status": "failed", "error": reason, "restart": isinstance(error, ProcessDiedError)})
        raise
    finally:
        summary["rounds"] = len(run.folder.read_rounds())
        run.folder.write_summary(summary)
    if summary["genotype"] is not None:
        print(genotype_in_words(summary["genotype"]), flush=True)
    print(f"completed: test accuracy {summary['test_accuracy']:.4f}; run folder: {run.folder.path}", flush=True)


def wait_for_nodes(grid: Grid, num_clients: int) -> list[int]:
    """Ids of all nodes, once there are enough; RunFailedError with the setup hint when no more appear."""
    seen, deadline = 0, time.monotonic() + NODE_WAIT_S
    while len(found := list(grid.get_node_ids())) < num_clients:
        if len(found) > seen:
            seen, deadline = len(found), time.monotonic() + NODE_WAIT_S
        if time.monotonic() > deadline:
            hint = SETUP_HINT.format(count=num_clients)
            raise RunFailedError(f"num_clients={num_clients}, but Flower has {len(found)} nodes; {hint}")
        time.sleep(0.2)
    return found


def meet_nodes(grid: Grid, num_clients: int) -> dict[int, int]:
    """Partition id to node id of the clients 0 ... num_clients - 1, each asked who it is and which code it runs.

    Raises RunFailedError when nodes are missing, do not answer, or run other code than this server.
    """
    messages = [Message(RecordDict(), node, MessageType.QUERY) for node in wait_for_nodes(grid, num_clients)]
    nodes: dict[int, int] = {}
    for reply in grid.send_and_receive(messages, timeout=QUERY_TIMEOUT_S):
        if reply.has_error():
            raise RunFailedError(f"a client cannot start: {error_line(reply)}")
        facts = reply.content.config_records["node"]
        if facts["fingerprint"] != code_fingerprint():
            raise RunFailedError(
                f"the clients run other code ({facts['fingerprint']!s}) than this server ({code_fingerprint()}): "
                "a SuperLink started in another project serves them; end it and start again"
            )
        nodes[int(facts["partition_id"])] = reply.metadata.src_node_id  # type: ignore[arg-type]
    missing = [client for client in range(num_clients) if client not in nodes]
    if missing:
        raise RunFailedError(
            f"no node holds partition {missing[0]} (of {num_clients}); {SETUP_HINT.format(count=num_clients)}"
        )
    return {client: nodes[client] for client in range(num_clients)}


def search(grid: Grid, run: Run, nodes: dict[int, int], summary: dict[str, Any]) -> None:
    """All rounds that are left, the extraction, the measurements; fills ``summary`` as it goes, so that a late fault
    loses little."""
    experiment, folder = run.experiment, run.folder
    config, method = experiment.config, run.method()
    state, tally = going_on(run)
    if state.round:
        tally.resumed_after.append(state.round)
    identity = RunIdentity(
        json.dumps(config.to_dict()), experiment.partition.hash(), code_fingerprint(), run.run_id, str(folder.path)
    )
    declared = {client: len(share.train) for client, share in enumerate(experiment.partition.shares)}
    strategy = SearchStrategy(method, state, nodes, identity, config, tally, declared)
    loop = RoundLoop(strategy, experiment, grid, folder)
    try:
        with Progress(int(config.num_rounds), stream=sys.stdout) as progress:
            loop.run(progress.update)
        if not method.recipe.is_local:
            summary.update(_finish(loop, folder, experiment))
        summary.update(_ask_clients(loop, folder, experiment))
    finally:
        summary.update(loop.totals())


def _finish(loop: RoundLoop, folder: RunFolder, experiment: Experiment) -> dict[str, Any]:
    """The global network, extracted, saved and measured."""
    method, state = loop.strategy.method, loop.state
    network = method.extract(state)
    save_network(network, folder.model_directory, experiment.images)
    found: dict[str, Any] = {}
    if isinstance(network, Network):
        genotype = network.genotype.to_dict()
        write_atomically(folder.genotype_drawing, draw_genotype(genotype).encode())
        found.update({"genotype": genotype, "one_hot": state.architecture.is_one_hot()})
    found.update(loop.compare(network))
    if isinstance(network, Network) and not state.architecture.is_one_hot():
        renewed = loop.renewed(max(1, state.round))
        found["test_accuracy_recalibrated"] = None if renewed is None else loop.measuring.whole_accuracy(renewed)
    if not method.recipe.personal.own_architecture:
        loop.adopt(network)  # what is measured from here on is the network that the run folder holds
    elif isinstance(network, Network):  # clients still cut their own out of the supernet
        loop.cost_of_result = network_cost(network)
    return found


def _ask_clients(loop: RoundLoop, folder: RunFolder, experiment: Experiment) -> dict[str, Any]:
    """What all clients measure; the networks of those that have their own go into the run folder."""
    answers, config, space = loop.evaluate_clients(), experiment.config, loop.state.spec
    networks = {}
    if isinstance(space, SpaceSpec):
        networks = {each.client: network for each in answers if (network := personal_network(each, space)) is not None}
    for client, network in networks.items():
        save_network(network, folder.model_directory / CLIENTS / str(client), experiment.images)
    found = describe_clients(answers, loop.strategy.exchange.excluded, config.num_clients - config.unseen_clients)
    if networks:  # nobody uses what the server holds
        costs = {client: network_cost(network) for client, network in networks.items()}
        found["personal_parameters"] = fmean(cost.parameters for cost in costs.values())
        found["personal_macs"] = fmean(cost.macs for cost in costs.values())
        if loop.is_local:  # no network is everybody's: the mean of those that were trained
            turns = {client for row in folder.read_rounds() for client in heard(row)}
            trained = sorted(networks.keys() & turns) or sorted(networks)
            found["test_accuracy"] = loop.measuring.mean_accuracy([networks[client] for client in trained])
            figures = zip(*(astuple(costs[client]) for client in trained), strict=True)
            loop.cost_of_result = Cost(*(round(fmean(each)) for each in figures))
    return found
