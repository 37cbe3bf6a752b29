"""FedDSNAS: DSNAS (Hu et al. 2020) on every client, averaged."""

from dataclasses import replace

from fedmetanas_core.config import Config
from fedmetanas_core.federation.policy import AveragedAlphas
from fedmetanas_core.methods.budgets import budget_of, within
from fedmetanas_core.methods.parts import ALL_INPUTS, outer_options, plain_sgd, training, tuning
from fedmetanas_core.methods.recipe import Personal, Recipe, Stage
from fedmetanas_core.search.prune_events import EarlyFix
from fedmetanas_core.search.relaxation import Relaxation
from fedmetanas_core.search.schedule import Steady
from fedmetanas_core.space.genotype import argmax_genotype
from fedmetanas_core.space.spec import SpaceSpec


def recipe(config: Config, spec: SpaceSpec) -> Recipe:
    """One path sampled for every batch; weights and alphas by the same batch, alphas by DSNAS' score gradient."""
    rounds, space = int(config.num_rounds), replace(spec, inputs=ALL_INPUTS)
    budget = budget_of(config, space)
    outer = replace(
        outer_options(config, Relaxation("path")), alpha_optimizer="adam", alpha_rate=float(config.feddsnas_lr)
    )
    local = replace(training(config, plain_sgd(config), outer), returns_touched=True)
    stage = Stage(
        name="search",
        rounds=rounds,
        space=space,
        planner=Steady(rounds, "search", adapts=True, noise_scale=1.0),
        local=local,
        architect=AveragedAlphas(),
        pruning=EarlyFix(budget=budget),
        derive=within(budget, argmax_genotype),
    )
    return Recipe((stage,), Personal(tune=tuning(config)), budget=budget)
