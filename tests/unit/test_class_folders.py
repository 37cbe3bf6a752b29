"""Folders of class folders: layout, sizes, colour, corrupt files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import dataset_refusal
from PIL import Image, ImageOps

from fedmetanas_core.data import image_files, image_folder
from fedmetanas_core.data.datasets import NORMALISATION, load_dataset
from fedmetanas_core.data.image_files import FileSplit, decode_image
from fedmetanas_core.data.image_folder import load_class_folders
from fedmetanas_core.errors import RefusalError, RunFailedError


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
    assert data.image_shape[0] == 1
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


@pytest.mark.parametrize(("size", "shape"), [((61, 37), (24, 24, 3)), ((30, 90), (20, 16, 1)), ((16, 16), (16, 16, 3))])
def test_images_are_read_as_the_documentation_reads_them(
    tmp_path: Path, size: tuple[int, int], shape: tuple[int, int, int]
) -> None:
    """What docs/tutorial.md tells people to do with Pillow before they ask an exported network."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    picture = Image.open(tmp_path / "a.png").convert("L" if shape[2] == 1 else "RGB")
    fitted = np.asarray(ImageOps.fit(picture, (shape[1], shape[0]), Image.Resampling.BILINEAR)).reshape(shape)
    assert np.array_equal(decode_image(tmp_path / "a.png", shape), fitted)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_corrupt_image_is_refused_by_name(tmp_path: Path, split: str) -> None:
    fill(tmp_path / "train", 3)
    fill(tmp_path / "test", 3)
    broken = tmp_path / split / "dog" / "broken.jpg"
    Image.effect_noise((64, 64), 50).save(broken)
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])  # the header is fine, the pixels are not
    assert str(broken) in dataset_refusal(tmp_path)
    broken.write_bytes(b"")
    assert str(broken) in dataset_refusal(tmp_path)


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
    assert f"{empty} has no class folders" in dataset_refusal(empty)
    one = fill(tmp_path / "one", classes=("cat",))
    assert "only the class folder cat" in dataset_refusal(one)
    hollow = fill(tmp_path / "hollow")
    (hollow / "emu").mkdir()
    assert f"{hollow / 'emu'} has no images" in dataset_refusal(hollow)
    single = fill(tmp_path / "single", 1)
    assert f"{single} has one image a class" in dataset_refusal(single)
    unknown = tmp_path / "unknown"
    fill(unknown / "train")
    fill(unknown / "test", classes=("cat", "emu"))
    assert "emu" in dataset_refusal(unknown)
    flat = tmp_path / "flat"
    fill(flat / "train")
    draw(flat / "test" / "0.png")
    assert f"{flat / 'test'} has no class folders" in dataset_refusal(flat)


def test_a_machine_with_one_of_the_federations_classes(tmp_path: Path) -> None:
    fill(tmp_path, 5, classes=("dog",))
    data = load_class_folders(tmp_path, "site", 0, class_names=("cat", "dog", "emu"))
    assert data.num_classes == 3
    assert set(data.train.labels) == {1}
    with pytest.raises(RefusalError, match=r"dog.*; "):
        load_class_folders(tmp_path, "site", 0, class_names=("cat", "emu"))


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
    message = dataset_refusal("imagenet", tmp_path / "elsewhere")
    assert str(tmp_path / "elsewhere") in message
    assert "data_root" in message
