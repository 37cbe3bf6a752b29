"""Parts that several methods are made of, from the configuration."""

from collections.abc import Callable
from dataclasses import replace
from math import ceil

from fedmetanas_core.config import Config
from fedmetanas_core.methods.recipe import Personal, Recipe, Share, Stage
from fedmetanas_core.search.local_search import LocalOptions, Phase
from fedmetanas_core.search.penalties import BetaDecay, BudgetPenalty, DirichletPrior, Penalty
from fedmetanas_core.search.pruning import PruneRule
from fedmetanas_core.search.relaxation import Relaxation, dirichlet_mean
from fedmetanas_core.search.schedule import Schedule, Steady
from fedmetanas_core.search.steps import Fomaml, SingleLevel, StepRule
from fedmetanas_core.search.tasks import OuterOptions
from fedmetanas_core.space.architecture import Architecture, masked_softmax
from fedmetanas_core.space.budget import Budget
from fedmetanas_core.space.fixed import FixedSpec
from fedmetanas_core.space.genotype import Genotype
from fedmetanas_core.space.spec import SpaceSpec

ALL_INPUTS = "all"  # see SpaceSpec.inputs


def fixed_space(config: Config, spec: SpaceSpec) -> FixedSpec:
    """The configured fixed model on the same images."""
    return FixedSpec(config.model, spec.in_channels, spec.num_classes, spec.height, spec.width)


def dual_learner(config: Config) -> Fomaml:
    """FedMetaNAS' step (paper, section 4.3)."""
    return Fomaml(
        weight_rate=config.task_lr_weights,
        alpha_rate=config.task_lr_alphas,
        alpha_optimizer=config.task_alpha_optimizer,
        inner_steps=int(config.inner_steps),
        alternate=config.inner == "alternate",
        clip=config.clip,
    )


def outer_options(
    config: Config,
    relaxation: Relaxation | None = None,
    budget: Budget | None = None,
    budget_penalty: float | None = None,
) -> OuterOptions:
    """The outer steps as configured; alphas that go beyond the ``budget`` are drawn back by the ``budget_penalty``."""
    penalty = config.budget_penalty if budget_penalty is None else budget_penalty
    relaxation = Relaxation(config.relaxation, config.sample) if relaxation is None else relaxation
    return OuterOptions(
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        alpha_rate=float(config.meta_lr_alphas),
        alpha_optimizer=config.meta_alpha_optimizer,
        relaxation=relaxation,
        penalties=_penalties(config, relaxation, BudgetPenalty(budget, penalty) if budget and penalty else None),
        precision=config.precision,
    )


def _penalties(config: Config, relaxation: Relaxation, budget: BudgetPenalty | None) -> tuple[Penalty, ...]:
    found: list[Penalty] = [BetaDecay(config.beta_decay)] if config.beta_decay > 0 else []
    found += [DirichletPrior()] if relaxation.kind == "dirichlet" else []
    found += [budget] if budget is not None else []
    return tuple(found)


def training(config: Config, rule: StepRule, outer: OuterOptions | None = None) -> LocalOptions:
    """E epochs of one kind of step, at the configured rates."""
    return LocalOptions(
        phases=(Phase(rule, int(config.local_epochs)),),
        batch_size=int(config.batch_size),
        outer=outer_options(config) if outer is None else outer,
        weight_rate=float(config.meta_lr_weights),
        weight_rate_end=config.meta_lr_weights_end,
        seed=config.seed,
    )


def dual_training(config: Config, outer: OuterOptions | None = None, part: str = "all") -> LocalOptions:
    """E epochs of the dual learner, of as many tasks each as configured."""
    local = training(config, replace(dual_learner(config), part=part), outer)
    return replace(local, single_task=config.task == "single_pair")


def plain_sgd(config: Config, part: str = "all") -> SingleLevel:
    """A step of SGD on every batch."""
    return SingleLevel(config.clip, part)


def tuning(config: Config, part: str = "all", epochs: int = 1, rate: float | None = None) -> LocalOptions:
    """Plain steps on a client's own images with the federation's running statistics (equation 6, weights only).

    Moments of one client's few classes would normalise away what tells the classes apart. ``epochs`` is what an
    ``auto`` stands for.
    """
    outer = replace(outer_options(config), momentum=0.0, weight_decay=0.0, penalties=())
    rate = config.task_lr_weights if rate is None else rate
    return LocalOptions(
        phases=(Phase(plain_sgd(config, part), adapt_epochs(config, epochs)),),
        batch_size=int(config.batch_size),
        outer=outer,
        weight_rate=rate,
        weight_rate_end=rate,
        running_statistics=True,
        seed=config.seed,
        purpose="adaptation",
    )


def own_training(config: Config) -> LocalOptions:
    """Plain training of a network that a client has cut out for itself: SGD on all its images, as in the rounds.

    The rate falls from the outer one to its end within these epochs (``auto``: E). Batch norm takes the client's own
    moments, and keeps them: those that came belong to another network.
    """
    epochs = adapt_epochs(config, int(config.local_epochs))
    local = training(config, plain_sgd(config), replace(outer_options(config), penalties=()))
    return replace(local, phases=(Phase(plain_sgd(config), epochs),), restarts=True, purpose="adaptation")


def adapt_epochs(config: Config, default: int) -> int:
    """Epochs of local adaptation after the last round."""
    return default if config.adapt_epochs == "auto" else int(config.adapt_epochs)


def fixed_model(
    config: Config, spec: SpaceSpec, local: LocalOptions, personal: Personal, share: Share | None = None
) -> Recipe:
    """A method that trains a fixed model for all rounds."""
    rounds = int(config.num_rounds)
    stage = Stage("training", rounds, fixed_space(config, spec), Steady(rounds), local)
    return Recipe((stage,), personal, Share() if share is None else share)


def search_schedule(config: Config, spec: SpaceSpec) -> Schedule:
    """FedMetaNAS' phases."""
    return Schedule.with_search_fraction(
        float(config.search_fraction),
        num_rounds=int(config.num_rounds),
        num_nodes=spec.num_nodes,
        seed=config.seed,
        temperature_start=config.temperature_start,
        temperature_end=config.temperature_end,
        noise_fades=config.noise == "fade",
        caps=config.prune_cap == "linear",
        alpha_weight_decay=config.alpha_weight_decay,
    )


def prune_rule(config: Config) -> PruneRule:
    """Which choices an event removes."""
    weigh = dirichlet_mean if config.relaxation == "dirichlet" else masked_softmax
    return PruneRule(config.prune_threshold, config.none_policy, config.skip_cap or None, weigh)


def retraining_rounds(config: Config) -> int:
    """The rounds at the end in which a two-stage method trains its genotype afresh; at least one of each kind."""
    rounds = int(config.num_rounds)
    return min(rounds - 1, max(1, round(config.retrain_fraction * rounds)))


def for_each(derive: Callable[[Architecture], Genotype]) -> Callable[[Architecture, int], Genotype]:
    """A derivation that is the same for every client."""
    return lambda architecture, client: derive(architecture)


def personal_cells(spec: SpaceSpec) -> SpaceSpec:
    """A quarter of the cells, the last ones, are personal (FedPNAS: two of eight)."""
    return replace(spec, personal_cells=max(1, ceil(spec.num_cells / 4)))
