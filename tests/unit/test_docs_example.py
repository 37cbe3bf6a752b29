"""The method that the documentation adds, taken from its text, added and run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from fedmetanas_core.methods.registry import METHODS

ROOT = Path(__file__).resolve().parents[2]
TABLES = (ROOT / "docs" / "methods.md").read_text()
FILE, LINE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-method.md").read_text(), re.DOTALL)


RUN = """
import sys
from pathlib import Path
from local_grid import LocalGrid, run_all
from fedmetanas_core.config import Config
from fedmetanas_core.preflight import prepare_experiment
from fedmetanas_core.runs import begin_run

keys = {"num_clients": 4, "clients_per_round": 2, "local_epochs": 1, "init_channels": 2, "num_cells": 3}
values = {**keys, "num_nodes": 2, "num_rounds": 8, "search_fraction": 0.8, "method": "softmax_search"}
here = Path(sys.argv[1])
experiment = prepare_experiment(Config.from_mapping(values), here)
summary = run_all(begin_run(here, "run", experiment, here), LocalGrid(4))
print(summary["one_hot"], summary["max_logit_difference"] <= 1e-5)
"""


def test_the_example_is_one_short_file_and_one_line_and_runs(tmp_path: Path) -> None:
    """Added to a copy of the sources as the text says, and nothing else."""
    assert len(FILE.splitlines()) < 60
    for package in ("fedmetanas_core", "server_app", "client_app"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    methods = tmp_path / "fedmetanas_core" / "methods"
    (methods / "softmax_search.py").write_text(FILE)
    registry = (methods / "registry.py").read_text()
    assert len(LINE.splitlines()) == 1
    first = '    "fedmetanas":'
    assert registry.count(first) == 1
    (methods / "registry.py").write_text(registry.replace(first, LINE + first))
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["True", "True"]


def test_every_method_stands_in_the_table() -> None:
    named = set(re.findall(r"^\| `(\w+)`(?: \|[^|\n]*){7} \|$", TABLES, re.MULTILINE))
    assert named == set(METHODS)
