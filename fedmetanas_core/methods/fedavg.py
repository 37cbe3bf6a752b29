"""FedAvg (McMahan et al. 2017) on a fixed model, alone and with local fine-tuning at the end."""

from fedmetanas_core.config import Config
from fedmetanas_core.methods.parts import fixed_model, plain_sgd, training, tuning
from fedmetanas_core.methods.recipe import Personal, Recipe
from fedmetanas_core.space.spec import SpaceSpec


def recipe(config: Config, spec: SpaceSpec) -> Recipe:
    """E epochs of SGD on all weights; everything is averaged."""
    return fixed_model(config, spec, training(config, plain_sgd(config)), Personal(tune=tuning(config)))


def fine_tuning(config: Config, spec: SpaceSpec) -> Recipe:
    """FedAvg, after which each client trains on with its own images (Meta-DNAS, Table 1); auto: for E epochs."""
    own = Personal(tune=tuning(config, epochs=int(config.local_epochs)), is_the_point=True)
    return fixed_model(config, spec, training(config, plain_sgd(config)), own)
