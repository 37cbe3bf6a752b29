"""Every method by name."""

from collections.abc import Callable
from difflib import get_close_matches

from fedmetanas_core.config import Config
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.methods import (
    fedavg,
    fedbabu,
    feddsnas,
    fedmetanas,
    fednas,
    fedpnas,
    fedrep,
    fedrlnas,
    meta_dnas,
    per_fedavg,
    random_search,
)
from fedmetanas_core.methods.method import Method
from fedmetanas_core.methods.recipe import Recipe
from fedmetanas_core.space.spec import SpaceSpec

METHODS: dict[str, Callable[[Config, SpaceSpec], Recipe]] = {
    "fedmetanas": fedmetanas.recipe,
    "fedavg": fedavg.recipe,
    "per_fedavg": per_fedavg.recipe,
    "fedrep": fedrep.recipe,
    "fedbabu": fedbabu.recipe,
    "fednas": fednas.recipe,
    "feddsnas": feddsnas.recipe,
    "fedrlnas": fedrlnas.recipe,
    "fedpnas": fedpnas.recipe,
    "perfedrlnas": fedrlnas.personalised,
    "meta_fedpnas": fedpnas.meta,
    "meta_perfedrlnas": fedrlnas.meta_personalised,
    "meta_dnas": meta_dnas.recipe,
    "fine_tuning": fedavg.fine_tuning,
    "local_darts": fednas.local_darts,
    "random_search": random_search.recipe,
}


def check_method(name: str) -> None:
    """Raises RefusalError, naming the nearest known method, for a name that is not registered."""
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
        raise RefusalError(f"method: {name!r} is unknown", f"did you mean {near}? Known: {', '.join(sorted(METHODS))}")


def make_method(config: Config, spec: SpaceSpec) -> Method:
    """The configured method over this space. ``config`` is resolved: no ``auto`` is left that a recipe reads."""
    check_method(config.method)
    return Method(METHODS[config.method](config, spec), config.seed)
