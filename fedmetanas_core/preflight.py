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
from fedmetanas_core.data.partitions import ClientShare, Partition, make_partition
from fedmetanas_core.data.sites import NODES, Agreement, describe_shape, load_test_images
from fedmetanas_core.data.splits import Dataset, Split
from fedmetanas_core.data.transforms import augment, augmentation_for, to_tensor
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.federation.direction import FEWEST
from fedmetanas_core.federation.privacy import Privacy, check_accountant
from fedmetanas_core.methods.budgets import check_budget, with_latencies
from fedmetanas_core.methods.recipe import Recipe
from fedmetanas_core.methods.registry import check_method, make_method
from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.space.network import ImageFormat
from fedmetanas_core.space.spec import SpaceSpec


@dataclass(frozen=True)
class Experiment:
    """A resolved configuration and what follows from it alone.

    Under ``dataset=nodes`` the dataset is this machine's own: a node's images, or those that the server measures on.
    """

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

    @property
    def on_nodes(self) -> bool:
        """Whether every node has its own images."""
        return self.config.dataset == NODES

    def _share(self, client: int) -> ClientShare:
        if self.on_nodes:  # a node knows no others, and all of its images are its own
            return ClientShare(np.arange(len(self.dataset.train)), np.arange(len(self.dataset.test)))
        return self.partition.shares[client]

    def training_data(self, client: int) -> LocalData:
        """A client's training images."""
        return self._local(self.dataset.train, self._share(client).train, self.config.augment == "on")

    def evaluation_data(self, client: int) -> LocalData:
        """A client's evaluation images, from the test split: never for training, tuning or rewards."""
        return self._local(self.dataset.test, self._share(client).evaluation, False)

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


def prepare_experiment(
    config: Config, launch_directory: Path, check: bool = True, own: Dataset | None = None
) -> Experiment:
    """Load the data, resolve every ``auto``, draw the partition and fix the space.

    Relative paths are taken from ``launch_directory``. ``check=False`` skips decoding every image file once, where
    that has been done before. ``own`` are a node's images, in place of the dataset. Raises RefusalError for anything
    that cannot work.
    """
    check_method(config.method)
    device = pick_device(config)
    if config.precision != "float32" and device == "cpu":
        raise RefusalError(f"precision: {config.precision} is for a GPU", "leave it at float32 on processors")
    config, dataset = _data(config, launch_directory, check, own)
    augments = augmentation_for(dataset.image_shape) if config.augment == AUTO else config.augment == "on"
    channels, height, width = dataset.image_shape
    config = replace(config, augment="on" if augments else "off").resolve(height, width, len(dataset.train))
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
    if config.protocol == "disjoint":
        most = len(dataset.train) // config.num_clients
        config = replace(config, samples_per_client=max(1, min(int(config.samples_per_client), most)))
    config = with_latencies(config, spec)
    _check_method(config, make_method(config, spec).recipe)  # refuses what its method cannot do
    return Experiment(config, dataset, _partition(config, dataset), spec)


def images_at_hand(config: Config, launch_directory: Path) -> Dataset:
    """The images of such a run, if they lie on this machine; RefusalError if not. Downloads nothing."""
    return _data(config, launch_directory, check=False, own=None, download=False)[1]


def _data(
    config: Config, launch_directory: Path, check: bool, own: Dataset | None, download: bool = True
) -> tuple[Config, Dataset]:
    """The images, and the configuration with their whereabouts made absolute."""
    if own is not None:
        return config, own
    size = None if config.image_size == AUTO else int(config.image_size)
    if config.dataset == NODES:
        agreement = agreed(config)
        dataset = agreement.without_images()
        if config.test_data:
            path = str(_path("test_data", config.test_data, launch_directory))
            config = replace(config, test_data=path)
            dataset = replace(dataset, test=load_test_images(path, agreement, config.seed, size))
        return config, dataset
    location = _locate(config.dataset, launch_directory)
    data_root = str(_path("data_root", config.data_root, launch_directory))
    dataset = load_dataset(location, data_root, config.seed, size, check=check, download=download)
    return replace(config, dataset=location, data_root=data_root), dataset


def agreed(config: Config) -> Agreement:
    """What the nodes of a run go by, from its keys; RefusalError where one of them is still open or makes no sense."""
    names, shape, normalisation = given_of_agreement(config)
    if names is None or shape is None or normalisation is None:
        raise RefusalError(
            "dataset: nodes stands for the images of real machines",
            "start such a run with `flwr run` (docs/deployment.md)",
        )
    return Agreement(names, shape, *normalisation)


def given_of_agreement(
    config: Config,
) -> tuple[tuple[str, ...] | None, tuple[int, int, int] | None, tuple[tuple[float, ...], tuple[float, ...]] | None]:
    """Class names, image shape, (mean, std), each None where it is left to the nodes. RefusalError for nonsense."""
    names = None if config.class_names == AUTO else tuple(name.strip() for name in config.class_names.split(","))
    if names is not None and (len(set(names)) < len(names) or len(names) < 2 or not all(names)):
        raise RefusalError(f"class_names: {config.class_names!r} is no list of two or more names", "write 'cat,dog'")
    shape = None
    if config.image_shape != AUTO:
        sides = _numbers("image_shape", config.image_shape, "x", "3x32x32")
        if (
            len(sides) != 3
            or sides[0] not in (1, 3)
            or not all(side % 1 == 0 and 8 <= side <= 1024 for side in sides[1:])
        ):
            raise RefusalError(f"image_shape: {config.image_shape!r} is no shape", "write it like 3x32x32")
        shape = (int(sides[0]), int(sides[1]), int(sides[2]))
    if config.pixel_mean == AUTO or config.pixel_std == AUTO:
        if config.pixel_mean != config.pixel_std:
            raise RefusalError("pixel_mean: it comes with pixel_std", "give both, or neither")
        return names, shape, None
    mean, std = (_numbers(key, getattr(config, key), ",", "0.49,0.48,0.45") for key in ("pixel_mean", "pixel_std"))
    if len(mean) != len(std) or (shape is not None and len(mean) != shape[0]) or min(std) <= 0:
        raise RefusalError(f"pixel_mean: {config.pixel_mean!r} and pixel_std do not fit", "give one each a channel")
    return names, shape, (mean, std)


def with_agreement(config: Config, agreement: Agreement) -> Config:
    """The configuration with what its nodes agreed on in place of ``auto``."""
    return replace(
        config,
        class_names=",".join(agreement.class_names),
        image_shape=describe_shape(agreement.image_shape),
        pixel_mean=",".join(map(str, agreement.mean)),
        pixel_std=",".join(map(str, agreement.std)),
    )


def _numbers(key: str, text: str, separator: str, example: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(separator))
    except ValueError as error:
        raise RefusalError(f"{key}: {text!r} cannot be read", f"write it like {example}") from error


def _partition(config: Config, dataset: Dataset) -> Partition:
    if config.dataset == NODES:
        return Partition(())
    samples = int(config.samples_per_client)
    return make_partition(
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


def _check_method(config: Config, recipe: Recipe) -> None:
    """RefusalError for what this method, or the kind of data, cannot do."""
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
    if config.opposed == "exclude" and config.clients_per_round < FEWEST:
        raise RefusalError(
            f"opposed: clients_per_round={config.clients_per_round} are too few to tell", f"let {FEWEST} or more train"
        )
    if config.opposed == "exclude" and not recipe.same_for_all:
        raise RefusalError(
            f"opposed: whole networks are compared, and clients of {config.method} send parts", "leave opposed at keep"
        )
    if config.dataset == NODES and (config.unseen_clients or config.protocol == "disjoint"):
        key = "unseen_clients" if config.unseen_clients else "protocol"
        raise RefusalError(f"{key}: it divides one dataset, and under dataset=nodes there is none", "leave it out")
    check_budget(config, recipe)
    _check_privacy(config, recipe)


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
