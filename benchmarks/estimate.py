"""What `fedmetanas estimate` foretells beside what the run then takes.

    python benchmarks/estimate.py ["KEY=VALUE ..."] ...

Each argument is a configuration, as it would follow `fedmetanas search` (`--config FILE.toml` included); without any,
the digits search, MNIST on a laptop, and FedNAS on the digits. Estimate and run follow each other on this machine,
which should have nothing else to do: the estimate tells the time of free cores. Prints, for each figure, the estimate,
what the run measured, and the first over the second; below stands the load of the machine before and after the run.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENTRY = "from fedmetanas_core.cli import entry_point; entry_point()"
CONFIGURATIONS = ("", "--config conf/mnist-laptop.toml", "method=fednas num_rounds=40")


def command(name: str, words: list[str]) -> str:
    """Run it; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", ENTRY, name, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def foretold(words: list[str]) -> dict[str, float]:
    """The figures of the estimate that a run measures as well, and how long it took to make."""
    started = time.perf_counter()
    found = json.loads(command("estimate", [*words, "--json"]))
    seconds, memory = found["seconds"], found["memory"]
    return {
        "seconds of the command": seconds["command"],
        "seconds of the run": seconds["run"],
        "seconds of the clients": seconds["compute"],
        "peak memory of a process": max(memory["client"], memory["server"]),
        "bytes up": found["bytes"]["run"]["up"],
        "bytes down": found["bytes"]["run"]["down"],
        "parameters at the end": found["network"]["final_parameters"]["mean"],
        "seconds of the estimate": time.perf_counter() - started,
    }


def measured(words: list[str]) -> dict[str, float]:
    """The same of a real run."""
    with tempfile.TemporaryDirectory() as place:
        started = time.perf_counter()
        command("search", [*words, f"runs_dir={place}", "run_name=run"])
        wall = time.perf_counter() - started
        summary: dict[str, Any] = json.loads((Path(place) / "run" / "summary.json").read_text())
    return {
        "seconds of the command": wall,
        "seconds of the run": summary["seconds"],
        "seconds of the clients": summary["compute_seconds"],
        "peak memory of a process": summary["peak_memory_bytes"],
        "bytes up": summary["uplink_bytes"],
        "bytes down": summary["downlink_bytes"],
        "parameters at the end": summary["parameters"],
    }


def compare(configuration: str, expected: dict[str, float], found: dict[str, float]) -> list[str]:
    """Lines of a table."""
    lines = [f"{configuration or 'the digits, as they are':50}{'estimate':>16}{'run':>16}{'ratio':>8}"]
    lines += [
        f"  {name:48}{expected[name]:16,.1f}{value:16,.1f}{expected[name] / value:8.2f}"
        for name, value in found.items()
    ]
    return [*lines, f"  {'seconds of the estimate':48}{expected['seconds of the estimate']:16,.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configurations", nargs="*", default=CONFIGURATIONS, metavar="KEYS")
    for configuration in parser.parse_args().configurations:
        words = shlex.split(configuration)
        expected, before = foretold(words), os.getloadavg()[0]
        found = measured(words)
        print("\n".join(compare(configuration, expected, found)))
        print(f"  load of the machine: {before:.1f} before the run, {os.getloadavg()[0]:.1f} after it", flush=True)


if __name__ == "__main__":
    main()
