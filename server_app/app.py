"""The Flower server: reads the configuration, meets the nodes, runs the rounds, writes the result."""

import json
import os
import sys
from dataclasses import astuple, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmetanas_core.config import Config
from fedmetanas_core.data.sites import NODES
from fedmetanas_core.description import describe_experiment
from fedmetanas_core.errors import FedMetaNASError, ProcessDiedError
from fedmetanas_core.federation.wire import RunIdentity
from fedmetanas_core.methods.budgets import account
from fedmetanas_core.methods.registry import check_method
from fedmetanas_core.output.report.files import show_result
from fedmetanas_core.output.tracking.session import Tracking, check_trackers
from fedmetanas_core.output.words import genotype_in_words
from fedmetanas_core.preflight import Experiment, pick_device, prepare_experiment, with_agreement
from fedmetanas_core.run.fingerprint import code_fingerprint
from fedmetanas_core.run.folder import RunFolder, blank_summary, default_run_name, resolve_runs_dir
from fedmetanas_core.run.hardware import describe_hardware
from fedmetanas_core.run.ownership import PREDECESSOR_S, WRITER, owned
from fedmetanas_core.run.processes import available_cores
from fedmetanas_core.run.progress import Progress
from fedmetanas_core.runs import Run, begin_run, going_on, reopen_run
from fedmetanas_core.space.cost import Cost, network_cost
from fedmetanas_core.space.native import build
from fedmetanas_core.space.network import CLIENTS, Network, save_network
from server_app.courier import LAST_POLL_S, VIRTUAL_POLL_S, Courier
from server_app.limits import fit_to_nodes, own_accounts
from server_app.loop import RoundLoop
from server_app.measuring import describe_clients, heard
from server_app.roster import Roster
from server_app.strategy import SearchStrategy

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
    virtual = _is_virtual()
    courier = Courier(grid, VIRTUAL_POLL_S if virtual else LAST_POLL_S, watches_restarts=not virtual)
    if config.resume:
        run = reopen_run(launch_directory / config.resume)
        config, known = run.experiment.config, Roster.from_list(run.load()[1].roster)
        roster = Roster(courier, config, virtual, known)
        if roster.virtual:
            roster.count()
        roster.begun, roster.tells_of_limits = True, not run.method().recipe.personal.own_limits
        roster.gather()
    else:
        check_trackers(config.track)
        roster = Roster(courier, config, virtual)
        run = _begin(roster, launch_directory)
    print(f"run folder: {run.folder.path}", flush=True)
    print(describe_experiment(run.experiment, list(roster.sizes().values())), flush=True)
    with (
        owned(run.folder.path, WRITER, patience_s=PREDECESSOR_S),
        Tracking(run.folder, config.track, launch_directory) as tracking,
    ):
        _session(roster, run, tracking)


def _is_virtual() -> bool:
    """Whether this server is that of a simulation."""
    return Path(sys.argv[0]).name == "flwr-simulation"


def _begin(roster: Roster, launch_directory: Path) -> Run:
    """Check all that can be checked, meet the nodes, and make the run's folder."""
    config = roster.config
    if roster.virtual:
        roster.count()  # before what may take a while
    build.prepare(lambda line: print(line, flush=True), pick_device(config))
    if config.dataset == NODES:
        check_method(config.method)
        roster.gather()
        config = with_agreement(config, roster.agreement)
        experiment = prepare_experiment(_without_latency(config, roster), launch_directory)
    else:
        experiment = prepare_experiment(_without_latency(config, roster), launch_directory)
        roster.gather()
    if not roster.virtual:
        experiment = replace(experiment, config=replace(experiment.config, max_latency_ms=config.max_latency_ms))
        experiment = fit_to_nodes(experiment, roster)
    roster.config, roster.begun = experiment.config, True
    runs_dir = resolve_runs_dir(config.runs_dir, os.environ, launch_directory)
    run_name = config.run_name or default_run_name(config.method, config.dataset)
    return begin_run(runs_dir, run_name, experiment, launch_directory)


def _without_latency(config: Config, roster: Roster) -> Config:
    """Where nodes are to be timed, this machine's own times must refuse nothing."""
    return config if roster.virtual else replace(config, max_latency_ms=0.0)


def _session(roster: Roster, run: Run, tracking: Tracking) -> None:
    """From the newest state to the end of the run, or to what stops it."""
    build.prepare(lambda line: print(line, flush=True), pick_device(run.experiment.config))
    summary = blank_summary(run.experiment.config)
    try:
        search(roster, run, summary, tracking)
        summary["status"] = "completed"
    except (KeyboardInterrupt, SystemExit):  # whoever ends Flower's programs, `flwr stop` among them
        summary.update({"status": "interrupted", "error": "the server was told to end"})
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, FedMetaNASError) else f"{type(error).__name__}: {error}"
        summary.update({"status": "failed", "error": reason, "restart": isinstance(error, ProcessDiedError)})
        raise
    finally:
        summary["rounds"] = len(run.folder.rounds.read())
        run.folder.write_summary(summary)
        # Whoever ends a run waits for it; the launching command, or `fedmetanas report`, draws what there is.
        if summary["status"] != "interrupted" and (missing := show_result(run.folder)):
            print(missing, flush=True)
    if summary["genotype"] is not None:
        print(genotype_in_words(summary["genotype"]), flush=True)
    print(f"completed: test accuracy {summary['test_accuracy']:.4f}; run folder: {run.folder.path}", flush=True)


def search(roster: Roster, run: Run, summary: dict[str, Any], tracking: Tracking) -> None:
    """All rounds that are left, the extraction, the measurements; fills ``summary`` as it goes, so that a late fault
    loses little."""
    experiment, folder = run.experiment, run.folder
    config, method = experiment.config, run.method()
    state, tally = going_on(run)
    if state.round:
        tally.resumed_after.append(state.round)
    here = describe_hardware(pick_device(config), os.environ.get("RAY_ADDRESS", "") if roster.virtual else "")
    tally.hardware = list(dict.fromkeys([*tally.hardware, here]))
    identity = RunIdentity(
        json.dumps(config.to_dict()), experiment.partition.hash(), code_fingerprint(), run.run_id, str(folder.path)
    )
    for client, share in enumerate(experiment.partition.shares):
        roster.declared[client], roster.held_out[client] = len(share.train), len(share.evaluation)
    strategy = SearchStrategy(
        method,
        state,
        roster.nodes,
        identity,
        config,
        tally,
        roster.declared,
        roster.held_out,
        roster.free,
        lambda: roster.members,
        roster.virtual,
    )
    loop = RoundLoop(strategy, experiment, roster, folder)
    tracking.start(after=state.round)

    def note_trackers() -> None:
        roster.events += [(None, note) for note in tracking.failed()]  # for the next round's notes

    note_trackers()
    try:
        with Progress(int(config.num_rounds), stream=sys.stdout) as progress:

            def tell(row: dict[str, Any]) -> None:
                progress.update(row)
                note_trackers()

            loop.run(tell)
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
        found.update({"genotype": genotype, "one_hot": state.architecture.is_one_hot()})
        if method.recipe.budget is not None:
            found["budget"] = account(method.recipe.budget, [network.genotype])
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
    answers, config = loop.evaluate_clients(), experiment.config
    networks = loop.strategy.networks
    for client, network in networks.items():
        save_network(network, folder.model_directory / CLIENTS / str(client), experiment.images)
    found = describe_clients(answers, loop.strategy.exchange.excluded, config.num_clients - config.unseen_clients)
    if networks:  # nobody uses what the server holds
        costs = {client: network_cost(network) for client, network in networks.items()}
        found["personal_parameters"] = fmean(cost.parameters for cost in costs.values())
        found["personal_macs"] = fmean(cost.macs for cost in costs.values())
        if (budget := loop.strategy.method.recipe.budget) is not None:
            found["budget"] = account(budget, [network.genotype for network in networks.values()])
        genotypes = {client: network.genotype for client, network in networks.items()}
        found.update(own_accounts(experiment, loop.roster, genotypes))
        if loop.is_local:  # no network is everybody's: the mean of those that were trained
            turns = {client for row in folder.rounds.read() for client in heard(row)}
            trained = sorted(networks.keys() & turns) or sorted(networks)
            found["test_accuracy"] = loop.measuring.mean_accuracy([networks[client] for client in trained])
            figures = zip(*(astuple(costs[client]) for client in trained), strict=True)
            loop.cost_of_result = Cost(*(round(fmean(each)) for each in figures))
    if not len(experiment.dataset.test):  # what all nodes held out is the test split
        own = loop.strategy.method.recipe.personal.own_architecture
        right = sum(each.num_examples * each.metrics["accuracy_used" if own else "accuracy"] for each in answers)
        found["test_accuracy"] = right / sum(each.num_examples for each in answers)
    return found
