"""The model that a server's state stands for, as it is measured between rounds."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedmetanas_core.federation.update import RoundPlan, ServerState
from fedmetanas_core.methods.method import Method
from fedmetanas_core.search.relaxation import relax
from fedmetanas_core.space.spec import SpaceSpec

Model = Callable[[Tensor], Tensor]  # normalised images to logits


def global_model(method: Method, state: ServerState, plan: RoundPlan, device: str, always_mixes: bool = False) -> Model:
    """Noise-free, at the plan's temperature. ``always_mixes`` weighs what is one-hot as well."""
    network, architecture = state.network(device), state.architecture.clone().to(device)
    with torch.no_grad():
        weights = method.stage(plan).local.outer.relaxation.expected(architecture, plan.temperature)
        if weights is None and always_mixes and isinstance(state.spec, SpaceSpec):
            weights = relax(architecture, plan.temperature)
    return lambda images: network(images, weights)
