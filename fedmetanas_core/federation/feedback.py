"""A client's compressed update, and what it keeps of what the encoding lost, for its next one."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedmetanas_core.federation.compression import RESIDUAL_KIND, Residual, compress, encode
from fedmetanas_core.federation.update import ClientUpdate, Payload

_RESIDUAL = "compression/"  # before the names of what is kept


def compressed(
    update: ClientUpdate, payload: Payload, kind: str, kept: Mapping[str, Tensor]
) -> tuple[ClientUpdate, dict[str, Tensor]]:
    """The update with compressed changes, and what is kept with what they lose, for the client's next one."""
    spec, mask = payload.architecture.spec, payload.architecture.operation_mask
    lost = torch.zeros_like(update.weights)
    names = {name: f"{_RESIDUAL}{name}" for name in ("stream", "mask")}
    if names["stream"] in kept:
        residual = Residual(kept[names["stream"]].numpy(), kept[names["mask"]].bool())
        lost = residual.restricted(spec, mask)
    changes, missing = compress((update.weights, update.statistics), payload.weights, lost, kind)
    kept = dict(kept)
    # What has diverged is for the server to refuse, not to be sent again.
    if all(bool(tensor.isfinite().all()) for tensor in update.named_tensors().values()):
        kept[names["stream"]] = torch.from_numpy(encode(missing, RESIDUAL_KIND))
        kept[names["mask"]] = mask.cpu().to(torch.uint8)
    return replace(update, changes=changes), kept
