"""FedRLNAS (Yao et al. 2021) and PerFedRLNAS (Yao and Li 2024): the server samples subnets and learns from rewards."""

from dataclasses import replace

from fedmetanas_core.config import Config
from fedmetanas_core.federation.policy import Adam, Reinforce
from fedmetanas_core.methods.budgets import budget_of, within
from fedmetanas_core.methods.parts import (
    ALL_INPUTS,
    dual_training,
    for_each,
    outer_options,
    own_training,
    plain_sgd,
    search_schedule,
    training,
    tuning,
)
from fedmetanas_core.methods.recipe import Personal, Recipe, Stage
from fedmetanas_core.search.local_search import HeldOut, LocalOptions
from fedmetanas_core.search.prune_events import PolicyPruning
from fedmetanas_core.search.relaxation import Relaxation
from fedmetanas_core.search.schedule import Steady
from fedmetanas_core.search.tasks import OuterOptions
from fedmetanas_core.space.budget import Budget
from fedmetanas_core.space.genotype import argmax_genotype
from fedmetanas_core.space.spec import SpaceSpec

REWARD = 0.1  # of a client's training images; accuracy on its evaluation images would leak test data into the alphas
WEIGHT_DECAY = 3e-4  # of the server's policy


def recipe(config: Config, spec: SpaceSpec) -> Recipe:
    """One policy on the server; only the sampled subnet travels."""
    policy = _policy(config, spec, Adam(float(config.policy_lr), weight_decay=WEIGHT_DECAY))
    stage = _stage(config, spec, policy)
    return Recipe((stage,), Personal(tune=tuning(config)), budget=_budget(config, spec))


def personalised(config: Config, spec: SpaceSpec) -> Recipe:
    """A policy for every client, on the server (PerFedRLNAS)."""
    policy = _policy(config, spec, Adam(float(config.personal_policy_lr)), per_client=True)
    stage = _stage(config, spec, policy)
    return Recipe((stage,), _trained_subnet(config, spec), budget=_budget(config, spec))


def meta_personalised(config: Config, spec: SpaceSpec) -> Recipe:
    """The same with the dual learner on weights, and policies that are annealed and pruned (meta-PerFedRLNAS)."""
    policy = _policy(config, spec, Adam(float(config.personal_policy_lr)), per_client=True, anneals=True)
    stage = _stage(config, spec, policy, dual_training(config, _one_path(config)))
    stage = replace(
        stage,
        planner=search_schedule(config, spec),
        pruning=PolicyPruning(config.prune_threshold, _budget(config, spec)),
    )
    return Recipe((stage,), _trained_subnet(config, spec), budget=_budget(config, spec))


def _policy(config: Config, spec: SpaceSpec, adam: Adam, per_client: bool = False, anneals: bool = False) -> Reinforce:
    return Reinforce(
        adam,
        config.seed,
        config.num_clients,
        per_client,
        explore=config.policy_explore,
        anneals=anneals,
        budget=_budget(config, spec),
    )


def _one_path(config: Config) -> OuterOptions:
    """A client's network has one operation on every edge; the server is evaluated on its likeliest one."""
    return outer_options(config, Relaxation("path"))


def _stage(config: Config, spec: SpaceSpec, policy: Reinforce, local: LocalOptions | None = None) -> Stage:
    rounds = int(config.num_rounds)
    local = training(config, plain_sgd(config), _one_path(config)) if local is None else local
    return Stage(
        name="search",
        rounds=rounds,
        space=replace(spec, inputs=ALL_INPUTS),
        planner=Steady(rounds, "search"),
        local=replace(local, held_out=HeldOut("reward", REWARD)),
        architect=policy,
        derive=within(_budget(config, spec), argmax_genotype),
    )


def _budget(config: Config, spec: SpaceSpec) -> Budget | None:
    return budget_of(config, replace(spec, inputs=ALL_INPUTS))


def _trained_subnet(config: Config, spec: SpaceSpec) -> Personal:
    """Each client's likeliest subnet, after training on its own images."""
    derive = for_each(within(_budget(config, spec), argmax_genotype))
    return Personal(tune=own_training(config), derive=derive, is_the_point=True)
