"""Budgets of the network that a method ends with, from the configuration."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedmetanas_core.config import AUTO, Config
from fedmetanas_core.errors import FedMetaNASError, RefusalError
from fedmetanas_core.methods.recipe import Recipe
from fedmetanas_core.space.budget import LATENCY, Budget, Derive, cheapest
from fedmetanas_core.space.cost import COSTS
from fedmetanas_core.space.genotype import Genotype
from fedmetanas_core.space.latency import Latencies, measure_latencies
from fedmetanas_core.space.spec import SpaceSpec

MOST = 10**15  # of what is limited
LONGEST = 1000  # characters that a node needs to tell its limits
KEYS = {
    "macs": "max_macs",
    "parameters": "max_parameters",
    "payload_bytes": "max_payload",
    LATENCY: "max_latency_ms",
}


def budget_of(config: Config, spec: SpaceSpec) -> Budget | None:
    """What the found network of this space may cost; None where nothing is asked."""
    limits = tuple((kind, float(getattr(config, key))) for kind, key in KEYS.items() if getattr(config, key))
    if not limits:
        return None
    latencies = Latencies.from_text(config.latency_table, spec) if config.max_latency_ms else None
    return Budget(replace(spec, auxiliary=False), limits, latencies)


def node_limits(node_config: Mapping[str, Any]) -> dict[str, float]:
    """By key, what a network may cost on a node, from its configuration (``max-macs=50000``); RefusalError."""
    found = {}
    for key in KEYS.values():
        name = key.replace("_", "-")
        value = node_config.get(name, 0)
        if not _is_limit(key, value) and not (value == 0 and not isinstance(value, bool)):
            raise RefusalError(
                f"its {name}={str(value)[:40]!r} is no number in range", f"start it with {name}=50000, or without"
            )
        if value:
            found[key] = float(value)
    return found


def _is_limit(key: str, value: object) -> bool:
    """Whether this can be a limit of this kind: of what is counted at least one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    least = 0.0 if key == KEYS[LATENCY] else 1.0
    return least <= value <= MOST and value > 0


def known_limits(told: str) -> dict[str, float]:
    """What a node says of its limits; FedMetaNASError for what no node can say."""
    try:
        limits = json.loads(told) if len(told) < LONGEST else None
    except ValueError as error:
        raise FedMetaNASError(f"limits is {told[:40]!r}") from error
    if not isinstance(limits, dict) or not set(limits) <= set(KEYS.values()):
        raise FedMetaNASError(f"limits is {told[:40]!r}")
    if not all(_is_limit(key, value) for key, value in limits.items()):
        raise FedMetaNASError(f"limits is {told[:40]!r}")
    return {key: float(value) for key, value in limits.items()}


def within_limits(config: Config, limits: Sequence[Mapping[str, float]]) -> Config:
    """The configuration with the least that it or any of these allow."""
    least: dict[str, Any] = {}
    for key in KEYS.values():
        given = [value for value in (getattr(config, key), *(each.get(key, 0) for each in limits)) if value]
        if given:
            least[key] = type(getattr(config, key))(min(given))
    return replace(config, **least)


def with_latencies(config: Config, spec: SpaceSpec) -> Config:
    """The configuration with this machine's latencies, where they count and nobody has measured others."""
    if not config.max_latency_ms or config.latency_table != AUTO:
        return config
    return replace(config, latency_table=measure_latencies(spec).to_text())


def within(budget: Budget | None, rule: Derive) -> Derive:
    """The rule, made to keep to the budget if there is one."""
    return rule if budget is None else lambda architecture: budget.within(architecture, rule)


def account(budget: Budget, genotypes: Sequence[Genotype]) -> dict[str, dict[str, float | bool]]:
    """By key: the limit, the most that any of these networks costs, and whether that is within it."""
    spent = [budget.measured(genotype) for genotype in genotypes]
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
    for kind, limit in budget.limits:
        alone = replace(budget, limits=((kind, limit),))
        least = alone.spent(cheapest(alone))[kind]
        if least > limit:
            enough = f"{math.ceil(least):,}" if kind in COSTS else f"{math.ceil(1000 * least) / 1000:g}"
            raise RefusalError(
                f"{KEYS[kind]}: {limit:,.15g} is less than the cheapest network of this space needs",
                f"set it to {enough} or more, or make the space smaller (init_channels, num_cells)",
            )
    if not budget.allows(cheapest(budget)):
        raise RefusalError(f"{', '.join(given)}: no network was found that keeps to all of them", "raise one of them")
