"""Per-FedAvg (Fallah et al. 2020): the weights of a fixed model are trained to be adapted in one step."""

from dataclasses import replace

from fedmetanas_core.config import Config
from fedmetanas_core.methods.parts import fixed_model, outer_options, training, tuning
from fedmetanas_core.methods.recipe import Personal, Recipe
from fedmetanas_core.search.steps import Fomaml
from fedmetanas_core.space.spec import SpaceSpec

DELTA = 1e-3  # the step of the difference that stands for the Hessian


def recipe(config: Config, spec: SpaceSpec) -> Recipe:
    """w' = w - alpha grad(w; D), then w -= beta grad(w'; D'), first order or Hessian-free; everything is averaged."""
    delta = DELTA if config.per_fedavg == "hessian_free" else None
    rule = Fomaml(weight_rate=config.task_lr_weights, clip=config.clip, hessian_delta=delta)
    plain = replace(outer_options(config), momentum=0.0, weight_decay=0.0)
    return fixed_model(config, spec, training(config, rule, plain), Personal(tune=tuning(config), is_the_point=True))
