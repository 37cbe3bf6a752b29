"""Budgets of the network that a method ends with, from the configuration."""

from collections.abc import Sequence
from dataclasses import replace

from fedmetanas_core.config import Config
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.methods.recipe import Recipe
from fedmetanas_core.space.budget import Budget, Derive, cheapest
from fedmetanas_core.space.genotype import Genotype
from fedmetanas_core.space.spec import SpaceSpec

KEYS = {"macs": "max_macs", "parameters": "max_parameters", "payload_bytes": "max_payload"}


def budget_of(config: Config, spec: SpaceSpec) -> Budget | None:
    """What the found network of this space may cost; None where nothing is asked."""
    limits = tuple((kind, float(getattr(config, key))) for kind, key in KEYS.items() if getattr(config, key))
    return Budget(replace(spec, auxiliary=False), limits) if limits else None


def within(budget: Budget | None, rule: Derive) -> Derive:
    """The rule, made to keep to the budget if there is one."""
    return rule if budget is None else lambda architecture: budget.within(architecture, rule)


def account(budget: Budget, genotypes: Sequence[Genotype]) -> dict[str, dict[str, float | bool]]:
    """By key: the limit, the most that any of these networks costs, and whether that is within it."""
    spent = [budget.spent(genotype) for genotype in genotypes]
    most = {kind: max(each[kind] for each in spent) for kind, _ in budget.limits}
    return {
        KEYS[kind]: {"limit": limit, "spent": most[kind], "met": most[kind] <= limit} for kind, limit in budget.limits
    }


def check_budget(config: Config, recipe: Recipe) -> None:
    """RefusalError for a budget that this method does not keep to, or that no network of the space can."""
    given = [key for key in KEYS.values() if getattr(config, key)]
    if not given:
        return
    budget = recipe.budget
    if budget is None:
        if all(stage.derive is None for stage in recipe.stages):
            raise RefusalError(
                f"{given[0]}: {config.method} searches no network", "leave it out, or choose a method that searches"
            )
        raise RefusalError(f"{given[0]}: {config.method} keeps to no budget", "leave it out, or set method=fedmetanas")
    least = budget.spent(cheapest(budget))
    for kind, limit in budget.limits:
        if least[kind] > limit:
            raise RefusalError(
                f"{KEYS[kind]}: {limit:,.0f} is less than the cheapest network of this space needs",
                f"set it to {least[kind]:,.0f} or more, or make the space smaller (init_channels, num_cells)",
            )
