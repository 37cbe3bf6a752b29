"""What nodes tell of their own images, what they agree on, and what makes one unfit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmetanas_core.config import Config
from fedmetanas_core.data.sites import (
    Agreement,
    SiteFacts,
    agree,
    describe_site,
    load_site,
    load_test_images,
    unfit,
)
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.preflight import agreed, prepare_experiment, with_agreement


def folders(root: Path, classes: dict[str, int], size: tuple[int, int] = (8, 8), colour: bool = False) -> Path:
    """Class folders with so many images each; the pixels are the class's number times 50."""
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB" if colour else "L", size, (50 * number,) * 3 if colour else 50 * number).save(
                root / name / f"{index}.png"
            )
    return root


def archive(path: Path, labels: list[int], side: int = 8, channels: int = 1) -> Path:
    images = np.zeros((len(labels), side, side, channels), np.uint8)
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return path


def facts(
    names: str = "a,b", shape: tuple[int, int, int] = (1, 8, 8), numbered: bool = False, **more: object
) -> SiteFacts:
    told = {"train": 10, "test": 2, "mean": (0.5,) * shape[0], "std": (0.25,) * shape[0], **more}
    return SiteFacts(class_names=tuple(names.split(",")), image_shape=shape, numbered=numbered, **told)  # type: ignore[arg-type]


def test_a_node_tells_counts_classes_shape_and_moments(tmp_path: Path) -> None:
    site = describe_site(str(folders(tmp_path / "own", {"cat": 10, "dog": 5})), 0, None)
    assert (site.train, site.test) == (12, 3)  # a fifth of each is held out
    assert (site.class_names, site.image_shape, site.numbered) == (("cat", "dog"), (1, 8, 8), False)
    # 8 cats of 0 and 4 dogs of 50/255: the mean is a third of that
    assert site.mean == pytest.approx((50 / 255 / 3,))
    assert SiteFacts.from_json(site.to_json()) == site
    with pytest.raises(ValueError, match="cannot be read"):
        SiteFacts.from_json("{}")


def test_a_node_of_one_class_can_take_part(tmp_path: Path) -> None:
    site = describe_site(str(folders(tmp_path / "own", {"cat": 10})), 0, None)
    agreement, reasons = agree({"a": site, "b": facts("cat,dog")})
    assert (agreement.class_names, reasons) == (("cat", "dog"), {})
    data = load_site(str(tmp_path / "own"), agreement, 0)
    assert set(data.train.labels) == {0}
    assert (data.mean, data.std, data.class_names) == (agreement.mean, agreement.std, ("cat", "dog"))


def test_moments_are_pooled_as_if_the_images_lay_together() -> None:
    generator = np.random.default_rng(0)
    parts = [generator.random((count, 3)) for count in (7, 20)]
    sites = {
        str(number): facts(shape=(3, 8, 8), train=len(part), mean=tuple(part.mean(0)), std=tuple(part.std(0)))
        for number, part in enumerate(parts)
    }
    agreement, _ = agree(sites)
    together = np.concatenate(parts)
    assert agreement.mean == pytest.approx(tuple(together.mean(0)), abs=1e-6)
    assert agreement.std == pytest.approx(tuple(together.std(0)), abs=1e-6)


def test_classes_are_those_of_all_nodes_and_numbers_are_counted_as_numbers() -> None:
    assert agree({"a": facts("dog,cat"), "b": facts("cow,cat")})[0].class_names == ("cat", "cow", "dog")
    numbered = facts(",".join(map(str, range(11))), numbered=True)
    assert agree({"a": numbered, "b": facts("2,10")})[0].class_names == tuple(map(str, range(11)))


def test_most_nodes_decide_on_shape_and_kind_of_labels() -> None:
    numbers, large = facts("0,1", numbered=True), facts("0,1", (1, 16, 16), numbered=True)
    agreement, reasons = agree({"a": numbers, "b": large, "c": numbers})
    assert agreement.image_shape == (1, 8, 8)
    assert reasons == {
        "b": "its images are 1x16x16, those of the run 1x8x8; set image_size, or bring them to one shape"
    }
    agreement, reasons = agree({"a": facts(), "b": facts(), "c": numbers})
    assert agreement.class_names == ("a", "b")
    assert "its labels are numbers, those of most nodes names" in reasons["c"]
    # Files are read at any shape: the largest square that all of them fill, in colour if any is.
    assert agree({"a": facts(shape=(1, 9, 40)), "b": facts(shape=(3, 20, 20))})[0].image_shape == (3, 9, 9)
    assert agree({"a": facts(shape=(1, 9, 12)), "b": facts(shape=(1, 9, 12))})[0].image_shape == (1, 9, 12)


def test_what_is_fixed_beforehand_stays_and_decides_who_fits() -> None:
    sites = {"a": facts("a,b"), "b": facts("a,typo"), "c": facts("0,1,2", numbered=True)}
    given = (("a", "b"), (1, 8, 8), ((0.5,), (0.2,)))
    agreement, reasons = agree(sites, *given)
    assert agreement == Agreement(*given[:2], *given[2])
    assert reasons == {
        "b": "it has classes that the run does not know: typo",
        "c": "its labels are numbers, the classes of the run names (a, b); give it class folders",
    }
    assert unfit(facts("b"), agreement) is None
    digits = Agreement(("0", "1"), (1, 8, 8), (0.5,), (0.2,))
    assert unfit(facts("0,1,2", numbered=True), digits) == "its labels go up to 2, the run has 2 classes"


def test_what_a_configuration_cannot_hold_or_a_network_cannot_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match="class name 'Smith, John' has a comma"):
        describe_site(str(folders(tmp_path / "own", {"Smith, John": 5, "Doe": 5})), 0, None)
    for side, channels in ((4, 1), (8, 4)):
        with pytest.raises(RefusalError, match=f"holds images of {channels}x{side}x{side}; give grey or colour images"):
            describe_site(str(archive(tmp_path / "odd.npz", [0, 1], side, channels)), 0, None)


@pytest.mark.parametrize(
    "claim",
    [
        {"train": 0},
        {"train": 10**12},
        {"test": -1},
        {"mean": (float("nan"),)},
        {"std": (0.1, 0.1)},
        {"class_names": ("x" * 300,)},
        {"class_names": ()},
        {"image_shape": (1, 8, 10**6)},
    ],
    ids=str,
)
def test_what_no_node_can_have_is_not_believed(claim: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="facts that no node can have"):
        SiteFacts.from_json(replace(facts(), **claim).to_json())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be read"):
        SiteFacts.from_json(facts().to_json().replace('"train": 10', '"train": Infinity'))


def test_a_dataset_without_a_path_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    agreement = Agreement(("0", "1"), (1, 8, 8), (0.5,), (0.2,))
    for path, what in (("", "no data-path"), (str(tmp_path / "none"), "does not exist on this node")):
        with pytest.raises(RefusalError, match=what):
            load_site(path, agreement, 0)
    other = archive(tmp_path / "other.npz", [0, 1], side=16)
    with pytest.raises(RefusalError, match="holds images of 1x16x16, this run's are 1x8x8; set image_size"):
        load_site(str(other), agreement, 0)
    assert load_site(str(other), agreement, 0, image_size=8).image_shape == (1, 8, 8)


def test_image_files_are_read_in_the_shape_of_the_run(tmp_path: Path) -> None:
    root = folders(tmp_path / "own", {"a": 5, "b": 5}, (20, 12), colour=True)
    agreement = Agreement(("a", "b"), (1, 8, 8), (0.1,), (0.2,))
    data = load_site(str(root), agreement, 0)
    assert data.train.take(np.arange(2)).shape == (2, 8, 8, 1)


def test_test_images_are_all_that_are_not_split(tmp_path: Path) -> None:
    agreement = Agreement(("a", "b"), (1, 8, 8), (0.1,), (0.2,))
    loose = folders(tmp_path / "loose", {"a": 5, "b": 5})
    assert len(load_test_images(str(loose), agreement, 0)) == 10
    folders(tmp_path / "split" / "train", {"a": 5, "b": 5})
    folders(tmp_path / "split" / "val", {"a": 1, "b": 2})
    assert len(load_test_images(str(tmp_path / "split"), agreement, 0)) == 3


def test_the_agreement_is_part_of_the_configuration(tmp_path: Path) -> None:
    agreement = Agreement(("cat", "dog"), (3, 8, 8), (0.1, 0.2, 0.3), (0.2, 0.3, 0.4))
    config = with_agreement(Config.from_mapping({"dataset": "nodes"}), agreement)
    assert agreed(Config.from_mapping(config.to_dict())) == agreement
    experiment = prepare_experiment(config, tmp_path)
    assert (experiment.spec.num_classes, experiment.spec.in_channels) == (2, 3)
    assert len(experiment.dataset.test) == 0
    folders(tmp_path / "measure", {"cat": 4, "dog": 4}, colour=True)
    config = with_agreement(Config.from_mapping({"dataset": "nodes", "test_data": "measure"}), agreement)
    experiment = prepare_experiment(config, tmp_path)
    assert len(experiment.dataset.test) == 8
    assert experiment.config.test_data == str(tmp_path / "measure")


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({}, "dataset: nodes stands for the images of real machines"),
        ({"class_names": "a"}, "class_names: 'a' is no list of two or more names"),
        ({"class_names": "a,a"}, "class_names"),
        ({"image_shape": "8x8"}, "image_shape: '8x8' is no shape"),
        ({"image_shape": "2x8x8"}, "image_shape"),
        ({"image_shape": "wide"}, "image_shape: 'wide' cannot be read"),
        ({"pixel_mean": "0.5"}, "pixel_mean: it comes with pixel_std"),
        ({"pixel_mean": "0.5", "pixel_std": "0"}, "pixel_mean"),
        ({"image_shape": "3x8x8", "pixel_mean": "0.5", "pixel_std": "0.2"}, "give one each a channel"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys: dict[str, str], what: str, tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match=what):
        prepare_experiment(Config.from_mapping({"dataset": "nodes", **keys}), tmp_path)


@pytest.mark.parametrize("keys", [{"unseen_clients": 2}, {"protocol": "disjoint"}])
def test_keys_that_divide_a_dataset_are_refused(keys: dict[str, object], tmp_path: Path) -> None:
    fixed = {"class_names": "a,b", "image_shape": "1x8x8", "pixel_mean": "0.5", "pixel_std": "0.2"}
    with pytest.raises(RefusalError, match="it divides one dataset"):
        prepare_experiment(Config.from_mapping({"dataset": "nodes", **fixed, **keys}), tmp_path)
