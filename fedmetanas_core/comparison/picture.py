"""Curves of a table, with bands over seeds: accuracy against compute, rounds and bytes."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedmetanas_core.comparison.plan import Table
from fedmetanas_core.comparison.statistics import Cell, smoothed

AXES = {
    "compute_seconds": "clients' compute (s)",
    "round": "rounds",
    "bytes": "bytes exchanged (MB)",
}
SCALES = {"bytes": 1e-6}
LINES = ("-", "--", "-.", ":")
WIDE = 8.0  # where the longest curve is so many times as long as the shortest, the axis is logarithmic


def draw_curves(table: Table, cells: Sequence[Cell]) -> str:
    """An SVG with a row of panels for every dataset and partition; the same text for the same cells."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    places = list(dict.fromkeys((cell.dataset, cell.partition) for cell in cells))
    settings = {"svg.fonttype": "none", "svg.hashsalt": table.name, "font.size": 9.0}
    with pyplot.rc_context(settings):  # type: ignore[arg-type]
        size = (4.0 * len(AXES), 3.1 * len(places) + 0.7)
        figure, grid = pyplot.subplots(len(places), len(AXES), figsize=size, squeeze=False, sharey="row")
        colours = pyplot.get_cmap("tab10").colors  # type: ignore[attr-defined]
        looks = {
            # Broken in several ways, so that curves that lie on each other are all seen.
            method: {"color": colours[index % len(colours)], "linestyle": LINES[index % len(LINES)]}
            for index, method in enumerate(table.methods)
        }
        handles: dict[str, Any] = {}
        for panels, place in zip(grid, places, strict=True):
            here = [cell for cell in cells if (cell.dataset, cell.partition) == place]
            for panel, (key, label) in zip(panels, AXES.items(), strict=True):
                for cell in here:
                    line = _draw(panel, cell, key, looks[cell.method])
                    if line is not None:
                        handles[cell.method] = line
                panel.set_xscale("log" if _is_wide(here, key) else "linear")
                panel.set_xlabel(label)
                if key == "round":
                    panel.xaxis.get_major_locator().set_params(integer=True)
                panel.grid(alpha=0.25)
            panels[0].set_ylabel("global model's test accuracy")
            panels[0].set_title(f"{place[0]}, {place[1]}", loc="left")
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=min(6, max(1, len(handles))))
        figure.tight_layout(rect=(0, 0.35 / size[1], 1, 1))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return text.getvalue()


def _is_wide(cells: Sequence[Cell], key: str) -> bool:
    """Whether some curves would be a line upright beside others."""
    ends = [row["curve"][-1][key] for cell in cells for row in cell.rows if row["curve"]]
    starts = [row["curve"][0][key] for cell in cells for row in cell.rows if row["curve"]]
    return bool(ends) and min(starts) > 0 and max(ends) > WIDE * min(ends)


def _draw(panel: Any, cell: Cell, key: str, look: dict[str, Any]) -> Any:
    """One point for every evaluation that all seeds have had: means over the seeds of both axes, and a band of one
    standard deviation of the accuracies; None without any."""
    curves = [row["curve"] for row in cell.rows if row["curve"]]
    if not curves:
        return None
    count = min(map(len, curves))
    spent = np.array([[at[key] * SCALES.get(key, 1.0) for at in curve[:count]] for curve in curves]).mean(axis=0)
    values = np.array([smoothed(curve)[:count] for curve in curves])
    mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1) if len(curves) > 1 else 0.0
    (line,) = panel.plot(spent, mean, linewidth=1.4, marker="o" if count == 1 else "", **look)
    below, above = np.clip((mean - deviation, mean + deviation), 0.0, 1.0)  # no accuracy lies beyond
    panel.fill_between(spent, below, above, color=look["color"], alpha=0.15, linewidth=0)
    return line
