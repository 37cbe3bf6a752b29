"""Datasets by name or path; nothing here unpickles a file that a user brings."""

import contextlib
import difflib
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np

from fedmetanas_core.data.image_files import FileSplit
from fedmetanas_core.data.image_folder import load_class_folders, load_imagenet
from fedmetanas_core.data.npz import load_npz
from fedmetanas_core.data.splits import ArraySplit, Dataset, Split, array_dataset, stratified_holdout
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.seeds import numpy_stream

__all__ = ["DATASETS", "ArraySplit", "Dataset", "DatasetRequest", "FileSplit", "Split", "load_dataset"]

# Published per-channel mean and deviation of the training splits, on the [0, 1] scale.
NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
DIGITS_TEST_IMAGES = 360  # a fifth of 1797
# Long enough for a slow line to answer, short enough that a machine without a network is told at once.
DOWNLOAD_TIMEOUT_S = 10.0
_NPZ_HINT = "dataset=FILE.npz with x_train, y_train, x_test, y_test"


@dataclass(frozen=True)
class DatasetRequest:
    """What a loader is asked for; fields as in load_dataset."""

    name: str
    data_root: Path
    seed: int
    image_size: int | None
    check: bool
    download: bool


def load_dataset(
    name: str,
    data_root: str,
    seed: int,
    image_size: int | None = None,
    *,
    check: bool = True,
    download: bool = True,
) -> Dataset:
    """The dataset called `name` in DATASETS, or the `.npz` file or folder of class folders at that path.

    `data_root` is where torchvision's data and ImageNet lie; `seed` decides which fifth of a class folder without
    a test split is held out, and nothing else, so named datasets are the same in every run. `image_size` (pixels)
    makes every image a square of that side. `check=False` skips decoding image files beforehand, for a process
    whose parent has done so; `download=False` refuses torchvision's data where it is not there. Relative paths count
    from the current directory.

    Raises RefusalError, in one line that names the file or folder and a remedy, whenever there is nothing to train on.
    """
    if image_size is not None and image_size < 1:
        raise RefusalError(f"image_size={image_size} is no image size", "give the side in pixels, such as 64")
    request = DatasetRequest(name, Path(data_root).expanduser(), seed, image_size, check, download)
    loader = DATASETS.get(name)
    return loader(request) if loader else _load_path(request)


def _load_path(request: DatasetRequest) -> Dataset:
    name, path = request.name, Path(request.name).expanduser()
    if not name.strip():
        raise RefusalError("dataset is empty", f"give one of {', '.join(DATASETS)}, or a path")
    if path.is_dir():
        return load_class_folders(path, name, request.seed, request.image_size, check=request.check)
    if path.is_file():
        if path.suffix.lower() != ".npz":
            raise RefusalError(f"dataset={name} is neither a .npz file nor a folder", f"use {_NPZ_HINT}")
        return load_npz(path, name, request.image_size)
    if path.suffix or len(path.parts) > 1:
        raise RefusalError(f"dataset={name} does not exist (looked for {path.absolute()})", "check the path")
    near = difflib.get_close_matches(name.lower(), DATASETS, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]}? " if near else ""
    raise RefusalError(
        f"dataset={name} is unknown and no such path exists",
        f"{guess}known are {', '.join(DATASETS)}, a .npz file or a folder of class folders",
    )


def _load_digits(request: DatasetRequest) -> Dataset:
    """The 8×8 digits that come with scikit-learn: 1437 training and 360 test images, the same in every run."""
    # Its file is read by itself: scikit-learn takes more than a second to import, in every process of a run.
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(str(file), delimiter=",", dtype=np.int64)  # 64 pixels of 0…16, and the digit
    images = np.rint(rows[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)  # (1797, 8, 8, 1)
    labels = np.ascontiguousarray(rows[:, -1])
    # Seed 0, not the run's: every run must be judged on the same test images.
    train, test = stratified_holdout(labels, DIGITS_TEST_IMAGES, numpy_stream(0, "digits split"))
    arrays = (images[train], labels[train], images[test], labels[test])
    return array_dataset(request.name, arrays, [str(digit) for digit in range(10)], request.image_size)


def _load_torchvision(request: DatasetRequest) -> Dataset:
    """MNIST, CIFAR-10 or CIFAR-100 as torchvision keeps them under data_root."""
    from torchvision import datasets as torchvision_datasets

    kind = {"mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}[request.name]
    source = getattr(torchvision_datasets, kind)
    root = request.data_root.absolute()
    folder = root / "MNIST" / "raw" if kind == "MNIST" else root / source.base_folder
    hint = f"set data_root to the folder that holds {folder.relative_to(root)}, or use {_NPZ_HINT}"
    if not _is_present(folder, kind):
        if not request.download:
            raise RefusalError(f"{request.name} is not in {folder}", hint)
        _download(source, root, folder, request.name, hint)
    try:
        train, test = source(str(root), train=True), source(str(root), train=False)
    except (RuntimeError, ValueError, AssertionError, OSError, EOFError) as error:
        raise RefusalError(
            f"{request.name}: torchvision does not accept the files in {folder}, which are incomplete or whose md5 "
            f"differs from the original's ({error})",
            f"use {_NPZ_HINT}, or remove that folder to download anew",
        ) from error
    names = [str(digit) for digit in range(10)] if kind == "MNIST" else list(train.classes)
    arrays = (_channels_last(train), _targets(train), _channels_last(test), _targets(test))
    return array_dataset(request.name, arrays, names, request.image_size, NORMALISATION[request.name])


def _is_present(folder: Path, kind: str) -> bool:
    if kind != "MNIST":
        return folder.is_dir()
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return all((folder / f"{part}-ubyte").is_file() for part in parts)


def _download(source: Any, root: Path, folder: Path, name: str, hint: str) -> None:
    made_by_us = [path for path in (folder, folder.parent, root) if not path.exists()]
    try:
        # torchvision reports on stdout, which belongs to the run folder's path.
        with _socket_timeout(DOWNLOAD_TIMEOUT_S), contextlib.redirect_stdout(sys.stderr):
            source(str(root), train=True, download=True)
    except (RuntimeError, ValueError, OSError, EOFError) as error:
        for path in made_by_us:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise RefusalError(
            f"{name} is not in {folder} and could not be downloaded ({_shortest(error)})", hint
        ) from error


def _shortest(error: Exception) -> str:
    """The innermost reason: torchvision's own message lists every mirror it tried."""
    found = re.findall(r"<urlopen error (?:\[Errno -?\d+\] )?([^>]+)>", str(error))
    return found[-1] if found else " ".join(str(error).split())[:120]


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torchvision has no time-out of its own; the process-wide default is restored afterwards."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _channels_last(split: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    images = np.asarray(split.data, dtype=np.uint8)
    return images[..., np.newaxis] if images.ndim == 3 else images


def _targets(split: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(split.targets, dtype=np.int64)


def _load_imagenet(request: DatasetRequest) -> Dataset:
    return load_imagenet(request.data_root, NORMALISATION["imagenet"], request.image_size, check=request.check)


DATASETS: Mapping[str, Callable[[DatasetRequest], Dataset]] = {
    "digits": _load_digits,
    "mnist": _load_torchvision,
    "cifar10": _load_torchvision,
    "cifar100": _load_torchvision,
    "imagenet": _load_imagenet,
}
