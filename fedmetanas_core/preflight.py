"""From a configuration to everything a run needs, or a refusal; what the command line and the server both do first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmetanas_core.config import AUTO, Config
from fedmetanas_core.data.datasets import DATASETS, load_dataset
from fedmetanas_core.data.partitions import Partition, make_partition
from fedmetanas_core.data.splits import Dataset, Split
from fedmetanas_core.data.transforms import augment, augmentation_for, to_tensor
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.federation.privacy import Privacy, check_accountant
from fedmetanas_core.methods.recipe import Recipe
from fedmetanas_core.methods.registry import check_method, make_method
from fedmetanas_core.run.progress import describe_bytes, describe_macs
from fedmetanas_core.search.local_data import LocalData, task_size
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.cost import FLOAT_BYTES, measure_cost
from fedmetanas_core.space.fixed import FixedSpec, Space
from fedmetanas_core.space.network import ImageFormat
from fedmetanas_core.space.spec import SpaceSpec

FEWEST_IN_A_BATCH = 4  # below, the moments of a batch say little about those of the data
ARRAY_HEADER_BYTES = 128  # numpy's, before the data of an array


@dataclass(frozen=True)
class Experiment:
    """A resolved configuration and what follows from it alone."""

    config: Config
    dataset: Dataset
    partition: Partition
    spec: SpaceSpec

    @property
    def images(self) -> ImageFormat:
        """How the network wants its images."""
        return ImageFormat(self.dataset.mean, self.dataset.std, self.dataset.class_names)

    @property
    def privacy(self) -> Privacy | None:
        """How clients protect their updates, if they do."""
        config = self.config
        return Privacy(config.dp_clip, config.dp_noise, config.clients_per_round) if config.dp_clip > 0 else None

    def training_data(self, client: int) -> LocalData:
        """A client's training images."""
        return self._local(self.dataset.train, self.partition.shares[client].train, self.config.augment == "on")

    def evaluation_data(self, client: int) -> LocalData:
        """A client's evaluation images, from the test split: never for training, tuning or rewards."""
        return self._local(self.dataset.test, self.partition.shares[client].evaluation, False)

    def test_sample(self, most: int) -> LocalData:
        """At most this many test images, evenly spaced over the test split."""
        count = len(self.dataset.test)
        chosen = np.linspace(0, count - 1, min(most, count)).astype(np.int64)
        return self._local(self.dataset.test, chosen, False)

    def test_chunks(self, size: int = 2000) -> Iterator[LocalData]:
        """The whole test split, a part at a time: all of ImageNet's would not fit into memory."""
        for chosen in np.split(np.arange(len(self.dataset.test)), range(size, len(self.dataset.test), size)):
            yield self._local(self.dataset.test, chosen, False)

    def _local(self, split: Split, indices: npt.NDArray[np.int64], augments: bool) -> LocalData:
        prepare = partial(_prepare, standardise=self.images.standardise, augments=augments)
        device = pick_device(self.config)
        labels = torch.from_numpy(split.labels[indices])
        return LocalData(to_tensor(split.take(indices)).to(device), labels.to(device), prepare)


def _prepare(
    images: Tensor, generator: torch.Generator | None, standardise: Callable[[Tensor], Tensor], augments: bool
) -> Tensor:
    if augments and generator is not None:
        images = augment(images, generator)
    return standardise(images)


def peak_gpu_memory_bytes() -> int:
    """The most that torch has held of this process's GPU, 0 where it used none; recordings and caches count."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def pick_device(config: Config) -> str:
    """``cpu`` or ``cuda``; raises RefusalError when cuda is asked for and absent."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RefusalError("device: cuda is not available on this machine", "set device=cpu or device=auto")
    if config.device == AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def prepare_experiment(config: Config, launch_directory: Path, check: bool = True) -> Experiment:
    """Load the data, resolve every ``auto``, draw the partition and fix the space.

    Relative paths are taken from ``launch_directory``. ``check=False`` skips decoding every image file once, where
    that has been done before. Raises RefusalError for anything that cannot work.
    """
    check_method(config.method)
    device = pick_device(config)
    if config.precision != "float32" and device == "cpu":
        raise RefusalError(f"precision: {config.precision} is for a GPU", "leave it at float32 on processors")
    size = None if config.image_size == AUTO else int(config.image_size)
    location = _locate(config.dataset, launch_directory)
    data_root = _path("data_root", config.data_root, launch_directory)
    dataset = load_dataset(location, str(data_root), config.seed, size, check=check)
    augments = augmentation_for(dataset.image_shape) if config.augment == AUTO else config.augment == "on"
    config = replace(config, dataset=location, data_root=str(data_root), augment="on" if augments else "off")
    channels, height, width = dataset.image_shape
    config = config.resolve(height, width, len(dataset.train))
    spec = SpaceSpec(
        init_channels=int(config.init_channels),
        num_cells=int(config.num_cells),
        num_nodes=int(config.num_nodes),
        in_channels=channels,
        num_classes=dataset.num_classes,
        height=height,
        width=width,
        stem=config.stem,
        norm=config.norm,
    )
    samples = int(config.samples_per_client)
    if config.protocol == "disjoint":
        samples = max(1, min(samples, len(dataset.train) // config.num_clients))
        config = replace(config, samples_per_client=samples)
    recipe = make_method(config, spec).recipe  # refuses what its method cannot do
    if config.compression != "none" and not recipe.compressible:
        raise RefusalError(
            f"compression: {config.method} sends parts of the weights, which it does not compress",
            "leave compression at none",
        )
    if config.averaging == "krum" and not recipe.same_for_all:
        raise RefusalError(
            f"averaging: krum compares whole networks, and clients of {config.method} send parts",
            "set averaging to median or trimmed_mean",
        )
    _check_privacy(config, recipe)
    partition = make_partition(
        scheme=config.partition,
        protocol=config.protocol,
        num_clients=config.num_clients,
        dir_alpha=config.dir_alpha,
        classes_per_client=config.classes_per_client,
        samples_per_client=samples,
        # A tenth of a small test split: larger shares would make all clients' evaluation sets the same.
        evaluation_per_client=max(1, min(samples, len(dataset.test) // 10)),
        train_labels=dataset.train.labels,
        test_labels=dataset.test.labels,
        num_classes=dataset.num_classes,
        seed=config.seed,
    )
    return Experiment(config, dataset, partition, spec)


def _check_privacy(config: Config, recipe: Recipe) -> None:
    """RefusalError for what would break the guarantee that dp_clip promises."""
    if config.dp_clip == 0:
        if config.dp_noise > 0:
            raise RefusalError("dp_noise: noise without a clipping norm promises nothing", "set dp_clip as well")
        return
    gives_more = recipe.stages[0].architect.takes_gradients or config.prune_rule == "client_vote"
    for broken, what, fix in (
        (config.dp_noise == 0, "dp_noise: 0 gives no privacy", "set dp_noise, for example to 1"),
        (config.weighting != "equal", "weighting: a client of many examples would say more", "set weighting=equal"),
        (
            config.averaging != "mean",
            f"averaging: the noise is that of a mean, not of {config.averaging}",
            "leave it at mean",
        ),
        (config.compression != "none", "compression: what it keeps for later is not clipped", "leave it at none"),
        (config.prune_score == "perturb", "prune_score: scores would travel without noise", "leave it at magnitude"),
        (
            not recipe.same_for_all or recipe.keeps_private or gives_more,
            f"dp_clip: clients of {config.method} send more than one whole, clipped change",
            "choose a method whose clients do, such as fedmetanas or fedavg",
        ),
    ):
        if broken:
            raise RefusalError(what, fix)
    check_accountant()


def _locate(dataset: str, launch_directory: Path) -> str:
    """A path is made absolute; the name of a dataset stays as it is."""
    if not dataset.strip():
        raise RefusalError("dataset: it is empty", f"give one of {', '.join(DATASETS)}, or a path")
    if dataset in DATASETS:
        return dataset
    path = _path("dataset", dataset, launch_directory)
    return str(path) if "/" in dataset or dataset.endswith(".npz") or path.exists() else dataset


def _path(key: str, text: str, launch_directory: Path) -> Path:
    """An absolute path; RefusalError for one that the system cannot even look at."""
    try:
        path = launch_directory / Path(text).expanduser()
        path.exists()
        if path.is_dir():
            next(path.iterdir(), None)
    except (OSError, RuntimeError, ValueError) as error:
        raise RefusalError(f"{key}: {text[:200]!r} cannot be read: {error}", "give a path you may read") from error
    return path


def describe_experiment(experiment: Experiment) -> str:
    """What is going to run, in a few lines: clients, data, model size, payload, and the bytes to expect at most."""
    config, dataset = experiment.config, experiment.dataset
    channels, height, width = dataset.image_shape
    trains = [len(share.train) for share in experiment.partition.shares]
    tests = [len(share.evaluation) for share in experiment.partition.shares]
    recipe = make_method(config, experiment.spec).recipe
    spec = recipe.stages[0].space
    cost = measure_cost(spec, Architecture(spec).operation_mask)
    rounds, at_once = int(config.num_rounds), config.clients_per_round
    skew = {
        "dirichlet": f"Dirichlet {config.dir_alpha:g}",
        "label_skew": f"{config.classes_per_client} classes each",
        "iid": "evenly",
    }[config.partition]
    return "\n".join(
        (
            f"method    {config.method} ({config.preset}), {rounds} round{'s'[: rounds > 1]}, seed {config.seed}",
            f"clients   {config.num_clients}, {at_once} a round; {skew}, {_span(trains)} training and "
            f"{_span(tests)} test images each",
            *_about_small_shares(config, min(trains)),
            f"data      {dataset.name}: {len(dataset.train):,} training and {len(dataset.test):,} test images",
            f"          {channels}x{height}x{width}, {dataset.num_classes} classes",
            *_about_empty_classes(dataset),
            f"{_about_network(spec)}: {cost.parameters:,} parameters",
            f"          {describe_macs(cost.macs)} an image",
            *_about_payload(experiment),
        )
    )


def _about_payload(experiment: Experiment) -> list[str]:
    """What a client gets in the first round, and what travels in all where that can be said."""
    method = make_method(experiment.config, experiment.spec)
    recipe = method.recipe
    if recipe.is_local:
        return ["payload   none; every client is on its own, and sends its network at the end"]
    first = method.payload(method.initial_state(), 0, method.plan(1))
    lines = [
        f"payload   {describe_bytes(FLOAT_BYTES * (len(first.weights) + len(first.statistics)))} to a client at first"
    ]
    if recipe.compressible and not recipe.personal.own_architecture:
        less = ", less as operations are pruned" if recipe.stages[0].pruning is not None else ""
        lines.append(f"          at most {describe_bytes(most_bytes(experiment))} in all{less}")
    return lines


def _about_network(spec: Space) -> str:
    if isinstance(spec, FixedSpec):
        return f"network   {spec.name}"
    return f"supernet  {spec.num_cells} cells, {spec.num_nodes} nodes, {spec.init_channels} channels"


def _about_small_shares(config: Config, fewest: int) -> list[str]:
    batch = task_size(fewest, int(config.batch_size))
    if batch >= FEWEST_IN_A_BATCH:
        return []
    return [f"          note: batches of {batch} make batch norm unreliable; more images a client help"]


def _about_empty_classes(dataset: Dataset) -> list[str]:
    counts = np.bincount(dataset.train.labels, minlength=dataset.num_classes)
    empty = [str(name) for name in np.flatnonzero(counts == 0)]
    if not empty:
        return []
    more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
    return [f"          note: no training image of class {', '.join(empty[:3])}{more}; labels count from 0"]


def most_bytes(experiment: Experiment) -> int:
    """What travels if nothing is ever pruned: every round both ways, and the final model to all clients."""
    config, spec = experiment.config, make_method(experiment.config, experiment.spec).recipe.stages[0].space
    architecture = Architecture(spec)
    choices = sum(mask.numel() for _, mask in architecture.rows())
    learned = measure_cost(spec, architecture.operation_mask).payload_bytes + FLOAT_BYTES * choices
    # Masks and votes take a byte a choice; each of the at most six arrays of a message has a header.
    message = learned + choices + 6 * ARRAY_HEADER_BYTES
    return message * (2 * int(config.num_rounds) * config.clients_per_round + config.num_clients)


def _span(sizes: list[int]) -> str:
    low, high = min(sizes), max(sizes)
    return f"{low}" if low == high else f"{low} to {high}"
