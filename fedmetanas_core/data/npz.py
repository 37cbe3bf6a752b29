"""Datasets in one `.npz` file: x_train, y_train, x_test, y_test; nothing in it may need unpickling."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedmetanas_core.data.splits import Dataset, Images, Labels, array_dataset
from fedmetanas_core.errors import RefusalError

KEYS = ("x_train", "y_train", "x_test", "y_test")
_SAVE_HINT = "write it with numpy.savez(FILE, x_train=..., y_train=..., x_test=..., y_test=...)"
_IMAGE_HINT = "store uint8, or float in [0, 1], of shape (N, height, width) or (N, height, width, channels)"
_LABEL_HINT = "store one integer 0…K−1 an image"
# More classes than this are more likely identifiers taken for labels, unless there are as many images.
_UNSUSPICIOUS_CLASSES = 1000


def load_npz(
    path: Path,
    name: str,
    image_size: int | None = None,
    class_names: Sequence[str] | None = None,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Dataset:
    """The dataset in `path`, normalised by its training images unless (mean, std) are given.

    There are K = largest training label + 1 classes, or as many as `class_names` has where a federation fixed them.
    Raises RefusalError, naming the file and the array, for anything that could not be trained on.
    """
    raw = _read_arrays(path)
    x_train, x_test = (_images(raw[key], key, path) for key in ("x_train", "x_test"))
    y_train, y_test = (_labels(raw[key], key, path) for key in ("y_train", "y_test"))
    for x, y, part in ((x_train, y_train, "train"), (x_test, y_test, "test")):
        if len(x) != len(y):
            raise RefusalError(f"{path}: x_{part} has {len(x)} images and y_{part} {len(y)} labels", _LABEL_HINT)
        if len(x) == 0:
            raise RefusalError(f"{path}: x_{part} is empty", "both splits need images")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise RefusalError(
            f"{path}: x_train holds images of shape {x_train.shape[1:]}, x_test of {x_test.shape[1:]}",
            "bring both to one shape (height, width, channels)",
        )
    names = tuple(class_names) if class_names is not None else _numbered_classes(y_train, path)
    for y, key in ((y_train, "y_train"), (y_test, "y_test")):
        if y.max() >= len(names):
            raise RefusalError(
                f"{path}: {key} has the label {y.max()}, but the classes are 0…{len(names) - 1}",
                "labels must be classes known from training",
            )
    return array_dataset(name, (x_train, y_train, x_test, y_test), names, image_size, normalisation)


def _numbered_classes(y_train: Labels, path: Path) -> tuple[str, ...]:
    count = int(y_train.max()) + 1
    if count < 2:
        raise RefusalError(f"{path}: y_train has only the label 0", "give at least two classes")
    if count > max(_UNSUSPICIOUS_CLASSES, len(y_train)):
        raise RefusalError(
            f"{path}: y_train has the label {count - 1} among only {len(y_train)} images",
            "number the classes 0…K−1 without large gaps",
        )
    return tuple(map(str, range(count)))


def _read_arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    if not zipfile.is_zipfile(path):
        raise RefusalError(f"{path} is no .npz file (not a zip archive)", _SAVE_HINT)
    try:
        _check_size(path)
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in KEYS if key not in archive.files]
            found = ", ".join(archive.files) or "nothing"
            arrays = {} if missing else {key: _member(archive, key, path) for key in KEYS}
    except RefusalError:
        raise
    except Exception as error:  # a damaged archive can raise nearly anything while it is parsed
        raise RefusalError(f"{path} cannot be read ({type(error).__name__}: {error})", _SAVE_HINT) from error
    if missing:
        raise RefusalError(f"{path} lacks {', '.join(missing)} (it holds {found})", _SAVE_HINT)
    return arrays


def _check_size(path: Path) -> None:
    """A few megabytes of file can unpack to more than the machine has."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if unpacked > memory / 2:
        raise RefusalError(
            f"{path} unpacks to {unpacked / 1e9:.1f} GB, more than half of this machine's memory",
            "use class folders, which are read as they are needed",
        )


def _member(archive: np.lib.npyio.NpzFile, key: str, path: Path) -> npt.NDArray[np.generic]:
    try:
        array = archive[key]
    except ValueError as error:
        # numpy refuses object arrays with this class and no other mark than its wording.
        if "allow_pickle" not in str(error):
            raise
        raise RefusalError(
            f"{path}: {key} holds pickled Python objects, which are never loaded", f"{_IMAGE_HINT}, labels as integers"
        ) from error
    if not isinstance(array, np.ndarray):
        raise RefusalError(f"{path}: {key} is no numpy array", _SAVE_HINT)
    return array


def _images(array: npt.NDArray[np.generic], key: str, path: Path) -> Images:
    """(N, height, width, channels), uint8 or float32."""
    where = f"{path}: {key}"
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise RefusalError(f"{where} has dtype {array.dtype}", _IMAGE_HINT)
    if array.ndim not in (3, 4):
        raise RefusalError(f"{where} has shape {array.shape}", _IMAGE_HINT)
    images = array[..., np.newaxis] if array.ndim == 3 else array
    if images.shape[3] not in (1, 2, 3, 4):
        raise RefusalError(
            f"{where} has shape {array.shape}, which ends in {array.shape[-1]} channels",
            "put the channels last: (N, height, width, channels), 1 to 4 of them",
        )
    if 0 in images.shape[1:3]:
        raise RefusalError(f"{where} has images without pixels, shape {array.shape}", _IMAGE_HINT)
    if images.dtype == np.uint8:
        return images.astype(np.uint8, copy=False)
    if images.size:
        low, high = images.min(), images.max()  # a nan anywhere makes both nan
        if np.isnan(low):
            raise RefusalError(f"{where} has values that are not numbers", "leave those images out, or mend them")
        if not (low >= 0 and high <= 1):
            raise RefusalError(f"{where} has values from {low} to {high}", "scale float images to [0, 1]")
    return images.astype(np.float32, copy=False)


def _labels(array: npt.NDArray[np.generic], key: str, path: Path) -> Labels:
    where = f"{path}: {key}"
    if array.dtype.kind not in "iu":
        raise RefusalError(f"{where} has dtype {array.dtype}, not integers", _LABEL_HINT)
    if array.ndim != 1:
        raise RefusalError(f"{where} has shape {array.shape}", f"{_LABEL_HINT}, shape (N,)")
    if array.size and array.min() < 0:
        raise RefusalError(f"{where} has the negative label {array.min()}", _LABEL_HINT)
    if array.size and array.max() > np.iinfo(np.int64).max:
        raise RefusalError(f"{where} has the label {array.max()}", _LABEL_HINT)
    return array.astype(np.int64)
