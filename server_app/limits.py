"""What a network may cost on the nodes of a run, and how long its operations take there."""

import json
from dataclasses import asdict, replace

from flwr.app import Message, MessageType

from fedmetanas_core.errors import FedMetaNASError
from fedmetanas_core.federation.wire import SiteQuestion, decode_facts, encode_question
from fedmetanas_core.methods.budgets import check_budget, with_latencies, within_limits
from fedmetanas_core.methods.registry import make_method
from fedmetanas_core.preflight import Experiment
from fedmetanas_core.space.latency import Latencies
from server_app.roster import Roster

MEASURING_TIMEOUT_S = 120.0


def fit_to_nodes(experiment: Experiment, roster: Roster, measure: bool) -> Experiment:
    """The experiment within what every node allows, if one network is to be everybody's.

    Where a latency is limited and ``measure`` is set, by what the slowest of the nodes takes for each operation: of
    those that limit it, or of all. Raises RefusalError where no network can be so cheap.
    """
    config, limits = experiment.config, roster.limits()
    if make_method(config, experiment.spec).recipe.personal.own_architecture:
        bound = config  # each client keeps to its own
    else:
        bound = within_limits(config, list(limits.values()))
    if measure and (bound.max_latency_ms or any("max_latency_ms" in own for own in limits.values())):
        slow = [client for client, own in limits.items() if "max_latency_ms" in own] or list(roster.nodes)
        bound = replace(bound, latency_table=_slowest(experiment, roster, slow).to_text())
    if bound == config:
        return experiment
    bound = with_latencies(bound, experiment.spec)
    check_budget(bound, make_method(bound, experiment.spec).recipe)
    return replace(experiment, config=bound)


def _slowest(experiment: Experiment, roster: Roster, clients: list[int]) -> Latencies:
    question = SiteQuestion(False, experiment.config.seed, 0, "", json.dumps(asdict(experiment.spec)))
    asked = [
        Message(encode_question(question), roster.nodes[client], MessageType.QUERY, ttl=MEASURING_TIMEOUT_S)
        for client in clients
    ]
    found: Latencies | None = None
    for reply in roster.courier.exchange(asked, MEASURING_TIMEOUT_S):
        if not reply.has_error():
            own = Latencies.from_text(decode_facts(reply.content).latencies, experiment.spec)
            found = own if found is None else found.slower(own)
    if found is None:
        raise FedMetaNASError("max_latency_ms: no node has told how long operations take there")
    return found
