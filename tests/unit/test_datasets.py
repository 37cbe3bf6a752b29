"""Datasets by name, from .npz files and from class folders, and every refusal in one line."""

import gzip
import urllib.error
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedmetanas_core.data import image_files, image_folder
from fedmetanas_core.data.datasets import NORMALISATION, load_dataset
from fedmetanas_core.data.image_files import FileSplit, decode_image
from fedmetanas_core.data.splits import ArraySplit, channel_statistics, resize_images, stratified_holdout
from fedmetanas_core.errors import RefusalError, RunFailedError

SHARED_MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist" / "MNIST" / "raw"


def refusal(name: Any, data_root: Path | str = "nowhere", **options: Any) -> str:
    """The message with which load_dataset refuses, after checking its form."""
    with pytest.raises(RefusalError) as refused:
        load_dataset(str(name), str(data_root), 0, **options)
    message = str(refused.value)
    assert "\n" not in message
    assert "; " in message  # what is wrong; what to do
    return message


# --- digits ---------------------------------------------------------------------------------------------------


def test_digits_are_split_1437_to_360_stratified_and_the_same_for_every_seed() -> None:
    first, second = (load_dataset("digits", "nowhere", seed) for seed in (0, 1))
    assert (len(first.train), len(first.test)) == (1437, 360)
    assert first.image_shape == (1, 8, 8)
    assert first.greyscale
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
    assert not data.greyscale
    assert data.test.take(np.arange(3)).dtype == np.float32
    assert len(data.mean) == len(data.std) == 3


def test_npz_with_a_class_nobody_has(tmp_path: Path) -> None:
    path = save(tmp_path / "set.npz", y_train=np.array([0, 2] * 4 + [0], dtype=np.uint8), y_test=np.array([0, 2, 0]))
    assert load_dataset(str(path), "nowhere", 0).num_classes == 3


def test_npz_takes_the_classes_of_a_federation(tmp_path: Path) -> None:
    path = save(tmp_path / "set.npz", y_train=np.zeros(9, int), y_test=np.zeros(3, int))
    assert load_dataset(str(path), "nowhere", 0, class_names=("cat", "dog")).class_names == ("cat", "dog")
    assert "only the label 0" in refusal(path)


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
        ({"x_test": np.full((3, 4, 5), np.nan)}, "x_test has values from nan"),
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
    message = refusal(path)
    assert str(path) in message
    assert named in message


def test_npz_that_is_no_archive_or_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    path.write_bytes(b"")
    assert f"{path} is no .npz file" in refusal(path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(path)
    assert f"{path} is no .npz file" in refusal(path)
    whole = save(tmp_path / "whole.npz").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{path} is no .npz file" in refusal(path)
    path.write_bytes(whole[:200] + bytes(byte ^ 255 for byte in whole[200:260]) + whole[260:])
    assert f"{path} cannot be read" in refusal(path)


def test_npz_member_that_is_no_array(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for key in arrays():
            archive.writestr(f"{key}.npy", "just text")
    assert f"{path}: x_train is no numpy array" in refusal(path)


# --- names and paths ------------------------------------------------------------------------------------------


def test_unknown_names_and_paths(tmp_path: Path) -> None:
    assert "did you mean cifar10?" in refusal("cifra10")
    assert "did you mean mnist?" in refusal("MNIST")
    assert "digits, mnist, cifar10, cifar100, imagenet" in refusal("zebra")
    missing = tmp_path / "missing.npz"
    assert f"{missing} does not exist" in refusal(missing)
    assert "dataset is empty" in refusal("")
    text = tmp_path / "notes.txt"
    text.write_text("no images")
    assert f"dataset={text} is neither" in refusal(text)
    assert "image_size=0" in refusal("digits", image_size=0)


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
    message = refusal(name, tmp_path / "data")
    assert str(tmp_path / "data" / folder) in message
    assert "data_root" in message
    assert ".npz" in message
    assert not (tmp_path / "data").exists()


def test_restored_cifar_files_are_refused_without_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def never(dataset: Any) -> None:
        raise AssertionError("would overwrite the user's files")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", never)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"restored")
    message = refusal("cifar10", tmp_path)
    assert str(tmp_path / "cifar-10-batches-py") in message
    assert "md5" in message
    assert ".npz" in message


def test_damaged_mnist_files_are_refused(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{stem}-ubyte").write_bytes(b"\0\0\x08\x03 broken")
    assert str(raw) in refusal("mnist", tmp_path)


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


# --- class folders --------------------------------------------------------------------------------------------


def draw(path: Path, size: tuple[int, int] = (10, 8), mode: str = "RGB", value: int = 100) -> Path:
    """A plain image file of (width, height) in one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in ("L", "I;16", "1") else (value,) * len(mode)).save(path)
    return path


def fill(root: Path, count: int = 5, classes: tuple[str, ...] = ("cat", "dog"), **options: Any) -> Path:
    """`count` images in every class folder of `root`."""
    for label, name in enumerate(classes):
        for number in range(count):
            draw(root / name / f"{number}.png", value=50 * label + number, **options)
    return root


def test_a_fifth_of_each_class_is_held_out_by_the_seed(tmp_path: Path) -> None:
    fill(tmp_path, 10)
    data = load_dataset(str(tmp_path), "nowhere", 3)
    assert data.class_names == ("cat", "dog")
    assert data.image_shape == (3, 8, 10)
    assert np.bincount(data.train.labels).tolist() == [8, 8]
    assert np.bincount(data.test.labels).tolist() == [2, 2]
    assert isinstance(data.train, FileSplit)
    assert isinstance(data.test, FileSplit)
    assert not set(data.train.paths) & set(data.test.paths)
    held_out = []
    for seed in (3, 3, 4, 5, 6):
        test = load_dataset(str(tmp_path), "nowhere", seed).test
        assert isinstance(test, FileSplit)
        held_out.append(test.paths)
    assert held_out[0] == held_out[1] == data.test.paths
    assert len(set(held_out)) > 1


def test_own_test_folder_and_val_and_hidden_entries(tmp_path: Path) -> None:
    fill(tmp_path / "train", 3)
    fill(tmp_path / "val", 2)
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"resource fork")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    data = load_dataset(str(tmp_path), "nowhere", 0)
    assert (len(data.train), len(data.test)) == (6, 4)
    fill(tmp_path / "test", 1)
    assert len(load_dataset(str(tmp_path), "nowhere", 0).test) == 2


def test_train_folder_alone_is_divided(tmp_path: Path) -> None:
    fill(tmp_path / "train", 5)
    data = load_dataset(str(tmp_path), "nowhere", 0)
    assert data.class_names == ("cat", "dog")
    assert (len(data.train), len(data.test)) == (8, 2)


def test_pixels_labels_and_normalisation(tmp_path: Path) -> None:
    fill(tmp_path / "train", 2, mode="L")  # values 0, 1 and 50, 51
    fill(tmp_path / "test", 1, mode="L")
    data = load_dataset(str(tmp_path), "nowhere", 0)
    assert data.greyscale
    images = data.train.take(np.array([3, 0]))
    assert images.shape == (2, 8, 10, 1)
    assert images[:, 0, 0, 0].tolist() == [51, 0]
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert data.mean == pytest.approx([25.5 / 255])


def test_mixed_sizes_become_squares_of_the_smallest_short_side(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    draw(tmp_path / "cat" / "wide.jpg", (300, 9))
    assert load_dataset(str(tmp_path), "nowhere", 0).image_shape == (3, 8, 8)
    assert load_dataset(str(tmp_path), "nowhere", 0, image_size=16).image_shape == (3, 16, 16)


def test_large_images_become_224_squares(tmp_path: Path) -> None:
    fill(tmp_path, 2, size=(230, 226))
    assert load_dataset(str(tmp_path), "nowhere", 0).image_shape == (3, 224, 224)


def test_one_colour_image_makes_the_set_colour(tmp_path: Path) -> None:
    fill(tmp_path, 4, mode="L")
    draw(tmp_path / "dog" / "colour.png")
    assert load_dataset(str(tmp_path), "nowhere", 0).image_shape[0] == 3


def test_decode_cuts_the_centre_and_scales_sixteen_bits(tmp_path: Path) -> None:
    stripes = np.zeros((4, 12), dtype=np.uint8)
    stripes[:, 4:8] = 200
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert decode_image(tmp_path / "stripes.png", (4, 4, 1)).tolist() == np.full((4, 4, 1), 200).tolist()
    Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert decode_image(tmp_path / "deep.png", (2, 2, 3)).tolist() == np.full((2, 2, 3), 128).tolist()
    # A palette with transparency, and an image a pixel high.
    Image.new("P", (3, 3), 0).save(tmp_path / "palette.gif", transparency=0)
    assert decode_image(tmp_path / "palette.gif", (3, 3, 3)).shape == (3, 3, 3)
    draw(tmp_path / "line.png", (500, 1))
    assert decode_image(tmp_path / "line.png", (5, 5, 3)).tolist() == np.full((5, 5, 3), 100).tolist()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_corrupt_image_is_refused_by_name(tmp_path: Path, split: str) -> None:
    fill(tmp_path / "train", 3)
    fill(tmp_path / "test", 3)
    broken = tmp_path / split / "dog" / "broken.jpg"
    Image.effect_noise((64, 64), 50).save(broken)
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])  # the header is fine, the pixels are not
    assert str(broken) in refusal(tmp_path)
    broken.write_bytes(b"")
    assert str(broken) in refusal(tmp_path)


def test_a_corrupt_image_met_later_fails_the_run_by_name(tmp_path: Path) -> None:
    fill(tmp_path / "train", 3)
    fill(tmp_path / "test", 3)
    data = load_dataset(str(tmp_path), "nowhere", 0, check=False)
    broken = tmp_path / "test" / "dog" / "2.png"
    broken.write_bytes(b"\x89PNG\n")
    with pytest.raises(RunFailedError, match=r"dog/2\.png cannot be decoded"):
        data.test.take(np.arange(6))


def test_checking_decodes_once_and_a_sample_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 10)
    decoded: list[str] = []

    def counting(path: str, shape: tuple[int, int, int]) -> Any:
        decoded.append(path)
        return decode_image(path, shape)

    monkeypatch.setattr(image_files, "decode_image", counting)
    data = load_dataset(str(tmp_path), "nowhere", 0)
    data.train.take(np.arange(16))
    assert len(decoded) == 20  # kept in memory since they fit
    decoded.clear()
    monkeypatch.setattr(image_folder, "CHECKED_IMAGES", 4)
    monkeypatch.setattr(image_folder, "STATISTICS_IMAGES", 1)
    monkeypatch.setattr(image_folder, "CACHE_BYTES", 0)
    data = load_dataset(str(tmp_path), "nowhere", 0)
    assert 4 <= len(decoded) <= 6
    assert data.train.take(np.array([1, 1])).shape == (2, 8, 10, 3)


def test_layout_refusals(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty} has no class folders" in refusal(empty)
    one = fill(tmp_path / "one", classes=("cat",))
    assert "only the class folder cat" in refusal(one)
    hollow = fill(tmp_path / "hollow")
    (hollow / "emu").mkdir()
    assert f"{hollow / 'emu'} has no images" in refusal(hollow)
    single = fill(tmp_path / "single", 1)
    assert f"{single} has one image a class" in refusal(single)
    unknown = tmp_path / "unknown"
    fill(unknown / "train")
    fill(unknown / "test", classes=("cat", "emu"))
    assert "emu" in refusal(unknown)
    flat = tmp_path / "flat"
    fill(flat / "train")
    draw(flat / "test" / "0.png")
    assert f"{flat / 'test'} has no class folders" in refusal(flat)


def test_a_machine_with_one_of_the_federations_classes(tmp_path: Path) -> None:
    fill(tmp_path, 5, classes=("dog",))
    data = load_dataset(str(tmp_path), "nowhere", 0, class_names=("cat", "dog", "emu"))
    assert data.num_classes == 3
    assert set(data.train.labels) == {1}
    assert "dog" in refusal(tmp_path, class_names=("cat", "emu"))


def test_imagenet_layout(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    fill(root / "train", 3, size=(40, 36), mode="L")
    draw(root / "train" / "cat" / "thumbnail.JPEG", (9, 7))
    fill(root / "val", 2, size=(50, 34))
    draw(root / "test" / "unlabelled.png")
    data = load_dataset("imagenet", str(tmp_path), 0)
    assert data.image_shape == (3, 36, 36)  # short sides 36 (six times), 34 (four times) and 7
    assert (data.mean, data.std) == NORMALISATION["imagenet"]
    assert (len(data.train), len(data.test)) == (7, 4)
    assert load_dataset("imagenet", str(root), 0).train.labels.tolist() == [0] * 4 + [1] * 3
    message = refusal("imagenet", tmp_path / "elsewhere")
    assert str(tmp_path / "elsewhere") in message
    assert "data_root" in message
