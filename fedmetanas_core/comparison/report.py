"""A table's cells as Markdown, CSV and JSON."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from fedmetanas_core.comparison.plan import MEASURES, Table
from fedmetanas_core.comparison.rows import BANDWIDTH_MBIT, LAST_ROUNDS, Row
from fedmetanas_core.comparison.statistics import (
    SMOOTHED_OVER,
    TARGET_SHARE,
    Cell,
    Difference,
    Reached,
    Spread,
    sentences,
    verdict,
)
from fedmetanas_core.run.files import spread_json
from fedmetanas_core.text import describe, describe_bytes, describe_macs


def markdown(table: Table, cells: Sequence[Cell], found: Sequence[Difference], command: str) -> str:
    """The whole page: tables, differences, how it was made."""
    rows = [row for cell in cells for row in cell.rows]
    parts = [f"# {table.title}", table.about] if table.about else [f"# {table.title}"]
    if len(rows) < len(table.runs):
        parts.append(f"**{len(rows)} of {len(table.runs)} runs so far.**")
    for dataset in table.datasets:
        for partition in table.partitions:
            here = [cell for cell in cells if (cell.dataset, cell.partition) == (dataset.name, partition.name)]
            if here:
                published = {**dataset.published, **partition.published}
                parts += [f"## {dataset.name}, {partition.name}", *_tables(here, published)]
    if found:
        parts += [f"## Is {table.methods[0]} different?", verdict(found)]
        parts.append("\n".join(f"- {line}" for line in sentences(table, found)))
        if tested := sum(each.p is not None for each in found):
            count = f"{tested} comparison{'s'[: tested > 1]}"
            parts.append(TESTED.format(measure=MEASURES[table.measure], count=count))
    parts += ["![curves](curves.svg)", CURVES + _without_curve(cells)]
    parts += ["## How it was made", _provenance(table, rows, command)]
    return "\n\n".join(parts) + "\n"


ACCURACY = (
    "Accuracy: mean ± sample standard deviation over seeds. Global is the final network on the whole test split; "
    f"beside it the mean over the evaluations of the last fifth of the rounds (at most {LAST_ROUNDS}), whose deviation "
    "is ± rounds. Client accuracies are means over the clients' own held-out images: with the model as it comes, after "
    "adaptation, and whichever of the two the method would have them use; ± clients is the deviation of the last. "
    "Unseen clients never trained. Deviations over rounds and clients are the population's."
)
CUTTING = (
    "What cutting the network out costs: the whole test split before and after the genotype is derived, with "
    "inherited weights and no training in between. Where the model between rounds is the likeliest network already, "
    "the two are one."
)
PRUNING = (
    "What prune events took away, in a run: choices below the threshold (voted down, or by the method's own rule), "
    "over the cap, `none` by policy, and with their edge; and what they cost, as means over all events and over each "
    "run's last: accuracy on the test images used between rounds just before, just after, and had DARTS' rule cut out "
    "the whole network at that moment; at how many of all events that rule was the better."
)
COST = (
    "Cost of a run. Compute is the training of all clients added up, in processor time (on a GPU: elapsed time; "
    "supernets run compiled code, fixed networks torch's operations); parallel time adds up, over the rounds, the "
    f"slowest client's compute and a client's mean transfer at {BANDWIDTH_MBIT} Mbit/s. Adaptation is what one client "
    "computes at the end to make and measure its own model; it is no part of compute."
)
TARGET = (
    "Time to the method's own final accuracy, and to a common target{target}: where the smoothed curve of the global "
    "model first gets there in the run's last stage, whose weights are kept (a supernet counts that the network is "
    "then cut out of, one that is given up does not). Means over the seeds that did."
)
CHOSEN_TARGET = f" ({100 * TARGET_SHARE:.0f} % of what the weakest method's curves end at, unless the table names one)"
TESTED = (
    "Paired by seed, on {measure}. Each interval is Student's at 95 % for its comparison alone; p-values are adjusted "
    "by Holm's rule for the {count} of this page, so that an interval without 0 may still be chance."
)
CURVES = (
    "Curves: the global model on the test images used between rounds (what a method's clients make of it is not in "
    f"them), running mean of {SMOOTHED_OVER} evaluations. A point for every evaluation, at the means over the seeds "
    "of accuracy and of what had been spent; bands of one standard deviation of the seeds' accuracies."
)
FEW_POINTS = " With so few evaluations there is no curve to see; a smaller `evaluate_every` gives more."


def _without_curve(cells: Sequence[Cell]) -> str:
    """What the picture cannot show."""
    lengths = {cell.method: max(len(row["curve"]) for row in cell.rows) for cell in cells}
    missing = [method for method, length in lengths.items() if not length]
    words = f" Without a global model, and so without a curve: {', '.join(missing)}." if missing else ""
    return words + (FEW_POINTS if 0 < max(lengths.values(), default=0) < 3 else "")


def _tables(cells: Sequence[Cell], published: Mapping[str, str]) -> list[str]:
    """The tables of one dataset and partition, each after what it shows."""
    parts = [
        (ACCURACY, _accuracy(cells, published)),
        (CUTTING, _cutting(cells)),
        (PRUNING, _pruning(cells)),
        (COST, _cost(cells)),
    ]
    target = cells[0].target
    words = "" if target is None else f" of {100 * target:.1f} %{CHOSEN_TARGET}"
    parts.append((TARGET.format(target=words), _target(cells)))
    return [text for part in parts if part[1] for text in part]


def _accuracy(cells: Sequence[Cell], published: Mapping[str, str]) -> str:
    """Accuracies and their spreads."""
    return _grid(
        cells,
        {
            "global accuracy %": lambda cell: _percent(cell.over_seeds("test_accuracy")),
            "last evaluations %": lambda cell: _percent(cell.over_seeds("test_accuracy_last")),
            "client accuracy %": lambda cell: _percent(cell.over_seeds("client_accuracy_mean")),
            "adapted %": lambda cell: _percent(cell.over_seeds("client_accuracy_adapted_mean")),
            "as used %": lambda cell: _percent(cell.over_seeds("client_accuracy_used_mean")),
            "unseen %": lambda cell: _percent(cell.over_seeds("unseen_client_accuracy_mean")),
            "unseen adapted %": lambda cell: _percent(cell.over_seeds("unseen_client_accuracy_adapted_mean")),
            "unseen as used %": lambda cell: _percent(cell.over_seeds("unseen_client_accuracy_used_mean")),
            "± rounds": lambda cell: _points(cell.over_seeds("round_std")),
            "± clients": lambda cell: _points(cell.over_seeds("client_accuracy_used_std")),
            "seeds": lambda cell: str(len(cell.rows)),
            "paper": lambda cell: published.get(cell.method, ""),
        },
    )


def _cutting(cells: Sequence[Cell]) -> str:
    """Accuracy around the derivation of a genotype, for those that derive one."""
    return _grid(
        [cell for cell in cells if cell.derivation("before") is not None],
        {
            "before %": lambda cell: _percent(cell.derivation("before")),
            "after %": lambda cell: _percent(cell.derivation("after")),
            "with statistics renewed %": lambda cell: _percent(cell.derivation("recalibrated")),
        },
    )


def _pruning(cells: Sequence[Cell]) -> str:
    """What soft pruning removed, and what it cost, for those that prune."""
    return _grid(
        [cell for cell in cells if cell.prunings()],
        {
            "threshold": lambda cell: _removed(cell, "voluntary"),
            "cap": lambda cell: _removed(cell, "forced"),
            "none": lambda cell: _removed(cell, "none"),
            "edge": lambda cell: _removed(cell, "stranded"),
            "before → ours / DARTS' rule %": lambda cell: _around(cell.prunings()),
            "at the last event": lambda cell: _around([events[-1] for events in cell.prunings_by_run()]),
            "DARTS' rule better": lambda cell: _darts_better(cell.prunings()),
        },
    )


def _removed(cell: Cell, kind: str) -> str:
    return f"{fmean(sum(event[kind] for event in events) for events in cell.prunings_by_run()):.0f}"


def _around(events: Sequence[Mapping[str, Any]]) -> str:
    """Means before an event, after it, and with the other rule in its place, of events at which they were measured."""
    measured = [event for event in events if event["before"] is not None]
    if not measured:
        return ""
    before, after, other = (
        100 * fmean(event[key] for event in measured) for key in ("before", "after", "hard_darts_rule")
    )
    return f"{before:.1f} → {after:.1f} / {other:.1f}"


def _darts_better(events: Sequence[Mapping[str, Any]]) -> str:
    measured = [event for event in events if event["before"] is not None]
    return f"{sum(event['hard_darts_rule'] > event['after'] for event in measured)} of {len(measured)}"


def _cost(cells: Sequence[Cell]) -> str:
    """What the runs took, and what came out."""
    return _grid(
        cells,
        {
            "compute": lambda cell: _time(cell.over_seeds("compute_seconds")),
            "parallel time": lambda cell: _time(cell.over_seeds("parallel_seconds")),
            "up": lambda cell: _bytes(cell.over_seeds("uplink_bytes")),
            "down": lambda cell: _bytes(cell.over_seeds("downlink_bytes")),
            "parameters": lambda cell: _count(cell.over_seeds("parameters")),
            "an image": lambda cell: _macs(cell.over_seeds("macs")),
            "a client's own": lambda cell: _count(cell.over_seeds("personal_parameters")),
            "adaptation": lambda cell: _time(cell.over_seeds("adaptation_seconds")),
            "rounds": lambda cell: _count(cell.over_seeds("rounds")),
        },
    )


def _target(cells: Sequence[Cell]) -> str:
    """Times to accuracies."""
    return _grid(
        cells,
        {
            "own final %": lambda cell: "" if cell.own_target is None else f"{100 * cell.own_target:.1f}",
            "rounds to it": lambda cell: _rounds(cell.to_own),
            "compute to it": lambda cell: _seconds(cell.to_own.compute_seconds),
            "reached the target": lambda cell: f"{cell.to_target.seeds} of {cell.to_target.of}",
            "rounds": lambda cell: _rounds(cell.to_target),
            "compute": lambda cell: _seconds(cell.to_target.compute_seconds),
            "parallel time": lambda cell: _seconds(cell.to_target.parallel_seconds),
            "bytes": lambda cell: "" if cell.to_target.bytes is None else describe_bytes(cell.to_target.bytes),
        },
    )


def _grid(cells: Sequence[Cell], columns: dict[str, Callable[[Cell], str]]) -> str:
    """A Markdown table; columns that are empty throughout are left out, and so is a table of nothing else."""
    values = {name: [column(cell) for cell in cells] for name, column in columns.items()}
    values = {name: column for name, column in values.items() if any(column)}
    if not values:
        return ""
    lines = [["method", *values], ["---"] * (len(values) + 1)]
    lines += [[cell.method, *(column[index] for column in values.values())] for index, cell in enumerate(cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(value: Spread | None) -> str:
    if value is None:
        return ""
    return f"{100 * value.mean:.2f}" + ("" if value.std is None else f" ± {100 * value.std:.2f}")


def _points(value: Spread | None) -> str:
    return "" if value is None else f"{100 * value.mean:.2f}"


def _time(value: Spread | None) -> str:
    if value is not None and value.mean < 0.1:
        return f"{1000 * value.mean:.0f} ms"
    return "" if value is None else describe(value.mean)


def _seconds(value: float | None) -> str:
    return "" if value is None else describe(value)


def _rounds(value: Reached) -> str:
    return "" if value.rounds is None else f"{value.rounds:.0f}"


def _bytes(value: Spread | None) -> str:
    return "" if value is None else describe_bytes(value.mean)


def _count(value: Spread | None) -> str:
    return "" if value is None else f"{value.mean:,.0f}"


def _macs(value: Spread | None) -> str:
    return "" if value is None else describe_macs(value.mean)


def _provenance(table: Table, rows: Sequence[Row], command: str) -> str:
    places = ["`rows/`", *(f"`../{name}/rows/`" for name in table.rows_from)]

    def all_of(key: str) -> str:
        return "; ".join(sorted({str(row[key]) for row in rows if row.get(key)})) or "unknown"

    apart = len({row.get("hardware") for row in rows}) > 1
    machines = " (seconds of different machines do not compare)" if apart else ""
    versions = sorted({f"{name} {number}" for row in rows for name, number in (row.get("versions") or {}).items()})
    return "\n".join(
        (
            f"- command: `{command}`",
            f"- seeds: {_seeds(rows)}",
            f"- commit: {all_of('commit')}",
            f"- hardware: {all_of('hardware')}{machines}; device {all_of('device')}",
            f"- versions: {', '.join(versions)}",
            f"- every run's settings, figures and curve: {' or '.join(places)}",
        )
    )


def _seeds(rows: Sequence[Row]) -> str:
    """The seeds of these rows, in order."""
    return ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))


def _flat(cell: Cell) -> dict[str, Any]:
    """A cell's figures under plain names, for CSV and JSON."""
    flat: dict[str, Any] = {"method": cell.method, "dataset": cell.dataset, "partition": cell.partition}
    flat["seeds"] = len(cell.rows)
    for key in (
        *("test_accuracy", "test_accuracy_last", "client_accuracy_mean", "client_accuracy_adapted_mean"),
        *("client_accuracy_used_mean", "adaptation_seconds", "personal_parameters", "personal_macs"),
        *("unseen_client_accuracy_mean", "unseen_client_accuracy_adapted_mean", "unseen_client_accuracy_used_mean"),
        *("compute_seconds", "parallel_seconds"),
        *("uplink_bytes", "downlink_bytes", "parameters", "macs", "rounds", "seconds"),
    ):
        value = cell.over_seeds(key)
        flat[key], flat[f"{key}_std"] = (None, None) if value is None else (value.mean, value.std)
    for key in ("round_std", "client_accuracy_std", "client_accuracy_used_std"):
        value = cell.over_seeds(key)
        flat[key] = None if value is None else value.mean
    for key in ("before", "after", "recalibrated"):
        value = cell.derivation(key)
        flat[f"derivation_{key}"] = None if value is None else value.mean
    flat["target"], flat["own_target"] = cell.target, cell.own_target
    flat.update({f"to_target_{key}": value for key, value in asdict(cell.to_target).items()})
    flat.update({f"to_own_{key}": value for key, value in asdict(cell.to_own).items()})
    return flat


def as_csv(cells: Sequence[Cell]) -> str:
    """One line for each cell."""
    text = io.StringIO()
    rows = [_flat(cell) for cell in cells]
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["method"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(table: Table, cells: Sequence[Cell], found: Sequence[Difference]) -> str:
    """Cells and differences."""
    content = {
        "title": table.title,
        "measure": table.measure,
        "bandwidth_mbit": BANDWIDTH_MBIT,
        "cells": [_flat(cell) for cell in cells],
        "differences": [{**asdict(each), "real": each.real} for each in found],
    }
    return spread_json(content) + "\n"
