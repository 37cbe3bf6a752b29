"""The product computes what the plain form of the supernet computes: one module per operation per edge, no sharing."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from helpers import random_architecture, random_masks, stream
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmetanas_core.space.native import build
from fedmetanas_core.space.spec import PRIMITIVES, SpaceSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
step = importlib.import_module("benchmarks.supernet_step")
setting = importlib.import_module("benchmarks.setting")

SPECS = st.builds(
    SpaceSpec,
    init_channels=st.sampled_from([2, 3, 4]),
    num_cells=st.integers(1, 4),
    num_nodes=st.integers(1, 4),
    in_channels=st.integers(1, 3),
    num_classes=st.integers(2, 5),
    height=st.integers(16, 19),
    width=st.integers(16, 18),
    stem=st.sampled_from(["cifar", "stride2"]),
)


@pytest.fixture(params=["compiled", "modules"], autouse=True)
def _execution(request: pytest.FixtureRequest) -> None:
    if request.param == "compiled":
        reason = build.prepare()
        if "no C++ compiler" in reason:
            pytest.skip(reason)
        assert reason == ""


@settings(max_examples=25, deadline=None)
@given(spec=SPECS, seed=st.integers(0, 10**6), keep=st.sampled_from([0.1, 0.4, 1.0]), size=st.integers(2, 9))
def test_a_whole_task_arrives_at_the_same_weights_and_alphas(
    spec: SpaceSpec, seed: int, keep: float, size: int
) -> None:
    """Inner step, query pass, both clippings and the outer step of both optimisers, with any masks and any pairs."""
    architecture = random_masks(random_architecture(spec, seed, 1.0, torch.float64), stream(seed + 1), keep)
    difference, name = step.largest_difference(step.make_sides(architecture, size, "cpu", torch.float64))
    assert difference <= 1e-10, name


@pytest.mark.parametrize(
    ("scale", "kept"),
    # The full network of the paper takes a minute; the benchmark itself checks it.
    [
        (scale, kept)
        for scale in setting.SCALES
        for kept in ("1.0", "0.5", "genotype")
        if (scale, kept) != ("paper", "1.0")
    ],
)
def test_the_measured_networks_agree(scale: str, kept: str) -> None:
    architecture = setting.architecture_of(setting.SCALES[scale], kept)
    difference, name = step.largest_difference(step.make_sides(architecture, 2, "cpu", torch.float64))
    assert difference <= 1e-10, name


@pytest.mark.parametrize("kept", ["1.0", "0.75", "0.5", "0.25", "0.125", "genotype"])
def test_the_measured_masks_keep_what_they_say(kept: str) -> None:
    spec = setting.SCALES["small"]
    architecture = setting.architecture_of(spec, kept)
    alive = architecture.alive_operations()
    if kept == "genotype":
        assert architecture.is_one_hot()
    else:
        assert alive == round(float(kept) * 2 * spec.num_edges * len(PRIMITIVES))


def test_the_check_sees_a_wrong_product() -> None:
    """Otherwise agreement would prove nothing."""
    spec = SpaceSpec(2, 2, 2, 1, 3, 16, 16)
    sides = step.make_sides(random_architecture(spec, 1, 1.0, torch.float64), 4, "cpu", torch.float64)
    name, tensor = next(iter(sides.product_values().items()))
    tensor.add_(1e-6)
    difference, _ = step.largest_difference(sides)
    assert difference > 1e-8, name
