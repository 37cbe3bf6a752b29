"""The compiled kernels compute what the modules compute: logits, every gradient, every moment, in float64."""

import gc
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import noisy, random_architecture, random_masks, random_supernet, stream
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmetanas_core.search.relaxation import Relaxation, draw_noise, relax
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.edge_weights import EdgeWeights
from fedmetanas_core.space.native import build
from fedmetanas_core.space.native.store import CACHE
from fedmetanas_core.space.spec import SpaceSpec
from fedmetanas_core.space.supernet import Supernet

SPECS = st.builds(
    SpaceSpec,
    init_channels=st.sampled_from([2, 3, 4, 5, 9]),
    num_cells=st.integers(1, 4),
    num_nodes=st.integers(1, 4),
    in_channels=st.integers(1, 3),
    num_classes=st.integers(1, 11),
    height=st.integers(16, 21),
    width=st.integers(16, 19),
    stem=st.sampled_from(["cifar", "stride2"]),
    norm=st.sampled_from(["batch", "affine"]),
)
TINY = SpaceSpec(4, 3, 3, 1, 10, 8, 8)


@pytest.fixture(autouse=True)
def _kernels() -> None:
    reason = build.prepare()
    if "no C++ compiler" in reason:
        pytest.skip(reason)
    assert reason == ""


def setting(spec: SpaceSpec, seed: int, keep: float, dtype: torch.dtype) -> tuple[Architecture, Supernet]:
    """Random masks, logits, weights and statistics."""
    architecture = random_masks(random_architecture(spec, seed, 1.0, dtype), stream(seed + 1), keep)
    supernet = random_supernet(spec, architecture.operation_mask, seed + 2, dtype)
    return architecture, supernet


def outcome(
    supernet: Supernet, architecture: Architecture, batch: tuple[Tensor, Tensor], weights: EdgeWeights, compiled: bool
) -> list[Tensor]:
    """Logits and loss gradients: of the weights, of the operation logits, of the input logits."""
    for tensor in (supernet.weights, architecture.operation_logits, architecture.input_logits):
        tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.zero_()
    logits = supernet(batch[0], weights) if compiled else supernet.forward_by_modules(batch[0], weights)
    F.cross_entropy(logits, batch[1]).backward()
    leaves = (supernet.weights, architecture.operation_logits, architecture.input_logits)
    return [logits.detach(), *(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)]


def check(
    spec: SpaceSpec, seed: int, keep: float, size: int, training: bool, dtype: torch.dtype, tolerance: float, mode: str
) -> None:
    architecture, supernet = setting(spec, seed, keep, dtype)
    supernet.train(training)
    generator = stream(seed + 3)
    images = torch.randn(size, spec.in_channels, spec.height, spec.width, generator=generator, dtype=dtype)
    batch = images, torch.randint(0, spec.num_classes, (size,), generator=generator)
    noise = 0.0 if mode == "per_type" else 0.5
    pairs = [
        outcome(supernet, architecture, batch, noisy(architecture, 0.7, noise, stream(9), mode), compiled)
        for compiled in (False, True)
    ]
    for expected, found in zip(*pairs, strict=True):
        scale = expected.abs().max().clamp_min(1e-3)  # where the true gradient is 0, both are rounding
        assert float((found - expected).abs().max() / scale) <= tolerance


@settings(max_examples=60, deadline=None)
@given(
    spec=SPECS,
    seed=st.integers(0, 10**6),
    keep=st.sampled_from([0.1, 0.4, 1.0]),
    size=st.integers(2, 19),
    training=st.booleans(),
    mode=st.sampled_from(["per_type", "per_cell"]),
)
def test_logits_and_gradients_agree(
    spec: SpaceSpec, seed: int, keep: float, size: int, training: bool, mode: str
) -> None:
    check(spec, seed, keep, size, training, torch.float64, 1e-10, mode)


@settings(max_examples=20, deadline=None)
@given(spec=SPECS, seed=st.integers(0, 10**6), training=st.booleans())
def test_a_sampled_path_agrees_with_the_same_weights_in_the_whole_supernet(
    spec: SpaceSpec, seed: int, training: bool
) -> None:
    """A path is a way to compute less: modules and kernels, along it and over everything, all say the same."""
    spec = replace(spec, inputs="all")
    architecture = random_architecture(spec, seed, 1.0, torch.float64)
    supernet = random_supernet(spec, architecture.operation_mask, seed + 2)
    supernet.train(training)
    generator = stream(seed)
    images = torch.randn(5, spec.in_channels, spec.height, spec.width, generator=generator, dtype=torch.float64)
    batch = images, torch.randint(0, spec.num_classes, (5,), generator=generator)
    relaxation = Relaxation("path")

    def sampled() -> EdgeWeights:
        return relaxation.sampled(architecture, 1.0, draw_noise(architecture, 1.0, stream(seed + 1)))

    expected = outcome(supernet, architecture, batch, replace(sampled(), path=None), False)
    for compiled in (False, True):
        found = outcome(supernet, architecture, batch, sampled(), compiled)
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 8, 9, 40])
def test_every_batch_size_agrees_on_the_smallest_maps(size: int) -> None:
    check(TINY, 1, 1.0, size, True, torch.float64, 1e-10, "per_type")


def test_large_images_agree() -> None:
    check(SpaceSpec(2, 3, 2, 3, 4, 64, 72, "imagenet"), 1, 0.6, 3, True, torch.float64, 1e-10, "per_type")


def test_float32_is_as_near_as_float32_can_be() -> None:
    check(TINY, 2, 1.0, 17, True, torch.float32, 1e-3, "per_type")


def test_without_mixture_weights_every_operation_counts_once() -> None:
    _, supernet = setting(TINY, 3, 0.3, torch.float64)
    x = torch.randn(5, 1, 8, 8, generator=stream(0), dtype=torch.float64)
    torch.testing.assert_close(supernet(x), supernet.forward_by_modules(x), rtol=1e-10, atol=1e-10)


def test_many_images_without_gradients_are_taken_in_parts() -> None:
    architecture, supernet = setting(TINY, 4, 1.0, torch.float64)
    supernet.eval()
    x = torch.randn(150, 1, 8, 8, generator=stream(0), dtype=torch.float64)
    with torch.no_grad():
        weights = relax(architecture, 0.5)
        torch.testing.assert_close(
            supernet(x, weights), supernet.forward_by_modules(x, weights), rtol=1e-10, atol=1e-10
        )


def test_collected_statistics_agree_over_batches_of_several_sizes() -> None:
    found = []
    for compiled in (True, False):
        if not compiled:
            build.forget()
        architecture, supernet = setting(TINY, 5, 0.7, torch.float64)
        supernet.collect_moments()
        supernet.train()
        with torch.no_grad():
            for size in (9, 3, 20):
                x = torch.randn(size, 1, 8, 8, generator=stream(size), dtype=torch.float64)
                supernet(x, relax(architecture, 0.5))
            supernet.store_moments()
        found.append(supernet.statistics)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


def test_a_pass_goes_back_once_and_only_once() -> None:
    architecture, supernet = setting(TINY, 6, 1.0, torch.float64)
    loss = supernet(torch.ones(2, 1, 8, 8, dtype=torch.float64), relax(architecture, 0.5)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def nan_count(logits: Tensor) -> int:
    return int(logits.isnan().sum())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("where", ["pixel", "weight"])
def test_a_diverged_network_is_seen_to_have_diverged(where: str, training: bool) -> None:
    architecture, supernet = setting(TINY, 8, 1.0, torch.float32)
    supernet.train(training)
    x = torch.randn(5, 1, 8, 8, generator=stream(0))
    with torch.no_grad():
        if where == "pixel":
            x[2, 0, 3, 3] = torch.nan
        else:
            supernet.weight_layout.views(supernet.weights)["cells.1.edges.2.sep_conv_3x3.depthwise1.weight"][0] = (
                torch.nan
            )
    weights = relax(architecture, 0.5)
    logits = supernet(x, weights)
    assert nan_count(logits) == nan_count(supernet.forward_by_modules(x, weights)) > 0
    logits.sum().backward()
    assert supernet.weights.grad is not None
    assert supernet.weights.grad.isnan().any()
    assert architecture.operation_logits.grad is not None
    assert architecture.operation_logits.grad.isnan().any()


@pytest.mark.parametrize("size", [1, 2, 17])
def test_images_of_one_colour_have_finite_gradients_in_deep_networks(size: int) -> None:
    """Their channels hardly vary, so batch norm amplifies whatever is not like them."""
    spec = SpaceSpec(4, 20, 2, 3, 4, 16, 16)
    architecture = Architecture(spec).initialise(stream(1))
    supernet = Supernet(spec, architecture.operation_mask)
    supernet.initialise(stream(2))
    x = torch.rand(size, 3, 1, 1, generator=stream(3)).expand(size, 3, 16, 16)
    supernet(x, relax(architecture, 1.0)).sum().backward()
    assert supernet.weights.grad is not None
    assert supernet.weights.grad.isfinite().all()


def test_what_the_compiled_code_cannot_take_the_modules_do() -> None:
    architecture, supernet = setting(TINY, 9, 1.0, torch.float64)
    weights = relax(architecture, 0.5)
    larger = torch.randn(2, 1, 11, 9, generator=stream(0), dtype=torch.float64)
    torch.testing.assert_close(supernet(larger, weights), supernet.forward_by_modules(larger, weights))
    wanted = torch.randn(2, 1, 8, 8, generator=stream(1), dtype=torch.float64, requires_grad=True)
    supernet(wanted, weights).sum().backward()
    assert wanted.grad is not None
    assert wanted.grad.abs().sum() > 0
    assert supernet.eval()(torch.empty(0, 1, 8, 8, dtype=torch.float64), weights).shape == (0, 10)
    with pytest.raises(RuntimeError):
        supernet(torch.ones(2, 3, 8, 8, dtype=torch.float64), weights)
    with pytest.raises(IndexError):
        supernet(torch.ones(2, 1, 8, 8, dtype=torch.float64), EdgeWeights(torch.ones(2, 1, 8), torch.ones(2, 1)))


def test_narrower_registers_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a processor without AVX runs, compiled here for want of one."""
    compiler = next(name for name in build.COMPILERS if shutil.which(name))
    monkeypatch.setenv("CXX", f"{compiler} -DREGISTER=16")
    monkeypatch.setenv(CACHE, str(tmp_path))
    build.forget()
    assert build.prepare() == ""
    for size in (1, 3, 9):
        check(TINY, size, 0.8, size, True, torch.float64, 1e-10, "per_type")
        check(TINY, size, 0.8, size, False, torch.float32, 1e-3, "per_type")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_whether_passes_go_back_or_are_dropped() -> None:
    architecture, supernet = setting(TINY, 7, 1.0, torch.float32)
    x = torch.ones(32, 1, 8, 8)

    def passes(count: int) -> None:
        for number in range(count):
            loss = supernet(x, relax(architecture, 0.5)).sum()
            if number % 2:
                loss.backward()

    passes(20)
    gc.collect()
    before = resident_bytes()
    passes(200)  # one pass takes about 6 MB
    gc.collect()
    assert resident_bytes() - before < 30_000_000


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_batches_that_grow_leave_no_more_behind_than_the_largest_needs() -> None:
    """Pieces of memory of many sizes do not fit each other; they must not be kept side by side."""
    spec = SpaceSpec(8, 3, 3, 3, 4, 16, 16)
    architecture, supernet = setting(spec, 10, 1.0, torch.float32)

    def held_after(sizes: list[int]) -> int:
        for size in sizes:
            supernet(torch.ones(size, 3, 16, 16), relax(architecture, 0.5)).sum().backward()
        gc.collect()
        return resident_bytes()

    held_after([16])
    start = held_after([16] * 40)
    largest = held_after([256]) - start
    assert largest > 50_000_000
    back = held_after([16] * 40) - start
    assert back < largest / 2
    assert held_after([16, 32, 64, 96, 128, 160, 192, 224, 256]) - start < 1.3 * largest
