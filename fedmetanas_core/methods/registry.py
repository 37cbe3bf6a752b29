"""Every method by name."""

from difflib import get_close_matches
from importlib import import_module

from fedmetanas_core.config import Config
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.federation.averaging import weighted_mean
from fedmetanas_core.federation.robust import TrimmedMean
from fedmetanas_core.methods.method import Method
from fedmetanas_core.methods.recipe import Recipe
from fedmetanas_core.space.spec import SpaceSpec

# Where each one's recipe is: module of this package and function.
METHODS: dict[str, str] = {
    "fedmetanas": "fedmetanas.recipe",
    "fedavg": "fedavg.recipe",
    "per_fedavg": "per_fedavg.recipe",
    "fedrep": "fedrep.recipe",
    "fedbabu": "fedbabu.recipe",
    "fednas": "fednas.recipe",
    "feddsnas": "feddsnas.recipe",
    "fedrlnas": "fedrlnas.recipe",
    "fedpnas": "fedpnas.recipe",
    "perfedrlnas": "fedrlnas.personalised",
    "meta_fedpnas": "fedpnas.meta",
    "meta_perfedrlnas": "fedrlnas.meta_personalised",
    "meta_dnas": "meta_dnas.recipe",
    "fine_tuning": "fedavg.fine_tuning",
    "local_darts": "fednas.local_darts",
    "random_search": "random_search.recipe",
}


def check_method(name: str) -> None:
    """Raises RefusalError, naming the nearest known method, for a name that is not registered."""
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
        raise RefusalError(f"method: {name!r} is unknown", f"did you mean {near}? Known: {', '.join(sorted(METHODS))}")


def make_method(config: Config, spec: SpaceSpec) -> Method:
    """The configured method over this space. ``config`` is resolved: no ``auto`` is left that a recipe reads."""
    check_method(config.method)
    module, function = METHODS[config.method].split(".")
    recipe: Recipe = getattr(import_module(f"fedmetanas_core.methods.{module}"), function)(config, spec)
    shares = {"median": 0.5, "trimmed_mean": config.byzantine_share}
    combine = TrimmedMean(shares[config.averaging]) if config.averaging in shares else weighted_mean
    krum_share = config.byzantine_share if config.averaging == "krum" else None
    return Method(recipe, config.seed, combine, krum_share, config.weighting == "equal")
