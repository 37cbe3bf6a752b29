"""Datasets by name, from .npz files and from class folders, and every refusal in one line."""

import gzip
import urllib.error
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import dataset_refusal

from fedmetanas_core.data.datasets import NORMALISATION, load_dataset
from fedmetanas_core.data.npz import load_npz
from fedmetanas_core.data.splits import ArraySplit, channel_statistics, resize_images, stratified_holdout

SHARED_MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist" / "MNIST" / "raw"


# --- digits ---------------------------------------------------------------------------------------------------


def test_digits_are_split_1437_to_360_stratified_and_the_same_for_every_seed() -> None:
    first, second = (load_dataset("digits", "nowhere", seed) for seed in (0, 1))
    assert (len(first.train), len(first.test)) == (1437, 360)
    assert first.image_shape == (1, 8, 8)
    assert first.class_names == tuple("0123456789")
    assert np.array_equal(first.test.labels, second.test.labels)
    everything = np.arange(360)
    assert np.array_equal(first.test.take(everything), second.test.take(everything))
    # The 1797 digits hold 174 to 183 of each class; a fifth is 34.9 to 36.7.
    assert set(np.bincount(first.test.labels)) <= {34, 35, 36, 37}


def test_digits_use_the_whole_byte_and_are_normalised_by_the_training_split() -> None:
    digits = load_dataset("digits", "nowhere", 0)
    images = digits.train.take(np.arange(1437))
    assert images.dtype == np.uint8
    assert images.shape == (1437, 8, 8, 1)
    # 0…16 scaled by 255/16 and rounded: 8 becomes 127.5, to even 128.
    assert set(np.unique(images)) == {round(value * 255 / 16) for value in range(17)}
    assert digits.mean == pytest.approx([images.mean() / 255])
    assert digits.std == pytest.approx([images.std() / 255])


def test_image_size_resamples_named_sets() -> None:
    digits = load_dataset("digits", "nowhere", 0, image_size=12)
    assert digits.image_shape == (1, 12, 12)
    assert digits.test.take(np.array([3])).shape == (1, 12, 12, 1)


# --- parts ----------------------------------------------------------------------------------------------------


def test_stratified_holdout_by_hand() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [2] * 1)
    # 4 of 10 are 2.4, 1.2 and 0.4: floors 2, 1, 0 and one more for the largest remainder, a tie that class 0 wins.
    kept, held = stratified_holdout(labels, 4, np.random.default_rng(0))
    assert np.bincount(labels[held], minlength=3).tolist() == [3, 1, 0]
    assert sorted([*kept, *held]) == list(range(10))


def test_channel_statistics_by_hand_and_never_zero() -> None:
    images = np.zeros((2, 1, 2, 2), dtype=np.uint8)
    images[..., 0] = [[[0, 255]], [[255, 0]]]
    images[..., 1] = 51
    mean, std = channel_statistics(ArraySplit(images, np.array([0, 1])))
    assert mean == pytest.approx((0.5, 0.2))
    assert std == pytest.approx((0.5, 1e-3))


def test_resize_takes_the_centre_square() -> None:
    images = np.zeros((1, 2, 6, 1), dtype=np.uint8)
    images[0, :, 2:4] = 200
    assert resize_images(images, 4).tolist() == np.full((1, 4, 4, 1), 200).tolist()


# --- .npz -----------------------------------------------------------------------------------------------------


def arrays(**changes: Any) -> dict[str, Any]:
    """A valid little set of three classes, changed as asked; None leaves an array out."""
    rng = np.random.default_rng(0)
    whole: dict[str, Any] = {
        "x_train": rng.integers(0, 256, (9, 4, 5), dtype=np.uint8),
        "y_train": np.arange(9) % 3,
        "x_test": rng.integers(0, 256, (3, 4, 5), dtype=np.uint8),
        "y_test": np.arange(3),
    }
    return {key: value for key, value in {**whole, **changes}.items() if value is not None}


def save(path: Path, **changes: Any) -> Path:
    """An .npz of `arrays`."""
    np.savez(path, **arrays(**changes))
    return path


def test_npz_grey_bytes(tmp_path: Path) -> None:
    path = save(tmp_path / "set.npz")
    data = load_dataset(str(path), "nowhere", 0)
    assert data.image_shape == (1, 4, 5)
    assert data.num_classes == 3
    assert (len(data.train), len(data.test)) == (9, 3)
    assert np.array_equal(data.train.take(np.array([8, 2]))[..., 0], arrays()["x_train"][[8, 2]])
    assert data.train.labels.dtype == np.int64
    assert data.mean == pytest.approx([arrays()["x_train"].mean() / 255])


def test_npz_colour_floats_become_float32(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    path = save(tmp_path / "set.npz", x_train=rng.random((9, 4, 4, 3)), x_test=rng.random((3, 4, 4, 3)))
    data = load_dataset(str(path), "nowhere", 0)
    assert data.image_shape == (3, 4, 4)
    assert data.image_shape[0] == 3
    assert data.test.take(np.arange(3)).dtype == np.float32
    assert len(data.mean) == len(data.std) == 3


def test_npz_with_a_class_nobody_has(tmp_path: Path) -> None:
    path = save(tmp_path / "set.npz", y_train=np.array([0, 2] * 4 + [0], dtype=np.uint8), y_test=np.array([0, 2, 0]))
    assert load_dataset(str(path), "nowhere", 0).num_classes == 3


def test_npz_takes_the_classes_of_a_federation(tmp_path: Path) -> None:
    path = save(tmp_path / "set.npz", y_train=np.zeros(9, int), y_test=np.zeros(3, int))
    assert load_npz(path, "set", class_names=("cat", "dog")).class_names == ("cat", "dog")
    assert "only the label 0" in dataset_refusal(path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": None, "y_train": None}, "lacks x_train, y_train"),
        ({"y_train": np.arange(8) % 3}, "x_train has 9 images and y_train 8 labels"),
        ({"x_train": np.empty((0, 4, 5), np.uint8), "y_train": np.empty(0, int)}, "x_train is empty"),
        ({"x_test": np.empty((0, 4, 5), np.uint8), "y_test": np.empty(0, int)}, "x_test is empty"),
        ({"x_train": np.array([{"a": 1}] * 9, dtype=object)}, "x_train holds pickled Python objects"),
        ({"y_train": np.array([0, "a"] * 4 + [0], dtype=object)}, "y_train holds pickled Python objects"),
        ({"x_train": np.zeros((9, 20), np.uint8)}, "x_train has shape (9, 20)"),
        ({"x_train": np.zeros((9, 3, 32, 32), np.uint8)}, "channels last"),
        ({"x_train": np.zeros((9, 4, 5), np.int64)}, "x_train has dtype int64"),
        ({"x_train": np.zeros((9, 4, 5), bool)}, "x_train has dtype bool"),
        ({"x_train": np.zeros((9, 0, 5), np.uint8)}, "x_train has images without pixels"),
        ({"x_train": np.full((9, 4, 5), 7.0)}, "x_train has values from 7.0 to 7.0"),
        ({"x_train": np.full((9, 4, 5), -0.1)}, "x_train has values from -0.1"),
        ({"x_test": np.full((3, 4, 5), np.nan)}, "x_test has values that are not numbers"),
        ({"x_test": np.zeros((3, 5, 4), np.uint8)}, "x_test of (5, 4, 1)"),
        ({"y_train": np.zeros(9)}, "y_train has dtype float64, not integers"),
        ({"y_train": np.array(["cat"] * 9)}, "y_train has dtype <U3"),
        ({"y_train": np.zeros((9, 1), int)}, "y_train has shape (9, 1)"),
        ({"y_train": np.array([-1, 1, 2] * 3)}, "y_train has the negative label -1"),
        ({"y_test": np.array([0, 1, 3])}, "y_test has the label 3, but the classes are 0…2"),
        ({"y_train": np.array([0, 1, 2**40] * 3)}, "y_train has the label 1099511627776 among only 9 images"),
        ({"y_train": np.array([0, 1, 2**63] * 3, dtype=np.uint64)}, "y_train has the label 9223372036854775808"),
        ({"y_train": np.zeros(9, int), "y_test": np.zeros(3, int)}, "y_train has only the label 0"),
    ],
)
def test_npz_refusals_name_file_and_array(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    path = save(tmp_path / "set.npz", **changes)
    message = dataset_refusal(path)
    assert str(path) in message
    assert named in message


def test_npz_that_is_no_archive_or_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    path.write_bytes(b"")
    assert f"{path} is no .npz file" in dataset_refusal(path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(path)
    assert f"{path} is no .npz file" in dataset_refusal(path)
    whole = save(tmp_path / "whole.npz").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{path} is no .npz file" in dataset_refusal(path)
    path.write_bytes(whole[:200] + bytes(byte ^ 255 for byte in whole[200:260]) + whole[260:])
    assert f"{path} cannot be read" in dataset_refusal(path)


def test_npz_member_that_is_no_array(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for key in arrays():
            archive.writestr(f"{key}.npy", "just text")
    assert f"{path}: x_train is no numpy array" in dataset_refusal(path)


# --- names and paths ------------------------------------------------------------------------------------------


def test_unknown_names_and_paths(tmp_path: Path) -> None:
    assert "did you mean cifar10?" in dataset_refusal("cifra10")
    assert "did you mean mnist?" in dataset_refusal("MNIST")
    assert "digits, mnist, cifar10, cifar100, imagenet" in dataset_refusal("zebra")
    missing = tmp_path / "missing.npz"
    assert f"{missing} does not exist" in dataset_refusal(missing)
    assert "dataset is empty" in dataset_refusal("")
    text = tmp_path / "notes.txt"
    text.write_text("no images")
    assert f"dataset={text} is neither" in dataset_refusal(text)
    assert "image_size=0" in dataset_refusal("digits", image_size=0)


@pytest.mark.parametrize(
    ("name", "kind", "folder"),
    [
        ("mnist", "MNIST", "MNIST/raw"),
        ("cifar10", "CIFAR10", "cifar-10-batches-py"),
        ("cifar100", "CIFAR100", "cifar-100-python"),
    ],
)
def test_missing_torchvision_data_names_the_folder_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, folder: str
) -> None:
    import torchvision

    def no_network(dataset: Any) -> None:
        (Path(dataset.root) / folder).mkdir(parents=True)
        raise urllib.error.URLError("no\nnetwork")

    monkeypatch.setattr(getattr(torchvision.datasets, kind), "download", no_network)
    message = dataset_refusal(name, tmp_path / "data")
    assert str(tmp_path / "data" / folder) in message
    assert "data_root" in message
    assert ".npz" in message
    assert not (tmp_path / "data").exists()


def test_nothing_is_downloaded_that_is_not_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmetanas_core.data.datasets._download", lambda *_: pytest.fail("a download"))
    message = dataset_refusal("mnist", tmp_path / "data", download=False)
    assert message.startswith(f"mnist is not in {tmp_path / 'data' / 'MNIST' / 'raw'}; set data_root")
    assert not (tmp_path / "data").exists()


def test_restored_cifar_files_are_refused_without_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def never(dataset: Any) -> None:
        raise AssertionError("would overwrite the user's files")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", never)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"restored")
    message = dataset_refusal("cifar10", tmp_path)
    assert str(tmp_path / "cifar-10-batches-py") in message
    assert "md5" in message
    assert ".npz" in message


def test_damaged_mnist_files_are_refused(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{stem}-ubyte").write_bytes(b"\0\0\x08\x03 broken")
    assert str(raw) in dataset_refusal("mnist", tmp_path)


@pytest.mark.skipif(not SHARED_MNIST.is_dir(), reason=f"no prepared MNIST in {SHARED_MNIST}")
def test_prepared_mnist(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in SHARED_MNIST.glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    mnist = load_dataset("mnist", str(tmp_path), 0)
    assert (len(mnist.train), len(mnist.test)) == (60_000, 10_000)
    assert mnist.image_shape == (1, 28, 28)
    assert (mnist.mean, mnist.std) == NORMALISATION["mnist"]
    assert mnist.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    mean, std = channel_statistics(mnist.train)
    assert mean == pytest.approx(mnist.mean, abs=1e-4)
    assert std == pytest.approx(mnist.std, abs=1e-4)
