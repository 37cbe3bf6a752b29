"""FedNAS (He et al. 2020): MiLeNAS on every client, then DARTS' genotype trained afresh; and without sharing."""

from dataclasses import replace

from fedmetanas_core.config import Config
from fedmetanas_core.federation.policy import AveragedAlphas
from fedmetanas_core.methods.budgets import budget_of, within
from fedmetanas_core.methods.parts import (
    ALL_INPUTS,
    outer_options,
    plain_sgd,
    retraining_rounds,
    training,
    tuning,
)
from fedmetanas_core.methods.recipe import Personal, Recipe, Share, Stage
from fedmetanas_core.search.local_search import HeldOut
from fedmetanas_core.search.relaxation import Relaxation
from fedmetanas_core.search.schedule import Steady
from fedmetanas_core.search.steps import Bilevel
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.budget import Budget
from fedmetanas_core.space.genotype import Genotype, darts_genotype, pairwise_genotype
from fedmetanas_core.space.spec import SpaceSpec

VALIDATION = 0.5  # of a client's training images; the reference took the test set


def recipe(config: Config, spec: SpaceSpec) -> Recipe:
    """Search with averaged weights and alphas, then FedAvg on the genotype from fresh weights."""
    return Recipe(stages(config, spec), Personal(tune=tuning(config)), budget=_budget(config, spec))


def _budget(config: Config, spec: SpaceSpec) -> Budget | None:
    """Of the network that is retrained, whatever the searched one costs."""
    return budget_of(config, replace(_final(spec), inputs=ALL_INPUTS))


def _final(spec: SpaceSpec) -> SpaceSpec:
    return replace(spec, norm="affine") if spec.norm == "batch" else spec


def stages(config: Config, spec: SpaceSpec) -> tuple[Stage, Stage]:
    """The search and the retraining. Rates restart in every round of the search, as in the reference."""
    last = retraining_rounds(config)
    first = int(config.num_rounds) - last
    budget = _budget(config, spec)
    outer = replace(outer_options(config, Relaxation("softmax"), budget), alpha_optimizer="adam")
    local = replace(
        training(config, Bilevel(clip=config.clip), outer),
        restarts=True,
        held_out=HeldOut("validation", VALIDATION),
    )
    search = Stage(
        name="search",
        rounds=first,
        space=replace(spec, inputs=ALL_INPUTS),
        planner=Steady(first, "search", adapts=True, alpha_weight_decay=config.alpha_weight_decay),
        local=local,
        architect=AveragedAlphas(),
        derive=within(budget, darts_genotype),
    )
    dropping = replace(outer_options(config), drop_path=float(config.drop_path))
    retraining = Stage(
        name="retraining",
        rounds=last,
        space=_final(spec),
        planner=Steady(last, "retraining"),
        local=training(config, plain_sgd(config), dropping),
        derive=pairwise_genotype,
    )
    return search, retraining


def local_darts(config: Config, spec: SpaceSpec) -> Recipe:
    """The same on every client for itself: nothing but the plan travels (Meta-DNAS, Table 1).

    Rates restart in the retraining as well: when a client's turn comes says nothing about how far it has got.
    """
    share = Share(down="none", up="none", kept="all", resumes=True)
    search, retraining = stages(config, spec)
    retraining = replace(retraining, local=replace(retraining.local, restarts=True))
    searched = within(_budget(config, spec), darts_genotype)

    def own_genotype(architecture: Architecture, client: int) -> Genotype:
        """What the client's last stage has come to."""
        return (pairwise_genotype if architecture.chooses_pairs else searched)(architecture)

    personal = Personal(tune=tuning(config), derive=own_genotype, is_the_point=True, own_limits=True)
    return Recipe((search, retraining), personal, share, _budget(config, spec))
