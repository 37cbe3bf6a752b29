"""A run from its beginning: its folder with all that it goes on from, and the way back into it."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from fedmetanas_core.config import Config, defaults
from fedmetanas_core.errors import RefusalError, RunFailedError
from fedmetanas_core.federation.update import ServerState
from fedmetanas_core.methods.method import Method
from fedmetanas_core.methods.registry import make_method
from fedmetanas_core.preflight import Experiment, pick_device, prepare_experiment
from fedmetanas_core.run.checkpoint import load_state, save_state
from fedmetanas_core.run.fingerprint import code_commit, code_fingerprint
from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.run.tally import Tally
from fedmetanas_core.space.native import build

PACKAGES = ("fedmetanas", "flwr", "ray", "torch", "torchvision", "numpy")
START_ANEW = "start a new run"

Found = TypeVar("Found")


@dataclass(frozen=True)
class Run:
    """A run folder with what follows from its config.yaml. ``run_id`` tells runs apart, wherever their folders go."""

    folder: RunFolder
    experiment: Experiment
    run_id: str

    def method(self) -> Method:
        """The method that it runs."""
        return make_method(self.experiment.config, self.experiment.spec)

    def load(self) -> tuple[ServerState, Tally]:
        """The newest state. Raises RunFailedError where there is none that this program can go on from."""
        return load_state(self.folder.checkpoint_directory, [stage.space for stage in self.method().recipe.stages])


def begin_run(runs_dir: Path, run_name: str, experiment: Experiment, launch_directory: Path) -> Run:
    """Make the folder, with the state of round 0. config.yaml comes last: where it is, everything is.

    Raises RefusalError if the folder exists or cannot be made, RunFailedError if the disk refuses.
    """
    folder, run_id = RunFolder.create(runs_dir, run_name), uuid.uuid4().hex
    run = Run(folder, experiment, run_id)
    save_state(folder.checkpoint_directory, run.method().initial_state(), Tally())
    data, partition = experiment.dataset, experiment.partition
    partition.save(
        folder.partition_file,
        train_class_counts=partition.class_counts(data.train.labels, data.num_classes),
        evaluation_class_counts=partition.class_counts(data.test.labels, data.num_classes, evaluation=True),
    )
    device = pick_device(experiment.config)
    folder.write_config(
        {
            **experiment.config.to_dict(),
            "device": device,
            "without_compiled_code": build.prepare(device=device),
            "run_name": folder.name,
            "runs_dir": str(folder.path.parent),
            "run_id": run_id,
            "versions": {name: version(name) for name in PACKAGES},
            "commit": code_commit(launch_directory),
            "code_fingerprint": code_fingerprint(),
            "partition_hash": partition.hash(),
        }
    )
    return run


def reopen_run(path: Path) -> Run:
    """The run in this folder, to go on with. Raises RefusalError where that cannot be done."""
    folder = RunFolder.open(path)
    facts = _refusing(folder.read_config)
    missing = [key for key in (*defaults(), "run_id", "partition_hash") if key not in facts]
    if missing:
        raise RefusalError(f"{folder.config_file} lacks {missing[0]}, so it is of another version", START_ANEW)
    config = Config.from_mapping({key: facts[key] for key in defaults()})
    experiment = prepare_experiment(config, folder.path, check=False)
    if experiment.partition.hash() != facts["partition_hash"]:
        raise RefusalError(f"{folder.path}: the images or their labels are not those it began with", START_ANEW)
    run = Run(folder, experiment, str(facts["run_id"]))
    _refusing(run.load)
    return run


def _refusing(read: Callable[[], Found]) -> Found:
    try:
        return read()
    except RunFailedError as error:
        raise RefusalError(str(error), START_ANEW) from error


def is_complete(path: Path) -> bool:
    """Whether the run in this folder has come to its end."""
    folder = RunFolder.open(path)
    return (_refusing(folder.read_summary) or dict[str, Any]()).get("status") == "completed"


def going_on(run: Run) -> tuple[ServerState, Tally]:
    """The state that a run goes on from, with everything later, and the end of an earlier session, taken back."""
    state, tally = run.load()
    run.folder.rewind(state.round)
    return state, tally
