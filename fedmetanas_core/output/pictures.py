"""Pictures of a run, each as SVG and PNG: the cells, the curves, the alphas round by round, who holds which classes.

Drawn from what the run folder holds. The same folder gives the same SVG, byte for byte.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmetanas_core.output.drawing import (
    KINDS,
    MARGIN,
    TITLE_HEIGHT,
    draw_genotype,
    kind_of,
    slot_name,
)
from fedmetanas_core.output.layout import NODE_RADIUS, CellLayout, layout_cell
from fedmetanas_core.output.words import cells_of
from fedmetanas_core.space.spec import PRIMITIVES

DPI = 120
PIXELS = 96  # of a drawn cell in an inch
PHASES = {  # of a ledger's rows, with their shades
    "warm-up": "#f2f2f2",
    "warm start": "#f2f2f2",
    "search": "#ffffff",
    "one-hot": "#e8f3ec",
    "training": "#ffffff",
    "retraining": "#e8f3ec",
}
SHADE_OF_PRUNED = "#d9d9d9"
COLUMNS = 3  # of the alphas' panels

Picture = dict[str, bytes]  # by ending
Row = Mapping[str, Any]


@contextmanager
def drawing(salt: str) -> Iterator[Any]:
    """matplotlib's pyplot, without a screen, for SVGs that do not depend on when they are made."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9.0}
    with warnings.catch_warnings(), pyplot.rc_context(settings):  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of names in other scripts; SVGs leave it to the viewer
        yield pyplot
        pyplot.close("all")


def saved(figure: Any, endings: Sequence[str] = ("svg", "png")) -> Picture:
    found = {}
    for ending in endings:
        options: dict[str, Any] = {"dpi": DPI} if ending == "png" else {"metadata": {"Date": None}}
        content = io.BytesIO()
        figure.savefig(content, format=ending, **options)
        found[ending] = content.getvalue()
    return found


def draw_cells(genotype: Mapping[str, object]) -> Picture:
    """The two cells: the SVG that follows its viewer into the dark, and the same places on white ground as PNG."""
    layouts = [layout_cell(cell) for cell in cells_of(genotype)]
    width = max(layout.width for layout in layouts) + 2 * MARGIN
    height = sum(TITLE_HEIGHT + layout.height + MARGIN for layout in layouts) + MARGIN
    with drawing("cells") as pyplot:
        figure = pyplot.figure(figsize=(width / PIXELS, height / PIXELS))
        panel = figure.add_axes((0, 0, 1, 1))
        panel.set(xlim=(-MARGIN, width - MARGIN), ylim=(height - MARGIN, -MARGIN))
        panel.axis("off")
        top = 0.0
        for layout in layouts:
            panel.text(0, top + TITLE_HEIGHT / 3, layout.cell.name, fontsize=11, weight="bold", va="center")
            _draw_cell(panel, layout, top + TITLE_HEIGHT)
            top += TITLE_HEIGHT + layout.height + MARGIN
        return {"svg": draw_genotype(genotype).encode(), **saved(figure, ["png"])}


def _draw_cell(panel: Any, layout: CellLayout, top: float) -> None:
    from matplotlib import patches
    from matplotlib.path import Path

    for edge in layout.edges:
        steps = layout.stroke(edge)
        places = [(step[index], step[index + 1] + top) for step in steps for index in range(0, len(step), 2)]
        codes = [Path.MOVETO]
        for step in steps[1:]:
            codes += [Path.LINETO] if len(step) == 2 else [Path.CURVE4] * 3
        colour = "#8a919c" if edge.operation is None else KINDS[kind_of(edge.operation)][1]
        dash = (0, (4, 3)) if edge.operation is None else "solid"
        panel.add_patch(patches.PathPatch(Path(places, codes), fill=False, edgecolor=colour, linestyle=dash, lw=1.4))
        panel.add_patch(patches.Polygon([(x, y + top) for x, y in layout.arrow(edge)], color="#1d2129", lw=0))
    for box in layout.label_boxes.values():
        _, line, fill, *_ = KINDS[kind_of(box.text)]
        look = patches.BoxStyle.Round(pad=0, rounding_size=box.height / 2)
        corner = (box.left, box.top + top)
        panel.add_patch(
            patches.FancyBboxPatch(corner, box.width, box.height, boxstyle=look, facecolor=fill, edgecolor=line)
        )
        middle = (box.left + box.width / 2, box.top + box.height / 2 + top)
        panel.text(*middle, box.text, ha="center", va="center", fontsize=8.5, family="monospace")
    for slot in layout.slots:
        if not slot.is_lane:
            x, y = layout.circle_x(slot.layer), slot.y + top
            panel.add_patch(patches.Circle((x, y), NODE_RADIUS, facecolor="#f6f7f9", edgecolor="#1d2129"))
            name, index = slot_name(layout, slot)
            panel.text(x, y, f"${name}_{{{index}}}$" if index else name, ha="center", va="center", fontsize=10)


def draw_run(rounds: Sequence[Row]) -> Picture:
    """Accuracy, losses, what is alive, and bytes over the rounds, the phases shaded."""
    panels: dict[str, list[tuple[str, Callable[[Row], float | None]]]] = {
        "accuracy on test images": [("global model", lambda row: row["test_accuracy"])],
        "loss": [("query", lambda row: row["train_loss"]), ("support", lambda row: row["support_loss"])],
        "alive operations": [("operations", lambda row: row["alive_operations"])],
        "multiply-adds of an image (million)": [("multiply-adds", lambda row: row["macs"] / 1e6)],
        "bytes of a round (MB)": [
            ("up", lambda row: row["uplink_bytes"] / 1e6),
            ("down", lambda row: row["downlink_bytes"] / 1e6),
        ],
        "seconds of a round": [("by the clock", lambda row: row["seconds"])],
    }
    with drawing("run") as pyplot:
        figure, grid = pyplot.subplots(3, 2, figsize=(9.0, 8.4), sharex=True)
        for panel, (title, lines) in zip(grid.flat, panels.items(), strict=True):
            for name, value in lines:
                points = [(row["round"], value(row)) for row in rounds if value(row) is not None]
                mark = "." if len(points) < 3 else ""
                panel.plot(*(zip(*points, strict=True) if points else ((), ())), linewidth=1.3, marker=mark, label=name)
            panel.set_title(title, loc="left")
            panel.grid(alpha=0.25)
            panel.xaxis.get_major_locator().set_params(integer=True)
            if len(lines) > 1:
                panel.legend(frameon=False)
            _shade(panel, rounds)
        grid.flat[0].set_ylim(bottom=0.0)  # an accuracy that hardly rises is not to look like one that does
        for panel in grid[-1]:
            panel.set_xlabel("round")
        _name_phases(figure, rounds)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        return saved(figure)


def phases_of(rounds: Sequence[Row]) -> list[tuple[str, int, int]]:
    """(name, first round, last round) of the phases in their order."""
    found: list[tuple[str, int, int]] = []
    for row in rounds:
        if found and found[-1][0] == row["phase"]:
            found[-1] = (row["phase"], found[-1][1], row["round"])
        else:
            found.append((row["phase"], row["round"], row["round"]))
    return found


def _shade(panel: Any, rounds: Sequence[Row]) -> None:
    """A ground for each phase."""
    for phase, first, last in phases_of(rounds):
        panel.axvspan(first - 0.5, last + 0.5, color=PHASES.get(phase, "#ffffff"), zorder=0, linewidth=0)


def _name_phases(figure: Any, rounds: Sequence[Row]) -> None:
    """One key to the grounds of all panels, below them, where no curve can run through it."""
    from matplotlib.patches import Patch

    names = dict.fromkeys(phase for phase, _, _ in phases_of(rounds))
    keys = [Patch(facecolor=PHASES.get(name, "#ffffff"), edgecolor="#8a919c", label=name) for name in names]
    figure.legend(handles=keys, loc="lower center", ncols=max(1, len(keys)), frameon=False)


def edge_names(num_edges: int) -> list[str]:
    """The edges of a cell that has so many, in the order of ``architecture.jsonl``: source and node."""
    num_nodes = next(nodes for nodes in range(1, num_edges + 1) if nodes * (nodes + 3) // 2 == num_edges)
    sources = ["c(k-2)", "c(k-1)", *(str(node + 1) for node in range(num_nodes))]
    return [f"{sources[source]} → {node + 1}" for node in range(num_nodes) for source in range(2 + node)]


def over_rounds(history: Sequence[Row], group: str, num_rounds: int) -> npt.NDArray[np.float64]:
    """(edges, 8, rounds): each operation's share after every round, NaN once it was pruned.

    A round without a line of its own is like the one before; those before the first line are like it.
    """
    first = np.array(history[0]["operations"][group], dtype=np.float64)
    shares = np.empty((*first.shape, num_rounds))
    shares[...] = first[..., None]
    for line in history:
        shares[..., line["round"] - 1 :] = np.array(line["operations"][group], dtype=np.float64)[..., None]
    return shares


def draw_alphas(history: Sequence[Row], num_rounds: int) -> Picture:
    """A heat map for every edge: operations over rounds, the darker the likelier; pruned ones are grey."""
    groups = list(history[0]["operations"])
    edges = len(history[0]["operations"][groups[0]])
    names = edge_names(edges)
    lines = -(-edges // COLUMNS)
    with drawing("alphas") as pyplot:
        size = (3.4 * COLUMNS + 1.2, 1.35 * lines * len(groups) + 0.9)
        figure, grid = pyplot.subplots(lines * len(groups), COLUMNS, figsize=size, squeeze=False)
        shades = pyplot.get_cmap("Blues").with_extremes(bad=SHADE_OF_PRUNED)
        image = None
        for number, group in enumerate(groups):
            shares = over_rounds(history, group, num_rounds)
            panels = grid[number * lines : (number + 1) * lines].flat
            for place, panel in enumerate(panels):
                if place >= edges:
                    panel.set_visible(False)
                    continue
                box = (0.5, num_rounds + 0.5, len(PRIMITIVES) - 0.5, -0.5)
                looks = {"cmap": shades, "vmin": 0.0, "vmax": 1.0, "interpolation": "nearest"}
                image = panel.imshow(shares[place], aspect="auto", extent=box, **looks)
                panel.set_title(f"{group}: {names[place]}", loc="left", fontsize=8)
                if place % COLUMNS == 0:
                    panel.set_yticks(range(len(PRIMITIVES)), PRIMITIVES, fontsize=6)
                else:
                    panel.set_yticks([])
                if place < edges - COLUMNS:
                    panel.set_xticks([])
                else:
                    panel.tick_params(labelsize=6)
        # By hand: matplotlib's own layout measures every text several times, which takes as long as all the rest.
        width, height = size
        figure.subplots_adjust(0.95 / width, 0.5 / height, 1 - 0.9 / width, 1 - 0.3 / height, 0.06, 0.45)
        figure.supxlabel("round", fontsize=8)
        colour_bar = figure.add_axes((1 - 0.75 / width, 0.3, 0.13 / width, 0.4))
        figure.colorbar(image, cax=colour_bar, label="softmax of alphas")
        return saved(figure)


def draw_partition(counts: npt.NDArray[np.int64], class_names: Sequence[str]) -> Picture:
    """Training images by client and class; ``counts``: (clients, classes)."""
    clients, classes = counts.shape
    with drawing("partition") as pyplot:
        figure, panel = pyplot.subplots(figsize=(min(14.0, 3.0 + 0.11 * clients), min(9.0, 1.6 + 0.22 * classes)))
        image = panel.imshow(counts.T, aspect="auto", cmap="viridis", interpolation="nearest")
        panel.set_xlabel("client")
        panel.set_ylabel("class")
        if classes <= 30:
            panel.set_yticks(range(classes), [name[:20].replace("$", r"\$") for name in class_names])
        figure.colorbar(image, label="training images", fraction=0.03, pad=0.02)
        figure.tight_layout()
        return saved(figure)
