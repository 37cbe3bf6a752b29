"""Updates in fewer bytes: the change of each weight in 16 or 8 bits, scaled block by block, entropy-coded.

What a client's encoding loses is added to its next update (error feedback: Seide et al. 2014; Karimireddy et al. 2019),
so that small changes arrive in the end. Alphas are never compressed.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmetanas_core.errors import FedMetaNASError
from fedmetanas_core.space.fixed import Space
from fedmetanas_core.space.models import layouts

KINDS = ("float16", "int8")
BLOCK = 256  # values that share a scale: 4 bytes for 256 or 512
LARGEST_CODE = 127
ZLIB_LEVEL = 1  # higher levels take several times as long and save 1 %

STATISTICS_KIND = "float16"  # whatever the weights travel as, and as values: a variance stays what it is
RESIDUAL_KIND = "int8"  # one byte a weight; what this loses of a loss is a hundredth of it

Stream = npt.NDArray[np.uint8]
Sent = tuple[Tensor, Tensor]  # weights and statistics


def encode(values: Tensor, kind: str) -> Stream:
    """A flat float32 tensor as bytes; what is not finite in a block makes the whole block NaN."""
    padded = np.zeros(-(-values.numel() // BLOCK) * BLOCK, dtype=np.float32)
    padded[: values.numel()] = values.detach().cpu().numpy()
    blocks = padded.reshape(-1, BLOCK)
    scales = np.abs(blocks).max(axis=1, initial=0.0).astype(np.float32)
    usable = np.isfinite(scales) & (scales > 0)
    shares = np.divide(blocks, scales[:, None], out=np.zeros_like(blocks), where=usable[:, None])
    if kind == "int8":
        codes = np.rint(shares * LARGEST_CODE).astype(np.int8).tobytes()
    else:
        # First all low bytes, then all high ones: the high bytes, sign and exponent, are alike.
        codes = shares.astype("<f2").view(np.uint8).reshape(-1, 2).T.tobytes()
    scales[~np.isfinite(scales)] = np.nan
    packed = zlib.compress(scales.astype("<f4").tobytes() + codes, ZLIB_LEVEL)
    return np.frombuffer(bytearray(packed), dtype=np.uint8)


def decode(stream: Stream, count: int, kind: str) -> Tensor:
    """The ``count`` values that ``encode`` was given, nearly; FedMetaNASError if the stream holds anything else."""
    blocks = -(-count // BLOCK)
    width = 1 if kind == "int8" else 2
    expected = blocks * (4 + BLOCK * width)
    try:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(stream.tobytes(), expected + 1)  # never more memory than an honest one needs
    except zlib.error as error:
        raise FedMetaNASError(f"a compressed update cannot be read: {error}") from error
    if len(content) != expected or not unpacker.eof:
        raise FedMetaNASError(f"a compressed update does not hold {count} values")
    scales = np.frombuffer(content, dtype="<f4", count=blocks)
    codes = np.frombuffer(content, dtype=np.uint8, offset=4 * blocks)
    if kind == "int8":
        shares = codes.view(np.int8).astype(np.float32) / np.float32(LARGEST_CODE)
    else:
        shares = np.ascontiguousarray(codes.reshape(2, -1).T).view("<f2").ravel().astype(np.float32)
    values = shares.reshape(blocks, BLOCK) * scales[:, None]
    return torch.from_numpy(values.ravel()[:count].copy())


@dataclass(frozen=True)
class Residual:
    """What a client's updates so far have lost, encoded, for the weights of the operations of ``mask``."""

    stream: Stream
    mask: Tensor

    def restricted(self, spec: Space, mask: Tensor) -> Tensor:
        """Its values for a smaller mask; zeros where this is another network's."""
        layout, _ = layouts(spec, mask)
        if self.mask.shape == mask.shape and not bool((mask & ~self.mask).any()):
            own, _ = layouts(spec, self.mask)
            return own.select(decode(self.stream, own.size, RESIDUAL_KIND), layout)
        return torch.zeros(layout.size)


def compress(trained: Sent, weights_before: Tensor, lost: Tensor, kind: str) -> tuple[tuple[Stream, Stream], Tensor]:
    """What travels of trained weights and statistics, and what the weights lose by it this time.

    Weights travel as their change, with ``lost``, what they lost before. Statistics, which every round computes anew,
    travel as they are.
    """
    weights, statistics = trained
    change = (weights - weights_before).float() + lost
    stream = encode(change, kind)
    missing = change - decode(stream, len(change), kind)
    return (stream, encode(statistics.float(), STATISTICS_KIND)), missing


def apply_changes(sent: Sent, streams: tuple[Stream, Stream], kind: str) -> Sent:
    """Weights as the client's changes make them, and its statistics."""
    weights, statistics = sent
    return (
        weights + decode(streams[0], len(weights), kind).to(weights.dtype),
        decode(streams[1], len(statistics), STATISTICS_KIND).to(statistics.dtype),
    )
