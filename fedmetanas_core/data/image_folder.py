"""Datasets as folders: one folder a class, image files inside."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedmetanas_core.data.image_files import FileSplit
from fedmetanas_core.data.splits import Dataset, Labels, channel_statistics, hold_out_per_class
from fedmetanas_core.errors import RefusalError, RunFailedError
from fedmetanas_core.seeds import numpy_stream

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
GREY_MODES = frozenset({"1", "L", "I", "I;16", "I;16L", "I;16B"})
LARGEST_SIDE = 224  # the field's usual input; larger ones cost more than this project's networks can use
CHECKED_IMAGES = 5_000  # up to here every file is decoded beforehand, above it a sample
CHECK_BUDGET_S = 8.0  # a sample of large photographs stops here; the rest is found out when it is read
STATISTICS_IMAGES = 1_000
CACHE_BYTES = 512 * 2**20  # decoded images of both splits together
HELD_OUT_FRACTION = 0.2
_LAYOUT_HINT = "lay images out as FOLDER/CLASS/IMAGE, or FOLDER/train/CLASS/IMAGE and FOLDER/test/CLASS/IMAGE"

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class _Listing:
    """Image files and their labels, in order of class and path."""

    paths: list[str]
    labels: Labels

    def subset(self, indices: npt.NDArray[np.int64]) -> "_Listing":
        return _Listing([self.paths[i] for i in indices], self.labels[indices])


@dataclass(frozen=True)
class _Headers:
    """What the headers of the looked-at files say: (width, height) and mode, one each."""

    sizes: list[tuple[int, int]]
    modes: frozenset[str]

    @property
    def greyscale(self) -> bool:
        return self.modes <= GREY_MODES

    def natural_size(self) -> tuple[int, int]:
        """(height, width): as they are if all agree and are small, else a square every image can fill."""
        (width, height), *others = set(self.sizes)
        if not others and max(width, height) <= LARGEST_SIDE:
            return height, width
        side = min(LARGEST_SIDE, min(map(min, self.sizes)))
        return side, side

    def usual_side(self) -> int:
        """The median short side, at most 224: ImageNet has a few thumbnails that must not shrink all the others."""
        return min(LARGEST_SIDE, int(np.median([min(size) for size in self.sizes])))


def load_class_folders(
    root: Path,
    name: str,
    seed: int,
    image_size: int | None = None,
    *,
    class_names: Sequence[str] | None = None,
    shape: tuple[int, int, int] | None = None,
    normalisation: Normalisation | None = None,
    check: bool = True,
    fewest_classes: int = 2,
) -> Dataset:
    """The folder `root` of class folders, with its own train/ and test/ or val/, else a fifth of each class held out.

    Classes are the sorted folder names of the training split, or `class_names` where a federation fixed them. Which
    fifth is held out depends on `seed`. Without `image_size`, images stay as they are if all have one size of at most
    224×224, and become squares of the smallest short side (at most 224) otherwise; of more than 5,000 files a fixed
    sample of 5,000 decides. Images have one channel if all looked at are grey, else three.
    `shape` (channels, height, width) fixes all of that instead. `normalisation` (mean, std) is not measured if given.
    `check` decodes all files beforehand (of more than 5,000 a sample, for some seconds).

    Raises RefusalError naming the folder or file if the layout does not fit or an image is corrupt.
    """
    train_folder, test_folder = split_folders(root, ("test", "val"))
    names, train = _list_classes(train_folder, class_names)
    if len(names) < fewest_classes:
        raise RefusalError(f"{train_folder} has only the class folder {names[0]}", f"give two or more; {_LAYOUT_HINT}")
    if test_folder is None:
        train, test = _hold_out(train, len(names), seed, train_folder)
    else:
        _, test = _list_classes(test_folder, names)
    if shape is None:
        headers = _read_headers(train, test)
        size = (image_size, image_size) if image_size else headers.natural_size()
        shape = (1 if headers.greyscale else 3, *size)
    return _assemble(name, names, train, test, (*shape[1:], shape[0]), normalisation, check)


def load_imagenet(
    data_root: Path, normalisation: Normalisation, image_size: int | None = None, *, check: bool = True
) -> Dataset:
    """ImageNet as class folders: train/ and val/ in data_root/imagenet or, without that, in data_root; RGB.

    The side is `image_size`, else the median short side, at most 224. Raises RefusalError as load_class_folders.
    """
    root = data_root / "imagenet" if (data_root / "imagenet").is_dir() else data_root
    train_folder, test_folder = split_folders(root, ("val", "test"))
    if test_folder is None:
        raise RefusalError(
            f"imagenet is not in {root.absolute()} (no train/ and val/ with class folders)",
            "set data_root to the folder that holds train/ and val/",
        )
    names, train = _list_classes(train_folder, None)
    _, test = _list_classes(test_folder, names)
    headers = _read_headers(train, test)
    side = image_size or headers.usual_side()
    return _assemble("imagenet", names, train, test, (side, side, 3), normalisation, check)


def _assemble(
    name: str,
    names: tuple[str, ...],
    train: _Listing,
    test: _Listing,
    shape: tuple[int, int, int],
    normalisation: Normalisation | None,
    check: bool,
) -> Dataset:
    """`shape` is (height, width, channels)."""
    height, width, channels = shape
    cache = (len(train.paths) + len(test.paths)) * height * width * channels <= CACHE_BYTES
    splits = [FileSplit(listing.paths, listing.labels, shape, cache) for listing in (train, test)]
    if check:
        _check_images(*splits)
    if normalisation is None:
        try:
            normalisation = channel_statistics(splits[0], _sample(len(splits[0]), STATISTICS_IMAGES, "statistics"))
        except RunFailedError as error:
            raise RefusalError(str(error), "repair or remove that file") from error
    return Dataset(name, splits[0], splits[1], names, (channels, height, width), *normalisation)


def _sub_folders(folder: Path) -> list[str]:
    """Sorted names; hidden folders and what archive programs leave behind are no classes."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".") and e.name != "__MACOSX")


def split_folders(root: Path, held_out: tuple[str, ...]) -> tuple[Path, Path | None]:
    """The folders of training and test classes; no second one where images must be held out."""
    folders = _sub_folders(root)
    if "train" in folders:
        present = [name for name in held_out if name in folders]
        for name in present:
            if _sub_folders(root / name):
                return root / "train", root / name
        if present:
            raise RefusalError(f"{root / present[0]} has no class folders", _LAYOUT_HINT)
        if folders == ["train"] and _sub_folders(root / "train"):
            return root / "train", None
    return root, None  # a class may be called train


def _list_classes(folder: Path, class_names: Sequence[str] | None) -> tuple[tuple[str, ...], _Listing]:
    present = _sub_folders(folder)
    if not present:
        raise RefusalError(f"{folder.absolute()} has no class folders", _LAYOUT_HINT)
    names = tuple(present) if class_names is None else tuple(class_names)
    unknown = [name for name in present if name not in names]
    if unknown:
        raise RefusalError(
            f"{folder} has class folders that training does not know: {', '.join(unknown[:5])}",
            "rename or remove them",
        )
    label_of = {name: label for label, name in enumerate(names)}
    paths: list[str] = []
    labels: list[int] = []
    for name in present:
        files = _image_files(folder / name)
        if not files:
            raise RefusalError(
                f"the class folder {folder / name} has no images",
                f"remove it or add files that end in {', '.join(sorted(SUFFIXES))}",
            )
        paths += files
        labels += [label_of[name]] * len(files)
    return names, _Listing(paths, np.asarray(labels, dtype=np.int64))


def _image_files(folder: Path) -> list[str]:
    return sorted(
        os.path.join(parent, file)
        for parent, _, files in os.walk(folder)
        for file in files
        if os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith(".")
    )


def _hold_out(listing: _Listing, num_classes: int, seed: int, folder: Path) -> tuple[_Listing, _Listing]:
    """A fifth of every class, at least one image where the class has two."""
    sizes = np.bincount(listing.labels, minlength=num_classes)
    fifth = np.floor(sizes * HELD_OUT_FRACTION + 0.5).astype(np.int64)
    quota = np.where(sizes >= 2, np.maximum(fifth, 1), 0)
    if quota.sum() == 0:
        raise RefusalError(f"{folder} has one image a class, which leaves none to test on", "add images")
    kept, held = hold_out_per_class(listing.labels, quota, numpy_stream(seed, "class folder split"))
    return listing.subset(kept), listing.subset(held)


def _sample(total: int, at_most: int, purpose: str) -> npt.NDArray[np.int64]:
    """All indices, or `at_most` of them in random order, the same in every run."""
    if total <= at_most:
        return np.arange(total)
    return numpy_stream(0, f"class folder {purpose}").choice(total, size=at_most, replace=False)


def _read_headers(train: _Listing, test: _Listing) -> _Headers:
    from PIL import Image

    # In one order whatever was held out, so that the image shape does not depend on the seed.
    paths = sorted(train.paths + test.paths)
    sizes, modes = [], set()
    for index in _sample(len(paths), CHECKED_IMAGES, "check"):
        try:
            with Image.open(paths[index]) as image:
                sizes.append(image.size)
                modes.add(image.mode)
        except Exception as error:  # Pillow's readers raise many classes for damaged files
            raise RefusalError(f"image {paths[index]} cannot be decoded ({error})", "repair or remove it") from error
    return _Headers(sizes, frozenset(modes))


def _check_images(train: FileSplit, test: FileSplit) -> None:
    """Decode files until one fails, all are done, or (of more than 5,000) the time is up."""
    total = len(train) + len(test)
    deadline = time.monotonic() + (CHECK_BUDGET_S if total > CHECKED_IMAGES else float("inf"))

    def decode(index: np.int64) -> None:
        if time.monotonic() < deadline:
            split, offset = (train, 0) if index < len(train) else (test, len(train))
            split.image(int(index) - offset)

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:  # Pillow decodes outside the GIL
        try:
            for _ in pool.map(decode, _sample(total, CHECKED_IMAGES, "check")):
                continue
        except RunFailedError as error:
            pool.shutdown(cancel_futures=True)
            raise RefusalError(str(error), "repair or remove that file") from error
