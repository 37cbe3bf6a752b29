"""The benchmarks run as they are documented, and say what they promise to say."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
report = importlib.import_module("benchmarks.round").report


def lines(script: str, *arguments: str) -> list[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("kept", ["1.0", "genotype"])
def test_the_step_against_the_plain_form(kept: str) -> None:
    said = lines("supernet_step.py", "--scale", "tiny", "--kept", kept, "--pairs", "3", "--batch", "4")
    assert re.fullmatch(r"ratio \d+\.\d\d \[\d+\.\d\d-\d+\.\d\d\] n=3", said[-1])
    assert any("largest difference is" in line for line in said)


def test_the_fixed_models_step_against_torchvisions() -> None:
    said = lines("fixed_step.py", "--pairs", "1")
    assert re.fullmatch(r"ratio \d+\.\d\d \[\d+\.\d\d-\d+\.\d\d\] n=1", said[-1])
    assert said[0].startswith("after 3 steps in float64 the largest difference is")


def test_the_step_after_pruning() -> None:
    said = lines("pruned_step.py", "--scale", "tiny", "--turns", "1", "--masks", "1")
    assert [line.split(":")[0] for line in said[1:]] == ["1.0", "0.75", "0.5", "0.25", "0.125", "genotype"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_of_the_step() -> None:
    said = lines("memory.py", "--scale", "tiny", "--steps", "4")
    assert re.search(r"peak \d+ MB: \d+ MB above", said[-2])
    assert re.search(r"the last 2 steps added -?\d+\.\d MB", said[-1])


def test_upload_sizes() -> None:
    said = lines("upload.py", "--scale", "tiny", "--tasks", "2")
    shares = [float(found[1]) for line in said if (found := re.search(r"bytes, (0\.\d+), error", line))]
    assert len(shares) == 4
    assert all(share < 0.6 for share in shares)
    assert shares[1] < 0.25  # int8, full supernet
    assert shares[3] < 0.3  # int8, one genotype


def test_the_gpu_script_is_proven_on_a_processor(tmp_path: Path) -> None:
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--device", "cpu", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = tmp_path.iterdir()
    said = report.read_text()
    assert said == done.stdout
    for expected in (
        r"ratio \d",
        r"pass of the product: \d+ operators",
        "5 clients in processes: 1.0",
        r"450,000 passes",
    ):
        assert re.search(expected, said), said


FEW = ("num_clients=6", "clients_per_round=2", "num_rounds=4", "local_epochs=1")


def test_the_round_of_searches_that_clients_adapt_from(tmp_path: Path) -> None:
    picture = tmp_path / "curve.svg"
    said = lines("adaptation.py", "--seeds=0", "--unseen=2", f"--runs-dir={tmp_path}", f"--picture={picture}", *FEW)
    assert re.fullmatch(r"the found network, adapted: (\d+\.\d ± - \(clients \d+\.\d\)(, )?){4}", said[-2])
    assert said[-1].startswith("the same network, from scratch: ")
    assert picture.read_text().startswith("<?xml")
    again = lines("adaptation.py", "--seeds=0", "--unseen=2", f"--runs-dir={tmp_path}", *FEW)
    assert again[-2:] == said[-2:]


def test_the_round_of_searches_within_a_budget(tmp_path: Path) -> None:
    said = lines("budget.py", "--seeds=0", "--share=0.9", f"--runs-dir={tmp_path}", *FEW)
    free, limit, half = (
        int(said[-4].split(mark)[-1].split()[0].strip(",:").replace(",", "")) for mark in ("seed 0:", "max_macs=", ": ")
    )
    assert half <= limit == int(0.9 * free)
    assert [line.split(":")[0] for line in said[-3:]] == ["free", "within the budget", "difference"]


def test_the_round_shares_out_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """16 s of search on two workers are 8 of the 10 s of the exchange; 2 s of 16 are Flower and Ray."""
    parts = {"clients": 16.0, "exchange": 10.0, "averaging": 1.0, "evaluation": 2.0, "saving": 2.5, "other": 0.5}
    report(parts, rounds=4, workers=2)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "4 rounds of 4 clients on 2 workers, 4.000 s each"
    assert said[1].split() == ["search", "2.000", "s", "a", "round", "50.0", "%"]
    assert said[-1] == "Flower and Ray take 12.5 % of a round"


def test_the_round_as_documented() -> None:
    said = lines("round.py", "--scale", "tiny", "--rounds", "2")
    assert re.fullmatch(r"Flower and Ray take -?\d+\.\d % of a round", said[-1])
