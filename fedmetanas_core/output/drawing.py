"""Draws a genotype as one self-contained SVG: the two cells one above the other, and a legend."""

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from fedmetanas_core.output.layout import NODE_RADIUS, Box, CellLayout, Edge, Slot, layout_cell
from fedmetanas_core.output.words import NUM_INPUTS, cells_of, source_name

MARGIN = 28.0
TITLE_HEIGHT = 36.0
LEGEND_WIDTH, LEGEND_LINE = 330.0, 24.0  # the least to wrap at, and from line to line
LEAST_SCALE = 0.8  # at which text can still be read on a page that is narrower

# Kind of operation: prefix of its name, words for the legend, and line and fill colours on light and on dark ground.
# Hues are told apart with the common colour blindnesses, and every label carries its name besides.
KINDS = {
    "sep": ("separable convolution", "#1f6fb4", "#e3effa", "#6cb4f0", "#17324a"),
    "dil": ("dilated convolution", "#7a4fb5", "#efe8f9", "#b99af0", "#33254d"),
    "pool": ("pooling", "#c2571a", "#fcebdf", "#f0a070", "#4a2a17"),
    "skip": ("skip connection", "#16806a", "#e0f3ee", "#5cc9af", "#143d34"),
    "other": ("other operation", "#5f6670", "#eceef0", "#a5adb8", "#2e333a"),
}


def kind_of(operation: str) -> str:
    """The key of KINDS that `operation` belongs to."""
    for kind, mark in (("sep", "sep_"), ("dil", "dil_"), ("pool", "pool_"), ("skip", "skip_")):
        if mark in operation:
            return kind
    return "other"


def draw_genotype(genotype: Mapping[str, object]) -> str:
    """The SVG of `genotype` (its JSON form), dark or light as the viewer prefers. Raises RefusalError if malformed."""
    layouts = [layout_cell(cell) for cell in cells_of(genotype)]
    occurring = {kind_of(box.text) for layout in layouts for box in layout.label_boxes.values()}
    inner = max(LEGEND_WIDTH, *(layout.width for layout in layouts))
    legend, lines = _legend([kind for kind in KINDS if kind in occurring], inner)
    width = 2 * MARGIN + inner
    parts, y = [], MARGIN
    for layout in layouts:
        parts.append(f'<g transform="translate({MARGIN:g} {y:g})">{_cell_svg(layout)}</g>')
        y += TITLE_HEIGHT + layout.height + MARGIN
    parts.append(f'<g transform="translate({MARGIN:g} {y:g})">{legend}</g>')
    height = y + lines * LEGEND_LINE + 6
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="genotype-drawing" role="img" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'style="min-width:{LEAST_SCALE * width:.0f}px">'
        f"<title>Normal and reduction cell</title><style>{_style()}</style>"
        f'<rect class="ground" width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    )


def _style() -> str:
    # Every rule is confined to the drawing, because a report puts it inline beside its own styles.
    def rules(ground: str, ink: str, soft: str, node: str, line: int) -> str:
        colours = "".join(
            f".genotype-drawing .{kind} {{stroke:{values[line]}}}"
            f".genotype-drawing rect.{kind} {{fill:{values[line + 1]}}}"
            for kind, values in KINDS.items()
        )
        return (
            f".genotype-drawing .ground {{fill:{ground}}}.genotype-drawing text {{fill:{ink}}}"
            f".genotype-drawing .concat {{stroke:{soft}}}.genotype-drawing polygon {{fill:{ink}}}"
            f".genotype-drawing circle {{fill:{node};stroke:{ink}}}{colours}"
        )

    return (
        ".genotype-drawing text {font:13px sans-serif;text-anchor:middle}"
        ".genotype-drawing .title {font:bold 15px sans-serif;text-anchor:start}"
        ".genotype-drawing .key {text-anchor:start}"
        ".genotype-drawing .label {font:12px monospace}"
        ".genotype-drawing path {fill:none;stroke-width:1.8}"
        ".genotype-drawing path.concat {stroke-dasharray:5 4}"
        ".genotype-drawing circle, .genotype-drawing rect {stroke-width:1.4}"
        + rules("#ffffff", "#1d2129", "#8a919c", "#f6f7f9", 1)
        + f"@media (prefers-color-scheme: dark) {{{rules('#15181d', '#e8eaed', '#828a95', '#23272e', 3)}}}"
    )


def _cell_svg(layout: CellLayout) -> str:
    parts = [f'<text class="title" x="0" y="15">{escape(layout.cell.name)}</text>']
    parts.append(f'<g transform="translate(0 {TITLE_HEIGHT:g})">')
    # Edges first: circles and labels cover what runs beneath them.
    parts += [_edge_svg(layout, edge) for edge in layout.edges]
    parts += [_label_svg(box) for box in layout.label_boxes.values()]
    parts += [_circle_svg(layout, slot) for slot in layout.slots if not slot.is_lane]
    return "".join([*parts, "</g>"])


def _edge_svg(layout: CellLayout, edge: Edge) -> str:
    first, *rest = layout.stroke(edge)
    line = "M" + _numbers(first) + "".join(("L" if len(step) == 2 else "C") + _numbers(step) for step in rest)
    kind = "concat" if edge.operation is None else kind_of(edge.operation)
    head = " ".join(f"{x:.1f},{y:.1f}" for x, y in layout.arrow(edge))
    source = source_name(edge.path[0].source)
    return f'<path class="edge {kind}" data-source="{source}" d="{line}"/><polygon points="{head}"/>'


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.1f}" for value in values)


def slot_name(layout: CellLayout, slot: Slot) -> tuple[str, str]:
    """What stands in a circle, and its index: a node's number, or c and which cell's output it is."""
    output = NUM_INPUTS + len(layout.cell.nodes)
    if NUM_INPUTS <= slot.source < output:
        return str(slot.source - NUM_INPUTS + 1), ""
    return "c", "k" if slot.source == output else ("k−2", "k−1")[slot.source]


def _label_svg(box: Box) -> str:
    text = escape(box.text)
    return (
        f'<rect class="{kind_of(box.text)}" x="{box.left:.1f}" y="{box.top:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="{box.height / 2:.1f}"/><text class="label" '
        f'x="{box.left + box.width / 2:.1f}" y="{box.top + box.height / 2 + 4:.1f}">{text}</text>'
    )


def _circle_svg(layout: CellLayout, slot: Slot) -> str:
    x, (name, index) = layout.circle_x(slot.layer), slot_name(layout, slot)
    name += f'<tspan dy="3" font-size="9">{index}</tspan>' if index else ""
    return (
        f'<circle cx="{x:.1f}" cy="{slot.y:.1f}" r="{NODE_RADIUS:g}"/>'
        f'<text x="{x:.1f}" y="{slot.y + 4.5:.1f}">{name}</text>'
    )


def _legend(kinds: Sequence[str], width: float) -> tuple[str, int]:
    """The legend of the kinds that occur, in lines no wider than this many pixels, and how many lines it takes."""
    parts, x, line = [], 0.0, 0
    entries = [(kind, KINDS[kind][0]) for kind in kinds] + [("concat", "concatenated to the output")]
    for kind, words in entries:
        long = 34 + 7.4 * len(words)
        if x and x + long > width:
            x, line = 0.0, line + 1
        y = line * LEGEND_LINE
        if kind == "concat":
            parts.append(f'<path class="concat" d="M{x:.1f} {y:g}H{x + 26:.1f}"/>')
        else:
            parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{y - 7:g}" width="26" height="14" rx="7"/>')
        parts.append(f'<text class="key" x="{x + 34:.1f}" y="{y + 4.5:g}">{words}</text>')
        x += long + 22
    return "".join(parts), line + 1
