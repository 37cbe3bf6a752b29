"""What a search costs on a GPU: kernel launches, passes a second at each stage of pruning, memory, the paper's run.

python benchmarks/gpu_figures.py [--device cuda|cpu] [--scale tiny|small|paper] [--seconds 2] [--clients 5] [--name]

A pass is the forward and backward computation of one batch of 32; a task has two. Several clients share the GPU as
processes (what Ray's shares of a GPU are), and as streams of one process. --name prints what the hardware is called.
"""

import argparse
import multiprocessing
import platform
import queue
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pruned_step import SHARES
from benchmarks.reference_supernet import ReferenceSupernet
from benchmarks.setting import BATCH, GENOTYPE, SCALES, architecture_of, random_batch
from benchmarks.supernet_step import make_product_alone
from fedmetanas_core.search.relaxation import relax
from fedmetanas_core.search.schedule import Schedule
from fedmetanas_core.space.native import build
from fedmetanas_core.space.spec import PRIMITIVES, SpaceSpec
from fedmetanas_core.space.supernet import Supernet

PASSES = 2  # of a task with one inner step
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
PAPER = {"rounds": 1000, "clients": 5, "epochs": 5, "images": 600}  # section 5.1; images as in PerFedRLNAS
RUNS_FOR_MEMORY = 3
PATIENCE_S = 120.0  # for the slowest of several processes


class Operators(TorchDispatchMode):
    """Counts operators that compute: views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def passes_of(spec: SpaceSpec, device: str) -> dict[str, Callable[[], None]]:
    """One eager forward and backward pass of the plain form and of the product's modules."""
    architecture = architecture_of(spec, "1.0").to(device)
    net = Supernet(spec, architecture.operation_mask, device)
    net.initialise(torch.Generator().manual_seed(0))
    plain = ReferenceSupernet(architecture).to(device)
    images, labels = random_batch(spec, BATCH, torch.Generator().manual_seed(0), net.weights)

    def product() -> None:
        F.cross_entropy(net.forward_by_modules(images, relax(architecture, 0.5)), labels).backward()

    def reference() -> None:
        rows = [torch.softmax(logits, -1) * mask for logits, mask in architecture.rows()]
        F.cross_entropy(plain(images, *rows), labels).backward()

    return {"reference": reference, "product": product}


def count_launches(work: Callable[[], None], device: str) -> str:
    """How many kernels one pass starts, by the profiler; on a processor how many operators it calls."""
    work()
    if device == "cpu":
        with Operators() as operators:
            work()
        return f"{operators.count} operators"
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return f"{sum(event.count for event in profiler.key_averages() if event.key in LAUNCHES)} kernel launches"


def rate(tasks: Sequence[Callable[[], object]], device: str, seconds: float, streams: bool = False) -> float:
    """Passes a second of all these tasks, in turn, each on a stream of its own if asked."""
    lanes = [torch.cuda.Stream() if streams else None for _ in tasks]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    done, started = 0, time.perf_counter()
    while time.perf_counter() < started + seconds:
        for task, lane in zip(tasks, lanes, strict=True):
            with torch.cuda.stream(lane):
                task()
            done += PASSES
    wait()
    return done / (time.perf_counter() - started)


def client(number: int, given: dict[str, Any], barrier: Barrier, results: Any) -> None:
    """One of several processes: all stages, each begun together with the others."""
    torch.set_num_threads(1)
    build.prepare(device=given["device"])
    found = []
    for share in SHARES:
        architecture = architecture_of(SCALES[given["scale"]], share, number)
        task = make_product_alone(architecture, BATCH, given["device"], share != GENOTYPE)
        task()
        barrier.wait(PATIENCE_S)
        found.append(rate([task], given["device"], given["seconds"]))
    results.put(found)


def by_processes(given: dict[str, Any]) -> list[float]:
    """Passes a second at each stage, of all clients together."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(given["clients"]), context.Queue()
    workers = [
        context.Process(target=client, args=(number, given, barrier, results), daemon=True)
        for number in range(given["clients"])
    ]
    for worker in workers:
        worker.start()
    try:
        every = [results.get(timeout=2 * PATIENCE_S) for _ in workers]
    except queue.Empty:
        codes = [worker.exitcode for worker in workers]
        sys.exit(f"gpu_figures: the clients in processes did not all answer; exit codes {codes}")
    return [sum(stage) for stage in zip(*every, strict=True)]


def in_one_process(spec: SpaceSpec, given: dict[str, Any], clients: int, **outer: str) -> list[float]:
    """The same in this process: one client, or several on streams."""
    found = []
    for share in SHARES:
        architectures = [architecture_of(spec, share, number) for number in range(clients)]
        searches = share != GENOTYPE
        tasks = [make_product_alone(each, BATCH, given["device"], searches, **outer) for each in architectures]
        for task in tasks:
            task()
        found.append(rate(tasks, given["device"], given["seconds"], clients > 1))
    return found


def extrapolate(spec: SpaceSpec, rates: Sequence[float]) -> str:
    """Hours of the paper's rounds at these rates, with the arithmetic; the network is as large as its caps allow.

    Making the recordings, evaluation and what travels are left out.
    """
    tasks = PAPER["images"] // BATCH // 2
    each = PAPER["clients"] * PAPER["epochs"] * tasks * PASSES
    schedule = Schedule(num_rounds=PAPER["rounds"], num_nodes=spec.num_nodes, seed=0)
    alive, rounds = 1.0, dict.fromkeys(SHARES, 0)
    for number in range(1, PAPER["rounds"] + 1):
        plan = schedule.plan(number)
        stage = min((s for s in SHARES if s != GENOTYPE and float(s) >= alive), key=float)
        rounds[GENOTYPE if plan.phase == "one-hot" else stage] += 1
        alive = min(alive, plan.operation_cap / len(PRIMITIVES)) if plan.prunes else alive
    seconds = sum(count * each / speed for count, speed in zip(rounds.values(), rates, strict=True))
    stages = ", ".join(f"{count} at {share}" for share, count in rounds.items() if count)
    total = each * PAPER["rounds"]
    return (
        f"{PAPER['rounds']} rounds of {PAPER['clients']} clients x {PAPER['epochs']} epochs x {tasks} tasks x {PASSES} "
        f"passes are {total:,} passes; rounds: {stages}; at these rates {seconds / 3600:.2f} h"
    )


def peak_memory(spec: SpaceSpec, device: str) -> str:
    """What one client with the full network holds."""
    if device == "cpu":
        return "see memory.py"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    task = make_product_alone(architecture_of(spec, "1.0", 99), BATCH, device)
    for _ in range(RUNS_FOR_MEMORY):
        task()
    return f"{torch.cuda.max_memory_reserved() / 1e6:.0f} MB reserved"


def table(title: str, rates: Sequence[float]) -> None:
    print(f"{title}: " + ", ".join(f"{share} {speed:.1f}" for share, speed in zip(SHARES, rates, strict=True)))


def hardware(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}-proof"
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", choices=SCALES, default="paper")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--name", action="store_true")
    given = vars(parser.parse_args())
    device, spec = given["device"], SCALES[given["scale"]]
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu proves the script without one")
    if given["name"]:
        print(hardware(device))
        return
    torch.set_num_threads(1)
    build.prepare(device=device)
    print(f"{hardware(device)}; torch {torch.__version__}; {given['scale']}, batch {BATCH}")
    for name, work in passes_of(spec, device).items():
        print(f"one pass of the {name}: {count_launches(work, device)}")
    print(f"peak memory of one client: {peak_memory(spec, device)}")
    one = in_one_process(spec, given, 1)
    table("passes a second, one client", one)
    if device == "cuda":
        table("the same in bfloat16", in_one_process(spec, given, 1, precision="bfloat16"))
        table(f"passes a second, {given['clients']} clients on streams", in_one_process(spec, given, given["clients"]))
    together = by_processes(given)
    table(f"passes a second, {given['clients']} clients in processes", together)
    print(f"one client after the other: {extrapolate(spec, one)}")
    print(f"{given['clients']} clients in processes: {extrapolate(spec, together)}")


if __name__ == "__main__":
    main()
