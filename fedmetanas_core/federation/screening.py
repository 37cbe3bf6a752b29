"""Each update is looked at before it is averaged; what does not fit is left out, with the reason."""

import torch
from torch import Tensor

from fedmetanas_core.federation.update import ClientUpdate, Payload


def screen(update: ClientUpdate, sent: Payload, expected: dict[str, Tensor]) -> str | None:
    """Why this update cannot be averaged, or None if it can.

    ``sent`` is what its client got, ``expected`` tensors of the shapes and dtypes that have to come back, by name.
    """
    plan, architecture = sent.plan, sent.architecture
    if update.round != plan.round:
        return f"answers round {update.round}, this is round {plan.round}"
    if update.mask_version != architecture.version:
        return f"trained under mask version {update.mask_version}, the current one is {architecture.version}"
    if update.num_examples < 1:
        return f"reports {update.num_examples} examples"
    tensors = update.named_tensors()
    for name, like in expected.items():
        if name not in tensors:
            return f"{name} is missing"
        tensor = tensors[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            return f"{name} has shape {tuple(tensor.shape)} and type {tensor.dtype}, not {tuple(like.shape)}"
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} is not finite"
    surplus = sorted(tensors.keys() - expected.keys())
    if surplus:
        return f"{surplus[0]} was not asked for"
    scores = update.scores
    if scores is not None and (scores.shape != architecture.operation_mask.shape or not bool(scores.isfinite().all())):
        return f"scores have shape {tuple(scores.shape)} or are not finite"
    masks = (architecture.operation_mask, architecture.input_mask)
    for vote, mask in zip(update.votes or masks, masks, strict=True):
        if vote.shape != mask.shape:
            return f"a vote has shape {tuple(vote.shape)}, not {tuple(mask.shape)}"
    return None
