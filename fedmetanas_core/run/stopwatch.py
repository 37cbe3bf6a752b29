"""Where the rounds' time goes."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

PARTS = ("exchange", "averaging", "evaluation", "saving")
OTHER = "other"


class Stopwatch:
    """Wall seconds of rounds and of their parts, without the first round, in which the clients' processes start.

    ``before`` is what an earlier session of the same run has measured.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, before: Mapping[str, float] | None = None
    ) -> None:
        self.clock = clock
        before = before or {}
        self._seconds = {name: before.get(name, 0.0) for name in PARTS}
        self._whole = sum(before.values())
        self.counts = False

    @contextmanager
    def round(self) -> Iterator[None]:
        """A whole round."""
        started = self.clock()
        try:
            yield
        finally:
            if self.counts:
                self._whole += self.clock() - started
            self.counts = True

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """One of PARTS, inside a round; KeyError for another."""
        started = self.clock()
        try:
            yield
        finally:
            self._seconds[name] += self.clock() - started if self.counts else 0.0

    def seconds(self) -> dict[str, float]:
        """Seconds of each part; ``other`` is what the rounds took beside them."""
        return {**self._seconds, OTHER: max(0.0, self._whole - sum(self._seconds.values()))}


class Compute:
    """Seconds of computing within a ``with`` block: the process's own processor time, or a GPU's busy wall time.

    Processor time does not grow when several workers share the cores.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        self.seconds = 0.0

    def __enter__(self) -> "Compute":
        self._started = self._now()
        return self

    def __exit__(self, *details: object) -> None:
        self.seconds = self._now() - self._started

    def _now(self) -> float:
        if not self.on_gpu:
            return time.process_time()
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()
