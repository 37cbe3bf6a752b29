"""Tasks that are recorded and replayed compute what they compute when they are run.

On a processor a recording is imitated: every operation is noted with the tensors it read and wrote, and repeated on
the same tensors with the same numbers, as a CUDA graph repeats its kernels. What that cannot show, that nothing passes
by way of the processor, torch's meta device shows: its tensors have no values.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from helpers import random_architecture, random_masks, random_one_hot, random_supernet, small_spec, stream
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmetanas_core.federation.update import Payload, RoundPlan
from fedmetanas_core.search.relaxation import Relaxation
from fedmetanas_core.search.schedule import Schedule
from fedmetanas_core.search.steps import Fomaml
from fedmetanas_core.search.tasks import (
    OuterOptions,
    Recordings,
    TaskKind,
    TaskRunner,
    Work,
    _recorded,
    borrow_runner,
)
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.supernet import Supernet

SPEC = small_spec()
PLAN = Schedule(num_rounds=20, num_nodes=SPEC.num_nodes, seed=3).plan(5)
SIZE = 4
WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Tape(TorchDispatchMode):
    """Every operation with its arguments; an operation that needs its result on the host cannot be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in WAITS, f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for place, value in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                        place.copy_(value)


def on_tape(work: Work) -> Work:
    for _ in range(2):
        work()  # as before a CUDA graph: leaves weights, alphas and optimisers in a state that must not matter
    tape = Tape()
    with tape:
        work()
    return tape.replay


def kind_of(**values: Any) -> TaskKind:
    rule = Fomaml(alpha_optimizer="sgd", alpha_rate=0.1)
    plain = TaskKind(SIZE, True, True, True, 1e-3, rule, OuterOptions(alpha_optimizer="sgd", alpha_rate=0.1))
    return replace(plain, **values)


def payload_of(architecture: Architecture, plan: RoundPlan, seed: int) -> Payload:
    supernet = random_supernet(SPEC, architecture.operation_mask, seed, torch.float64)
    return Payload(supernet.weights.detach().clone(), supernet.statistics.clone(), architecture, plan)


def make(kind: TaskKind, architecture: Architecture, record: Callable[[Work], Work] | None) -> TaskRunner:
    supernet = Supernet(SPEC, architecture.operation_mask, dtype=torch.float64)
    return TaskRunner(supernet, architecture.clone(), kind, record)


def two_rounds(runner: TaskRunner, architectures: list[Architecture], plans: list[RoundPlan]) -> list[Tensor]:
    """Three tasks each in two rounds with other values in all that may change; losses and what was learned."""
    found: list[Tensor] = []
    for number, (architecture, plan) in enumerate(zip(architectures, plans, strict=True)):
        runner.begin(payload_of(architecture, plan, 10 + number))
        generator = stream(20 + number)
        for step in range(3):
            runner.set_rate(2.0 ** -(6 + step))  # a recording reads it as float32
            images = [torch.randn(SIZE, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
            labels = [torch.randint(SPEC.num_classes, (SIZE,), generator=generator) for _ in range(2)]
            found.append(runner(list(zip(images, labels, strict=True)), generator))
        found += [runner.network.weights.detach().clone()]
        found += [logits.detach().clone() for logits, _ in runner.architecture.rows()]
    return found


RULES = {
    "joint": Fomaml(alpha_optimizer="sgd", alpha_rate=0.1),
    "three inner steps": Fomaml(alpha_optimizer="sgd", alpha_rate=0.1, inner_steps=3),
    "alternate": Fomaml(alpha_optimizer="sgd", alpha_rate=0.1, alternate=True, inner_steps=2),
}
KINDS = {
    **{name: {"rule": rule} for name, rule in RULES.items()},
    "frozen alphas": {"adapts": False},
    "a draw per cell": {
        "outer": OuterOptions(alpha_optimizer="sgd", alpha_rate=0.1, relaxation=Relaxation(sample="per_cell"))
    },
    "running statistics": {"trains": False},
}


@pytest.mark.parametrize("values", KINDS.values(), ids=KINDS)
def test_a_recording_serves_later_rounds(values: dict[str, Any]) -> None:
    kind = kind_of(**values)
    first = random_masks(random_architecture(SPEC, 1, 1.0, torch.float64), stream(5), 0.6)
    second = first.clone()
    with torch.no_grad():
        second.operation_logits.mul_(-0.5)
    plans = [replace(PLAN, temperature=0.8, noise_scale=0.7), replace(PLAN, temperature=0.3, noise_scale=0.0)]
    expected = two_rounds(make(kind, first, None), [first, second], plans)
    found = two_rounds(make(kind, first, on_tape), [first, second], plans)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    moved = float((expected[3] - payload_of(first, PLAN, 10).weights).abs().max())
    assert moved > 1e-4


def test_a_one_hot_network_is_recorded_without_a_mixture() -> None:
    architecture = random_one_hot(random_architecture(SPEC, 1, 1.0, torch.float64), stream(5))
    kind, plans = kind_of(mixes=False, adapts=False), [PLAN, replace(PLAN, temperature=0.1)]
    sides = [two_rounds(make(kind, architecture, how), [architecture] * 2, plans) for how in (None, on_tape)]
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_tape_sees_what_cannot_be_recorded() -> None:
    """Otherwise the tests above would prove nothing."""
    total, rate = torch.zeros(()), [1.0]

    def waits() -> None:
        total.add_(float(total))

    def reads_a_number() -> None:
        total.add_(rate[0])

    with pytest.raises(AssertionError, match="waits for the device"):
        on_tape(waits)
    replay = on_tape(reads_a_number)
    rate[0] = 5.0
    before = float(total)
    replay()
    assert float(total) == before + 1.0  # a number that is not a tensor stays what it was


class Devices(TorchDispatchMode):
    """The operations that touched a tensor of the processor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.on_processor = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        tensors = [each for each in tree_leaves((args, kwargs or {}, out)) if isinstance(each, Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.on_processor.add(str(func))
        return out


@pytest.fixture
def meta_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch offers for CUDA and refuses for its meta device, which computes nothing anyway."""
    monkeypatch.setattr(import_module("torch.optim.adam"), "_get_capturable_supported_devices", lambda **_: ["meta"])
    monkeypatch.setattr("torch._fused_sgd_", lambda *_, **__: None)
    autocast = torch.autocast
    monkeypatch.setattr("torch.autocast", lambda _, *rest, **options: autocast("cpu", *rest, **options))


DEFAULTS = {"rule": Fomaml(), "outer": OuterOptions()}


@pytest.mark.usefixtures("meta_takes_part")
@pytest.mark.parametrize(
    "values",
    [
        DEFAULTS,
        {**DEFAULTS, "rule": Fomaml(alternate=True, inner_steps=2)},
        {**DEFAULTS, "outer": OuterOptions(precision="bfloat16")},
        {**DEFAULTS, "outer": OuterOptions(weight_optimizer="adam")},
        {**DEFAULTS, "mixes": False, "adapts": False},
        *KINDS.values(),
    ],
)
def test_nothing_in_a_task_passes_by_way_of_the_processor(values: dict[str, Any]) -> None:
    """Reading a value, or an operation that makes its shape from values, would raise."""
    devices = Devices()

    def watched(work: Work) -> Work:
        work()
        with devices:
            work()
        return work

    architecture = Architecture(SPEC).to("meta")
    TaskRunner(Supernet(SPEC, architecture_mask(), "meta"), architecture, kind_of(**values), watched)
    assert devices.calls > 500
    assert devices.on_processor == set()


def architecture_mask() -> Tensor:
    return Architecture(SPEC).operation_mask


class Kept:
    """Stands in for a runner."""


def test_recordings_that_cannot_be_used_again_are_let_go() -> None:
    held = Recordings()
    for network, kind, left in [
        (("a",), kind_of(), 0),
        (("a",), kind_of(size=2), 1),
        (("a",), kind_of(size=3), 1),  # two at most: the oldest goes
        (("a",), kind_of(adapts=False), 0),  # another phase
        (("b",), kind_of(adapts=False), 0),  # another architecture
    ]:
        held.make_room(network, kind)
        assert len(held._runners) == left
        assert held.find(network, kind) is None
        held.keep(kind, Kept())  # type: ignore[arg-type]
        assert isinstance(held.find(network, kind), Kept)
        assert held.find(("c",), kind) is None


def test_a_recording_that_fails_is_done_without_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(work: Work) -> Work:
        raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr("fedmetanas_core.search.tasks.as_graph", refuses)
    monkeypatch.setattr("fedmetanas_core.search.tasks.recordings", held := Recordings())
    architecture = random_architecture(SPEC, 1, 1.0, torch.float64)
    assert _recorded(Supernet(SPEC, architecture.operation_mask), architecture, kind_of()) is None
    assert held.failure == "tasks are not recorded: CUDA error: operation not permitted when stream is capturing"


def test_passes_are_counted_as_the_rule_takes_them() -> None:
    assert kind_of().passes == 2
    assert kind_of(rule=RULES["three inner steps"]).passes == 4
    assert kind_of(rule=RULES["alternate"]).passes == 5
    assert kind_of(rule=RULES["alternate"], adapts=False).passes == 3


def test_a_new_round_forgets_the_last_client() -> None:
    architecture = random_architecture(SPEC, 1, 1.0, torch.float64)
    kind = kind_of(rule=Fomaml(), outer=OuterOptions())
    payload = payload_of(architecture, PLAN, 10)
    runner = borrow_runner(payload, kind, torch.device("cpu"), tasks=100)
    plans = [PLAN, PLAN]
    two_rounds(runner, [architecture] * 2, plans)
    again = two_rounds(runner, [architecture] * 2, plans)
    fresh = two_rounds(make(kind, architecture, None), [architecture] * 2, plans)
    for one, other in zip(again, fresh, strict=True):
        assert torch.equal(one, other)


def test_reduced_precision_leaves_weights_and_alphas_in_float32() -> None:
    architecture = random_architecture(SPEC, 1, 1.0)
    supernet = random_supernet(SPEC, architecture.operation_mask, 2)
    payload = Payload(supernet.weights.detach(), supernet.statistics, architecture, PLAN)
    seen: list[torch.dtype] = []
    found = {}
    for precision in ("float32", "bfloat16"):
        kind = kind_of(outer=OuterOptions(alpha_optimizer="sgd", alpha_rate=0.1, precision=precision))
        runner = TaskRunner(Supernet(SPEC, architecture.operation_mask), architecture.clone(), kind)
        runner.begin(payload)
        runner.set_rate(0.02)
        hook = runner.network.classifier.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
        images, labels = torch.randn(SIZE, 1, 8, 8, generator=stream(1)), torch.arange(SIZE) % SPEC.num_classes
        found[precision] = runner([(images, labels)] * 2, stream(2))
        hook.remove()
        for tensor in (runner.network.weights, *(logits for logits, _ in runner.architecture.rows())):
            assert tensor.dtype == torch.float32
            assert tensor.grad is not None
            assert tensor.grad.dtype == torch.float32
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
    torch.testing.assert_close(found["bfloat16"], found["float32"], rtol=0.1, atol=0.1)
    assert not torch.equal(found["bfloat16"], found["float32"])
