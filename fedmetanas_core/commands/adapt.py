"""``fedmetanas adapt``: a client that was never seen takes the found network and adapts it in a few steps."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fedmetanas_core.commands.networks import model_folder, open_network
from fedmetanas_core.commands.options import read_options, refuse_surplus, user_path
from fedmetanas_core.commands.terminal import COMPLETED, say
from fedmetanas_core.commands.usage import form
from fedmetanas_core.config import Config, defaults
from fedmetanas_core.data.sites import Agreement, load_site
from fedmetanas_core.data.splits import Split
from fedmetanas_core.data.transforms import to_tensor
from fedmetanas_core.errors import FedMetaNASError, RefusalError, RunFailedError
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
FOLDER, UNSEEN, CURVE = "adapted", "unseen", "curve.json"


@dataclass(frozen=True)
class Client:
    """Images of somebody whom the search has not seen."""

    name: str
    images: LocalData
    held_out: LocalData


@dataclass(frozen=True)
class Request:
    """What was asked for: whose images, how many steps at which rate, and where to write."""

    data: str
    client: str | None
    steps: tuple[int, ...]
    rate: float
    target: Path


def run(arguments: Sequence[str]) -> int:
    """RUN --data FOLDER|FILE.npz, or --unseen for those clients that the run kept out"""
    options = ["--data", "--steps", "--rate", "--client", "--output"]
    words, given = read_options("adapt", arguments, with_value=options, switches=["--unseen"])
    if not words or ("--data" in given) == ("--unseen" in given):
        what = "give either --data or --unseen" if words else "no run was given"
        raise RefusalError(f"adapt: {what}", f"write {form('adapt')}")
    refuse_surplus("adapt", words[1:])
    folder = RunFolder.open(user_path("adapt", words[0]))
    config = _config(folder)
    network, images = open_network(model_folder("adapt", words[0], given.get("--client")))
    asked = _request(given, folder, config)
    clients = _unseen(config, folder) if asked.data == UNSEEN else [_newcomer(asked.data, network, images, config)]
    build.prepare(say)
    torch.set_num_threads(available_cores())
    how = StepOptions(asked.rate, int(config.batch_size), seed=config.seed)
    curves, adapted = _adapt(network, clients, how, asked.steps)
    if not bool(adapted.weights.isfinite().all()):
        raise FedMetaNASError(f"adapt: the weights are no numbers after {asked.steps[-1]} steps; set a smaller --rate")
    _write(asked, curves, how, str(folder.path))
    if asked.data != UNSEEN:
        save_network(adapted, asked.target, images)
    print(curves_in_words(curves))
    print(asked.target, flush=True)
    return COMPLETED


def _request(given: Mapping[str, str], folder: RunFolder, config: Config) -> Request:
    """Checked, before any work; RefusalError."""
    data = UNSEEN if "--unseen" in given else str(user_path("adapt", given["--data"]))
    client = given.get("--client")
    name = UNSEEN if data == UNSEEN else Path(data).stem
    name += f"-client-{client}" if client else ""
    target = user_path("adapt", given["--output"]) if "--output" in given else folder.path / FOLDER / name
    asked = Request(data, client, _steps(given.get("--steps")), _rate(given.get("--rate"), config), target)
    _check_target(asked)
    return asked


def _check_target(asked: Request) -> None:
    """RefusalError where something else would be overwritten, or nothing can be written."""
    target, hint = asked.target, "choose another --output"
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            known = json.loads((target / CURVE).read_text())
            if (known["data"], known["client"]) != (asked.data, asked.client):
                raise RefusalError(f"adapt: {target} is of {known['data']}", hint)
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
    except (ValueError, KeyError, TypeError, FileNotFoundError, NotADirectoryError) as error:
        raise RefusalError(f"adapt: {target} holds something else", hint) from error
    except OSError as error:
        raise RefusalError(f"adapt: {target} cannot be written: {error.strerror or error}", hint) from error


def _steps(text: str | None) -> tuple[int, ...]:
    """Ascending, from 0 on."""
    if text is None:
        return STEPS
    words = text.split(",")
    if not all(word.strip().isdecimal() and len(word) < 9 and int(word) <= MOST_STEPS for word in words):
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
    """That of the run, on this machine's processors; keys that an older one has not are at their defaults."""
    facts = folder.read_config()
    return replace(Config.from_mapping({key: facts[key] for key in defaults() if key in facts}), device="cpu")


def _unseen(config: Config, folder: RunFolder) -> Iterable[Client]:
    """The clients whom the run kept out of its training, with the images that it gave them."""
    if not config.unseen_clients:
        fix = "give your own images with --data, or search with unseen_clients=20"
        raise RefusalError(f"adapt: {folder.path} kept no clients out of its training", fix)
    experiment = prepare_experiment(config, folder.path, check=False)
    if experiment.partition.hash() != folder.read_config().get("partition_hash"):
        raise RefusalError(f"{folder.path}: the images or their labels are not those it began with", "bring them back")
    return _clients(experiment, range(config.num_clients - config.unseen_clients, config.num_clients))


def _clients(experiment: Experiment, numbers: Sequence[int]) -> Iterator[Client]:
    for number in numbers:
        yield Client(str(number), experiment.training_data(number), experiment.evaluation_data(number))


def _newcomer(data: str, network: TrainableNetwork, images: ImageFormat, config: Config) -> Client:
    """The images of a folder or an .npz, as the network wants them; RefusalError where they do not fit."""
    path = Path(data).expanduser()
    if not path.exists():
        raise RefusalError(f"adapt: --data {path} does not exist", "give an .npz or a folder of class folders")
    shape = image_shape(network)
    size = shape[1] if shape[1] == shape[2] else None
    agreement = Agreement(images.class_names, shape, images.mean, images.std)
    site = load_site(str(path), agreement, config.seed, size)
    if not len(site.test):
        raise RefusalError(f"adapt: {data} has no images to measure on", "give a test/ folder, or more images")
    try:
        return Client(path.stem, _all(site.train, images), _all(site.test, images))
    except RunFailedError as error:
        raise RefusalError(f"adapt: {error}", "repair or remove that file") from error


def _all(split: Split, images: ImageFormat) -> LocalData:
    pixels = to_tensor(split.take(np.arange(len(split))))
    return LocalData(pixels, torch.from_numpy(split.labels), lambda batch, generator: images.standardise(batch))


def _adapt(
    network: TrainableNetwork, clients: Iterable[Client], options: StepOptions, steps: Sequence[int]
) -> tuple[Curves, TrainableNetwork]:
    """All curves, and the last client's network."""
    names, own, scratch, counts = [], [], [], []
    adapted, fresh = network, from_scratch(network, options.seed)
    plain = StepOptions(SCRATCH_RATE, options.batch_size, SCRATCH_MOMENTUM, running_statistics=False, seed=options.seed)
    for client in clients:
        names.append(client.name)
        counts.append((len(client.images), len(client.held_out)))
        curve, adapted = adaptation_curve(network, client.images, client.held_out, options, steps)
        own.append(tuple(curve))
        scratch.append(tuple(adaptation_curve(fresh, client.images, client.held_out, plain, steps)[0]))
    return Curves(tuple(steps), tuple(names), tuple(own), tuple(scratch), tuple(counts)), adapted


def _write(asked: Request, curves: Curves, options: StepOptions, run: str) -> None:
    told = {"run": run, "data": asked.data, "client": asked.client, **asdict(options)}
    told |= {"scratch_rate": SCRATCH_RATE, "scratch_momentum": SCRATCH_MOMENTUM, **curves.to_dict()}
    write_atomically(asked.target / CURVE, (spread_json(told) + "\n").encode())
    for ending, content in draw_adaptation(curves).items():
        write_atomically(asked.target / f"curve.{ending}", content)
