"""FedMetaNAS (arXiv 2504.06457): Gumbel supernet, first-order MAML on weights and alphas, soft pruning."""

from dataclasses import replace

from fedmetanas_core.config import Config
from fedmetanas_core.federation.policy import AveragedAlphas
from fedmetanas_core.methods.budgets import budget_of, within
from fedmetanas_core.methods.parts import dual_training, outer_options, prune_rule, search_schedule, tuning
from fedmetanas_core.methods.recipe import Personal, Recipe, Stage
from fedmetanas_core.search.prune_events import SoftPruning
from fedmetanas_core.space.genotype import pairwise_genotype
from fedmetanas_core.space.spec import SpaceSpec


def recipe(config: Config, spec: SpaceSpec) -> Recipe:
    """The dual learner, averaged alphas, pruning to a one-hot network."""
    rule, budget = prune_rule(config), budget_of(config, spec)
    votes, lowest = config.prune_rule == "client_vote", config.prune_temperature == "min"
    temperature = config.temperature_end if lowest else None
    local = replace(
        dual_training(config, outer_options(config, budget=budget)),
        vote=rule if votes else None,
        vote_temperature=temperature,
        scores=config.prune_score == "perturb",
    )
    schedule = search_schedule(config, spec)
    stage = Stage(
        name="search",
        rounds=int(config.num_rounds),
        space=spec,
        planner=schedule,
        local=local,
        architect=AveragedAlphas(),
        pruning=SoftPruning(rule, votes, schedule.caps, temperature, budget=budget),
        derive=within(budget, pairwise_genotype),
        without_none=config.none_policy == "absent",
    )
    return Recipe((stage,), Personal(tune=tuning(config)), budget=budget)
