"""FedPNAS (Hoang and Kingsford 2021) in the DARTS space: shared base cells, and personal ones of each client's own."""

from dataclasses import replace

from fedmetanas_core.config import Config
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.federation.policy import AveragedAlphas
from fedmetanas_core.methods.budgets import budget_of, within
from fedmetanas_core.methods.parts import (
    ALL_INPUTS,
    dual_training,
    for_each,
    outer_options,
    personal_cells,
    prune_rule,
    search_schedule,
    training,
    tuning,
)
from fedmetanas_core.methods.recipe import Personal, Recipe, Stage
from fedmetanas_core.search.prune_events import SoftPruning
from fedmetanas_core.search.relaxation import Relaxation
from fedmetanas_core.search.schedule import Later, Steady
from fedmetanas_core.search.steps import RankOne, StepRule
from fedmetanas_core.space.genotype import argmax_genotype, pairwise_genotype
from fedmetanas_core.space.spec import CELL_KINDS, SpaceSpec

TEMPERATURE = 0.1
WARM_START = 0.1  # of the rounds; published as 100 of 1000
PERSONAL_RATE, PERSONAL_ALPHA_RATE = 1e-3, 1e-5  # of Adam, as published


def recipe(config: Config, spec: SpaceSpec) -> Recipe:
    """One-hot Gumbel samples, a rank-one step ahead of the personal part; personal cells are tuned at the end.

    The prediction of a training pass is the mean over several samples, in probability.

    An auxiliary classifier on the shared cells learns in the first tenth of the rounds; then it is frozen, and the
    distance to what it predicts joins the loss.
    """
    _check_cells(spec)
    rate = float(config.fedpnas_lr)
    rounds, space = int(config.num_rounds), personal_cells(replace(spec, inputs=ALL_INPUTS, auxiliary=True))
    budget = budget_of(config, space)
    derive = within(budget, argmax_genotype)
    outer = replace(
        outer_options(config, Relaxation("gumbel_st", evaluated="path"), budget),
        weight_optimizer="adam",
        weight_decay=0.0,
        alpha_rate=rate,
        alpha_optimizer="adam",
        samples=int(config.fedpnas_samples),
    )
    beginning = max(1, round(WARM_START * rounds))

    def stage(name: str, length: int, rule: StepRule, auxiliary: str, continues: bool) -> Stage:
        local = training(config, rule, replace(outer, auxiliary=auxiliary))
        return Stage(
            name=name,
            rounds=length,
            space=space,
            planner=Steady(length, name, adapts=True, temperature=TEMPERATURE, noise_scale=1.0),
            local=replace(local, weight_rate=rate, weight_rate_end=0.0),
            architect=AveragedAlphas(),
            derive=derive,
            continues=continues,
        )

    stages = (
        stage("warm start", beginning, RankOne(rate, config.clip), "learns", False),
        stage("search", rounds - beginning, RankOne(rate, config.clip, part="trunk"), "followed", True),
    )
    own = tuning(config, "personal", rate=PERSONAL_RATE)
    own = replace(own, outer=replace(outer, alpha_rate=PERSONAL_ALPHA_RATE, auxiliary="followed"))
    return Recipe(
        stages if rounds > beginning else stages[:1],
        Personal(search=own, derive=for_each(derive), is_the_point=True, own_limits=True),
        budget=budget,
    )


def _check_cells(spec: SpaceSpec) -> None:
    if spec.num_cells < 2:
        raise RefusalError(f"num_cells: {spec.num_cells} leaves no cell to share", "set num_cells to at least 2")


def meta(config: Config, spec: SpaceSpec) -> Recipe:
    """The same cells and auxiliary classifier, with FedMetaNAS' dual learner and pruning (meta-FedPNAS).

    The server prunes the shared cells, every client its personal ones.
    """
    _check_cells(spec)
    rule, schedule = prune_rule(config), search_schedule(config, spec)
    rounds, space = int(config.num_rounds), personal_cells(replace(spec, auxiliary=True))
    beginning = max(1, round(WARM_START * rounds))

    def stage(name: str, first: int, length: int, part: str, auxiliary: str) -> Stage:
        outer = replace(outer_options(config), auxiliary=auxiliary)
        local = dual_training(config, outer, part)
        return Stage(
            name=name,
            rounds=length,
            space=space,
            planner=Later(schedule, first),
            local=replace(local, centres=False),
            architect=AveragedAlphas(by_holder=True),
            pruning=SoftPruning(rule, caps=schedule.caps, groups=len(CELL_KINDS)),
            derive=pairwise_genotype,
            without_none=config.none_policy == "absent",
            continues=first > 0,
        )

    stages = (
        stage("warm start", 0, beginning, "all", "learns"),
        stage("search", beginning, rounds - beginning, "trunk", "followed"),
    )
    own = tuning(config, "personal")
    own = replace(own, outer=replace(own.outer, auxiliary="followed"))
    personal = Personal(own, own, for_each(pairwise_genotype), rule, min(schedule.events()), is_the_point=True)
    return Recipe(stages if rounds > beginning else stages[:1], personal)
