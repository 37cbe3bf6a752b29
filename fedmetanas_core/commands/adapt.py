"""``fedmetanas adapt``: a client that was never seen takes the found network and adapts it in a few steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedmetanas_core.commands.networks import model_folder, open_network
from fedmetanas_core.commands.options import read_options, refuse_surplus
from fedmetanas_core.commands.terminal import COMPLETED, say
from fedmetanas_core.commands.usage import form
from fedmetanas_core.config import Config, defaults
from fedmetanas_core.data.sites import Agreement, load_site
from fedmetanas_core.data.splits import Split
from fedmetanas_core.data.transforms import to_tensor
from fedmetanas_core.errors import RefusalError, RunFailedError
from fedmetanas_core.output.adapted import Curves, curves_in_words, draw_adaptation
from fedmetanas_core.output.classifier import image_shape
from fedmetanas_core.preflight import Experiment, prepare_experiment
from fedmetanas_core.run.files import spread_json, write_atomically
from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.run.processes import available_cores
from fedmetanas_core.search.adaptation import STEPS, StepOptions, adaptation_curve, from_scratch
from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.native import build
from fedmetanas_core.space.network import ImageFormat, save_network

# Of a network that knows nothing: the best after five steps of rates from 0.03 to 1, with and without momentum, for
# clients of digits, on images held out of the training split.
SCRATCH_RATE, SCRATCH_MOMENTUM = 0.1, 0.9
MOST_STEPS = 100_000
FOLDER, UNSEEN = "adapted", "unseen"


@dataclass(frozen=True)
class Client:
    """Images of somebody whom the search has not seen."""

    name: str
    images: LocalData
    held_out: LocalData


def run(arguments: Sequence[str]) -> int:
    """RUN --data FOLDER|FILE.npz, or --unseen for those clients that the run kept out"""
    options = ["--data", "--steps", "--rate", "--client", "--output"]
    words, given = read_options("adapt", arguments, with_value=options, switches=["--unseen"])
    if not words or ("--data" in given) == ("--unseen" in given):
        what = "give either --data or --unseen" if words else "no run was given"
        raise RefusalError(f"adapt: {what}", f"write {form('adapt')}")
    refuse_surplus("adapt", words[1:])
    folder = RunFolder.open(Path(words[0]).expanduser())
    steps, config = _steps(given.get("--steps")), _config(folder)
    rate = _rate(given.get("--rate"), config)
    network, images = open_network(model_folder("adapt", words[0], given.get("--client")))
    clients = _unseen(config, folder) if "--unseen" in given else [_newcomer(given["--data"], network, images, config)]
    name = UNSEEN if "--unseen" in given else clients[0].name
    target = Path(given["--output"]).expanduser().absolute() if "--output" in given else folder.path / FOLDER / name
    build.prepare(say)
    torch.set_num_threads(available_cores())
    curves, adapted = _adapt(network, clients, StepOptions(rate, int(config.batch_size), seed=config.seed), steps)
    _write(target, curves, {"rate": rate, "batch_size": int(config.batch_size), "run": str(folder.path)})
    if "--data" in given:
        save_network(adapted, target, images)
    print(curves_in_words(curves))
    print(target, flush=True)
    return COMPLETED


def _steps(text: str | None) -> tuple[int, ...]:
    """Ascending, from 0 on."""
    if text is None:
        return STEPS
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) <= MOST_STEPS for word in words):
        raise RefusalError(f"adapt: --steps {text[:80]!r} are no numbers of steps", "write --steps 0,1,5,20")
    return tuple(sorted({int(word) for word in words}))


def _rate(text: str | None, config: Config) -> float:
    try:
        rate = config.task_lr_weights if text is None else float(text)
    except ValueError:
        rate = 0.0
    if not 0.0 < rate < float("inf"):
        raise RefusalError(f"adapt: --rate {str(text)[:80]!r} is no number above 0", "write --rate 0.01")
    return rate


def _config(folder: RunFolder) -> Config:
    facts = folder.read_config()
    missing = [key for key in defaults() if key not in facts]
    if missing:
        raise RefusalError(f"{folder.config_file} lacks {missing[0]}, so it is of another version", "use that version")
    return Config.from_mapping({key: facts[key] for key in defaults()})


def _unseen(config: Config, folder: RunFolder) -> list[Client]:
    """The clients whom the run kept out of its training, with the images that it gave them."""
    if not config.unseen_clients:
        fix = "give your own images with --data, or search with unseen_clients=20"
        raise RefusalError(f"adapt: {folder.path} kept no clients out of its training", fix)
    experiment = prepare_experiment(config, folder.path, check=False)
    if experiment.partition.hash() != folder.read_config().get("partition_hash"):
        raise RefusalError(f"{folder.path}: the images or their labels are not those it began with", "bring them back")
    return list(_clients(experiment, range(config.num_clients - config.unseen_clients, config.num_clients)))


def _clients(experiment: Experiment, numbers: Sequence[int]) -> Iterator[Client]:
    for number in numbers:
        yield Client(str(number), experiment.training_data(number), experiment.evaluation_data(number))


def _newcomer(data: str, network: TrainableNetwork, images: ImageFormat, config: Config) -> Client:
    """The images of a folder or an .npz, as the network wants them; RefusalError where they do not fit."""
    path = Path(data).expanduser()
    if not path.exists():
        raise RefusalError(f"adapt: --data {data} does not exist", "give an .npz or a folder of class folders")
    shape = image_shape(network)
    size = shape[1] if shape[1] == shape[2] else None
    agreement = Agreement(images.class_names, shape, images.mean, images.std)
    site = load_site(str(path), agreement, config.seed, size)
    if not len(site.test):
        raise RefusalError(f"adapt: {data} has no images to measure on", "give a test/ folder, or more images")
    return Client(path.resolve().stem, _all(site.train, images), _all(site.test, images))


def _all(split: Split, images: ImageFormat) -> LocalData:
    pixels = to_tensor(split.take(np.arange(len(split))))
    return LocalData(pixels, torch.from_numpy(split.labels), lambda batch, generator: images.standardise(batch))


def _adapt(
    network: TrainableNetwork, clients: Sequence[Client], options: StepOptions, steps: Sequence[int]
) -> tuple[Curves, TrainableNetwork]:
    """All curves, and the last client's network."""
    own, scratch = [], []
    adapted, fresh = network, from_scratch(network, options.seed)
    plain = StepOptions(SCRATCH_RATE, options.batch_size, SCRATCH_MOMENTUM, running_statistics=False, seed=options.seed)
    for client in clients:
        curve, adapted = adaptation_curve(network, client.images, client.held_out, options, steps)
        own.append(tuple(curve))
        scratch.append(tuple(adaptation_curve(fresh, client.images, client.held_out, plain, steps)[0]))
    return Curves(tuple(steps), tuple(client.name for client in clients), tuple(own), tuple(scratch)), adapted


def _write(target: Path, curves: Curves, options: dict[str, object]) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFailedError(f"cannot write {target}: {error.strerror or error}") from error
    write_atomically(target / "curve.json", (spread_json({**options, **curves.to_dict()}) + "\n").encode())
    for ending, content in draw_adaptation(curves).items():
        write_atomically(target / f"curve.{ending}", content)
