"""Tensors and facts in one checked file: a safetensors file whose header names its kind, version and checksum."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch

from fedmetanas_core.run.files import plain


def encode(kind: str, version: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, object]) -> bytes:
    """The file's content. Tensors keep dtype and shape; facts become JSON, so keys become texts and tuples lists."""
    # clone, because safetensors refuses tensors that share memory and views into larger ones
    stored = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    facts_json = json.dumps(plain(facts))
    digest = _digest(stored, facts_json)
    return safetensors.torch.save(
        stored, {"format": kind, "version": str(version), "facts": facts_json, "sha256": digest}
    )


def decode(kind: str, version: int, content: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, on the CPU, and facts; ValueError with the reason where this is not a whole, unaltered such file."""
    metadata = _metadata(content)
    if metadata.get("format") != kind:
        raise ValueError(f"it is not a {kind} of this program")
    if metadata.get("version") != str(version):
        raise ValueError(f"it has format version {metadata.get('version')}, this program reads version {version}")
    try:
        tensors = safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"it is truncated or damaged: {error}") from error
    facts_json = str(metadata.get("facts"))
    if metadata.get("sha256") != _digest(tensors, facts_json):
        raise ValueError("its content does not match its checksum")
    facts: dict[str, Any] = json.loads(facts_json)
    return tensors, facts


def _metadata(content: bytes) -> dict[str, Any]:
    """The metadata of a safetensors file: 8 bytes of header length, little-endian, then the header as JSON."""
    header_bytes = int.from_bytes(content[:8], "little")
    if len(content) < 8 or header_bytes > len(content) - 8:
        raise ValueError("it is truncated or not a safetensors file")
    try:
        header = json.loads(content[8 : 8 + header_bytes])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is damaged or not that of a safetensors file: {error}") from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError("it was not written by this program")
    return metadata


def _digest(tensors: Mapping[str, torch.Tensor], facts_json: str) -> str:
    """SHA-256 over the facts and over every tensor's name, dtype, shape and bytes, in the order of the names."""
    digest = hashlib.sha256(facts_json.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
