"""FedBABU (Oh et al. 2022), "body aggregation, body update": the head stays what it was drawn as, for all."""

from fedmetanas_core.config import Config
from fedmetanas_core.methods.parts import fixed_model, plain_sgd, training, tuning
from fedmetanas_core.methods.recipe import Personal, Recipe, Share
from fedmetanas_core.space.spec import SpaceSpec

TUNING_EPOCHS = 5  # of the whole network, after the last round


def recipe(config: Config, spec: SpaceSpec) -> Recipe:
    """SGD on the body, which alone travels; every client draws the same head from the run's seed."""
    local = training(config, plain_sgd(config, "body"))
    share = Share(down="body", up="body")
    return fixed_model(
        config, spec, local, Personal(tune=tuning(config, epochs=TUNING_EPOCHS), is_the_point=True), share
    )
