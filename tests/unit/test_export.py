"""Exported networks: the same answers from the file, whatever the network and the batch; a wrong file is not kept."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from found import NAMES, completed_run, found_network, image_format, pixels, trained
from helpers import small_spec

from fedmetanas_core import cli
from fedmetanas_core.errors import FedMetaNASError
from fedmetanas_core.output import export as exporting
from fedmetanas_core.output.classifier import Classifier, Floats, classifier_of_network, image_shape
from fedmetanas_core.output.export import FORMS, PROBES, Deployed, check_agreement, export
from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.fixed import FixedNetwork, FixedSpec
from fedmetanas_core.space.genotype import Genotype
from fedmetanas_core.space.network import load_network
from fedmetanas_core.space.spec import PRIMITIVES, SpaceSpec

ROOT = Path(__file__).resolve().parents[2]
TEN = (*NAMES, *"abcdefg")


def everything() -> Genotype:
    """Every operation in both cells, two of a kind on one source, and pooling of inputs and of nodes."""
    names = PRIMITIVES[1:]
    nodes = tuple(((names[2 * i], 0), (names[(2 * i + 1) % 7], 1 + i)) for i in range(4))
    mirrored = tuple(((names[-1 - 2 * i], 1), (names[(5 - 2 * i) % 7], 0)) for i in range(4))
    found = {name for node in nodes for name, _ in node}
    assert found == {name for node in mirrored for name, _ in node} == set(names)
    return Genotype(nodes, mirrored)


# Digits of odd height, MNIST, CIFAR-10, large images, and MobileNet on maps of one pixel; both norms, all stems.
NETWORKS: dict[str, Callable[[], TrainableNetwork]] = {
    "digits, every operation": lambda: found_network(SpaceSpec(2, 3, 4, 1, 3, 9, 8), 1, everything()),
    "mnist, personal cells": lambda: found_network(
        SpaceSpec(2, 4, 1, 1, 3, 28, 28, stem="stride2", personal_cells=1, auxiliary=True), 3
    ),
    "cifar10": lambda: found_network(SpaceSpec(2, 4, 2, 3, 3, 32, 32), 4),
    "large images, group norm": lambda: found_network(
        SpaceSpec(4, 3, 1, 3, 3, 97, 96, stem="imagenet", norm="group"), 5
    ),
    "fixed": lambda: trained(FixedNetwork(FixedSpec("mobilenet_v3_large", 1, 3, 8, 8)), 7),
}


def largest(first: Classifier, second: Classifier, batch: Floats) -> float:
    return float(max(np.abs(a - b).max() for a, b in zip(first.run(batch), second.run(batch), strict=True)))


# MobileNet's 17 MB take long; its program is traced for ONNX as well.
CASES = [(name, form) for name in NETWORKS for form in FORMS if (name, form) != ("fixed", "torch")]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_file_answers_as_the_network_does(name: str, form: str, tmp_path: Path) -> None:
    network = NETWORKS[name]()
    shape = image_shape(network)
    images, path = image_format(shape[0]), tmp_path / FORMS[form][0]
    difference = export(network, images, form, path, pixels(PROBES, shape))
    assert difference <= 5e-5
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    loaded, own = FORMS[form][2](path), classifier_of_network(network, images)
    for size in (1, 3, 17):
        assert largest(own, loaded, pixels(size, shape, seed=size)) <= 5e-5
    logits, probabilities = loaded.run(pixels(17, shape))
    assert logits.std(0).max() > 0.02  # what all images have in common would hide differences
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), probabilities, atol=1e-6)
    assert (loaded.class_names, loaded.image_shape) == (NAMES, shape)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small network in both forms."""
    place, network = tmp_path_factory.mktemp("files"), found_network(small_spec(num_nodes=1, num_classes=10), 1)
    for form, (name, _, _) in FORMS.items():
        export(network, image_format(1, TEN), form, place / name, pixels(PROBES, (1, 8, 8)))
    return {form: place / name for form, (name, _, _) in FORMS.items()}


FACTS = {"class_names": list(TEN), "image_shape": [1, 8, 8], "mean": [0.3], "std": [0.2]}


def test_onnx_says_what_it_is(files: dict[str, Path]) -> None:
    model = onnx.load(files["onnx"])
    onnx.checker.check_model(model, full_check=True)
    assert {entry.key: json.loads(entry.value) for entry in model.metadata_props} == FACTS
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert model.ir_version == 8

    def shape(value: onnx.ValueInfoProto) -> tuple[str, list[object]]:
        kind = value.type.tensor_type
        assert kind.elem_type == onnx.TensorProto.FLOAT
        return value.name, [side.dim_param or side.dim_value for side in kind.shape.dim]

    assert [shape(value) for value in model.graph.input] == [("images", ["batch", 1, 8, 8])]
    assert [shape(value) for value in model.graph.output] == [
        ("logits", ["batch", 10]),
        ("probabilities", ["batch", 10]),
    ]


def test_a_torch_program_says_what_it_is(files: dict[str, Path]) -> None:
    told = {"network.json": ""}
    program = torch.export.load(files["torch"], extra_files=told)
    assert json.loads(told["network.json"]) == FACTS
    assert program.graph_signature.user_inputs == ("images",)
    logits, probabilities = program.module()(torch.zeros(5, 1, 8, 8))
    assert logits.shape == probabilities.shape == (5, 10)
    assert not logits.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_a_file_tells_nothing_of_the_machine_it_was_made_on(form: str, files: dict[str, Path]) -> None:
    import zipfile

    content = files[form].read_bytes()
    if form == "torch":
        with zipfile.ZipFile(files[form]) as archive:
            content = b"".join(archive.read(name) for name in archive.namelist())
    for word in (str(ROOT), "site-packages", "operations.py", str(Path.home())):
        assert word.encode() not in content, word


def test_a_file_that_differs_is_not_kept_and_the_old_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, path = found_network(small_spec(num_nodes=1), 1), tmp_path / "network.pt2"
    path.write_bytes(b"old")

    def without_normalisation(self: Deployed, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.network.forward_by_modules(images)  # type: ignore[operator]
        return logits, logits.softmax(1)

    monkeypatch.setattr(Deployed, "forward", without_normalisation)
    probes, images = pixels(PROBES, (1, 8, 8)), image_format(1)
    with pytest.raises(FedMetaNASError, match="differs from the found one by") as caught:
        export(network, images, "torch", path, probes)
    with torch.no_grad():
        raw, right = (network(each) for each in (torch.from_numpy(probes), images.normalise(probes)))
    expected = max(float((raw - right).abs().max()), float((raw.softmax(1) - right.softmax(1)).abs().max()))
    assert float(str(caught.value).split(" by ")[1].split(",")[0]) == pytest.approx(expected, rel=0.01)
    assert [file.name for file in tmp_path.iterdir()] == ["network.pt2"]
    assert path.read_bytes() == b"old"


def test_what_cannot_be_read_again_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, load = FORMS["onnx"]
    monkeypatch.setattr(exporting, "FORMS", {"onnx": (name, lambda *_: b"nonsense", load)})
    with pytest.raises(FedMetaNASError, match="cannot be read again"):
        export(found_network(small_spec(), 1), image_format(1), "onnx", tmp_path / name, pixels(PROBES, (1, 8, 8)))
    assert list(tmp_path.iterdir()) == []


def test_what_torch_cannot_export_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def depends_on_pixels(self: Deployed, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (images, images) if images.sum() > 0 else (images + 1, images)

    monkeypatch.setattr(Deployed, "forward", depends_on_pixels)
    with pytest.raises(FedMetaNASError, match="cannot be written as torch") as caught:
        export(found_network(small_spec(), 1), image_format(1), "torch", tmp_path / "a", pixels(PROBES, (1, 8, 8)))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def constant(logits: list[float]) -> Classifier:
    """Gives every image the same answer."""

    def run(batch: Floats) -> tuple[Floats, Floats]:
        answer = np.tile(np.array(logits, dtype=np.float32), (len(batch), 1))
        return answer, np.zeros_like(answer)

    return Classifier(("a", "b"), (1, 8, 8), run)


def test_the_largest_difference_counts_in_whichever_batch_it_is() -> None:
    probes = pixels(PROBES, (1, 8, 8))
    assert check_agreement(constant([1.0, 2.0]), constant([1.0, 2.0 + 2**-14]), probes) == 2**-14
    with pytest.raises(FedMetaNASError, match=r"by 0\.25, more than 0\.0001"):
        check_agreement(constant([1.0, 2.0]), constant([0.75, 2.0]), probes)
    sizes = []

    def run(batch: Floats) -> tuple[Floats, Floats]:
        sizes.append(len(batch))
        off = np.zeros((len(batch), 2), dtype=np.float32)
        off[-1, 0] = 0.5 * (len(batch) == 17)  # a single number of the last image of the larger batch
        return off, off

    with pytest.raises(FedMetaNASError, match=r"by 0\.5,"):
        check_agreement(constant([0.0, 0.0]), Classifier(("a", "b"), (1, 8, 8), run), probes)
    assert sizes == [1, 17]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_never_agrees(value: float) -> None:
    probes = pixels(PROBES, (1, 8, 8))
    with pytest.raises(FedMetaNASError, match=r"differs from the found one by (nan|inf)"):
        check_agreement(constant([1.0, 2.0]), constant([1.0, value]), probes)
    with pytest.raises(FedMetaNASError, match="the network itself gives no numbers"):
        check_agreement(constant([1.0, value]), constant([1.0, value]), probes)


# ---- the command


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return completed_run(tmp_path_factory.mktemp("runs"), clients=(0, 3))


def said(capfd: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    out, err = capfd.readouterr()
    return out.splitlines(), err.splitlines()


@pytest.mark.parametrize(("form", "name"), [("torch", "network.pt2"), ("onnx", "network.onnx")])
def test_export_writes_into_the_run_and_says_what_it_checked(
    form: str, name: str, run_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = run_folder / "model" / "clients" / "3"
    assert cli.main(["export", str(run_folder), "--format", form, "--client", "3"]) == cli.COMPLETED
    out, err = said(capfd)
    assert out == [str(own / name)]
    assert len(err) == 2, err  # and nothing from torch
    assert err[0] == "checked against the found network on 18 test images of digits, in batches of 1 and 17"
    assert err[1].startswith("largest difference ")
    network, images = load_network(own)
    batch = pixels(4, (1, 8, 8))
    loaded = FORMS[form][2](own / name)
    assert largest(classifier_of_network(network, images), loaded, batch) <= 1e-5
    others = classifier_of_network(*load_network(run_folder))
    assert largest(others, loaded, batch) > 1e-3  # this client's, and not the run's


def test_safetensors_are_checked_where_they_lie_or_copied(
    run_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(run_folder)]) == cli.COMPLETED
    assert said(capfd)[0] == [str(run_folder / "model")]
    target = tmp_path / "shipped"
    assert cli.main(["export", str(run_folder / "model"), f"--output={target}"]) == cli.COMPLETED
    assert said(capfd)[0] == [str(target)]
    assert sorted(path.name for path in target.iterdir()) == ["genotype.json", "weights.safetensors"]
    for path in target.iterdir():
        assert path.read_bytes() == (run_folder / "model" / path.name).read_bytes()
    assert cli.main(["export", str(run_folder), "--output", str(target)]) == cli.REFUSED
    assert "is no empty folder" in said(capfd)[1][0]


def test_a_copy_that_differs_is_removed(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    other = load_network(run_folder / "model" / "clients" / "0")
    monkeypatch.setattr(exporting, "load_network", lambda _: other)
    assert cli.main(["export", str(run_folder), "--output", str(tmp_path / "new")]) == cli.FAILED
    out, err = said(capfd)
    assert out == []
    assert "the exported network differs from the found one by" in err[0]
    assert list(tmp_path.iterdir()) == []


def test_without_the_runs_images_random_ones_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arrays = {"x_train": np.zeros((40, 8, 8), np.uint8), "y_train": np.arange(40) % 2}
    np.savez(tmp_path / "own.npz", **arrays, x_test=arrays["x_train"][:20], y_test=arrays["y_train"][:20])
    folder = completed_run(tmp_path, dataset="own.npz")
    assert cli.main(["export", str(folder)]) == cli.COMPLETED
    assert f"18 test images of {tmp_path / 'own.npz'}" in said(capfd)[1][0]
    (tmp_path / "own.npz").unlink()
    assert cli.main(["export", str(folder)]) == cli.COMPLETED
    line = said(capfd)[1][0]
    assert "18 images of random pixels" in line
    assert "own.npz does not exist" in line
    (folder / "config.yaml").unlink()
    assert cli.main(["export", str(folder / "model")]) == cli.COMPLETED
    assert "no config.yaml beside it" in said(capfd)[1][0]


def test_other_images_of_the_same_name_are_not_the_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for side in (8, 9):
        arrays = {"x_train": np.zeros((40, side, side), np.uint8), "y_train": np.arange(40) % 2}
        np.savez(tmp_path / "own.npz", **arrays, x_test=arrays["x_train"][:20], y_test=arrays["y_train"][:20])
        folder = completed_run(tmp_path, dataset="own.npz") if side == 8 else tmp_path / "run"
    assert cli.main(["export", str(folder)]) == cli.COMPLETED
    assert "holds other images than the run began with" in said(capfd)[1][0]


def test_a_failed_check_is_an_exit_code(
    run_folder: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The file is another network's."""
    name, _, load = FORMS["torch"]
    monkeypatch.setitem(exporting.FORMS, "torch", (name, lambda *_: files["torch"].read_bytes(), load))  # type: ignore[arg-type]
    before = sorted(run_folder.rglob("*"))
    other = run_folder / "model" / "other.pt2"
    assert cli.main(["export", str(run_folder), "--format=torch", f"--output={other}"]) == cli.FAILED
    out, err = said(capfd)
    assert (out, len(err)) == ([], 1)
    assert "the exported network differs from the found one by" in err[0]
    assert sorted(run_folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "no run was given"),
        (["nowhere"], "nowhere does not exist"),
        (["RUN", "more"], "unknown argument: 'more'"),
        (["RUN", "--format", "xml"], "unknown format: 'xml'; choose safetensors, torch or onnx"),
        (["RUN", "--client", "9"], "no network of client '9'; choose one of 0, 3"),
        (["RUN", "--client", "../.."], "no network of client"),
        (["RUN/model/clients/0", "--client", "0"], "leave --client out"),
        (["RUN/checkpoint"], "does not hold a complete network"),
        (["RUN/config.yaml"], "is no folder"),
        (["RUN", "--format", "onnx", "--output", "a.pt2"], "is no name of a .onnx file"),
        (["RUN", "--format", "onnx", "--output", "no/a.onnx"], "does not exist"),
        (["RUN", "--output", "RUN"], "is no empty folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_export_refuses(
    words: list[str],
    named: str,
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", *(word.replace("RUN", str(run_folder)) for word in words)]) == cli.REFUSED
    out, err = said(capfd)
    assert (out, len(err)) == ([], 1)
    assert named in err[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_onnx_without_its_packages_names_the_extra(
    package: str, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["export", str(run_folder), "--format", "onnx"]) == cli.REFUSED
    out, err = said(capfd)
    assert (out, len(err)) == ([], 1)
    assert f'{package} is not installed; pip install -e ".[onnx]"' in err[0]


def test_a_torch_that_is_too_old_for_onnx_is_told_apart(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    assert cli.main(["export", str(run_folder), "--format", "onnx"]) == cli.REFUSED
    assert "torch 2.6.0+cpu cannot write these networks as ONNX" in said(capfd)[1][0]
