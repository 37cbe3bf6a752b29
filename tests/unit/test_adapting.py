"""`fedmetanas adapt`: steps worked by hand, curves, clients that were kept out, folders of one's own, refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from deployment import digit_folders
from finished import finished_run
from helpers import random_architecture, small_spec
from torch import nn

from fedmetanas_core.cli import main
from fedmetanas_core.output.adapted import Curves, curves_in_words
from fedmetanas_core.search.adaptation import StepOptions, adaptation_curve, from_scratch
from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.space.genotype import pairwise_genotype
from fedmetanas_core.space.network import Network, load_network


def network() -> Network:
    found = Network(pairwise_genotype(random_architecture(small_spec(), 3)), small_spec())
    found.initialise(torch.Generator().manual_seed(0))
    return found.eval()


def images(count: int, seed: int = 0) -> LocalData:
    generator = torch.Generator().manual_seed(seed)
    spec = small_spec()
    pixels = torch.rand(count, spec.in_channels, spec.height, spec.width, generator=generator)
    labels = torch.randint(spec.num_classes, (count,), generator=generator)
    return LocalData(pixels, labels, lambda batch, _: batch - 0.5)


def test_a_step_is_sgd_on_the_loss_with_the_statistics_as_they_are() -> None:
    """One batch holds all images, so that its order says nothing; the gradient is torch's own, clipped to norm 5."""
    before, data = network(), images(6)
    logits = before.forward_by_modules(data.images - 0.5)
    nn.functional.cross_entropy(logits, data.labels).backward()  # type: ignore[no-untyped-call]
    gradient = before.weights.grad
    assert gradient is not None
    clipped = gradient * min(1.0, 5.0 / float(gradient.norm()))
    expected = before.weights.detach() - 0.1 * clipped
    _, after = adaptation_curve(before, data, images(4, 1), StepOptions(0.1, 6), steps=(1,))
    assert torch.allclose(after.weights, expected, atol=1e-6)
    assert torch.equal(after.statistics, before.statistics)


def test_momentum_carries_the_last_gradient_on() -> None:
    """Two steps on one batch: w - r g1 - r (m g1 + g2)."""
    first, data = network(), images(6)
    plain = StepOptions(0.05, 6)
    _, one = adaptation_curve(first, data, images(4, 1), plain, steps=(1,))
    _, two = adaptation_curve(one, data, images(4, 1), plain, steps=(1,))
    _, carried = adaptation_curve(first, data, images(4, 1), StepOptions(0.05, 6, momentum=0.5), steps=(2,))
    change = (one.weights - first.weights).detach()
    assert torch.allclose(carried.weights, two.weights + 0.5 * change, atol=1e-6)


def test_the_given_network_stays_and_later_steps_go_on_from_earlier_ones() -> None:
    start, data, held_out = network(), images(20), images(30, 1)
    kept, options = start.weights.detach().clone(), StepOptions(0.1, 8)
    all_at_once, last = adaptation_curve(start, data, held_out, options, steps=(0, 1, 3))
    assert torch.equal(start.weights, kept)
    one_by_one = [adaptation_curve(start, data, held_out, options, steps=(steps,))[0][0] for steps in (0, 1, 3)]
    assert all_at_once == one_by_one
    assert torch.equal(last.weights, adaptation_curve(start, data, held_out, options, steps=(3,))[1].weights)


def test_without_running_statistics_they_become_those_of_the_images() -> None:
    start, data = network(), images(20)
    options = StepOptions(0.1, 8, running_statistics=False)
    _, after = adaptation_curve(start, data, images(4, 1), options, steps=(2,))
    assert not torch.equal(after.statistics, start.statistics)
    fresh = from_scratch(start, 7)
    assert not torch.equal(fresh.weights, start.weights)
    assert torch.equal(from_scratch(start, 7).weights, fresh.weights)


def test_means_and_spreads_over_clients_by_hand() -> None:
    curves = Curves((0, 5), ("a", "b"), ((0.5, 0.75), (0.7, 1.0)), ((0.1, 0.2), (0.1, 0.4)), ((8, 2), (9, 3)))
    assert curves.means("adapted") == pytest.approx([0.6, 0.875])
    assert curves.spreads("adapted") == pytest.approx([0.02**0.5, 0.03125**0.5])
    words = curves_in_words(curves).splitlines()
    assert words[0].split() == ["0", "steps", "5", "steps"]
    assert "0.6000 ± 0.141" in words[1]
    assert "0.3000 ± 0.141" in words[2]
    assert words[3] == "accuracy on 5 images that were kept out, after steps on 17 others;"
    assert words[4] == "the found network is ahead throughout"
    behind = replace(curves, from_scratch=((0.1, 0.9), (0.1, 1.0)))
    assert curves_in_words(behind).endswith("the found network is ahead after 0 steps")
    nowhere = replace(curves, adapted=curves.from_scratch)
    assert curves_in_words(nowhere).endswith("the found network is never ahead")
    alone = Curves((1,), ("a",), ((0.5,),), ((0.25,),), ((4, 1),))
    assert curves_in_words(alone).splitlines()[0].split() == ["1", "step"]
    assert "±" not in curves_in_words(alone)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs"), unseen_clients=2, search_fraction=0.5)


def test_clients_that_the_run_kept_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", str(run), "--unseen", "--steps", "5,0"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert last == str(run / "adapted" / "unseen")
    assert len(table) == 5
    found = json.loads((run / "adapted" / "unseen" / "curve.json").read_text())
    assert (found["steps"], [each["client"] for each in found["clients"]]) == ([0, 5], ["4", "5"])
    assert found["rate"] == 0.01
    summary = json.loads((run / "summary.json").read_text())
    before = [each["adapted"][0] for each in found["clients"]]
    assert before == pytest.approx(summary["unseen_client_accuracy"]), "without a step, as the run measured it"
    assert (run / "adapted" / "unseen" / "curve.svg").read_text().startswith("<?xml")
    assert not (run / "adapted" / "unseen" / "weights.safetensors").exists()


@pytest.mark.parametrize("form", ["folder", "npz"])
def test_images_of_ones_own(run: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = digit_folders(tmp_path / "mine", 0, 1, each=6, without=[3, 4])
    if form == "npz":
        generator = np.random.default_rng(0)
        x, y = generator.integers(0, 256, (30, 8, 8), dtype=np.uint8), generator.integers(0, 10, 30)
        data = tmp_path / "mine.npz"
        np.savez(data, x_train=x[:20], y_train=y[:20], x_test=x[20:], y_test=y[20:])
    target = tmp_path / "out" / form
    assert main(["adapt", str(run), "--data", str(data), "--output", str(target), "--steps=0,3", "--rate=0.05"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(target)
    adapted, images_of = load_network(target)
    found, _ = load_network(run)
    assert isinstance(adapted, Network)
    assert isinstance(found, Network)
    assert adapted.genotype == found.genotype
    assert not torch.equal(adapted.weights, found.weights)
    assert images_of.class_names == tuple("0123456789")
    assert json.loads((target / "curve.json").read_text())["rate"] == 0.05


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapt"], "no run was given"),
        (["adapt", "RUN"], "give either --data or --unseen"),
        (["adapt", "RUN", "--unseen", "--data", "x"], "give either --data or --unseen"),
        (["adapt", "RUN", "--data", "nowhere"], "/nowhere does not exist"),
        (["adapt", "RUN", "--unseen", "--steps", "1,x"], "are no numbers of steps"),
        (["adapt", "RUN", "--unseen", "--steps", "9" * 5000], "are no numbers of steps"),
        (["adapt", "RUN", "--unseen", "--rate", "nan"], "is no number above 0"),
        (["adapt", "RUN", "--unseen", "--client", "3"], "has no network of client '3'"),
        (["adapt", "nowhere", "--unseen"], "is not a run folder"),
        (["adapt", "RUN", "--data", "FOREIGN"], "has class folders that training does not know: cat"),
        (["adapt", "RUN", "--data", "EMPTY"], "has no class folders"),
    ],
)
def test_what_is_refused(
    run: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = digit_folders(tmp_path / "foreign", 0, 1, each=3)
    (foreign / "3").rename(foreign / "cat")
    (tmp_path / "empty").mkdir()
    places = {"RUN": run, "FOREIGN": foreign, "EMPTY": tmp_path / "empty"}
    assert main([str(places.get(word, word)) for word in words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err


def test_a_run_that_kept_nobody_out_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path)
    assert main(["adapt", str(run), "--unseen"]) == 2
    assert "kept no clients out of its training" in capsys.readouterr().err


def test_nothing_else_is_overwritten(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the found network, nor what was adapted to other images, nor a file in the way."""
    (tmp_path / "file").write_text("")
    photos = [digit_folders(tmp_path / site / "photos", 0, 1, each=4) for site in ("a", "b")]
    before = (run / "model" / "weights.safetensors").read_bytes()
    for data, output, said in (
        (photos[0], run / "model", "holds something else"),
        (photos[0], tmp_path / "file", "holds something else"),
        (photos[0], tmp_path / "file" / "x", "holds something else"),
        (photos[0], None, ""),
        (photos[0], None, ""),
        (photos[1], None, f"is of {photos[0]}"),
    ):
        words = ["adapt", str(run), "--data", str(data), "--steps=1", *(["--output", str(output)] if output else [])]
        assert main(words) == (2 if said else 0)
        assert said in capsys.readouterr().err
    assert (run / "model" / "weights.safetensors").read_bytes() == before


def test_weights_that_are_no_numbers_are_not_kept(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, target = digit_folders(tmp_path / "mine", 0, 1, each=6), tmp_path / "out"
    words = ["adapt", str(run), "--data", str(data), "--output", str(target), "--steps=3"]
    assert main(words) == 0
    kept = (target / "weights.safetensors").read_bytes()
    capsys.readouterr()
    assert main([*words, "--rate=1e38"]) == 1
    assert "set a smaller --rate" in capsys.readouterr().err
    assert (target / "weights.safetensors").read_bytes() == kept
