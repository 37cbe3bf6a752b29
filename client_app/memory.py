"""What a client keeps to itself from round to round, in the state that Flower holds for it."""

from dataclasses import replace

import torch
from flwr.app import Array, ArrayRecord, RecordDict

from fedmetanas_core.federation.compression import Residual, compress
from fedmetanas_core.federation.update import ClientUpdate, Payload

_RESIDUAL = "compression"


def compressed(update: ClientUpdate, payload: Payload, kind: str, state: RecordDict) -> ClientUpdate:
    """The update with compressed changes; what they lose is kept in ``state`` for the client's next one."""
    spec, mask = payload.architecture.spec, payload.architecture.operation_mask
    lost = torch.zeros_like(update.weights)
    kept = state.array_records.get(_RESIDUAL)
    if kept is not None:
        values, mask_then = (torch.from_numpy(kept[name].numpy().copy()) for name in ("values", "mask"))
        lost = Residual(values, mask_then.bool()).restricted(spec, mask)
    trained, sent = (update.weights, update.statistics), (payload.weights, payload.statistics)
    changes, missing = compress(trained, sent, lost, kind)
    if bool(missing.isfinite().all()):  # what has diverged is for the server to refuse, not to be sent again
        arrays = {"values": missing, "mask": mask.cpu().to(torch.uint8)}
        state[_RESIDUAL] = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in arrays.items()})
    return replace(update, changes=changes)
