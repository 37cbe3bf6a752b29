"""How far a run is, on stderr: one live display in a terminal, a few plain lines in a log file."""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedmetanas_core.text import describe, printable

RECENT_ROUNDS = 10  # enough to hold one evaluated round of most schedules, few enough to follow pruning
MOST_PLAIN_LINES = 60
REGULAR_PLAIN_LINES = 40  # of these; the rest is for phase changes and evaluated rounds between them
REFRESHES_PER_SECOND = 2.0  # the clock must move while a round takes minutes


class Progress:
    """Shows the ledger rows it is given; `with Progress(total_rounds) as progress: progress.update(row)`.

    `before` says what goes on until the first row comes, `after` what follows the last one. Writes to `stream` (stderr)
    only; print to stdout after the `with` block, where both are one terminal. `clock` gives seconds.
    """

    def __init__(
        self,
        total_rounds: int,
        before: str = "waiting for the first round",
        after: str = "",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_rounds = max(1, total_rounds)
        self.before, self.after = printable(before), printable(after)
        self.stream = sys.stderr if stream is None else stream
        self.clock = clock
        self.started_s = clock()
        self.updated_s = self.started_s
        self.round = 0
        self.phase = ""
        self.train_loss: float | None = None
        self.accuracy: float | None = None
        self.accuracy_round = 0
        self.alive_operations: int | None = None
        self.excluded = 0
        self.recent_seconds: deque[float] = deque(maxlen=RECENT_ROUNDS)
        self._live: Live | None = None
        self._plain = _PlainSchedule(self.total_rounds)

    def __enter__(self) -> "Progress":
        self.started_s = self.updated_s = self.clock()
        if self.stream.isatty() and os.environ.get("TERM", "") != "dumb":
            self._live = Live(
                console=Console(file=self.stream, force_terminal=True),
                get_renderable=self._display,
                refresh_per_second=REFRESHES_PER_SECOND,
                redirect_stdout=False,  # rich would move what is printed to stdout onto this console, that is stderr
                redirect_stderr=self.stream is sys.stderr,
            )
            self._live.start(refresh=True)
        else:
            self._write(self.before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, row: Mapping[str, object]) -> None:
        """Take in the ledger row of a finished round. Keys that are missing or null leave what was shown before."""
        now_s = self.clock()
        phase = printable(str(row.get("phase") or self.phase))
        phase_changed = phase != self.phase
        if phase_changed:
            self.recent_seconds.clear()  # a phase has its own cost: what the last one took says nothing about it
        self.phase = phase
        self.round = int(_number(row, "round") or self.round + 1)
        seconds = _number(row, "seconds")
        if self.round > 1:  # the first one takes the start of the workers with it
            self.recent_seconds.append(now_s - self.updated_s if seconds is None else seconds)
        self.updated_s = now_s
        self.train_loss = _number(row, "train_loss")
        accuracy, alive = _number(row, "test_accuracy"), _number(row, "alive_operations")
        if accuracy is not None:
            self.accuracy, self.accuracy_round = accuracy, self.round
        excluded = row.get("excluded")
        self.excluded += len(excluded) if isinstance(excluded, list) else 0
        if alive is not None:
            self.alive_operations = int(alive)
        if self._live is not None:
            self._live.refresh()
        elif self._plain.wants(self.round, phase_changed, evaluated=accuracy is not None):
            self._write(self._plain_line())
            if self.round >= self.total_rounds:
                self._write(self.after)

    def _write(self, line: str) -> None:
        if line:
            self.stream.write(line + "\n")
            self.stream.flush()

    def seconds_left(self) -> float | None:
        """The estimate for the rounds to come, from the last rounds of this phase; None before the second round.

        Only recent rounds count because pruning makes rounds cheaper as the search goes on.
        """
        recent = list(self.recent_seconds)  # a copy, because the live display reads from a thread of its own
        if not recent:
            return None
        rounds_left = max(0, self.total_rounds - self.round)
        estimate = rounds_left * sum(recent) / len(recent)
        return max(0.0, estimate - (self.clock() - self.updated_s)) if rounds_left else 0.0

    def _facts(self) -> list[str]:
        facts = [self.phase] if self.phase else []
        if self.train_loss is not None:
            facts.append(f"loss {self.train_loss:.4g}")
        if self.accuracy is not None:
            when = "" if self.accuracy_round == self.round else f" (round {self.accuracy_round})"
            facts.append(f"accuracy {self.accuracy:.3f}{when}")
        if self.alive_operations is not None:
            facts.append(f"{self.alive_operations} operations")
        if self.excluded:
            facts.append(f"{self.excluded} update{'s'[: self.excluded > 1]} excluded so far")
        facts.append(f"{describe(self.clock() - self.started_s)} elapsed")
        left_s = self.seconds_left()
        if left_s:
            facts.append(f"about {describe(left_s)} left")
        return facts

    def _plain_line(self) -> str:
        return ", ".join([f"round {self.round}/{self.total_rounds}", *self._facts()])

    def _display(self) -> RenderableType:
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True, overflow="ellipsis")
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        bar.add_row(
            Text("rounds", style="bold"),
            ProgressBar(total=self.total_rounds, completed=min(self.round, self.total_rounds)),
            Text(f"{self.round}/{self.total_rounds}"),
        )
        return Group(bar, Text(self._status_line(), style="dim", no_wrap=True, overflow="ellipsis"))

    def _status_line(self) -> str:
        """What goes on, on one line: what a narrow terminal has no room for is left out, the least telling first."""
        if not self.round or self.round >= self.total_rounds:
            now = self.after if self.round else self.before
            return " · ".join(filter(None, [now, f"{describe(self.clock() - self.started_s)} elapsed"]))
        facts, width = self._facts(), self._live.console.width if self._live is not None else 80
        for word in ("elapsed", "operations", "loss"):
            if len(" · ".join(facts)) > width:
                facts = [fact for fact in facts if word not in fact]
        return " · ".join(facts)


class _PlainSchedule:
    """Which rounds get a plain line: all of a short run, about MOST_PLAIN_LINES of a long one."""

    def __init__(self, total_rounds: int) -> None:
        self.total_rounds = total_rounds
        self.interval = 1 if total_rounds <= MOST_PLAIN_LINES else math.ceil(total_rounds / REGULAR_PLAIN_LINES)
        self.extra_lines = 0

    def wants(self, round_number: int, phase_changed: bool, evaluated: bool) -> bool:
        if phase_changed or round_number % self.interval == 0 or round_number >= self.total_rounds:
            return True
        # A run that evaluates every round must not flood the log, so these lines are handed out evenly over the run.
        allowed = math.ceil((MOST_PLAIN_LINES - REGULAR_PLAIN_LINES) * round_number / self.total_rounds)
        if evaluated and self.extra_lines < allowed:
            self.extra_lines += 1
            return True
        return False


def _number(row: Mapping[str, object], key: str) -> float | None:
    value = row.get(key)
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None
