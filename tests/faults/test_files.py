"""Files that somebody else made: pickles, bombs and names that point elsewhere are refused before any harm."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmetanas_core.data import npz
from fedmetanas_core.data.datasets import load_dataset
from fedmetanas_core.errors import FedMetaNASError, RefusalError
from fedmetanas_core.run.checkpoint import load_checkpoint
from fedmetanas_core.space.genotype import Genotype
from fedmetanas_core.space.network import ImageFormat, Network, load_network, save_network
from fedmetanas_core.space.spec import SpaceSpec

HARMED = []


class Harm:
    """Does its harm when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return HARMED.append, (1,)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The model folder of a small network."""
    genotype = Genotype.from_dict(
        {kind: [[["sep_conv_3x3", 0], ["skip_connect", 1]]] * 2 for kind in ("normal", "reduce")}
    )
    network = Network(genotype, SpaceSpec(2, 3, 2, 1, 10, 8, 8))
    save_network(network, tmp_path / "model", ImageFormat((0.5,), (0.5,), tuple("abcdefghij")))
    load_network(tmp_path)
    return tmp_path / "model"


def zip_bomb(path: Path) -> None:
    """Ten kilobytes that unpack to ten megabytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in npz.KEYS:
            archive.writestr(f"{key}.npy", bytes(2_500_000))


def test_a_weights_file_that_is_a_pickle_or_an_archive_is_refused_and_not_unpickled(model: Path) -> None:
    weights = model / "weights.safetensors"
    tensors = load_file(weights)
    for spoil in (
        lambda: weights.write_bytes(pickle.dumps({"a": Harm()})),
        lambda: torch.save({"a": Harm(), **tensors}, weights),
        lambda: zip_bomb(weights),
    ):
        spoil()
        with pytest.raises(FedMetaNASError, match=f"{model} does not hold a complete network"):
            load_network(model)
    assert not HARMED


def test_a_name_that_points_elsewhere_is_refused(model: Path) -> None:
    weights = model / "weights.safetensors"
    save_file({**load_file(weights), "../../beside": torch.zeros(1)}, weights)
    with pytest.raises(FedMetaNASError, match=r"holds '\.\./\.\./beside', which this network has not"):
        load_network(model)
    assert not (model.parent.parent / "beside").exists()


def test_a_network_of_absurd_size_is_refused_before_it_is_built(model: Path) -> None:
    file = model / "genotype.json"
    facts = json.loads(file.read_text())
    facts["space"]["num_cells"] = 10**9
    file.write_text(json.dumps(facts))
    with pytest.raises(FedMetaNASError, match="num_cells: 1000000000 is out of range"):
        load_network(model)


def test_a_state_that_is_a_pickle_or_an_archive_is_refused_and_not_unpickled(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    for spoil in (lambda: state.write_bytes(pickle.dumps(Harm())), lambda: zip_bomb(state)):
        spoil()
        with pytest.raises(FedMetaNASError, match=r"state\.safetensors"):
            load_checkpoint(tmp_path)
    assert not HARMED


def test_an_archive_of_images_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.npz"
    zip_bomb(path)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(npz.os, "sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 15_000}.__getitem__)
    with pytest.raises(RefusalError, match=r"unpacks to 0\.0 GB, more than half of this machine's memory"):
        load_dataset(str(path), "data", 0)


def test_an_archive_of_pickled_images_is_refused_and_not_unpickled(tmp_path: Path) -> None:
    images = np.array([Harm()] * 4, dtype=object)
    np.savez(tmp_path / "own.npz", x_train=images, y_train=[0, 1, 0, 1], x_test=images, y_test=[0, 1, 0, 1])
    with pytest.raises(RefusalError, match="x_train holds pickled Python objects, which are never loaded"):
        load_dataset(str(tmp_path / "own.npz"), "data", 0)
    assert not HARMED
