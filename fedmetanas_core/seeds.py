"""A random stream belongs to (run seed, purpose, indices); nothing here touches a global generator."""

import hashlib

import numpy as np
import torch


def derive_seed(run_seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed that differs whenever any argument differs.

    Hashing, rather than adding, keeps (round 1, client 2) apart from (round 2, client 1).
    """
    text = "/".join([str(run_seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_stream(run_seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU torch generator for this purpose."""
    return torch.Generator().manual_seed(derive_seed(run_seed, purpose, *indices))


def numpy_stream(run_seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A numpy generator for this purpose."""
    return np.random.default_rng(derive_seed(run_seed, purpose, *indices))
