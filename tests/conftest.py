"""One thread for every test: small tensors gain nothing from more, and results do not depend on the machine.

No test finds compiled kernels loaded because an earlier one loaded them.
"""

from collections.abc import Iterator

import pytest
import torch

from fedmetanas_core.space.native import build

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_kernels_left_loaded() -> Iterator[None]:
    yield
    build.forget()
