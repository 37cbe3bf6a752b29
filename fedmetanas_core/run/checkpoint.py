"""The newest complete state of a run and the one before it, written so that a crash never costs the last good one."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fedmetanas_core.errors import RunFailedError
from fedmetanas_core.federation.update import ServerState
from fedmetanas_core.run.files import plain, sync_directory, write_aside
from fedmetanas_core.run.tally import Tally
from fedmetanas_core.run.tensor_file import decode, encode
from fedmetanas_core.space.architecture import CHANGING, Architecture
from fedmetanas_core.space.fixed import Space

STATE_FILE = "state.safetensors"
PREVIOUS_FILE = "previous.safetensors"
KIND = "fedmetanas-checkpoint"
_MEMORY = "memory/"
VERSION = 2  # raise it when an older reader would misread the file


def save_checkpoint(directory: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, object]) -> None:
    """Make `tensors` and `facts` the newest state in `directory`; the one before becomes previous.safetensors.

    See tensor_file.encode for what is kept of them. Raises RunFailedError if the disk refuses.
    """
    newest, previous = directory / STATE_FILE, directory / PREVIOUS_FILE
    content = encode(KIND, VERSION, tensors, facts)
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


def save_state(directory: Path, state: ServerState, tally: Tally) -> None:
    """Make this the newest state in ``directory``. Raises RunFailedError if the disk refuses."""
    architecture = state.architecture
    tensors = {
        "weights": state.weights,
        "statistics": state.statistics,
        **{name: getattr(architecture, name) for name in CHANGING},
        **{f"{_MEMORY}{name}": tensor for name, tensor in state.memory.items()},
    }
    facts = {
        "round": state.round,
        "stage": state.stage,
        "mask_version": architecture.version,
        "space": asdict(state.spec),
        "evaluations": [list(pair) for pair in state.evaluations],
        "tally": tally.to_dict(),
    }
    save_checkpoint(directory, tensors, facts)


def load_state(directory: Path, spaces: Sequence[Space]) -> tuple[ServerState, Tally]:
    """The newest state in ``directory``; ``spaces`` are those of the method's stages.

    Raises RunFailedError as ``load_checkpoint`` does, and where the state is not one of these spaces.
    """
    tensors, facts = load_checkpoint(directory)
    try:
        spec = spaces[facts["stage"]]
        if plain(asdict(spec)) != facts["space"]:
            raise ValueError("its network is not that of this run")
        architecture = Architecture(spec)
        architecture.load_state_dict({**architecture.state_dict(), **{name: tensors.pop(name) for name in CHANGING}})
        architecture.version = facts["mask_version"]
        state = ServerState(
            spec,
            tensors.pop("weights"),
            tensors.pop("statistics"),
            architecture,
            facts["round"],
            facts["stage"],
            {name.removeprefix(_MEMORY): tensor for name, tensor in tensors.items()},
            [(number, accuracy) for number, accuracy in facts["evaluations"]],
        )
        return state, Tally.from_dict(facts["tally"])
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"what it lacks is {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise RunFailedError(f"cannot go on from {directory}: {reason}") from error


def load_checkpoint(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The newest state in `directory`: its tensors, on the CPU, and its facts.

    Raises RunFailedError, naming file and reason, where there is none or it is truncated, altered, foreign or of
    another version; the state before is then offered, if it is whole.
    """
    newest, previous = directory / STATE_FILE, directory / PREVIOUS_FILE
    path = newest if newest.exists() or not previous.exists() else previous
    try:
        return decode(KIND, VERSION, path.read_bytes())
    except FileNotFoundError as error:
        raise RunFailedError(f"there is no checkpoint in {directory}") from error
    except (OSError, ValueError) as error:
        offer = _offer(previous) if path == newest else ""
        raise RunFailedError(f"cannot go on from {path}: {' '.join(str(error).split())}{offer}") from error


def _offer(previous: Path) -> str:
    """What to do to go on from the state before, if that is possible."""
    try:
        _, facts = decode(KIND, VERSION, previous.read_bytes())
    except (OSError, ValueError):
        return ""
    return f"; the state before it, of round {facts.get('round')}, is whole: remove that file to go on from there"
