"""What the rows of a table amount to: means, three spreads, times to a target, and which differences are real."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from fedmetanas_core.comparison.plan import MEASURES, Setting, Table
from fedmetanas_core.comparison.rows import Row

CONFIDENCE = 0.95
SMOOTHED_OVER = 3  # evaluations of a curve
TARGET_SHARE = 0.95  # of the weakest method's accuracy, where a table names no target
ROUNDING = 1e-9  # differences of accuracies that differ by less are equal


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
    ``compute_ratio`` is the first method's clients' compute over the other's, or None: seconds of different machines
    do not compare.
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
    compute_ratio: float | None

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
    target: float | None
    to_own: Reached
    to_target: Reached

    @property
    def own_target(self) -> float | None:
        """The mean of what its runs' curves end at; None for a method that is not measured before its end."""
        return fmean(map(final_accuracy, self.rows)) if all(row["curve"] for row in self.rows) else None

    def over_seeds(self, key: str) -> Spread | None:
        """A figure of the rows."""
        return spread(row.get(key) for row in self.rows)

    def prunings_by_run(self) -> list[list[dict[str, Any]]]:
        """The prune events of each run that had any."""
        found = [[event for event in row["events"] if event["kind"] == "pruning"] for row in self.rows]
        return [events for events in found if events]

    def prunings(self) -> list[dict[str, Any]]:
        """The prune events of all runs."""
        return [event for events in self.prunings_by_run() for event in events]

    def derivation(self, key: str) -> Spread | None:
        """A figure of the last derivation of a genotype: ``before``, ``after``, ``recalibrated``.

        For a method that cuts nothing out at the end of a stage, extraction itself.
        """
        if any(row.get("test_accuracy_supernet") is None for row in self.rows):
            return None
        of_the_run = {
            "before": "test_accuracy_supernet",
            "after": "test_accuracy",
            "recalibrated": "test_accuracy_recalibrated",
        }
        values = []
        for row in self.rows:
            events = [event for event in row["events"] if event["kind"] == "derivation"]
            values.append(events[-1].get(key) if events else row.get(of_the_run[key]))
        return spread(values)


def smoothed(curve: Sequence[dict[str, Any]]) -> list[float]:
    """The running mean of accuracies over the last few evaluations."""
    values = [at["accuracy"] for at in curve]
    return [fmean(values[max(0, index + 1 - SMOOTHED_OVER) : index + 1]) for index in range(len(values))]


def kept(row: Row) -> list[tuple[dict[str, Any], float]]:
    """The curve's points of a run's last stage, whose weights are kept, each with its smoothed accuracy."""
    points = [at for at in row["curve"] if at["stage"] == row["curve"][-1]["stage"]]
    return list(zip(points, smoothed(points), strict=True))


def final_accuracy(row: Row) -> float:
    """Where the smoothed curve of the last stage ends; the row has a curve."""
    return kept(row)[-1][1]


def reached(rows: Sequence[Row], targets: Sequence[float | None]) -> Reached:
    """When each run's smoothed curve first got to its target with weights of its last stage: others are not kept."""
    hits = []
    for row, target in zip(rows, targets, strict=True):
        hit = None if target is None else next((at for at, value in kept(row) if value >= target), None)
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
            target = common_target(dataset, partition, list(groups.values()))
            for method, found in groups.items():
                own = [final_accuracy(row) if row["curve"] else None for row in found]
                to_target = reached(found, [target] * len(found))
                cells.append(
                    Cell(method, dataset.name, partition.name, tuple(found), target, reached(found, own), to_target)
                )
    return cells


def common_target(dataset: Setting, partition: Setting, groups: Sequence[Sequence[Row]]) -> float | None:
    """The table's own, else a share of what the weakest method's curves end at, of those that have curves."""
    for setting in (partition, dataset):
        if setting.target is not None:
            return setting.target
    ends = [fmean(map(final_accuracy, rows)) for rows in groups if all(row["curve"] for row in rows)]
    return TARGET_SHARE * min(ends) if ends else None


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
    pairs = [(mine[seed], its[seed]) for seed in sorted(mine.keys() & its.keys())]
    pairs = [(one, two) for one, two in pairs if None not in (one[table.measure], two[table.measure])]
    pairs = [(one, two) for one, two in pairs if one["partition_hash"] == two["partition_hash"]]  # the same images
    if not pairs:
        return None
    gaps = [one[table.measure] - two[table.measure] for one, two in pairs]
    compute = [sum(row["compute_seconds"] for row in rows) for rows in zip(*pairs, strict=True)]
    mean, low, high, p = fmean(gaps), None, None, None
    error = stdev(gaps) / sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    if error > ROUNDING:
        freedom = len(gaps) - 1
        reach = float(student.ppf(0.5 + CONFIDENCE / 2, freedom)) * error
        low, high, p = mean - reach, mean + reach, float(2 * student.sf(abs(mean) / error, freedom))
    timed_alike = all(one.get("hardware") == two.get("hardware") is not None for one, two in pairs)
    place, ratio = (first.dataset, first.partition), compute[0] / max(1e-9, compute[1]) if timed_alike else None
    return Difference(*place, first.method, other.method, mean, low, high, p, None, len(gaps), ratio)


def _holm(found: Sequence[Difference]) -> list[Difference]:
    """Holm's step-down correction over all differences that have a p-value."""
    order = sorted((each.p, index) for index, each in enumerate(found) if each.p is not None)
    adjusted, largest = dict[int, float](), 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = largest
    return [replace(each, adjusted=adjusted.get(index)) for index, each in enumerate(found)]


def verdict(found: Sequence[Difference]) -> str:
    """Which differences are real, in one plain sentence."""
    real = [each for each in found if each.real]
    tested = sum(each.p is not None for each in found)
    if not tested:
        return "Nothing is said about chance here: that takes more than one seed, and differences that vary."
    if not real:
        return f"Told apart from chance: none of {tested}."
    words = [
        f"{each.first} is {'above' if each.mean > 0 else 'below'} {each.other} on {each.dataset}, {each.partition}"
        for each in real
    ]
    return f"Told apart from chance, {len(real)} of {tested}: {'; '.join(words)}."


def sentences(table: Table, found: Sequence[Difference]) -> list[str]:
    """Every difference, in plain words."""
    lines, what = [], MEASURES[table.measure]
    for each in found:
        where = f"On {each.dataset}, {each.partition}: {each.first} is {_points(abs(each.mean))}"
        side = "above" if each.mean >= 0 else "below"
        compared = f"{where} {side} {each.other} in {what}"
        if each.low is not None and each.high is not None and each.adjusted is not None:
            interval = f"95 % interval {100 * each.low:+.1f} to {100 * each.high:+.1f}"
            told = "a real difference" if each.real else "not told apart from chance"
            known = f"{interval}, adjusted p = {each.adjusted:.2g}, {each.seeds} seeds: {told}"
        elif each.seeds > 1:
            known = f"by the same amount with each of {each.seeds} seeds, so that no interval can be given"
        else:
            known = "with 1 seed no interval can be given"
        if each.compute_ratio is None:
            lines.append(f"{compared} ({known}); their computing was timed on different machines and does not compare.")
        else:
            lines.append(
                f"{compared} ({known}); {each.first}'s clients computed {each.compute_ratio:.2f} times as long."
            )
    return lines


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"
