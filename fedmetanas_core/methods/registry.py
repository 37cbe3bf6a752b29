"""Every method by name."""

from difflib import get_close_matches

from fedmetanas_core.config import Config
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.methods.fedmetanas import FedMetaNAS
from fedmetanas_core.methods.method import Method
from fedmetanas_core.space.spec import SpaceSpec

METHODS: dict[str, type[Method]] = {
    "fedmetanas": FedMetaNAS,
}


def check_method(name: str) -> None:
    """Raises RefusalError, naming the nearest known method, for a name that is not registered."""
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
        raise RefusalError(f"method: {name!r} is unknown", f"did you mean {near}? Known: {', '.join(sorted(METHODS))}")


def make_method(config: Config, spec: SpaceSpec) -> Method:
    """The configured method over this space."""
    check_method(config.method)
    return METHODS[config.method](config, spec)
