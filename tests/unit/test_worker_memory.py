"""A worker keeps one copy of the images, whatever number of clients it serves."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

IMAGES = 40_000  # of 32x32x3: 123 MB

MEASURE = """
import gc, sys
from pathlib import Path
import torch
from fedmetanas_core.config import Config
from fedmetanas_core.preflight import prepare_experiment

def resident():
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6

prepare_experiment(Config.from_mapping({}), Path.cwd())  # whatever is imported is imported now
start = resident()
experiment = prepare_experiment(Config.from_mapping({"dataset": sys.argv[1], "samples_per_client": 600}), Path.cwd())
loaded = resident()
for client in range(100):
    data = experiment.training_data(client)
    data.batch(torch.arange(32))
print(loaded - start, resident() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_hundred_clients_share_one_copy_of_the_images(tmp_path: Path) -> None:
    labels = np.arange(IMAGES) % 10
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "many.npz", x_train=images, y_train=labels, x_test=images[:100], y_test=labels[:100])
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "many.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded, afterwards = map(float, done.stdout.split())
    size = images.nbytes / 1e6
    assert 0.9 * size < loaded < 1.2 * size
    assert (
        afterwards < 1.6 * size
    )  # one client's images as float32 at a time; all of them would take six times the size
