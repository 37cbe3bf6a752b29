"""What goes beyond the papers and is off by default: penalties, scores, caps, watch, group norm."""

from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_architecture, random_one_hot, random_supernet, small_spec, stream
from local_grid import LocalGrid, run_all

from fedmetanas_core.config import Config, defaults
from fedmetanas_core.federation.update import ClientUpdate
from fedmetanas_core.preflight import prepare_experiment
from fedmetanas_core.runs import begin_run
from fedmetanas_core.search.collapse import alpha_entropy, collapse_warning, skip_share
from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.search.penalties import BetaDecay, ComputeBudget, ComputeBudgets, DirichletPrior, largest_cost
from fedmetanas_core.search.perturbation import perturbation_scores
from fedmetanas_core.search.prune_events import mean_scores
from fedmetanas_core.search.pruning import PruneRule, propose
from fedmetanas_core.search.relaxation import Relaxation, relax
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.budget import Demand, budgeted_genotype
from fedmetanas_core.space.cost import by_group, edge_costs, measure_cost
from fedmetanas_core.space.genotype import PRIMITIVES, pairwise_genotype
from fedmetanas_core.space.operations import GroupNorm
from fedmetanas_core.space.spec import SKIP

SPEC = small_spec()


def test_beta_decay_is_the_mean_logsumexp() -> None:
    """All zeros over eight operations: ln 8; over the two that are alive, ln 2."""
    architecture = Architecture(SPEC).double()
    assert float(BetaDecay(0.5)(architecture, 1.0).detach()) == pytest.approx(0.5 * log(8))
    keep = torch.zeros_like(architecture.operation_mask)
    keep[..., 3:5] = True
    architecture.restrict(keep, architecture.input_mask)
    assert float(BetaDecay(2.0)(architecture, 1.0).detach()) == pytest.approx(2 * log(2))


def test_the_dirichlet_prior_is_zero_at_the_uniform_distribution_and_grows_from_there() -> None:
    """elu(0) + 1 = 1, which is Dirichlet(1) itself."""
    architecture = Architecture(SPEC).double()
    assert float(DirichletPrior(1.0)(architecture, 1.0).detach()) == pytest.approx(0.0, abs=1e-9)
    with torch.no_grad():
        architecture.operation_logits[0, 0, 0] = 3.0
    assert float(DirichletPrior(1.0)(architecture, 1.0).detach()) > 0.0


def test_expected_cost_and_the_budget_penalty_by_hand() -> None:
    """One-hot architectures have the cost that measure_cost counts, less that of what is always there."""
    architecture = Architecture(SPEC).double()
    genotype = pairwise_genotype(random_architecture(SPEC, 5))
    architecture.restrict(*genotype.masks(SPEC))
    nothing = torch.zeros_like(architecture.operation_mask)
    nothing[..., 0] = True
    cost = measure_cost(SPEC, architecture.operation_mask).macs - measure_cost(SPEC, nothing).macs
    by_table = sum(
        float(edge_costs(SPEC)[index][architecture.operation_mask[cell.group]].sum())
        for index, cell in enumerate(SPEC.cells)
    )
    assert by_table == cost > 0
    over = ComputeBudget(budget=cost / 2)(architecture, 1.0)
    assert float(over.detach()) == pytest.approx(1.0 + 0.01 * cost / largest_cost(SPEC))
    under = ComputeBudget(budget=2 * cost)(architecture, 1.0)
    assert float(under.detach()) == pytest.approx(0.01 * cost / largest_cost(SPEC))


def test_no_architecture_costs_more_than_the_largest() -> None:
    costs = edge_costs(SPEC)
    for seed in range(50):
        masks, _ = pairwise_genotype(random_architecture(SPEC, seed, 3.0)).masks(SPEC)
        own = sum(float(table[masks[cell.group]].sum()) for table, cell in zip(costs, SPEC.cells, strict=True))
        assert own <= largest_cost(SPEC)


def test_budgets_are_drawn_once_for_each_client() -> None:
    budgets = ComputeBudgets(3)
    drawn = [budgets.of(client, SPEC).budget / largest_cost(SPEC) for client in range(60)]
    assert {round(share, 6) for share in drawn} == {0.3, 0.6, 1.0}
    assert drawn == [ComputeBudgets(3).of(client, SPEC).budget / largest_cost(SPEC) for client in range(60)]


@pytest.mark.parametrize("share", [1.0, 0.6, 0.3, 0.05, 0.0])
def test_a_budget_is_met_by_giving_up_what_is_least_likely(share: float) -> None:
    architecture, costs = random_architecture(SPEC, 1, 2.0), edge_costs(SPEC)
    genotype = budgeted_genotype(architecture, [Demand(by_group(SPEC, costs), share * largest_cost(SPEC))])
    masks, _ = genotype.masks(SPEC)
    own = sum(float(table[masks[cell.group]].sum()) for table, cell in zip(costs, SPEC.cells, strict=True))
    # Reduction cells pay for every identity out of an input; there the cheapest choice is a pooling, which is free.
    assert own <= share * largest_cost(SPEC)
    if share == 1.0:
        assert genotype == pairwise_genotype(architecture)


def test_the_cheapest_regret_is_given_up_first() -> None:
    """Both edges of the only node cost the same; the one whose alternative is nearly as likely gives way."""
    spec = small_spec(num_nodes=1)
    architecture = Architecture(spec)
    with torch.no_grad():
        architecture.operation_logits[..., PRIMITIVES.index("sep_conv_3x3")] = 5.0
        architecture.operation_logits[0, 0, PRIMITIVES.index("max_pool_3x3")] = 4.9
        architecture.operation_logits[0, 1, PRIMITIVES.index("max_pool_3x3")] = 1.0
    full = pairwise_genotype(architecture)
    masks, _ = full.masks(spec)
    costs = edge_costs(spec)
    own = sum(float(table[masks[cell.group]].sum()) for table, cell in zip(costs, spec.cells, strict=True))
    genotype = budgeted_genotype(architecture, [Demand(by_group(spec, costs), own - 1)])
    assert genotype.normal == ((("max_pool_3x3", 0), ("sep_conv_3x3", 1)),)
    assert genotype.reduce == full.reduce


def test_skips_beyond_the_cap_go_where_they_weigh_least() -> None:
    architecture = Architecture(SPEC)
    with torch.no_grad():
        for edge in range(SPEC.num_edges):
            architecture.operation_logits[0, edge, SKIP] = float(edge)
    (operations, _), report = propose(architecture, 1.0, PruneRule(0.0, "legal", skip_cap=2))
    assert operations[0, :, SKIP].tolist() == [False] * (SPEC.num_edges - 2) + [True, True]
    assert int(operations[1, :, SKIP].sum()) == 2
    assert report.forced == 2 * (SPEC.num_edges - 2)


def test_scores_rank_operations_in_place_of_weights() -> None:
    """By weight operation 4 leads, by score 6; a cap of one keeps 6."""
    architecture = Architecture(SPEC)
    with torch.no_grad():
        architecture.operation_logits[..., 4] = 3.0
    scores = torch.zeros_like(architecture.operation_logits.detach())
    scores[..., 6] = 0.1
    (plain, _), _ = propose(architecture, 1.0, PruneRule(0.0), operation_cap=1)
    (scored, _), _ = propose(architecture, 1.0, PruneRule(0.0), operation_cap=1, scores=scores)
    assert plain[..., 4].all()
    assert scored[..., 6].all()
    assert int(scored.sum()) == int(plain.sum())


def test_clients_scores_are_averaged_by_examples() -> None:
    def update(examples: int, value: float | None) -> ClientUpdate:
        scores = None if value is None else torch.full((1, 1, 8), value)
        return ClientUpdate(0, 1, 0, examples, torch.zeros(0), torch.zeros(0), scores=scores)

    found = mean_scores([update(1, 1.0), update(3, 5.0), update(9, None)])
    assert found is not None
    assert found.unique().tolist() == [4.0]
    assert mean_scores([update(1, None)]) is None


def test_a_score_is_the_loss_without_the_operation_less_the_loss_with_all() -> None:
    architecture = random_architecture(SPEC, 3, 1.0, torch.float64)
    network = random_supernet(SPEC, architecture.operation_mask, 4)
    images = torch.rand(6, 1, 8, 8, generator=stream(1), dtype=torch.float64)
    data = LocalData(images, torch.tensor([0, 1, 2, 0, 1, 2]), lambda x, generator: x)
    scores = perturbation_scores(network, architecture, data, 0.5, Relaxation("softmax"))
    place = (1, 2, 5)
    without = architecture.clone()
    without.operation_mask[place] = False
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(network(images, relax(each, 0.5)), data.labels)
            for each in (architecture, without)
        ]
    assert float(scores[place]) == pytest.approx(float(losses[1] - losses[0]), rel=1e-5)
    assert bool((scores != 0).any(-1).all())


def test_the_last_choice_is_scored_by_what_each_operation_does_alone() -> None:
    """Two operations on a single edge: each trial leaves a one-hot architecture in a network that has both."""
    architecture = random_one_hot(random_architecture(SPEC, 3, 1.0, torch.float64), stream(3))
    place = next(tuple(map(int, row)) for row in architecture.operation_mask.nonzero() if row[2] != 5)
    other = (*place[:2], 5)
    architecture.operation_mask[other] = True
    network = random_supernet(SPEC, architecture.operation_mask, 4)
    images = torch.rand(6, 1, 8, 8, generator=stream(1), dtype=torch.float64)
    data = LocalData(images, torch.tensor([0, 1, 2, 0, 1, 2]), lambda x, generator: x)
    scores = perturbation_scores(network, architecture, data, 0.5, Relaxation("softmax"))
    losses = {}
    for left_out in (place, other):
        trial = architecture.clone()
        trial.operation_mask[left_out] = False
        with torch.no_grad():
            losses[left_out] = torch.nn.functional.cross_entropy(network(images, relax(trial, 0.5)), data.labels)
    assert float(scores[place] - scores[other]) == pytest.approx(float(losses[place] - losses[other]), rel=1e-5)
    assert float(scores[place]) != pytest.approx(float(scores[other]))


def test_signs_of_a_collapse() -> None:
    architecture = Architecture(SPEC)
    assert alpha_entropy(architecture) == pytest.approx(1.0)
    with torch.no_grad():
        architecture.operation_logits[0, :, SKIP] = 4.0
        architecture.operation_logits[1, :, 5] = 4.0
    assert skip_share(architecture) == pytest.approx(0.5)
    assert collapse_warning(architecture) == ""
    with torch.no_grad():
        architecture.operation_logits[1, 0] = architecture.operation_logits[0, 0]
    assert "skip_connect leads on 60%" in collapse_warning(architecture)
    assert 0.0 < alpha_entropy(architecture) < 0.5


def test_group_norm_looks_at_every_image_by_itself() -> None:
    norm = GroupNorm(8)
    x = torch.randn(3, 8, 4, 4, generator=stream(0))
    torch.testing.assert_close(norm(x)[:1], norm(x[:1]))
    scale = torch.tensor(0.3)
    torch.testing.assert_close(norm(x, scale), 0.3 * norm(x))
    groups = norm(x).view(3, 2, -1)
    assert groups.mean(-1).abs().max() < 1e-5


EXTRAS: list[dict[str, Any]] = [
    {"beta_decay": 0.1},
    {"relaxation": "dirichlet"},
    {"relaxation": "gumbel_st"},
    {"prune_score": "perturb"},
    {"norm": "group"},
    {"skip_cap": 1},
    {"collapse_watch": "on"},
]


@pytest.mark.parametrize("values", EXTRAS, ids=lambda values: "=".join(map(str, *values.items())))
def test_every_extra_runs_to_a_lossless_network_and_is_off_by_default(values: dict[str, Any], tmp_path: Path) -> None:
    (name,) = values
    assert Config.from_mapping(defaults()) != replace(Config.from_mapping(defaults()), **values)
    keys = {"num_clients": 4, "clients_per_round": 2, "local_epochs": 1, "init_channels": 4, "num_cells": 3}
    config = Config.from_mapping({**keys, "num_nodes": 2, "num_rounds": 6, "search_fraction": 0.8, **values})
    experiment = prepare_experiment(config, tmp_path)
    run = begin_run(tmp_path, "run", experiment, tmp_path)
    summary = run_all(run, LocalGrid(4))
    assert summary["one_hot"]
    assert summary["max_logit_difference"] <= 1e-5
    rows = run.folder.rounds.read()
    if name == "skip_cap":
        for cell in ("normal", "reduce"):
            assert sum(choice[0] == "skip_connect" for node in summary["genotype"][cell] for choice in node) <= 1
    assert all(("skip_share" in row) == (name == "collapse_watch" and row["phase"] == "search") for row in rows)
