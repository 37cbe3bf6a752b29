"""What a report is made of: all that a run folder holds, read once."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.space.network import GENOTYPE_FILE

SHAPE = ("in_channels", "height", "width")


@dataclass(frozen=True)
class RunFacts:
    """``counts``: training images by (client, class), empty where the server does not know; ``summary`` may be empty
    while a run goes on. ``image_shape`` is empty until there is a network."""

    name: str
    path: Path
    config: dict[str, Any]
    rounds: list[dict[str, Any]]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    counts: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, path: Path) -> "RunFacts":
        """Of the run in this folder, finished or not. RefusalError if it is none, RunFailedError if it is damaged."""
        folder = RunFolder.open(path)
        counts = _counts(folder)
        names, shape = _images(folder)
        return cls(
            folder.name,
            folder.path,
            folder.read_config(),
            folder.rounds.read(),
            folder.architecture.read(),
            folder.read_summary() or {},
            counts,
            names or tuple(str(number) for number in range(counts.shape[1])),
            shape,
        )


def _counts(folder: RunFolder) -> npt.NDArray[np.int64]:
    try:
        with np.load(folder.partition_file, allow_pickle=False) as archive:
            counts = np.asarray(archive["train_class_counts"], dtype=np.int64)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):  # only what it would show is missing then
        return np.zeros((0, 0), dtype=np.int64)
    return counts if counts.ndim == 2 else np.zeros((0, 0), dtype=np.int64)


def _images(folder: RunFolder) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Class names and (channels, height, width) that the found network carries, once there is one."""
    try:
        facts = json.loads((folder.model_directory / GENOTYPE_FILE).read_text())
        names, space = facts["images"]["class_names"], facts["space"]
        return tuple(str(name) for name in names), tuple(int(space[key]) for key in SHAPE)
    except (OSError, ValueError, KeyError, TypeError):
        return (), ()
