"""What the rows of a table amount to: means, three spreads, times to a target, and which differences are real."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isnan, sqrt
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from fedmetanas_core.comparison.plan import MEASURES, Table
from fedmetanas_core.comparison.rows import Row

CONFIDENCE = 0.95
SMOOTHED_OVER = 3  # evaluations of a curve
TARGET_SHARE = 0.95  # of the weakest method's accuracy, where a table names no target


@dataclass(frozen=True)
class Spread:
    """A mean over seeds; ``std`` is the sample deviation, None for a single seed."""

    mean: float
    std: float | None
    count: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Over the values that are there; None if none is."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    return Spread(fmean(found), stdev(found) if len(found) > 1 else None, len(found))


@dataclass(frozen=True)
class Reached:
    """What it took to reach an accuracy, over the seeds that did; ``seeds`` is how many did, of ``of``."""

    seeds: int
    of: int
    rounds: float | None
    compute_seconds: float | None
    parallel_seconds: float | None
    bytes: float | None


@dataclass(frozen=True)
class Difference:
    """A paired difference of the table's measure, the first method's less another's, over the seeds of both.

    ``low`` to ``high`` is Student's 95 % interval; ``p`` two-sided; ``adjusted`` the same after Holm's correction for
    all comparisons of the table. All are None with fewer than two seeds, or where all pairs differ by the same amount.
    """

    dataset: str
    partition: str
    first: str
    other: str
    mean: float
    low: float | None
    high: float | None
    p: float | None
    adjusted: float | None
    seeds: int
    compute_ratio: float

    @property
    def real(self) -> bool:
        """Whether it is told apart from chance."""
        return self.adjusted is not None and self.adjusted < 1 - CONFIDENCE


@dataclass(frozen=True)
class Cell:
    """A method on a dataset and partition, over seeds. Times are of the clients, in seconds."""

    method: str
    dataset: str
    partition: str
    rows: tuple[Row, ...]
    own_target: float
    target: float
    to_own: Reached
    to_target: Reached

    def over_seeds(self, key: str) -> Spread | None:
        """A figure of the rows."""
        return spread(row.get(key) for row in self.rows)

    def derivation(self, key: str) -> Spread | None:
        """A figure of the last derivation of a genotype: ``before``, ``after``, ``recalibrated``.

        For a method that cuts nothing out at the end of a stage, extraction itself.
        """
        if any(row.get("test_accuracy_supernet") is None for row in self.rows):
            return None
        names = {
            "before": "test_accuracy_supernet",
            "after": "test_accuracy",
            "recalibrated": "test_accuracy_recalibrated",
        }
        values = []
        for row in self.rows:
            events = [event for event in row["events"] if event["kind"] == "derivation"]
            values.append(events[-1].get(key) if events else row.get(names.get(key, "")))
        return spread(values)


def smoothed(curve: Sequence[dict[str, Any]]) -> list[float]:
    """The running mean of accuracies over the last few evaluations."""
    values = [at["accuracy"] for at in curve]
    return [fmean(values[max(0, index + 1 - SMOOTHED_OVER) : index + 1]) for index in range(len(values))]


def reached(rows: Sequence[Row], targets: Sequence[float]) -> Reached:
    """When each run's smoothed curve first got to its target with a network of its last stage: others are not kept."""
    hits = []
    for row, target in zip(rows, targets, strict=True):
        final = [at for at in row["curve"] if at["stage"] == row["curve"][-1]["stage"]]
        hit = next((at for at, value in zip(final, smoothed(final), strict=True) if value >= target), None)
        if hit is not None:
            hits.append(hit)

    def mean(key: str) -> float | None:
        return fmean(hit[key] for hit in hits) if hits else None

    keys = ("round", "compute_seconds", "parallel_seconds", "bytes")
    return Reached(len(hits), len(rows), *(mean(key) for key in keys))


def cells_of(table: Table, rows: Sequence[Row]) -> list[Cell]:
    """All cells that have a row, in the table's order."""
    cells = []
    for dataset in table.datasets:
        for partition in table.partitions:
            here = [row for row in rows if (row["dataset"], row["partition"]) == (dataset.name, partition.name)]
            groups = {method: [row for row in here if row["method"] == method] for method in table.methods}
            groups = {method: found for method, found in groups.items() if found}
            with_curve = [found for found in groups.values() if all(row["curve"] for row in found)]
            finals = [fmean(smoothed(row["curve"])[-1] for row in found) for found in with_curve]
            target = dataset.target if dataset.target is not None else TARGET_SHARE * min(finals, default=1.0)
            for method, found in groups.items():
                own = [smoothed(row["curve"])[-1] if row["curve"] else 1.0 for row in found]
                cells.append(
                    Cell(
                        method,
                        dataset.name,
                        partition.name,
                        tuple(found),
                        fmean(own),
                        target,
                        reached(found, own),
                        reached(found, [target] * len(found)),
                    )
                )
    return cells


def differences(table: Table, cells: Sequence[Cell]) -> list[Difference]:
    """The first method against every other, wherever both have rows, corrected for how many comparisons that is."""
    found = []
    for cell in cells:
        first = next((each for each in cells if _same_place(each, cell) and each.method == table.methods[0]), None)
        if first is not None and cell.method != first.method and (pair := _paired(table, first, cell)) is not None:
            found.append(pair)
    return _holm(found)


def _same_place(one: Cell, other: Cell) -> bool:
    return (one.dataset, one.partition) == (other.dataset, other.partition)


def _paired(table: Table, first: Cell, other: Cell) -> Difference | None:
    mine, its = ({row["seed"]: row for row in cell.rows} for cell in (first, other))
    seeds = sorted(mine.keys() & its.keys())
    pairs = [(mine[seed][table.measure], its[seed][table.measure]) for seed in seeds]
    gaps = [one - two for one, two in pairs if one is not None and two is not None]
    if not gaps:
        return None
    compute = [mine[seed]["compute_seconds"] / max(1e-9, its[seed]["compute_seconds"]) for seed in seeds]
    mean, low, high, p = fmean(gaps), None, None, None
    error = stdev(gaps) / sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    if error > 0:
        freedom = len(gaps) - 1
        reach = float(student.ppf(0.5 + CONFIDENCE / 2, freedom)) * error
        low, high, p = mean - reach, mean + reach, float(2 * student.sf(abs(mean) / error, freedom))
    return Difference(
        first.dataset, first.partition, first.method, other.method, mean, low, high, p, None, len(gaps), fmean(compute)
    )


def _holm(found: Sequence[Difference]) -> list[Difference]:
    """Holm's step-down correction over all differences that have a p-value."""
    order = sorted((each.p, index) for index, each in enumerate(found) if each.p is not None and not isnan(each.p))
    adjusted, largest = dict[int, float](), 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = largest
    return [replace(each, adjusted=adjusted.get(index)) for index, each in enumerate(found)]


def sentences(table: Table, found: Sequence[Difference]) -> list[str]:
    """Which differences are real, in plain words."""
    lines, what = [], MEASURES[table.measure]
    for each in found:
        where = f"On {each.dataset}, {each.partition}: {each.first} is {_points(abs(each.mean))}"
        side = "above" if each.mean >= 0 else "below"
        compared = f"{where} {side} {each.other} in {what}"
        if each.low is None or each.high is None or each.adjusted is None:
            verdict = f"with {each.seeds} seed{'s'[: each.seeds > 1]} no interval can be given"
        else:
            interval = f"95 % interval {100 * each.low:+.1f} to {100 * each.high:+.1f}"
            told = "a real difference" if each.real else "not told apart from chance"
            verdict = f"{interval}, adjusted p = {each.adjusted:.2g}, {each.seeds} seeds: {told}"
        lines.append(f"{compared} ({verdict}); its clients computed {each.compute_ratio:.2f} times as long.")
    return lines


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"
