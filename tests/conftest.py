"""One thread for every test: small tensors gain nothing from more, and results do not depend on the machine.

No test finds compiled kernels loaded because an earlier one loaded them.
"""

from collections.abc import Iterator

import pytest
import torch
from watching import Watch, watch_training
from xdist.scheduler import LoadScopeScheduling

from fedmetanas_core.space.native import build

torch.set_num_threads(1)
# Tests of one scope run one after the other in one process.
SCOPES = {
    "machines": ("tests/e2e/test_deployment.py", "tests/e2e/test_ray_cluster.py", "tests/faults/test_nodes.py"),
    "flower": (
        *("tests/e2e/", "tests/faults/test_kills.py", "tests/unit/test_benchmarks.py::test_the_gpu_script"),
        "tests/unit/test_benchmarks.py::test_the_round",
    ),
    "gpu": ("tests/gpu/",),
}


class Scheduling(LoadScopeScheduling):
    """Tests outside all scopes run wherever there is time. (pytest 9.2 does not hear xdist_group marks.)"""

    def _split_scope(self, nodeid: str) -> str:
        return next((name for name, beginnings in SCOPES.items() if nodeid.startswith(beginnings)), nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Scheduling:
    """The hook by which pytest-xdist asks."""
    return Scheduling(config, log)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)  # a command that was run in this process may have asked for more


@pytest.fixture(autouse=True)
def _no_kernels_left_loaded() -> Iterator[None]:
    build.forget()  # what was loaded while the tests were collected
    yield
    build.forget()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """See watching.watch_training."""
    return watch_training(monkeypatch)
