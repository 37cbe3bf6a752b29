"""Memory and open files of every process of a long search.

    python benchmarks/long_run.py [--rounds 300] [KEY=VALUE ...]

Follows `fedmetanas search num_rounds=300` from outside (/proc, Linux) and prints, at every fiftieth round, resident
megabytes and open files of the server and of the Ray workers that train, and at the end how far each moved after round
50: the largest and the smallest value of the rounds after it over the value at round 50.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.run.processes import family

FEDMETANAS = str(Path(sys.executable).with_name("fedmetanas"))
SETTLED = 50  # rounds after which nothing should grow any more


def look(pid: int) -> tuple[str, float, int] | None:
    """(what it is, resident megabytes, open files) of a process that serves or trains, None for others."""
    place = Path(f"/proc/{pid}")
    try:
        command = (place / "cmdline").read_bytes()
        pages = int((place / "statm").read_text().split()[1])
        files = len(os.listdir(place / "fd"))
    except OSError:
        return None
    kind = "server" if b"flwr-simulation" in command else "worker" if b"ray::" in command else ""
    return (f"{kind} {pid}", pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files) if kind else None


def follow(process: subprocess.Popen[bytes], folder: RunFolder) -> dict[str, dict[int, tuple[float, int]]]:
    """Process to round to (megabytes, open files), until the search ends."""
    seen: dict[str, dict[int, tuple[float, int]]] = defaultdict(dict)
    shown = set[int]()
    while process.poll() is None:
        number = len(folder.rounds.read()) if folder.rounds.path.exists() else 0
        for found in filter(None, map(look, family([process.pid], set()))):
            name, megabytes, files = found
            seen[name][number] = (megabytes, files)
            if number and number % SETTLED == 0 and number not in shown:
                print(f"round {number:4d}  {name:14s} {megabytes:7.1f} MB  {files:4d} files", flush=True)
        shown.add(number)
        time.sleep(0.3)
    return seen


def main() -> int:
    """Run, print, judge: 1 if anything moved by more than a twentieth, or files were left open."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    moved = False
    with tempfile.TemporaryDirectory() as place:
        words = [FEDMETANAS, "search", f"num_rounds={given.rounds}", "run_name=long", *given.keys]
        with subprocess.Popen(words, cwd=place, stdout=subprocess.DEVNULL) as process:
            seen = follow(process, RunFolder(Path(place) / "runs" / "long"))
        for name, by_round in seen.items():
            before = [by_round[number] for number in sorted(by_round) if number <= SETTLED]
            after = [by_round[number] for number in sorted(by_round) if SETTLED < number < given.rounds]
            if not before or len(after) < given.rounds / 4:
                continue  # a process that neither serves nor trains all along
            megabytes, files = before[-1]
            low, high = (choose(each[0] for each in after) / megabytes for choose in (min, max))
            counts = sorted({each[1] for each in after})
            print(f"{name:14s} after round {SETTLED}: {megabytes:.0f} MB x {low:.3f} to {high:.3f}; files {counts}")
            moved |= high > 1.05 or counts[-1] > files + 2
    return int(moved or process.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
