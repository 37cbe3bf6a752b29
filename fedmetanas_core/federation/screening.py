"""Each update is looked at before it is averaged; what does not fit is left out, with the reason."""

import torch

from fedmetanas_core.federation.update import ClientUpdate, RoundPlan, ServerState


def screen(update: ClientUpdate, state: ServerState, plan: RoundPlan) -> str | None:
    """Why this update cannot be averaged into this state, or None if it can."""
    if update.round != plan.round:
        return f"answers round {update.round}, this is round {plan.round}"
    if update.mask_version != state.architecture.version:
        return f"trained under mask version {update.mask_version}, the current one is {state.architecture.version}"
    if update.num_examples < 1:
        return f"reports {update.num_examples} examples"
    architecture = state.architecture
    expected = {
        "weights": state.weights,
        "statistics": state.statistics,
        "operation_logits": architecture.operation_logits,
        "input_logits": architecture.input_logits,
    }
    for name, tensor in update.named_tensors().items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            return f"{name} has shape {tuple(tensor.shape)} and type {tensor.dtype}, not {tuple(expected[name].shape)}"
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} is not finite"
    masks = (architecture.operation_mask, architecture.input_mask)
    for vote, mask in zip(update.votes or masks, masks, strict=True):
        if vote.shape != mask.shape:
            return f"a vote has shape {tuple(vote.shape)}, not {tuple(mask.shape)}"
    return None
