"""Predictions: the same from a run, its ONNX file and its torch program; what is shown; what is refused."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from found import completed_run, pixels
from PIL import Image

from fedmetanas_core import cli
from fedmetanas_core.commands import predict as command
from fedmetanas_core.commands.predict import read_images
from fedmetanas_core.data.image_files import decode_image
from fedmetanas_core.data.transforms import to_tensor
from fedmetanas_core.output.classifier import Classifier, Floats
from fedmetanas_core.output.export import FORMS, PROBES, export
from fedmetanas_core.output.predict import BATCH, Prediction, as_json, predict
from fedmetanas_core.space.network import load_network

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a network of its own for client 2, and both exported forms of the common one."""
    folder = completed_run(tmp_path_factory.mktemp("runs"), clients=(2,))
    network, images = load_network(folder)
    for form, (name, _, _) in FORMS.items():
        export(network, images, form, folder / "model" / name, pixels(PROBES, (1, 8, 8)))
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    """A colour photograph in landscape, a grey one with transparency, sixteen bits, and an image of the right size."""
    draw = np.random.default_rng(0)
    colour = draw.integers(0, 256, (48, 90, 3), dtype=np.uint8)
    images = {
        "colour.jpg": Image.fromarray(colour),
        "grey, see-through.png": Image.fromarray(colour[:, :, :2], "LA"),
        "sixteen.png": Image.fromarray(draw.integers(0, 65_536, (20, 20), dtype=np.uint16)),
        "digit.png": Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)),
    }
    for name, image in images.items():
        image.save(tmp_path / name)
    return [str(tmp_path / name) for name in images]


def answered(words: list[str], capfd: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    assert cli.main(["predict", *words, "--json"]) == cli.COMPLETED
    out, err = capfd.readouterr()
    assert err == ""
    found: list[dict[str, object]] = json.loads(out)
    return found


def test_a_run_and_its_files_agree_with_the_network(
    run_folder: Path, photos: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """As training sees images in files: the centre, scaled, as grey as the network's."""
    network, images = load_network(run_folder)
    batch = to_tensor(np.stack([decode_image(path, (8, 8, 1)) for path in photos]))
    with torch.no_grad():
        expected = network(images.normalise(batch)).softmax(1).numpy()
    assert np.abs(expected[0] - expected[3]).max() > 0.01
    for source in ("", "model/network.onnx"):
        rows = answered([str(run_folder / source), *photos, "--top", "10"], capfd)
        assert [row["image"] for row in rows] == photos
        for row, probabilities in zip(rows, expected, strict=True):
            classes = row["classes"]
            assert isinstance(classes, list)
            found = {int(entry["class"]): entry["probability"] for entry in classes}
            assert [found[index] for index in range(10)] == pytest.approx(probabilities.tolist(), abs=1e-5)
            ranked = [entry["probability"] for entry in classes]
            assert ranked == sorted(ranked, reverse=True)


def test_a_line_for_each_image_with_the_three_likeliest(
    run_folder: Path, photos: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["predict", str(run_folder), *photos]) == cli.COMPLETED
    lines = capfd.readouterr().out.splitlines()
    rows = answered([str(run_folder), *photos], capfd)
    for line, row, photo in zip(lines, rows, photos, strict=True):
        words = ", ".join(f"{entry['class']} {entry['probability']:.3f}" for entry in row["classes"])  # type: ignore[attr-defined]
        assert line == f"{photo}: {words}"
        assert line.count(", ") - photo.count(", ") == 2


def test_a_clients_own_network_predicts(run_folder: Path, photos: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    own = answered([str(run_folder), "--client", "2", *photos], capfd)
    assert own == answered([str(run_folder / "model" / "clients" / "2"), *photos], capfd)
    assert own != answered([str(run_folder), *photos], capfd)


def brightness(names: tuple[str, ...] = ("dark", "bright")) -> Classifier:
    """The probability of the second class is the mean of the pixels."""

    def run(batch: Floats) -> tuple[Floats, Floats]:
        bright = batch.mean(axis=(1, 2, 3))
        probabilities = np.stack([1 - bright, bright], axis=1)
        return np.log(probabilities + 1e-9), probabilities

    return Classifier(names, (3, 8, 8), run)


def test_more_images_than_a_batch_stay_in_order(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{grey}.png") for grey in range(0, 255, 2)]
    assert len(paths) == 2 * BATCH
    for grey, path in zip(range(0, 255, 2), paths, strict=True):
        Image.new("RGB", (9, 12), (grey, grey, grey)).save(path)
    images = read_images(paths, (3, 8, 8))
    for grey, found in zip(range(0, 255, 2), predict(brightness(), paths, images, 1), strict=True):
        assert found.path == paths[grey // 2]
        probability = max(grey / 255, 1 - grey / 255)
        assert found.classes == (("bright" if grey >= 128 else "dark", pytest.approx(probability, abs=1e-6)),)


def test_equal_classes_keep_their_order_and_no_more_are_shown_than_there_are() -> None:
    half = np.repeat(np.array([0, 255], np.uint8), 96).reshape(1, 8, 8, 3)
    (found,) = predict(brightness(), ["half.png"], half, 5)
    assert found.classes == (("dark", 0.5), ("bright", 0.5))


def test_a_line_stays_a_line_whatever_the_names() -> None:
    found = Prediction("a\nb\udcff.png", (("Käuzchen, klein", 0.91249), ("犬\t", 0.0876)))
    assert found.in_words() == "a\\nb\\udcff.png: Käuzchen, klein 0.912, 犬\\t 0.088"
    (row,) = json.loads(as_json([found]))
    assert row["image"] == "a\nb\udcff.png"
    assert row["classes"][0] == {"class": "Käuzchen, klein", "probability": 0.91249}


def test_an_unreadable_image_is_refused_before_anything_is_predicted(
    photos: list[str],
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "predict", lambda *_: pytest.fail("something was predicted"))
    (tmp_path / "cut.jpg").write_bytes(Path(photos[0]).read_bytes()[:200])
    for bad in ("cut.jpg", "missing.png", "."):
        assert cli.main(["predict", str(run_folder), *photos, str(tmp_path / bad)]) == cli.REFUSED
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "cannot be decoded" in err


def test_rotation_in_exif_is_left_alone_as_in_training(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "turned.png", exif=exif)
    plain, turned = (decode_image(tmp_path / f"{name}.png", (8, 8, 3)) for name in ("plain", "turned"))
    np.testing.assert_array_equal(plain, turned)


REFUSALS: list[tuple[list[str], str]] = [
    ([], "no run was given"),
    (["RUN"], "no images were given"),
    (["RUN", "PHOTO", "--top", "0"], "--top '0' is not a whole number above 0"),
    (["RUN", "PHOTO", "--best", "2"], "unknown option: '--best'"),
    (["RUN", "PHOTO", "missing.png"], "missing.png"),
    (["RUN", "PHOTO", "RUN/config.yaml"], "cannot be decoded"),
    (["RUN", "PHOTO", "--client", "7"], "no network of client '7'; choose one of 2"),
    (["RUN/checkpoint", "PHOTO"], "does not hold a complete network"),
    (["nowhere", "PHOTO"], "nowhere does not exist"),
    (["PHOTO", "PHOTO"], "is no folder"),
    (["nowhere.onnx", "PHOTO"], "nowhere.onnx does not exist"),
    (["RUN/model/network.onnx", "PHOTO", "--client", "2"], "--client chooses among the networks of a run"),
    (["bad.onnx", "PHOTO"], "bad.onnx is no ONNX file"),
    (["RUN/model/network.pt2", "PHOTO"], "is a torch program, which can hold code"),
]


@pytest.mark.parametrize(("words", "named"), REFUSALS, ids=lambda value: " ".join(value) if value else "nothing")
def test_predict_refuses(
    words: list[str],
    named: str,
    run_folder: Path,
    photos: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    places = [word.replace("RUN", str(run_folder)).replace("PHOTO", photos[0]) for word in words]
    assert cli.main(["predict", *places]) == cli.REFUSED
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert named in err


def nameless(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


def misnamed(model: onnx.ModelProto) -> None:
    for entry in model.metadata_props:
        if entry.key == "image_shape":
            entry.value = "[8, 8]"


@pytest.mark.parametrize("change", [nameless, misnamed])
def test_an_onnx_file_of_another_origin_is_refused(
    change: Callable[[onnx.ModelProto], None],
    run_folder: Path,
    photos: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = onnx.load(run_folder / "model" / "network.onnx")
    change(model)
    onnx.save(model, tmp_path / "other.onnx")
    assert cli.main(["predict", str(tmp_path / "other.onnx"), *photos]) == cli.REFUSED
    assert "does not tell its classes" in capfd.readouterr().err


def test_onnx_without_onnxruntime_names_the_extra(
    run_folder: Path, photos: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert cli.main(["predict", str(run_folder / "model" / "network.onnx"), *photos]) == cli.REFUSED
    assert 'onnxruntime is not installed; pip install -e ".[onnx]"' in capfd.readouterr().err


@pytest.mark.parametrize(
    ("source", "unneeded"),
    [
        ("model/network.onnx", "torch flwr ray scipy rich yaml onnx"),
        ("", "flwr ray scipy sklearn torchvision torch._dynamo fedmetanas_core.federation fedmetanas_core.config"),
    ],
)
def test_predict_imports_only_what_it_needs(source: str, unneeded: str, run_folder: Path, photos: list[str]) -> None:
    """torch takes over a second, and a fixed model's torchvision another half."""
    program = (
        "import sys; from fedmetanas_core.cli import main; code = main(sys.argv[1:]); "
        f"print(code, *sorted({set(unneeded.split())!r} & sys.modules.keys()))"
    )
    words = [sys.executable, "-c", program, "predict", str(run_folder / source), photos[0]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"


def test_the_examples_of_the_documentation_run(run_folder: Path, tmp_path: Path) -> None:
    """One after the other, beside a run, its exported files and a photograph; both files see the same digit."""
    text = (ROOT / "docs" / "use-the-network.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 4
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "NAME").symlink_to(run_folder)
    for name in ("network.onnx", "network.pt2"):
        (tmp_path / name).symlink_to(run_folder / "model" / name)
    picture = np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.jpg", quality=100)
    words = [sys.executable, "-W", "ignore", "-c", "\n".join(examples)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    drawn, by_onnx, by_torch = done.stdout.splitlines()
    assert len(re.findall(r"'\d'", drawn)) == 4
    network, images = load_network(run_folder)
    with torch.no_grad():
        logits = network(images.normalise(to_tensor(decode_image(tmp_path / "photo.jpg", (8, 8, 1))[None])))
    index = int(logits.argmax())
    assert by_torch == images.class_names[index]
    name, probability = by_onnx.split()
    assert name == images.class_names[index]
    assert float(probability) == pytest.approx(float(logits.softmax(1)[0, index]), abs=1e-5)
