"""Kill a search at random moments, resume it each time, and compare its result with an uninterrupted one's.

    python benchmarks/kill_and_resume.py [--kills 20] [--seed 0] [--directory DIR]

What gets SIGKILL is drawn each time: the command that launched the run, its server process, a Ray worker, or all
processes of the launch at once. A run that comes to its end before all kills are used up is followed by another. Prints
a line for each kill and a verdict; the exit code is 1 if any byte of a result differs.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.run.processes import family, send

FEDMETANAS = str(Path(sys.executable).with_name("fedmetanas"))
SMALL = ("num_rounds=20", "num_clients=20", "local_epochs=1", "init_channels=2", "num_nodes=2", "evaluate_every=5")
RESULTS = ("model/genotype.json", "model/weights.safetensors")
TARGETS = ("launcher", "server", "worker", "everything")
LATEST_S = 30.0  # of a kill, after its session's start: Flower and Ray take about half of it
END_TIMEOUT_S = 300.0
RESUMED_AT_MOST = 3  # without a kill in between: a launcher restarts a killed server only so often


class Search:
    """A search in ``directory`` that is started, killed and resumed."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.name = directory, name
        self.folder = RunFolder(directory / "runs" / name)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """Start it, or go on with it."""
        there = self.folder.config_file.is_file()
        words = [f"resume={self.folder.path}"] if there else [*SMALL, f"run_name={self.name}"]
        with (self.directory / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [FEDMETANAS, "search", *words], cwd=self.directory, stdout=log, stderr=log, start_new_session=True
            )
        return self.process

    def finish(self) -> None:
        """Go on with it until it is complete; RuntimeError if it does not get there."""
        process = self.process if self.process is not None and self.process.poll() is None else self.start()
        for _ in range(RESUMED_AT_MOST):
            if process.wait(END_TIMEOUT_S) == 0:
                return
            process = self.start()
        raise RuntimeError(f"{self.name} ended with {process.wait()}; see {self.directory / self.name}.log")

    def results(self) -> list[bytes]:
        """What it found."""
        return [(self.folder.path / name).read_bytes() for name in RESULTS]


def victims(process: subprocess.Popen[bytes], target: str) -> set[int]:
    """Pids of the launch to kill; none if there is no such process yet."""
    if target == "launcher":
        return {process.pid}
    relatives = family([process.pid], set())
    if target == "everything":
        return {process.pid, *relatives}
    word = {"server": b"flwr-simulation", "worker": b"ray::"}[target]
    found = {pid for pid in relatives if word in _command(pid)}
    return found if target == "server" else set(sorted(found)[:1])


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill_at_random(search: Search, kills: int, stream: random.Random) -> Iterator[str]:
    """Kill the search up to ``kills`` times, until it comes to its end; a word for each kill."""
    process = search.start()
    done = 0
    while done < kills:
        target, moment = stream.choice(TARGETS), stream.uniform(0.0, LATEST_S)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            pids = victims(process, target)
            if not pids:
                continue  # too early for that one
            rounds = len(search.folder.rounds.read())
            send(pids, signal.SIGKILL)
            yield f"{search.name}: {target} ({len(pids)} processes) after {moment:.1f} s, at round {rounds}"
            done += 1
            if target in ("launcher", "everything"):
                process.wait()
                process = search.start()
        else:
            return


def run(directory: Path, kills: int, seed: int) -> bool:
    """Whether every killed run ended with the bytes of the uninterrupted one."""
    whole = Search(directory, "whole")
    whole.finish()
    stream, done, same = random.Random(seed), 0, True
    number = 0
    while done < kills:
        number += 1
        search = Search(directory, f"broken-{number}")
        for words in kill_at_random(search, kills - done, stream):
            done += 1
            print(f"kill {done}: {words}", flush=True)
        search.finish()
        equal = search.results() == whole.results()
        summary = search.folder.read_summary() or {}
        print(f"{search.name}: {'the same bytes' if equal else 'DIFFERS'}, resumed after {summary['resumed_after']}")
        same &= equal
    return same


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path)
    given = parser.parse_args()
    directory = given.directory or Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    directory.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    same = run(directory, given.kills, given.seed)
    print(f"{given.kills} kills in {time.monotonic() - started:.0f} s: {'all the same' if same else 'NOT the same'}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
