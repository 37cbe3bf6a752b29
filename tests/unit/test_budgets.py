"""Budgets of the found network: what operations cost, which choices give way, and what every method ends with."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import finished_run
from helpers import random_architecture, small_spec

from fedmetanas_core.config import Config
from fedmetanas_core.errors import FedMetaNASError, RefusalError
from fedmetanas_core.methods.budgets import known_limits, node_limits, within_limits
from fedmetanas_core.preflight import prepare_experiment
from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.search.penalties import BudgetPenalty
from fedmetanas_core.search.pruning import PruneRule, propose
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.budget import LATENCY, Budget, Demand, budgeted_genotype, cheapest
from fedmetanas_core.space.cost import COSTS, by_group, edge_costs, measure_cost
from fedmetanas_core.space.genotype import (
    Genotype,
    argmax_genotype,
    darts_genotype,
    pairwise_genotype,
    random_genotype,
)
from fedmetanas_core.space.latency import Latencies, measure_latencies
from fedmetanas_core.space.network import Network
from fedmetanas_core.space.spec import PRIMITIVES, SpaceSpec

SPEC = small_spec(num_nodes=3)
SEP3, SEP5, MAX_POOL, SKIP = (
    PRIMITIVES.index(name) for name in ("sep_conv_3x3", "sep_conv_5x5", "max_pool_3x3", "skip_connect")
)


def drawn(spec: SpaceSpec, seed: int) -> Genotype:
    return random_genotype(spec, torch.Generator().manual_seed(seed))


def edges_of(spec: SpaceSpec, genotype: Genotype, kind: str) -> float:
    return float((by_group(spec, edge_costs(spec, kind)) * genotype.masks(spec)[0]).sum())


@pytest.mark.parametrize("norm", ["batch", "affine", "group"])
@pytest.mark.parametrize("kind", list(COSTS))
def test_what_edges_cost_is_what_networks_cost(kind: str, norm: str) -> None:
    """Exactly, but for the norms of poolings that share a source: those count on every edge."""
    spec = replace(SPEC, norm=norm)
    base = Budget(spec, ((kind, 0.0),)).room(kind, 0.0)
    for seed in range(20):
        genotype = drawn(spec, seed)
        whole, parts = COSTS[kind](measure_cost(spec, genotype.masks(spec)[0])), edges_of(spec, genotype, kind) - base
        shared = (kind, norm) in {("payload_bytes", "batch"), ("payload_bytes", "group"), ("parameters", "group")}
        assert whole <= parts if shared else whole == parts


def test_parameters_of_an_edge_by_hand() -> None:
    """A separable convolution is applied twice: 9 weights a channel, then channels squared; its norms have none."""
    table, channels = edge_costs(SPEC, "parameters"), SPEC.cells[0].channels
    assert float(table[0, 0, SEP3]) == 2 * (9 * channels + channels**2)
    assert float(table[0, 0, SKIP]) == 0.0
    assert float(edge_costs(SPEC, "payload_bytes")[0, 0, MAX_POOL]) == 4 * 2 * channels  # mean and variance


@pytest.mark.parametrize("rule", [pairwise_genotype, darts_genotype, argmax_genotype])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_every_rule_keeps_to_every_limit(rule: Any, share: float) -> None:
    spec = SPEC if rule is pairwise_genotype else replace(SPEC, inputs="all")
    for seed in range(5):
        architecture = random_architecture(spec, seed, 3.0)
        any_limit = Budget(spec, tuple((kind, 0.0) for kind in COSTS))
        free, least = (any_limit.spent(genotype) for genotype in (rule(architecture), cheapest(any_limit)))
        limits = tuple((kind, least[kind] + share * max(0.0, free[kind] - least[kind])) for kind in COSTS)
        budget = Budget(spec, limits)
        genotype = budget.within(architecture, rule)
        assert budget.allows(genotype)


def test_a_rule_that_keeps_to_its_budget_is_left_alone() -> None:
    architecture = random_architecture(SPEC, 3, 2.0)
    free = pairwise_genotype(architecture)
    assert Budget(SPEC, (("macs", 1e12),)).within(architecture, pairwise_genotype) == free


def test_what_is_saved_beyond_need_goes_to_the_likeliest_choice_that_it_pays_for() -> None:
    """Both edges of the only node like sep_conv_5x5 best; it does not fit twice, but once it does with sep_conv_3x3."""
    spec = small_spec(num_nodes=1)
    architecture = Architecture(spec)
    with torch.no_grad():
        architecture.operation_logits[0, :, SEP5] = 9.0
        architecture.operation_logits[0, :, SEP3] = 5.0
        architecture.operation_logits[0, :, SKIP] = 4.9
        architecture.operation_logits[1, :, MAX_POOL] = 9.0
    costs = by_group(spec, edge_costs(spec))
    five, three = (float(costs[0, 0, operation]) for operation in (SEP5, SEP3))
    demand = Demand(costs, five + three)
    thrifty = budgeted_genotype(architecture, [demand])
    assert {name for name, _ in thrifty.normal[0]} == {"sep_conv_5x5", "skip_connect"}, "saves more for what it loses"
    spent = budgeted_genotype(architecture, [demand], spends=True)
    assert {name for name, _ in spent.normal[0]} == {"sep_conv_5x5", "sep_conv_3x3"}


def test_demands_that_pull_in_two_directions_come_to_an_end() -> None:
    """What is cheap of one kind is dear of the other, and both cannot be met."""
    first, second = (torch.zeros(2, SPEC.num_edges, len(PRIMITIVES), dtype=torch.float64) for _ in range(2))
    first[..., SEP3], second[..., SEP5] = 10.0, 10.0
    first[..., 1:], second[..., 1:] = first[..., 1:] + 1.0, second[..., 1:] + 1.0
    genotype = budgeted_genotype(random_architecture(SPEC, 0, 2.0), [Demand(first, 0.5), Demand(second, 0.5)])
    chosen = {name for nodes in genotype.groups().values() for node in nodes for name, _ in node}
    assert not chosen & {"sep_conv_3x3", "sep_conv_5x5"}


def test_what_is_favoured_stays_and_is_what_stays_at_the_end() -> None:
    architecture = random_architecture(SPEC, 5, 4.0)
    favoured = drawn(SPEC, 1).masks(SPEC)
    rule = PruneRule(0.5, "drop_first")
    (operations, pairs), _ = propose(architecture, 1.0, rule, 3, None, favoured=favoured)
    assert bool((operations | ~favoured[0]).all())
    assert bool((pairs | ~favoured[1]).all())
    (operations, pairs), _ = propose(architecture, 1.0, rule, 1, [1] * SPEC.num_nodes, favoured=favoured)
    assert torch.equal(operations, favoured[0])
    assert torch.equal(pairs, favoured[1])


def test_the_penalty_is_what_the_expected_cost_exceeds_its_room_by() -> None:
    architecture = Architecture(SPEC)
    architecture.restrict(*drawn(SPEC, 2).masks(SPEC))
    genotype = pairwise_genotype(architecture)
    macs, parameters = edges_of(SPEC, genotype, "macs"), edges_of(SPEC, genotype, "parameters")
    base = measure_cost(SPEC, torch.zeros_like(architecture.operation_mask))
    limits = (("macs", base.macs + macs / 2), ("parameters", base.parameters + 2 * parameters))
    penalty = BudgetPenalty(Budget(SPEC, limits), over=3.0)
    assert float(penalty(architecture, 1.0).detach()) == pytest.approx(3.0)


def latencies_by_hand(spec: SpaceSpec) -> Latencies:
    """Of the operation with index o, in cell c: 1 + o + 10 c milliseconds, 100 more with stride 2."""
    cells = range(spec.num_cells)
    rows = [[tuple(1.0 + o + 10 * c + 100 * s for o in range(8)) for s in (0, 1)] for c in cells]
    return Latencies(7.0, tuple((first, second) for first, second in rows))


def test_latencies_as_text_and_as_a_table() -> None:
    latencies = latencies_by_hand(SPEC)
    assert Latencies.from_text(latencies.to_text(), SPEC) == latencies
    table = latencies.table(SPEC)
    reduction = min(SPEC.reductions)
    assert SPEC.cells[0].kind == "normal"
    assert float(table[0, 0, 3]) == 4.0
    assert float(table[reduction, 0, 3]) == 104.0 + 10 * reduction  # out of an input
    assert float(table[reduction, SPEC.edge(1, 2), 3]) == 4.0 + 10 * reduction  # out of the first node
    doubled = Latencies(1.0, tuple(tuple(tuple(2 * v for v in row) for row in cell) for cell in latencies.operations))
    slower = latencies.slower(doubled)
    assert (slower.base, slower.operations) == (7.0, doubled.operations)
    for text in ("", "x", "1;2", latencies.to_text() + ";1", latencies.to_text().replace("7000", "-1")):
        with pytest.raises(RefusalError, match="latency_table"):
            Latencies.from_text(text, SPEC)


def test_measured_latencies_add_up_to_something() -> None:
    found = measure_latencies(SPEC)
    assert found.base > 0
    normal, reduction = SPEC.cells.index(SPEC.cells[0]), min(SPEC.reductions)
    assert all(value == 0 for value in found.operations[normal][1]), "no stride of 2 there"
    assert found.operations[normal][0][0] == found.operations[normal][0][SKIP] == 0, "nothing is computed"
    assert all(value > 0 for value in found.operations[reduction][1][1:])


def test_a_latency_budget_counts_what_was_measured() -> None:
    latencies = latencies_by_hand(SPEC)
    genotype = drawn(SPEC, 4)
    masks, table = genotype.masks(SPEC)[0], latencies.table(SPEC)
    whole = 7.0 + sum(float(table[index][masks[cell.group]].sum()) for index, cell in enumerate(SPEC.cells))
    budget = Budget(SPEC, ((LATENCY, 0.9 * whole),), latencies)
    assert budget.spent(genotype)[LATENCY] == pytest.approx(whole)
    architecture = Architecture(SPEC)
    with torch.no_grad():
        for (logits, _), mask in zip(architecture.rows(), genotype.masks(SPEC), strict=True):
            logits.copy_(mask * 5.0)
    found = budget.within(architecture, pairwise_genotype)
    assert budget.spent(found)[LATENCY] <= 0.9 * whole


@pytest.mark.parametrize(
    "method",
    [
        *("fedmetanas", "fednas", "random_search", "feddsnas", "fedrlnas", "perfedrlnas", "meta_perfedrlnas"),
        *("fedpnas", "meta_dnas", "local_darts"),
    ],
)
def test_every_method_that_searches_ends_within_its_budget(tmp_path: Path, method: str) -> None:
    free = RunFolder(finished_run(tmp_path, "free", method=method)).read_summary() or {}
    own = "personal_macs" if free.get("personal_macs") else "macs"
    limit = round(0.6 * free[own])
    run = RunFolder(finished_run(tmp_path, "bound", method=method, max_macs=limit))
    found = (run.read_summary() or {})["budget"]["max_macs"]
    assert found["met"]
    assert found["spent"] <= limit == found["limit"]


def test_a_saved_network_costs_what_the_summary_says(tmp_path: Path) -> None:
    from fedmetanas_core.space.network import load_network

    run = finished_run(tmp_path, max_parameters=1500, max_payload=9000, search_fraction=0.8)
    summary = RunFolder(run).read_summary() or {}
    network, _ = load_network(run)
    assert isinstance(network, Network)
    assert network.weights.numel() == summary["budget"]["max_parameters"]["spent"] <= 1500
    assert 4 * (network.weights.numel() + network.statistics.numel()) <= 9000
    cuts = [event for event in summary["pruning_events"] if event["kind"] == "pruning"]
    assert all(0 <= event[key] <= 1 for event in cuts for key in ("cut_freely", "cut_within_budget"))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"max_macs": 1000}, "max_macs: 1,000 is less than the cheapest network of this space needs; set it to "),
        ({"max_parameters": 5, "max_macs": 10**9}, "max_parameters: 5 is less"),
        ({"max_latency_ms": 1e-6}, "max_latency_ms: 1e-06 is less"),
        ({"max_macs": 10**6, "method": "fedavg"}, "max_macs: fedavg searches no network"),
        ({"max_payload": 10**6, "method": "meta_fedpnas"}, "max_payload: meta_fedpnas keeps to no budget"),
        ({"max_latency_ms": 5.0, "latency_table": "1;2"}, "latency_table: it cannot be read"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusalError, match=said):
        prepare_experiment(Config.from_mapping({"num_clients": 6, "clients_per_round": 2, **keys}), tmp_path)


def test_the_limit_named_in_a_refusal_is_one_that_can_be_kept(tmp_path: Path) -> None:
    few = {"num_clients": 6, "clients_per_round": 2}
    with pytest.raises(RefusalError) as refusal:
        prepare_experiment(Config.from_mapping({**few, "max_macs": 1}), tmp_path)
    named = int("".join(filter(str.isdigit, refusal.value.fix.split(" or more")[0])))
    prepare_experiment(Config.from_mapping({**few, "max_macs": named}), tmp_path)


@pytest.mark.parametrize(
    "told",
    [
        *("[1]", '"max_macs"', '""', "null", "[" * 100_000, '{"max_macs": 1' + "0" * 400 + "}", '{"max_macs": true}'),
        *('{"max_macs": "5"}', '{"max_macs": 0.5}', '{"max_macs": NaN}', '{"max_memory": 5}', '{"max_latency_ms": -1}'),
    ],
)
def test_limits_that_no_node_can_have_are_refused(told: str) -> None:
    with pytest.raises(FedMetaNASError, match="limits is"):
        known_limits(told)


def test_limits_of_nodes_are_values_that_the_keys_take() -> None:
    """A limit of half a multiply-add must not become 0, which is no limit; large ones are read again as they are."""
    for value in (0.5, -1, True, "few", float("nan"), float("inf"), 10**16):
        with pytest.raises(RefusalError, match="is no number in range"):
            node_limits({"max-macs": value})
    limits = node_limits({"max-macs": 2e9, "max-payload": 3 * 10**9, "max-latency-ms": 0.25, "max-parameters": 0})
    assert known_limits(json.dumps(limits)) == limits
    bound = within_limits(Config(max_macs=5 * 10**9), [limits, {"max_macs": 4e9}])
    assert (bound.max_macs, bound.max_payload, bound.max_latency_ms) == (2 * 10**9, 3 * 10**9, 0.25)
    assert Config.from_mapping(bound.to_dict()) == bound
