"""Random search: a random one-hot genotype from FedMetaNAS' space, trained in its way for the same rounds."""

from functools import partial

import torch

from fedmetanas_core.config import Config
from fedmetanas_core.methods.budgets import budget_of
from fedmetanas_core.methods.parts import dual_training, tuning
from fedmetanas_core.methods.recipe import Personal, Recipe, Stage
from fedmetanas_core.search.schedule import Steady
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.budget import Budget
from fedmetanas_core.space.genotype import Genotype, pairwise_genotype, random_genotype
from fedmetanas_core.space.spec import SpaceSpec

MOST_DRAWS = 1000


def recipe(config: Config, spec: SpaceSpec) -> Recipe:
    """What remains of FedMetaNAS if nothing is searched."""
    rounds, budget = int(config.num_rounds), budget_of(config, spec)
    stage = Stage(
        name="training",
        rounds=rounds,
        space=spec,
        planner=Steady(rounds),
        local=dual_training(config),
        derive=pairwise_genotype,
        draw=random_genotype if budget is None else partial(_draw_within, budget),
    )
    return Recipe((stage,), Personal(tune=tuning(config)), budget=budget)


def _draw_within(budget: Budget, spec: SpaceSpec, generator: torch.Generator) -> Genotype:
    """The first of many random networks that keeps to the budget; where none does, the last, made cheaper."""
    for _ in range(MOST_DRAWS):
        genotype = random_genotype(spec, generator)
        if budget.allows(genotype):
            return genotype
    architecture = Architecture(spec)
    with torch.no_grad():
        for logits, mask in zip((row for row, _ in architecture.rows()), genotype.masks(spec), strict=True):
            logits.copy_(mask)
    return budget.within(architecture, pairwise_genotype)
