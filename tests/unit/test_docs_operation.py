"""The operation that the documentation adds, taken from its text, added to a copy of the sources, and searched with."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME, MODULE, CHOICE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-operation.md").read_text(), re.DOTALL)

RUN = """
import json
import sys
from pathlib import Path
import torch
from helpers import random_architecture, random_one_hot, random_supernet, small_spec, stream
from local_grid import LocalGrid, run_all
from fedmetanas_core.config import Config
from fedmetanas_core.preflight import prepare_experiment
from fedmetanas_core.runs import begin_run
from fedmetanas_core.search.relaxation import relax
from fedmetanas_core.space.genotype import Genotype
from fedmetanas_core.space.native import build
from fedmetanas_core.space.network import Network, load_network
from fedmetanas_core.space.spec import PRIMITIVES

spec, architecture = small_spec(), random_architecture(small_spec(), 1, dtype=torch.float64)
without = build.prepare()
whole = random_supernet(spec, architecture.operation_mask, 2)
eight = architecture.operation_mask.clone()
eight[..., -1] = False
x, weights = torch.randn(3, 1, 8, 8, dtype=torch.float64), relax(architecture, 1.0)
mixed = [whole(x, weights), whole.forward_by_modules(x, weights)]

keys = {"num_clients": 4, "clients_per_round": 2, "local_epochs": 1, "init_channels": 4, "num_cells": 3}
here = Path(sys.argv[1])
experiment = prepare_experiment(Config.from_mapping({**keys, "num_nodes": 2, "num_rounds": 8}), here)
run = begin_run(here, "run", experiment, here)
summary = run_all(run, LocalGrid(4))
node = (("pointwise_1x1", 0), ("pointwise_1x1", 1))
network = Network(Genotype((node, node), (node, node)), spec)
network.initialise(stream(0))
print(json.dumps({
    "names": PRIMITIVES,
    "without_compiler": without,
    "compilable": [whole.compilable, random_supernet(spec, eight, 2).compilable, network.compilable],
    "difference": float((mixed[0] - mixed[1]).abs().max()),
    "own": sum(name.endswith("pointwise.weight") and ".edges." in name for name, _ in network.named_parameters()),
    "halved": list(network.eval()(torch.zeros(1, 1, 8, 8)).shape),
    "operations": [row["alive_operations"] for row in run.folder.rounds.read()][0],
    "one_hot": summary["one_hot"],
    "max_logit_difference": summary["max_logit_difference"],
    "loads": list(load_network(run.folder.path)[1].class_names),
}))
"""


def test_a_ninth_operation_is_searched_with_as_the_text_says(tmp_path: Path) -> None:
    for package in ("fedmetanas_core", "server_app", "client_app"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    space = tmp_path / "fedmetanas_core" / "space"
    for file, edits in {
        "spec.py": {'    "dil_conv_5x5",\n)\n': NAME},
        "operations.py": {
            "def make_weighted_operation(": MODULE + "\n\ndef make_weighted_operation(",
            "        return FactorizedReduce(channels, channels, norm)\n    return None": (
                "        return FactorizedReduce(channels, channels, norm)\n" + CHOICE + "    return None"
            ),
        },
    }.items():
        source = (space / file).read_text()
        for before, after in edits.items():
            assert source.count(before) == 1
            source = source.replace(before, after)
        (space / file).write_text(source)
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["names"][-1] == "pointwise_1x1"
    assert len(found["names"]) == 9
    # Where it is alive nothing runs compiled, and both ways are one; where it is not, the eight do.
    assert found["compilable"] == [False, True, False]
    assert found["difference"] == 0.0
    assert found["own"] == 3 * 2 * 2  # cells, nodes, inputs
    assert found["halved"] == [1, 3]
    assert found["operations"] == 2 * 5 * 9  # kinds of cells, edges, operations
    assert found["one_hot"] is True
    assert found["max_logit_difference"] <= 1e-5
    assert len(found["loads"]) == 10
