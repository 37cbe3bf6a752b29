"""The network that a command is about, by what its user wrote."""

from pathlib import Path

from fedmetanas_core.commands.options import user_path
from fedmetanas_core.errors import FedMetaNASError, RefusalError
from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.network import CLIENTS, ImageFormat, load_network

SHOWN_CLIENTS = 5  # of those to choose from


def model_folder(command: str, run: str, client: str | None) -> Path:
    """Where its files lie; RefusalError if there is no such run, or no such client's network in it.

    ``run`` is a run folder, its model folder, or a client's folder in there; ``client`` chooses such a folder.
    """
    folder = user_path(command, run)
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise RefusalError(f"{command}: {run} {what}", "give the run folder that a search printed")
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if client is None:
        return folder
    own = folder / CLIENTS / client
    if not client.isdecimal() or not own.is_dir():
        known = sorted((path.name for path in (folder / CLIENTS).glob("*")), key=lambda name: name.zfill(9))
        more = f" and {len(known) - SHOWN_CLIENTS} more" if len(known) > SHOWN_CLIENTS else ""
        fix = f"choose one of {', '.join(known[:SHOWN_CLIENTS])}{more}" if known else "leave --client out"
        raise RefusalError(f"{command}: {folder} has no network of client {client!r}", fix)
    return own


def open_network(folder: Path) -> tuple[TrainableNetwork, ImageFormat]:
    """See load_network; RefusalError where the folder does not hold a network."""
    try:
        return load_network(folder)
    except FedMetaNASError as error:
        raise RefusalError(str(error), "give a run that is complete") from error
