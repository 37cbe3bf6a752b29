"""A training step of the fixed model against torchvision's own MobileNetV3-Large, in the same process and in turn.

python benchmarks/fixed_step.py [--side 8] [--channels 1] [--batch 16] [--pairs 7]

A step is SGD with momentum, decay and clipping on one batch, dropout on; one thread, processor time. The reference is
the model as torchvision builds it, but for its number of input channels, with torch.optim.SGD on its parameters. Before
they are timed in float32, both take three steps in float64 with the same dropout and must arrive at the same weights
(biases that the next batch norm takes away again have no gradient but round-off).
The last line is the ratio of the times, reference by product, as median, range and number of pairs.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torchvision.models import mobilenet_v3_large

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.setting import Batch, Clock, interleave, median_and_range
from fedmetanas_core.search.steps import SingleLevel
from fedmetanas_core.search.tasks import OuterOptions, TaskKind, TaskRunner
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.fixed import FixedNetwork, FixedSpec

RATE, MOMENTUM, DECAY, CLIP, CLASSES = 0.05, 0.9, 3e-4, 5.0, 10
STEPS, TOLERANCE = 3, 1e-9  # compared before timing; relative, float64

Step = Callable[[], object]


def make_product(spec: FixedSpec, batch: Batch) -> tuple[Step, FixedNetwork]:
    """The step as clients take it, and the network that it trains."""
    images = batch[0]
    network, architecture = FixedNetwork(spec, dtype=images.dtype), Architecture(spec)
    network.initialise(torch.Generator().manual_seed(0))
    outer = OuterOptions(momentum=MOMENTUM, weight_decay=DECAY)
    kind = TaskKind(len(images), True, False, False, 0.0, SingleLevel(CLIP), outer)
    runner = TaskRunner(network, architecture, kind)
    runner.set_rate(RATE)
    return lambda: runner([batch], torch.Generator()), network


def make_reference(spec: FixedSpec, batch: Batch, start: FixedNetwork) -> tuple[Step, nn.Module]:
    """The same step with torchvision's model, beginning with the same weights."""
    images, labels = batch
    model = mobilenet_v3_large(weights=None, num_classes=spec.num_classes)
    model.features[0][0] = nn.Conv2d(spec.in_channels, 16, 3, 2, padding=1, bias=False)
    model.to(images.dtype).train()
    with torch.no_grad():
        for own, given in zip(model.parameters(), start.parameters(), strict=True):
            own.copy_(given)
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, weight_decay=DECAY)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return step, model


def random_batch(spec: FixedSpec, size: int, dtype: torch.dtype) -> Batch:
    """Standard normal images and labels drawn evenly."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, spec.in_channels, spec.height, spec.width, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(spec.num_classes, (size,), generator=generator)


def largest_difference(spec: FixedSpec, size: int) -> float:
    """Of the weights after some steps of both, relative to their largest change."""
    batch = random_batch(spec, size, torch.float64)
    product, network = make_product(spec, batch)
    reference, model = make_reference(spec, batch, network)
    start = nn.utils.parameters_to_vector(network.parameters()).detach()
    for seed in range(STEPS):
        for step in (product, reference):
            torch.manual_seed(seed)  # dropout
            step()
    own, other = (nn.utils.parameters_to_vector(each.parameters()).detach() for each in (network, model))
    return float((own - other).abs().max() / (other - start).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=8)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    spec = FixedSpec("mobilenet_v3_large", given.channels, CLASSES, given.side, given.side)
    difference = largest_difference(spec, given.batch)
    print(f"after {STEPS} steps in float64 the largest difference is {difference:.1e}")
    if not difference <= TOLERANCE:  # NaN as well
        raise SystemExit(f"more than {TOLERANCE}: these are not the same step")
    batch = random_batch(spec, given.batch, torch.float32)
    product, network = make_product(spec, batch)
    reference, _ = make_reference(spec, batch, network)
    seconds = interleave({"reference": reference, "product": product}, given.pairs, Clock("cpu"))
    ratios = [one / other for one, other in zip(seconds["reference"], seconds["product"], strict=True)]
    print(f"torch {torch.__version__}, 1 thread, {given.side}x{given.side}x{given.channels}, batch {given.batch}")
    print(f"ratio {median_and_range(ratios)}")


if __name__ == "__main__":
    main()
