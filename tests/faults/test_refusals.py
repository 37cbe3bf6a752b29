"""Bad input: one line on stderr, exit 2, nothing on stdout, nothing started, nothing written."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmetanas_core import cli, launch
from fedmetanas_core.commands import search


def corrupt_folder(directory: Path) -> str:
    for name in ("cat", "dog"):
        (directory / "photos" / name).mkdir(parents=True)
        for index in range(6):
            Image.new("RGB", (16, 16), (index * 40, 0, 0)).save(directory / "photos" / name / f"{index}.png")
    (directory / "photos" / "dog" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    return "photos"


def npz(**changes: np.ndarray | None) -> Callable[[Path], str]:
    def write(directory: Path) -> str:
        arrays = {
            "x_train": np.zeros((20, 8, 8), np.uint8),
            "y_train": np.arange(20) % 2,
            "x_test": np.zeros((10, 8, 8), np.uint8),
            "y_test": np.arange(10) % 2,
        }
        arrays.update({key: value for key, value in changes.items() if value is not None})
        np.savez(
            directory / "own.npz", **{k: v for k, v in arrays.items() if k not in changes or changes[k] is not None}
        )
        return "own.npz"

    return write


BAD_DATA: dict[str, tuple[Callable[[Path], str], str]] = {
    "three arrays": (npz(y_test=None), "y_test"),
    "lengths differ": (npz(y_train=np.arange(19) % 2), "y_train"),
    "pickled objects": (npz(x_train=np.array([{"a": 1}] * 20, dtype=object)), "x_train"),
    "corrupt image": (corrupt_folder, "3.png"),
    "too small": (npz(x_train=np.zeros((20, 4, 4), np.uint8), x_test=np.zeros((10, 4, 4), np.uint8)), "too small"),
    "no such path": (lambda directory: "missing.npz", "missing.npz"),
    "no such name": (lambda directory: "cifar11", "cifar10"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, named = BAD_DATA[case]
    refused([f"dataset={make(tmp_path)}"], named, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["dir_alpha=0"], "dir_alpha"),
        (["dir_alpha=-1"], "dir_alpha"),
        (["dir_alpha=nan"], "dir_alpha"),
        (["dir_alpha=oops"], "dir_alpha"),
        (["dir_alhpa=0.1"], "dir_alpha"),
        (["num_rounds=0"], "num_rounds"),
        (["local_epochs=0"], "local_epochs"),
        (["batch_size=0"], "batch_size"),
        (["clients_per_round=101"], "clients_per_round"),
        (["workers=6"], "workers"),
        (["method=fedmetanass"], "fedmetanas"),
        (["run_name=a/b"], "run_name"),
        (["run_name=.."], "run_name"),
        (["run_name=taken"], "taken"),
        (["runs_dir=/proc/nowhere"], "/proc/nowhere"),
        (["resume=somewhere"], "somewhere is not a run folder"),
        (["resume=runs/taken"], "taken is not a run folder: it has no config.yaml"),
        (["resume=runs/taken", "seed=2"], "seed: a resumed run has its own"),
        (["seed"], "KEY=VALUE"),
        (["--config", "absent.toml"], "absent.toml"),
        (["partition=label_skew", "classes_per_client=11"], "classes_per_client"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    refused(arguments, named, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(("pair", "named"), [("device=cuda", "device: cuda"), ("precision=bfloat16", "precision")])
def test_a_gpu_that_is_not_there_is_refused(
    pair: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    # Before the data, which may have to be downloaded.
    monkeypatch.setattr("fedmetanas_core.preflight.load_dataset", lambda *_, **__: pytest.fail("data was loaded"))
    refused([pair], named, tmp_path, monkeypatch, capsys)


def refused(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit 2, one line on stderr that names the culprit, nothing on stdout, nothing started, nothing written."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(launch, "Simulation", started)
    monkeypatch.setattr(search, "install_profiles", started)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["search", *arguments]) == cli.REFUSED
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert named in err
    assert sorted(tmp_path.rglob("*")) == before
