"""How much faster the product's first-order MAML task is than the plain form's, at the same result.

python benchmarks/supernet_step.py --scale tiny|small|paper [--device cpu|cuda] [--kept 1.0|0.5|0.25|genotype]

A task is the inner step, the query pass, the meta update of weights and alphas, and both clippings. First both take
one task in float64 and must arrive at the same weights and alphas; then they are timed in float32, in turn. The last
line is the ratio of the times, reference by product, as median, range and number of pairs. FEDMETANAS_NATIVE=0
measures the product without compiled code.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.reference_supernet import Noise, ReferenceLearner, ReferenceSupernet
from benchmarks.setting import (
    BATCH,
    SCALES,
    Batch,
    Clock,
    architecture_of,
    interleave,
    median_and_range,
    random_batch,
)
from fedmetanas_core.federation.update import Payload, RoundPlan
from fedmetanas_core.search.relaxation import gumbel
from fedmetanas_core.search.steps import Fomaml
from fedmetanas_core.search.tasks import OuterOptions, TaskKind, TaskRunner, as_graph
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.native import build
from fedmetanas_core.space.spec import SpaceSpec
from fedmetanas_core.space.supernet import Supernet

TEMPERATURE, NOISE_SCALE = 0.5, 1.0
WEIGHT_RATE, ALPHA_RATE, MOMENTUM, WEIGHT_DECAY, ALPHA_DECAY = 0.025, 3e-4, 0.9, 3e-4, 1e-3
LEARNER = Fomaml()
Made = tuple[TaskRunner, Payload]
CHECK_BATCH = 4
# Relative, float64. A recorded task on a GPU reads the rate of weights, and Adam's count of steps, as float32.
TOLERANCE = {"cpu": 1e-10, "cuda": 1e-6}


@dataclass
class Sides:
    """The same task by both: callables that take one, and what they have arrived at."""

    product: Callable[[], object]
    reference: Callable[[], object]
    product_values: Callable[[], dict[str, Tensor]]
    reference_values: Callable[[], dict[str, Tensor]]


def weight_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The outer SGD of weights; one step per tensor where it is given many."""
    return torch.optim.SGD(parameters, WEIGHT_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, foreach=False)


def alpha_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The outer Adam of alphas."""
    return torch.optim.Adam(parameters, ALPHA_RATE, betas=(0.5, 0.999), weight_decay=ALPHA_DECAY)


def same_noise(architecture: Architecture, seed: int) -> tuple[Noise, Noise]:
    """The draws of support and query as ``draw_noise`` makes them from a generator of this seed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [logits.shape for logits, _ in architecture.rows()]
    like = architecture.operation_logits
    draws = [gumbel(shape, generator).to(like.device, like.dtype) for _ in range(2) for shape in shapes]
    return (draws[0], draws[1]), (draws[2], draws[3])


def make_product(runner: TaskRunner, payload: Payload, support: Batch, query: Batch) -> Callable[[], object]:
    """One task of the product on these batches; every call draws the same noise."""
    runner.begin(payload)
    runner.set_rate(WEIGHT_RATE)
    return lambda: runner([support, query], torch.Generator().manual_seed(1))


def make_runner(
    architecture: Architecture, images: int, device: str, dtype: torch.dtype, searches: bool = True, **outer: str
) -> Made:
    """A runner as a client has it, with a recording of its own, and a payload of fresh weights for it.

    ``searches`` False is the phase after the search: nothing is mixed and alphas are left alone.
    """
    fresh = Supernet(architecture.spec, architecture.operation_mask, dtype=dtype)
    fresh.initialise(torch.Generator().manual_seed(0))
    own = architecture.clone().to(dtype)
    plan = RoundPlan(1, 2, 0, 1, 2, "search", TEMPERATURE, NOISE_SCALE, True, False, 8, (), ALPHA_DECAY, 0)
    payload = Payload(fresh.weights.detach(), fresh.statistics, own, plan)
    options = OuterOptions(MOMENTUM, WEIGHT_DECAY, alpha_rate=ALPHA_RATE, **outer)
    kind = TaskKind(images, True, searches, searches, ALPHA_DECAY, LEARNER, options)
    net, record = Supernet(architecture.spec, own.operation_mask, device, dtype), as_graph if device == "cuda" else None
    return TaskRunner(net, own.clone().to(device), kind, record), payload


def make_product_alone(
    architecture: Architecture, images: int, device: str, searches: bool = True, **outer: str
) -> Callable[[], object]:
    """One task of the product in float32, for measurements without the plain form."""
    runner, payload = make_runner(architecture, images, device, torch.float32, searches, **outer)
    generator = torch.Generator().manual_seed(0)
    batches = [random_batch(architecture.spec, images, generator, runner.network.weights) for _ in range(2)]
    return make_product(runner, payload, *batches)


def make_sides(architecture: Architecture, images: int, device: str, dtype: torch.dtype) -> Sides:
    """Both forms of one network with the same weights, alphas, batches and noise."""
    spec: SpaceSpec = architecture.spec
    generator = torch.Generator().manual_seed(0)
    runner, payload = make_runner(architecture, images, device, dtype)
    net, own, other = runner.network, runner.architecture, architecture.clone().to(device, dtype)
    plain = ReferenceSupernet(other).to(device, dtype)
    plain.load(net.weight_layout.views(payload.weights))
    support, query = (random_batch(spec, images, generator, net.weights) for _ in range(2))
    (logits, masks), noises = zip(*other.rows(), strict=True), same_noise(other, 1)
    learner = ReferenceLearner(
        plain,
        list(logits),
        list(masks),
        TEMPERATURE,
        weight_optimizer(list(plain.parameters())),
        alpha_optimizer(list(logits)),
        LEARNER.weight_rate,
        LEARNER.alpha_rate,
        LEARNER.clip,
    )

    def values(of: Architecture, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**weights, **{name: parameter.detach() for name, parameter in of.named_parameters()}}

    return Sides(
        make_product(runner, payload, support, query),
        lambda: learner.task(support, query, noises),
        lambda: values(own, net.weight_layout.views(net.weights.detach())),
        lambda: values(other, plain.export()),
    )


def largest_difference(sides: Sides) -> tuple[float, str]:
    """The largest difference of any tensor after one task of both, and the tensor's name.

    Relative to the tensor's largest entry; logits are exponents, whose unit is 1. (Adam divides a gradient by its own
    size, so next to a logit of 0.001 even the rounding of a vanishing gradient would look large.)
    """
    sides.product()
    sides.reference()
    found, expected = sides.product_values(), sides.reference_values()
    units = {name: 1.0 if name.endswith("_logits") else float(expected[name].abs().max()) for name in expected}
    return max((float((found[name] - expected[name]).abs().max()) / units[name], name) for name in expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kept", default="1.0", help="share of the operations kept, or 'genotype'")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=BATCH)
    given = parser.parse_args()
    torch.set_num_threads(1)
    reason = build.prepare() if given.device == "cpu" else "on a GPU"
    print(f"compiled code: {f'no, {reason}' if reason else 'yes'}; torch {torch.__version__}, 1 thread, {given.device}")
    architecture = architecture_of(SCALES[given.scale], given.kept)
    difference, name = largest_difference(make_sides(architecture, CHECK_BATCH, given.device, torch.float64))
    print(f"after one task in float64 the largest difference is {difference:.1e}, in {name}")
    if difference > TOLERANCE[given.device]:
        sys.exit(f"supernet_step: more than {TOLERANCE[given.device]:.0e}; the two do not compute the same")
    sides = make_sides(architecture, given.batch, given.device, torch.float32)
    parts = {"reference": sides.reference, "product": sides.product}
    seconds = interleave(parts, given.pairs, Clock(given.device))
    for part, taken in seconds.items():
        print(f"{part}: milliseconds a task {median_and_range([1e3 * each for each in taken])}")
    ratios = [plain / own for plain, own in zip(seconds["reference"], seconds["product"], strict=True)]
    print(f"ratio {median_and_range(ratios)}")


if __name__ == "__main__":
    main()
