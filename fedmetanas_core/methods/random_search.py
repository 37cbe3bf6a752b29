"""Random search: a random one-hot genotype from FedMetaNAS' space, trained in its way for the same rounds."""

from fedmetanas_core.config import Config
from fedmetanas_core.methods.parts import dual_training, tuning
from fedmetanas_core.methods.recipe import Personal, Recipe, Stage
from fedmetanas_core.search.schedule import Steady
from fedmetanas_core.space.genotype import pairwise_genotype
from fedmetanas_core.space.spec import SpaceSpec


def recipe(config: Config, spec: SpaceSpec) -> Recipe:
    """What remains of FedMetaNAS if nothing is searched."""
    rounds = int(config.num_rounds)
    stage = Stage(
        name="training",
        rounds=rounds,
        space=spec,
        planner=Steady(rounds),
        local=dual_training(config),
        derive=pairwise_genotype,
        random=True,
    )
    return Recipe((stage,), Personal(tune=tuning(config)))
