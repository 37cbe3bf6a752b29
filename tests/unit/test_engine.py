"""The engine between the parts: stages, turns, what is renewed and what is cut out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_architecture, random_supernet, small_spec, stream

from fedmetanas_core.config import Config
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.federation.policy import MetaGradient
from fedmetanas_core.federation.sampling import take_turns
from fedmetanas_core.federation.update import ServerState
from fedmetanas_core.methods.method import Method
from fedmetanas_core.methods.parts import own_training
from fedmetanas_core.methods.registry import METHODS, make_method
from fedmetanas_core.preflight import Experiment, prepare_experiment
from fedmetanas_core.search.evaluation import refresh_statistics
from fedmetanas_core.search.local_data import LocalData, draw_steps, hold_out
from fedmetanas_core.search.optimizers import Sgd
from fedmetanas_core.search.prune_events import SoftPruning
from fedmetanas_core.search.pruning import PruneRule
from fedmetanas_core.search.steps import RankOne, SingleLevel
from fedmetanas_core.search.tasks import OuterOptions, TaskKind, TaskRunner
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.fixed import FixedNetwork, FixedSpec, PixelConv2d
from fedmetanas_core.space.genotype import darts_genotype
from fedmetanas_core.space.models import build
from fedmetanas_core.space.spec import NONE, SpaceSpec


def experiment_of(name: str, tmp_path: Path, **values: Any) -> Experiment:
    keys = {"num_clients": 4, "clients_per_round": 2, "init_channels": 2, "num_cells": 3, "num_nodes": 2}
    return prepare_experiment(Config.from_mapping({**keys, "method": name, **values}), tmp_path)


def method(name: str, tmp_path: Path, **values: Any) -> Method:
    experiment = experiment_of(name, tmp_path, **values)
    return make_method(experiment.config, experiment.spec)


def test_two_stages_count_their_own_rounds(tmp_path: Path) -> None:
    plans = [method("fednas", tmp_path, num_rounds=5, retrain_fraction=0.4).plan(number) for number in range(1, 6)]
    assert [plan.stage for plan in plans] == [0, 0, 0, 1, 1]
    assert [plan.stage_round for plan in plans] == [1, 2, 3, 1, 2]
    assert [plan.stage_rounds for plan in plans] == [3, 3, 3, 2, 2]
    assert [plan.round for plan in plans] == [1, 2, 3, 4, 5]
    assert len({plan.seed for plan in plans}) == 5


def test_stages_that_continue_count_together(tmp_path: Path) -> None:
    engine = method("fedpnas", tmp_path, num_rounds=20)
    plans = [engine.plan(number) for number in (1, 2, 3, 20)]
    assert [plan.stage for plan in plans] == [0, 0, 1, 1]
    assert [plan.stage_round for plan in plans] == [1, 2, 3, 20]
    assert {plan.stage_rounds for plan in plans} == {20}
    assert not engine.ends_stage(engine.plan(2))
    state = engine.initial_state()
    entered = engine.enter(state, engine.plan(3))
    assert entered.stage == 1
    assert torch.equal(entered.weights, state.weights)


def test_a_new_stage_begins_with_the_derived_genotype_and_fresh_weights(tmp_path: Path) -> None:
    engine = method("fednas", tmp_path, num_rounds=4)
    state = engine.initial_state()
    assert engine.ends_stage(engine.plan(2))
    assert engine.enter(state, engine.plan(2)) is state
    entered = engine.enter(state, engine.plan(3))
    genotype = darts_genotype(state.architecture)
    assert isinstance(entered.spec, SpaceSpec)
    assert entered.spec.norm == "affine"
    assert torch.equal(entered.architecture.operation_mask, genotype.masks(entered.spec)[0])
    assert entered.architecture.version == state.architecture.version + 1
    assert engine.derive(entered) == genotype


def test_no_cell_to_share_is_refused(tmp_path: Path) -> None:
    for name in ("fedpnas", "meta_fedpnas"):
        with pytest.raises(RefusalError, match="num_cells: 1 leaves no cell to share"):
            method(name, tmp_path, num_cells=1)


def test_turns_come_round_equally_often() -> None:
    visits = [client for number in range(1, 11) for client in take_turns(3, number, 7, range(7), 2)]
    assert [visits.count(client) for client in range(7)].count(3) == 6
    assert sorted(set(visits[:7])) != visits[:7]
    assert (
        take_turns(3, 1, 7, range(7), 2) == take_turns(3, 1, 7, range(7), 2) == sorted(take_turns(3, 1, 7, range(7), 2))
    )


def test_paths_are_not_dropped_while_statistics_are_renewed() -> None:
    architecture = random_architecture(small_spec(), 0)
    network = random_supernet(small_spec(), architecture.operation_mask, 1, torch.float32)
    data = LocalData(torch.rand(9, 1, 8, 8, generator=stream(0)), torch.zeros(9).long(), lambda x, generator: x)
    found = []
    for share in (0.0, 0.5):
        network.drop_path = share
        refresh_statistics(network, data)
        found.append(network.statistics.clone())
    assert torch.equal(*found)
    network.train()
    torch.manual_seed(0)
    assert not torch.equal(network(data.images), network(data.images))


def test_a_last_image_never_stands_alone_for_moments() -> None:
    data = LocalData(torch.rand(257, 1, 8, 8), torch.zeros(257).long(), lambda x, generator: x)
    assert [len(labels) for _, labels in data.batches(256)] == [256, 1]
    assert [len(labels) for _, labels in data.batches(256, least=2)] == [257]
    network = FixedNetwork(FixedSpec("mobilenet_v3_large", 1, 10, 8, 8))
    network.initialise(stream(0))
    refresh_statistics(network, data.subset(torch.arange(5)))
    assert bool(network.statistics.isfinite().all())


@pytest.mark.parametrize(("name", "macs"), [("mobilenet_v3_large", 7.2e6), ("mobilenet_v3_large_s4", 5e7)])
def test_the_fixed_models_have_their_published_size(name: str, macs: float) -> None:
    """4,214,842 parameters and 24,400 statistics for ten classes of colour images; 7.2 M multiply-adds at 32 pixels."""
    from fedmetanas_core.space.cost import measure_cost

    spec = FixedSpec(name, 3, 10, 32, 32)
    cost = measure_cost(spec, Architecture(spec).operation_mask)
    assert (cost.parameters, cost.statistics) == (4_214_842, 24_400)
    if name.endswith("_s4"):
        assert cost.macs > macs
    else:
        assert cost.macs == pytest.approx(macs, rel=0.03)


def test_the_fixed_models_pass_images_of_any_size_and_a_batch_of_one() -> None:
    for name in ("mobilenet_v3_large", "mobilenet_v3_large_s4"):
        network = FixedNetwork(FixedSpec(name, 1, 10, 8, 8))
        network.initialise(stream(0))
        assert network.eval()(torch.rand(1, 1, 8, 8)).shape == (1, 10)
        assert network.train()(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "inputs", "outputs", "groups"), [(5, 6, 6, 6), (3, 6, 4, 1), (1, 6, 4, 1), (3, 6, 4, 2)]
)
def test_a_convolution_of_a_single_pixel_is_torchs(
    kernel: int, inputs: int, outputs: int, groups: int, stride: int
) -> None:
    """Values and all gradients, on a map of one pixel and, for comparison, on a larger one."""
    settings = {"stride": stride, "padding": kernel // 2, "groups": groups, "dtype": torch.float64}
    for bias, side in ((True, 1), (False, 1), (True, 3)):
        expected = torch.nn.Conv2d(inputs, outputs, kernel, bias=bias, **settings)
        layer = PixelConv2d.like(expected).double()
        layer.load_state_dict(expected.state_dict())
        x = torch.randn(5, inputs, side, side, generator=stream(1), dtype=torch.float64, requires_grad=True)
        arguments = [(x, *module.parameters()) for module in (layer, expected)]
        values = [module(x) for module in (layer, expected)]
        weight = torch.randn(values[1].shape, generator=stream(2), dtype=torch.float64)
        gradients = [torch.autograd.grad((v * weight).sum(), a) for v, a in zip(values, arguments, strict=True)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*gradients)


def test_no_convolution_of_a_fixed_model_sees_a_single_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    whole = torch.nn.Conv2d._conv_forward

    def noted(layer: torch.nn.Conv2d, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(tuple(x.shape[2:]))
        return whole(layer, x, *rest)

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", noted)
    network = FixedNetwork(FixedSpec("mobilenet_v3_large", 1, 10, 8, 8))
    network.initialise(stream(0))
    network(torch.rand(2, 1, 8, 8))
    assert seen
    assert (1, 1) not in seen


def test_large_weights_are_stepped_by_the_fused_form() -> None:
    def optimizer(spec: FixedSpec | SpaceSpec) -> Sgd:
        architecture = Architecture(spec)
        network = build(spec, architecture.operation_mask)
        kind = TaskKind(4, True, False, False, 0.0, SingleLevel(), OuterOptions())
        found = TaskRunner(network, architecture, kind).weight_optimizer
        assert isinstance(found, Sgd)
        return found

    assert optimizer(FixedSpec("mobilenet_v3_large", 1, 10, 8, 8)).fused
    assert not optimizer(small_spec()).fused


def test_a_network_that_a_client_cut_out_is_trained_as_its_own(tmp_path: Path) -> None:
    for name in METHODS:
        experiment = experiment_of(name, tmp_path)
        tune = make_method(experiment.config, experiment.spec).recipe.personal.tune
        if name in ("meta_dnas", "perfedrlnas", "meta_perfedrlnas"):
            assert tune == own_training(experiment.config)
        else:
            assert tune is None or tune.running_statistics, name


def test_short_searches_take_the_configured_rates_of_alphas(tmp_path: Path) -> None:
    for stage in method("fedpnas", tmp_path, fedpnas_lr=0.07).recipe.stages:
        (phase,) = stage.local.phases
        assert isinstance(phase.rule, RankOne)
        assert (stage.local.weight_rate, stage.local.outer.alpha_rate, phase.rule.rate) == (0.07, 0.07, 0.07)
    (stage,) = method("meta_dnas", tmp_path, meta_dnas_lr=0.03).recipe.stages
    assert isinstance(stage.architect, MetaGradient)
    assert stage.architect.adam.rate == 0.03
    assert stage.local.outer.alpha_rate == pytest.approx(0.3)
    (stage,) = method("feddsnas", tmp_path, feddsnas_lr=0.04).recipe.stages
    assert stage.local.outer.alpha_rate == 0.04


@pytest.mark.parametrize("name", ["fednas", "feddsnas", "fedpnas", "meta_dnas"])
def test_alphas_of_published_adam_stay_so_whatever_the_preset(name: str, tmp_path: Path) -> None:
    stage = method(name, tmp_path, preset="paper_literal").recipe.stages[0]
    assert stage.local.outer.alpha_optimizer == "adam"


def test_a_search_under_a_budget_begins_without_what_costs_nothing(tmp_path: Path) -> None:
    assert not method("meta_dnas", tmp_path).initial_state().architecture.operation_mask[..., NONE].any()
    assert method("meta_dnas", tmp_path, none_policy="legal").initial_state().architecture.operation_mask.all()


def test_the_warm_start_of_a_schedule_is_its_beginning(tmp_path: Path) -> None:
    """Ten rounds of meta-FedPNAS are planned as ten of FedMetaNAS, the first of them with a classifier that learns."""
    personal, plain = (method(name, tmp_path, num_rounds=10) for name in ("meta_fedpnas", "fedmetanas"))
    assert [stage.rounds for stage in personal.recipe.stages] == [1, 9]
    assert [stage.local.outer.auxiliary for stage in personal.recipe.stages] == ["learns", "followed"]
    plans = [(personal.plan(number), plain.plan(number)) for number in range(1, 11)]
    for mine, its in plans:
        assert replace(mine, stage=0) == its
    assert [mine.stage for mine, _ in plans] == [0] + [1] * 9


def test_an_edge_that_is_settled_on_none_is_no_candidate_for_darts() -> None:
    spec = replace(small_spec(), inputs="all")
    architecture = random_architecture(spec, 0)
    keep = architecture.operation_mask.clone()
    keep[0, :2] = False
    keep[0, :2, NONE] = True
    architecture.restrict(keep, architecture.input_mask)
    genotype = darts_genotype(architecture)
    assert genotype.normal[0] == ()
    assert len(genotype.normal[1]) == len(genotype.reduce[0]) == 2
    genotype.masks(spec)


def test_the_server_prunes_shared_cells_alone_and_counts_nothing_else(tmp_path: Path) -> None:
    spec = replace(small_spec(), personal_cells=1)
    architecture = random_architecture(spec, 0, 3.0)
    network = build(spec, architecture.operation_mask)
    state = ServerState(spec, network.weights.detach().clone(), network.statistics.clone(), architecture)
    engine = method("meta_fedpnas", tmp_path, num_rounds=10)
    plan = next(plan for plan in map(engine.plan, range(1, 11)) if plan.prunes and plan.operation_cap < 8)
    before = architecture.operation_mask.clone()
    report = SoftPruning(PruneRule(), groups=2)(state, [], plan)
    assert report is not None
    gone = before & ~state.architecture.operation_mask
    assert not gone[2:].any()
    pairs = int((~state.architecture.input_mask & Architecture(spec).input_mask).sum())
    assert report.total == int(gone.sum()) + pairs


def test_a_step_with_one_batch_uses_every_image_and_fills_up_the_last() -> None:
    steps = draw_steps(10, 4, stream(0), batches=1)
    assert [len(indices) for (indices,) in steps] == [4, 4, 4]
    assert torch.cat([indices for (indices,) in steps]).unique().numel() == 10
    three = draw_steps(10, 4, stream(0), batches=3)
    assert [[len(batch) for batch in step] for step in three] == [[3, 3, 3]]
    assert torch.cat(three[0]).unique().numel() == 9


def test_what_is_held_out_is_apart_and_the_same_each_time() -> None:
    data = LocalData(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10), lambda x, generator: x)
    rest, held = hold_out(data, 0.3, stream(4))
    assert (len(rest), len(held)) == (7, 3)
    assert sorted(torch.cat([rest.labels, held.labels]).tolist()) == list(range(10))
    assert torch.equal(hold_out(data, 0.3, stream(4))[1].labels, held.labels)
    one, same = hold_out(data.subset(torch.tensor([6])), 0.5, stream(0))
    assert one.labels.tolist() == same.labels.tolist() == [6]
