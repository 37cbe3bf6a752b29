"""FedRep (Collins et al. 2021): a shared body, a head of each client's own."""

from dataclasses import replace

from fedmetanas_core.config import Config
from fedmetanas_core.methods.parts import fixed_model, plain_sgd, training, tuning
from fedmetanas_core.methods.recipe import Personal, Recipe, Share
from fedmetanas_core.search.local_search import Phase
from fedmetanas_core.space.spec import SpaceSpec


def recipe(config: Config, spec: SpaceSpec) -> Recipe:
    """First epochs on the head with the body frozen, then the last one on the body with the head frozen.

    A client never receives a head: it goes on with its own. The head that it sends goes into a mean that serves the
    global accuracy alone, which private heads leave undefined.
    """
    epochs = int(config.local_epochs)
    body = max(1, epochs // 5)  # 4 + 1 of five; one epoch serves both
    phases = (Phase(plain_sgd(config, "head"), max(1, epochs - body)), Phase(plain_sgd(config, "body"), body))
    local = replace(training(config, plain_sgd(config)), phases=phases)
    share = Share(down="body", up="all", kept="head", resumes=True)
    return fixed_model(config, spec, local, Personal(tune=tuning(config, "head"), is_the_point=True), share)
