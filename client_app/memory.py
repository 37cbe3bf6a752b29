"""What a client keeps to itself from round to round, in the state that Flower holds for it."""

from dataclasses import replace

import torch
from flwr.app import Array, ArrayRecord, RecordDict

from fedmetanas_core.federation.compression import RESIDUAL_KIND, Residual, compress, encode
from fedmetanas_core.federation.update import ClientUpdate, Payload
from fedmetanas_core.methods.client import Memory

_RESIDUAL, _PRIVATE = "compression", "private"


def recall(state: RecordDict) -> Memory:
    """What the method has kept here, by name; empty at first."""
    kept = state.array_records.get(_PRIVATE)
    return {} if kept is None else {name: torch.from_numpy(kept[name].numpy()) for name in kept}


def remember(state: RecordDict, memory: Memory) -> None:
    """Keep this for the client's next message."""
    if memory:
        arrays = {name: Array(tensor.detach().cpu().contiguous().numpy()) for name, tensor in memory.items()}
        state[_PRIVATE] = ArrayRecord(arrays)


def compressed(update: ClientUpdate, payload: Payload, kind: str, state: RecordDict) -> ClientUpdate:
    """The update with compressed changes; what they lose is kept in ``state`` for the client's next one."""
    spec, mask = payload.architecture.spec, payload.architecture.operation_mask
    lost = torch.zeros_like(update.weights)
    kept = state.array_records.get(_RESIDUAL)
    if kept is not None:
        stream, mask_then = (kept[name].numpy() for name in ("stream", "mask"))
        lost = Residual(stream, torch.from_numpy(mask_then).bool()).restricted(spec, mask)
    changes, missing = compress((update.weights, update.statistics), payload.weights, lost, kind)
    # What has diverged is for the server to refuse, not to be sent again.
    if all(bool(tensor.isfinite().all()) for tensor in update.named_tensors().values()):
        arrays = {"stream": encode(missing, RESIDUAL_KIND), "mask": mask.cpu().to(torch.uint8).numpy()}
        state[_RESIDUAL] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return replace(update, changes=changes)
