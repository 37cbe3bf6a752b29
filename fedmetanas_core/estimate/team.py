"""Several probes at once, as many as a run's workers on this machine's cores: orders to all, their answers."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from fedmetanas_core.config import Config
from fedmetanas_core.errors import ProcessDiedError

PROBE = "fedmetanas_core.estimate.probe"
ROOT = Path(__file__).resolve().parents[2]

Answer = dict[str, Any]


class Crew(Protocol):
    """``count`` workers that take an order each at the same time; ``ready`` is what they said when they began."""

    count: int
    ready: list[Answer]

    def ask(self, orders: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """What they answer."""
        ...


class Team:
    """Probes as a context manager; leaving ends them. If this process is killed, their input ends, and so do they."""

    def __init__(self, config: Config, count: int) -> None:
        self.config, self.count = config, count
        self.ready: list[Answer] = []
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._probes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        try:
            for _ in range(self.count):
                self._probes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", PROBE],
                        cwd=ROOT,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=self._log,
                        text=True,
                    )
                )
            self._tell([self.config.to_dict()] * self.count)
            self.ready = [self._hear(probe) for probe in self._probes]
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def ask(self, orders: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """All probes at the same time, one order each, and what they answer. Raises ProcessDiedError."""
        self._tell(orders)
        return [self._hear(probe) for probe in self._probes]

    def _tell(self, orders: Sequence[Mapping[str, Any]]) -> None:
        for probe, order in zip(self._probes, orders, strict=True):
            assert probe.stdin is not None
            try:
                probe.stdin.write(json.dumps(order) + "\n")
                probe.stdin.flush()
            except BrokenPipeError as error:
                raise self._died() from error

    def _hear(self, probe: subprocess.Popen[str]) -> Answer:
        assert probe.stdout is not None
        line = probe.stdout.readline()
        if not line:
            raise self._died()
        answer: Answer = json.loads(line)
        return answer

    def _died(self) -> ProcessDiedError:
        self._log.seek(0)
        said = self._log.read().strip().splitlines()
        reason = said[-1][:300] if said else "it was killed, most likely for want of memory"
        return ProcessDiedError(f"a process that measures has ended: {reason}")

    def _end(self) -> None:
        for probe in self._probes:
            probe.kill()
            probe.communicate()
        self._log.close()
