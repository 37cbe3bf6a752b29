"""One complete state of a run in one file: tensors and facts, written so that a crash never costs the last good one."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from fedmetanas_core.errors import RunFailedError
from fedmetanas_core.run.folder import plain, sync_directory, write_aside

STATE_FILE = "state.safetensors"
PREVIOUS_FILE = "previous.safetensors"
FORMAT = "fedmetanas-checkpoint"
VERSION = 1  # raise it when an older reader would misread the file


def save_checkpoint(directory: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, object]) -> None:
    """Make `tensors` and `facts` the newest state in `directory`; the one before becomes previous.safetensors.

    Tensors keep their dtype and shape and are stored from the CPU. Facts are stored as JSON: mapping keys become
    strings and tuples lists; NaN and infinities are kept. Raises RunFailedError if the disk refuses.
    """
    # clone, because safetensors refuses tensors that share memory and views into larger ones
    stored = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    facts_json = json.dumps(plain(facts))
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "facts": facts_json,
        "sha256": _digest(stored, facts_json),
    }
    content = safetensors.torch.save(stored, metadata)
    newest, previous = directory / STATE_FILE, directory / PREVIOUS_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        aside = write_aside(newest, content)
        # Between these two renames only previous.safetensors exists; load_checkpoint then takes that one.
        if newest.exists():
            os.replace(newest, previous)
        os.replace(aside, newest)
        sync_directory(directory)
    except OSError as error:
        raise RunFailedError(f"cannot write {newest}: {error.strerror or error}") from error


def load_checkpoint(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """The newest state in `directory`: its tensors, on the CPU, and its facts.

    Raises RunFailedError, naming file and reason, where there is none or it is truncated, altered, foreign or newer.
    """
    newest, previous = directory / STATE_FILE, directory / PREVIOUS_FILE
    path = newest if newest.exists() or not previous.exists() else previous
    try:
        return _decode(path.read_bytes())
    except FileNotFoundError as error:
        raise RunFailedError(f"there is no checkpoint in {directory}") from error
    except (OSError, ValueError) as error:
        hint = f"; {PREVIOUS_FILE} beside it is the state before" if path == newest and previous.exists() else ""
        raise RunFailedError(f"cannot go on from {path}: {' '.join(str(error).split())}{hint}") from error


def _decode(content: bytes) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Raises ValueError with the reason where `content` is not a whole, unaltered checkpoint of this version."""
    metadata = _metadata(content)
    if metadata.get("format") != FORMAT:
        raise ValueError("it is not a checkpoint of this program")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"it has format version {metadata.get('version')}, this program reads version {VERSION}")
    try:
        tensors = safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"it is truncated or damaged: {error}") from error
    facts_json = str(metadata.get("facts"))
    if metadata.get("sha256") != _digest(tensors, facts_json):
        raise ValueError("its content does not match its checksum")
    facts: dict[str, object] = json.loads(facts_json)
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
        raise ValueError("it is not a checkpoint of this program")
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
