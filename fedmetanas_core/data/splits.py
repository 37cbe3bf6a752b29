"""What every other room sees of a dataset: images by index, labels, names, shape and normalisation constants."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Sums = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Images = npt.NDArray[np.uint8] | npt.NDArray[np.float32]

# Dividing by a smaller deviation would only amplify rounding: one grey level is 0.004.
SMALLEST_STD = 1e-3
_CHUNK_VALUES = 2**22  # 32 MB in float64


class Split(Protocol):
    """Labelled images addressed by index; `labels` is int64 of shape (N,)."""

    @property
    def labels(self) -> Labels: ...

    def __len__(self) -> int: ...

    def take(self, indices: npt.NDArray[np.integer]) -> Images:
        """Images at `indices`, as a new array (len(indices), height, width, channels), uint8 or float32 in [0, 1]."""
        ...


@dataclass(frozen=True, eq=False)
class ArraySplit:
    """A split held in memory: `images` (N, height, width, channels), uint8 or float32 in [0, 1]."""

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: npt.NDArray[np.integer]) -> Images:
        """See Split.take."""
        chosen: Images = self.images[indices]
        return chosen


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split that share classes, image shape and normalisation.

    `image_shape` is (channels, height, width); `mean` and `std` have one value per channel, for pixels in [0, 1].
    Training and test images are indexed separately, so no index of one can mean an image of the other.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """How many classes a classifier must tell apart, counting classes without any image."""
        return len(self.class_names)


def channel_statistics(
    split: Split, indices: npt.NDArray[np.integer] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation on the [0, 1] scale, over `indices` (default: the whole split)."""
    chosen = np.arange(len(split)) if indices is None else indices
    image_values = split.take(chosen[:1])[0].size
    total: Sums = np.zeros(1)
    squares: Sums = np.zeros(1)
    pixels = 0
    for rows in _chunks(len(chosen), image_values):
        images = split.take(chosen[rows])
        values = images.reshape(len(images), -1).astype(np.float64)
        if images.dtype == np.uint8:
            values /= 255.0
        channels = images.shape[-1]
        total = total + values.sum(axis=0).reshape(-1, channels).sum(axis=0)
        squares = squares + np.square(values).sum(axis=0).reshape(-1, channels).sum(axis=0)
        pixels += images.size // channels
    mean = total / pixels
    # Rounding can leave a constant channel a hair below zero.
    variance = np.maximum(squares / pixels - np.square(mean), 0.0)
    std = np.maximum(np.sqrt(variance), SMALLEST_STD)
    return tuple(mean.tolist()), tuple(std.tolist())


def _chunks(count: int, values_each: int) -> Iterator[slice]:
    """Slices over `count` images, few enough at a time that a copy in floating point stays small."""
    step = max(1, _CHUNK_VALUES // values_each)
    return (slice(start, start + step) for start in range(0, count, step))


def stratified_holdout(
    labels: Labels, count: int, generator: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices (kept, held out), both sorted: `count` held out, each class in proportion (largest remainders)."""
    class_sizes = np.bincount(labels)
    ideal = class_sizes * (count / len(labels))
    quota = np.floor(ideal).astype(np.int64)
    by_remainder = np.argsort(quota - ideal, kind="stable")
    quota[by_remainder[: count - int(quota.sum())]] += 1
    return hold_out_per_class(labels, quota, generator)


def hold_out_per_class(
    labels: Labels, quota: npt.NDArray[np.int64], generator: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices (kept, held out), both sorted: `quota[c]` random images of every class c are held out."""
    held = np.zeros(len(labels), dtype=bool)
    for label, number in enumerate(quota):
        members = np.flatnonzero(labels == label)
        held[generator.choice(members, size=int(number), replace=False)] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def resize_images(images: Images, side: int) -> Images:
    """The centre square of every image (N, height, width, channels), resampled to side × side; keeps the dtype."""
    import torch

    height, width = images.shape[1:3]
    if (height, width) == (side, side):
        return images
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    out = np.empty((len(images), side, side, images.shape[3]), dtype=images.dtype)
    for rows in _chunks(len(images), images[0].size):
        square = images[rows, top : top + edge, left : left + edge].astype(np.float32)
        resized = torch.nn.functional.interpolate(
            torch.from_numpy(square).permute(0, 3, 1, 2), size=(side, side), mode="bilinear", antialias=True
        ).permute(0, 2, 3, 1)
        if images.dtype == np.uint8:
            resized = resized.round().clamp(0, 255)
        out[rows] = resized.numpy().astype(images.dtype)
    return out


def array_dataset(
    name: str,
    arrays: tuple[Images, Labels, Images, Labels],
    class_names: Sequence[str],
    image_size: int | None = None,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Dataset:
    """A dataset in memory from (x_train, y_train, x_test, y_test), images (N, height, width, channels).

    `image_size` resamples everything to a square; without `normalisation` the training split gives mean and std.
    """
    x_train, y_train, x_test, y_test = arrays
    if image_size is not None:
        x_train, x_test = resize_images(x_train, image_size), resize_images(x_test, image_size)
    train = ArraySplit(x_train, y_train)
    mean, std = normalisation or channel_statistics(train)
    height, width, channels = x_train.shape[1:]
    return Dataset(name, train, ArraySplit(x_test, y_test), tuple(class_names), (channels, height, width), mean, std)
