"""What a network may cost on the nodes of a run, and how long its operations take there."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from flwr.app import Message, MessageType

from fedmetanas_core.config import AUTO, Config
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.federation.wire import SiteQuestion, decode_facts, encode_question
from fedmetanas_core.methods.budgets import account, budget_of, check_budget, with_latencies, within_limits
from fedmetanas_core.methods.registry import make_method
from fedmetanas_core.preflight import Experiment
from fedmetanas_core.space.genotype import Genotype
from fedmetanas_core.space.latency import Latencies
from fedmetanas_core.space.spec import SpaceSpec
from server_app.roster import Roster

MEASURING_TIMEOUT_S = 300.0  # a node's program may have to be started first


def fit_to_nodes(experiment: Experiment, roster: Roster) -> Experiment:
    """The experiment within what every node allows, if one network is to be everybody's.

    Where a latency is limited and not known, by what the slowest of the nodes takes for each operation: of those that
    limit it, or of all. Limits that the method cannot keep to are told among the events. Raises RefusalError where no
    network can be so cheap, or a node does not tell how long it takes.
    """
    config, limits = experiment.config, roster.limits()
    recipe = make_method(replace(config, max_macs=1, max_latency_ms=0.0), experiment.spec).recipe
    if limits and recipe.budget is None:
        roster.events += [(client, f"its limits are not kept: {config.method} keeps to no budget") for client in limits]
        return experiment
    roster.tells_of_limits = not recipe.personal.own_limits
    bound = config if recipe.personal.own_limits else within_limits(config, list(limits.values()))
    timed = [client for client, own in limits.items() if "max_latency_ms" in own]
    if config.latency_table == AUTO and (bound.max_latency_ms or timed):
        slow = timed or sorted(roster.nodes)
        bound = replace(bound, latency_table=_slowest(experiment, roster, slow).to_text())
    known = replace(config, latency_table=bound.latency_table)
    _check(known, experiment.spec)
    names = {tuple(sorted(own.items())): roster.members[client].name for client, own in reversed(limits.items())}
    each = [(within_limits(known, [dict(own)]), name) for own, name in names.items()]
    if recipe.personal.own_limits:
        _check_each(each, experiment.spec)
        return replace(experiment, config=bound)
    try:
        _check(bound, experiment.spec)
    except RefusalError:
        _check_each(each, experiment.spec)  # one of them alone may be to blame
        raise
    return replace(experiment, config=bound)


def _check_each(configs: Sequence[tuple[Config, str]], spec: SpaceSpec) -> None:
    for config, name in configs:
        _check(config, spec, f"{name}: ")


def _check(config: Config, spec: SpaceSpec, whose: str = "") -> None:
    try:
        check_budget(config, make_method(config, spec).recipe)
    except RefusalError as error:
        raise RefusalError(f"{whose}{error.what}", error.fix) from error


def _slowest(experiment: Experiment, roster: Roster, clients: list[int]) -> Latencies:
    question = SiteQuestion(False, experiment.config.seed, 0, "", json.dumps(asdict(experiment.spec)))
    asked = {roster.nodes[client]: roster.members[client].name for client in clients}
    messages = [Message(encode_question(question), node, MessageType.QUERY, ttl=MEASURING_TIMEOUT_S) for node in asked]
    found: Latencies | None = None
    for reply in roster.courier.exchange(messages, MEASURING_TIMEOUT_S):
        name = asked.pop(reply.metadata.src_node_id, "a node")
        if reply.has_error():
            raise RefusalError(f"max_latency_ms: {name} cannot tell how long operations take there", "see its log")
        facts = decode_facts(reply.content)
        if facts.refusal:
            raise RefusalError(f"max_latency_ms: {name} tells no times: {facts.refusal}", "leave the limit out")
        own = Latencies.from_text(facts.latencies, experiment.spec)
        found = own if found is None else found.slower(own)
    if asked or found is None:
        names = ", ".join(asked.values()) or "no node"
        raise RefusalError(f"max_latency_ms: {names} did not tell how long operations take", "start again later")
    return found


def own_accounts(experiment: Experiment, roster: Roster, genotypes: dict[int, Genotype]) -> dict[str, Any]:
    """By client, what its own network costs of what its node limits; empty where none does."""
    found = {}
    for client, own in roster.limits().items():
        config = with_latencies(within_limits(experiment.config, [own]), experiment.spec)
        budget = make_method(config, experiment.spec).recipe.budget or budget_of(config, experiment.spec)
        if client in genotypes and budget is not None:
            found[str(client)] = account(budget, [genotypes[client]])
    return {"node_budgets": found} if found else {}
