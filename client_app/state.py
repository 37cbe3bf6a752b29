"""What a client keeps to itself from round to round: on its own disk, so that a restarted node goes on with it.

There is a file for each round in which it changed. A server that goes back to an earlier state asks for that round
again, and a client then takes what it had before that round.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedmetanas_core.errors import RunFailedError
from fedmetanas_core.federation.wire import RunIdentity
from fedmetanas_core.methods.client import Memory
from fedmetanas_core.run import tensor_file
from fedmetanas_core.run.files import write_atomically
from fedmetanas_core.run.folder import RunFolder

STATE_PATH = "state-path"  # key of a node's configuration
KIND = "fedmetanas-client-state"
VERSION = 1
KEPT = 3  # files of a client: its server keeps two states, and may be on its way to a third
_PRIVATE = "private/"


def state_directory(identity: RunIdentity, client: int, virtual: bool, node_config: Mapping[str, object]) -> Path:
    """Where this client's files lie: those of virtual clients in the run folder, a node's under its ``state-path``.

    Without that, under the user's state directory. Raises RunFailedError where this machine does not see the run
    folder of its virtual clients.
    """
    if virtual:
        folder = RunFolder(Path(identity.directory))
        if not folder.config_file.is_file():
            raise RunFailedError(
                f"{folder.path} is not on this machine, and clients of this method keep a state there; "
                "put the runs on a file system that all machines share"
            )
        return folder.clients_directory / str(client)
    if not re.fullmatch("[0-9a-f]{32}", identity.run_id):  # it becomes a part of a path
        raise RunFailedError(f"the server's run has no proper number: {identity.run_id[:40]!r}")
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    place = Path(str(node_config.get(STATE_PATH) or Path(home) / "fedmetanas"))
    return place.expanduser() / identity.run_id / str(client)


class PrivateState:
    """One client's private tensors in the files of ``directory``; None where the method keeps nothing."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    def recall(self, before: int) -> dict[str, Tensor]:
        """The newest tensors of a round before this one, by name; empty at first. RunFailedError if damaged."""
        number = max((each for each in self._rounds() if each < before), default=None)
        if number is None:
            return {}
        try:
            return tensor_file.decode(KIND, VERSION, self._file(number).read_bytes())[0]
        except (OSError, ValueError) as error:
            raise RunFailedError(f"cannot go on from {self._file(number)}: {' '.join(str(error).split())}") from error

    def keep(self, round_number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep these from this round on; RunFailedError if the disk refuses. Nothing is written for nothing."""
        if not tensors or self.directory is None:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file(round_number), tensor_file.encode(KIND, VERSION, tensors, {}))
            earlier = sorted(each for each in self._rounds() if each <= round_number)
            later = [each for each in self._rounds() if each > round_number]  # of a server that has gone back since
            for number in (*earlier[:-KEPT], *later):
                self._file(number).unlink(missing_ok=True)
        except OSError as error:
            raise RunFailedError(f"cannot write {self.directory}: {error.strerror or error}") from error

    def _file(self, round_number: int) -> Path:
        assert self.directory is not None
        return self.directory / f"{round_number:08d}.safetensors"

    def _rounds(self) -> list[int]:
        if self.directory is None or not self.directory.is_dir():
            return []
        return [int(path.stem) for path in self.directory.glob("*.safetensors") if path.stem.isdigit()]


def memory_of(kept: Mapping[str, Tensor]) -> Memory:
    """The method's own part of what is kept."""
    return {name.removeprefix(_PRIVATE): tensor for name, tensor in kept.items() if name.startswith(_PRIVATE)}


def with_memory(kept: Mapping[str, Tensor], memory: Memory) -> dict[str, Tensor]:
    """What is kept, with this as the method's own part."""
    others = {name: tensor for name, tensor in kept.items() if not name.startswith(_PRIVATE)}
    return {**others, **{f"{_PRIVATE}{name}": tensor for name, tensor in memory.items()}}
