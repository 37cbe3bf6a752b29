"""Draws a genotype as one self-contained SVG: the two cells one above the other, and a legend.

A cell is laid out in layers from left to right: its inputs, its nodes by the longest path that leads to them, its
output. Every operation is a label box in front of the node it feeds, and an edge that passes a layer gets a lane of
its own there. All that stands in a layer is stacked with a gap and curves bend only between layers, so neither can
two boxes overlap nor can an edge run through a box that is not its own.
"""

import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from fedmetanas_core.output.words import NUM_INPUTS, Cell, cells_of, source_name

# Sizes in SVG user units, that is pixels at 100 %.
CHARACTER_WIDTH = 7.3  # of the 12 px monospaced labels, the widest of the common fonts rounded up
LABEL_HEIGHT = 24.0
LABEL_GAP = 8.0
LABEL_PADDING = 10.0
LABEL_TO_NODE = 46.0  # room for the curves from the labels into their node
NODE_RADIUS = 19.0
LANE_HEIGHT = 6.0
SLOT_GAP = 18.0
LAYER_GAP = 84.0
MARGIN = 28.0
TITLE_HEIGHT = 36.0
LEGEND_HEIGHT = 30.0
ORDERING_SWEEPS = 8  # left-right and right-left; with at most a dozen slots in a layer more change nothing

# Kind of operation: prefix of its name, words for the legend, and line and fill colours on light and on dark ground.
# Hues are told apart with the common colour blindnesses, and every label carries its name besides.
KINDS = {
    "sep": ("separable convolution", "#1f6fb4", "#e3effa", "#6cb4f0", "#17324a"),
    "dil": ("dilated convolution", "#7a4fb5", "#efe8f9", "#b99af0", "#33254d"),
    "pool": ("pooling", "#c2571a", "#fcebdf", "#f0a070", "#4a2a17"),
    "skip": ("skip connection", "#16806a", "#e0f3ee", "#5cc9af", "#143d34"),
    "other": ("other operation", "#5f6670", "#eceef0", "#a5adb8", "#2e333a"),
}


@dataclass(frozen=True)
class Box:
    """A label's rectangle in pixels, and its text."""

    left: float
    top: float
    width: float
    height: float
    text: str


@dataclass(eq=False)
class _Slot:
    """What stands in one layer: an input, a node with the labels of its edges, the output, or one edge's lane."""

    layer: int
    source: int  # the source this slot is or carries
    edges: list["_Edge"] = field(default_factory=list)  # those that end here, from top to bottom
    is_lane: bool = False
    y: float = 0.0  # of the centre

    @property
    def height(self) -> float:
        if self.is_lane:
            return LANE_HEIGHT
        labels = sum(1 for edge in self.edges if edge.operation)
        return max(2 * NODE_RADIUS, labels * (LABEL_HEIGHT + LABEL_GAP) - LABEL_GAP)


@dataclass(eq=False)
class _Edge:
    """One edge: from its source through its lanes to the slot it ends in; without an operation it joins the output."""

    operation: str | None
    path: list[_Slot]  # the source's slot, one lane for every layer passed, the slot it ends in


@dataclass
class CellLayout:
    """A cell with every position known, in pixels from its own upper left corner."""

    cell: Cell
    slots: list[_Slot]
    edges: list[_Edge]
    label_boxes: dict[int, Box]  # by the edge's place in `edges`
    layer_left: list[float]
    label_widths: list[float]
    width: float
    height: float

    def circle_x(self, layer: int) -> float:
        """The x of the circles in `layer`."""
        room = self.label_widths[layer] + LABEL_TO_NODE if self.label_widths[layer] else 0.0
        return self.layer_left[layer] + room + NODE_RADIUS


def kind_of(operation: str) -> str:
    """The key of KINDS that `operation` belongs to."""
    for kind, mark in (("sep", "sep_"), ("dil", "dil_"), ("pool", "pool_"), ("skip", "skip_")):
        if mark in operation:
            return kind
    return "other"


def layout_cell(cell: Cell) -> CellLayout:
    """Place everything in `cell`."""
    slots, edges = _slots_and_edges(cell)
    layers = [[slot for slot in slots if slot.layer == number] for number in range(1 + max(s.layer for s in slots))]
    _order_layers(layers, edges)
    _place_vertically(layers, edges)
    height = max(slot.y + slot.height / 2 for slot in slots)

    label_widths = [
        max((_label_width(edge.operation) for slot in layer for edge in slot.edges if edge.operation), default=0.0)
        for layer in layers
    ]
    layer_left, x = [], 0.0
    for label_width in label_widths:
        layer_left.append(x)
        x += (label_width + LABEL_TO_NODE if label_width else 0.0) + 2 * NODE_RADIUS + LAYER_GAP
    layout = CellLayout(cell, slots, edges, {}, layer_left, label_widths, x - LAYER_GAP, height)
    for number, edge in enumerate(edges):
        if edge.operation is not None:
            end = edge.path[-1]
            layout.label_boxes[number] = Box(
                layer_left[end.layer],
                _label_y(edge) - LABEL_HEIGHT / 2,
                label_widths[end.layer],
                LABEL_HEIGHT,
                edge.operation,
            )
    return layout


def _slots_and_edges(cell: Cell) -> tuple[list[_Slot], list[_Edge]]:
    slots = [_Slot(0, source) for source in range(NUM_INPUTS)]
    edges: list[_Edge] = []
    lanes: list[_Slot] = []

    def connect(operation: str | None, source: int, end: _Slot) -> None:
        start = slots[source]
        passed = [_Slot(layer, source, is_lane=True) for layer in range(start.layer + 1, end.layer)]
        edge = _Edge(operation, [start, *passed, end])
        lanes.extend(passed)
        end.edges.append(edge)
        edges.append(edge)

    for index, inputs in enumerate(cell.nodes):
        node = _Slot(1 + max((slots[source].layer for _, source in inputs), default=0), NUM_INPUTS + index)
        for operation, source in inputs:
            connect(operation, source, node)
        slots.append(node)
    output = _Slot(1 + max(slot.layer for slot in slots), len(slots))
    for source in cell.concat:
        connect(None, source, output)
    return [*slots, output, *lanes], edges


def _label_width(operation: str) -> float:
    characters = sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in operation)
    return characters * CHARACTER_WIDTH + 2 * LABEL_PADDING


def _label_y(edge: _Edge) -> float:
    """The height at which an edge enters its end slot: its label's centre, or the output's own."""
    end = edge.path[-1]
    if edge.operation is None:
        return end.y
    first = end.y - (len(end.edges) - 1) * (LABEL_HEIGHT + LABEL_GAP) / 2
    return first + end.edges.index(edge) * (LABEL_HEIGHT + LABEL_GAP)


def _neighbours(edges: Sequence[_Edge], forward: bool) -> dict[_Slot, list[_Slot]]:
    """For every slot, those it is tied to in the layer before (`forward`) or after it."""
    found: dict[_Slot, list[_Slot]] = {}
    for edge in edges:
        for left, right in itertools.pairwise(edge.path):
            of, neighbour = (right, left) if forward else (left, right)
            found.setdefault(of, []).append(neighbour)
    return found


def _order_layers(layers: list[list[_Slot]], edges: list[_Edge]) -> None:
    """Sort every layer in place so that few edges cross: barycentre sweeps, of which the best order is kept."""
    best, fewest = [list(layer) for layer in layers], _crossings(layers, edges)
    for sweep in range(ORDERING_SWEEPS):
        forward = sweep % 2 == 0
        neighbours = _neighbours(edges, forward)
        # The inputs stay in their order, so that all drawings read alike.
        for number in range(1, len(layers)) if forward else range(len(layers) - 2, 0, -1):
            beside = layers[number - 1 if forward else number + 1]
            wanted = _barycentres(layers[number], beside, neighbours)
            layers[number].sort(key=wanted.__getitem__)
        crossings = _crossings(layers, edges)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    for layer, order in zip(layers, best, strict=True):
        layer[:] = order
    rank = {slot: place for layer in layers for place, slot in enumerate(layer)}
    for slot in rank:
        slot.edges.sort(key=lambda edge: rank[edge.path[-2]])


def _barycentres(
    layer: Sequence[_Slot], beside: Sequence[_Slot], neighbours: Mapping[_Slot, Sequence[_Slot]]
) -> dict[_Slot, float]:
    """For every slot the mean place of its neighbours in the layer `beside`; one without any goes last."""
    rank = {slot: place for place, slot in enumerate(beside)}
    places = {slot: [rank[other] for other in neighbours.get(slot, ())] for slot in layer}
    return {slot: sum(found) / len(found) if found else len(beside) for slot, found in places.items()}


def _crossings(layers: list[list[_Slot]], edges: Sequence[_Edge]) -> int:
    rank = {slot: place for layer in layers for place, slot in enumerate(layer)}
    steps: dict[int, list[tuple[int, int]]] = {}
    for edge in edges:
        for left, right in itertools.pairwise(edge.path):
            steps.setdefault(left.layer, []).append((rank[left], rank[right]))
    return sum(
        (a[0] - b[0]) * (a[1] - b[1]) < 0 for pairs in steps.values() for a, b in itertools.combinations(pairs, 2)
    )


def _place_vertically(layers: list[list[_Slot]], edges: Sequence[_Edge]) -> None:
    """Set every slot's y: near the mean of what it is tied to, in the layer's order, with gaps; the topmost at 0."""
    for layer in layers:
        _spread(layer, [0.0] * len(layer))
    before, after = _neighbours(edges, True), _neighbours(edges, False)
    for _ in range(ORDERING_SWEEPS):
        for layer in layers:
            wanted = []
            for slot in layer:
                tied = [*before.get(slot, []), *after.get(slot, [])]
                wanted.append(sum(other.y for other in tied) / len(tied) if tied else slot.y)
            _spread(layer, wanted)
    top = min(slot.y - slot.height / 2 for layer in layers for slot in layer)
    for layer in layers:
        for slot in layer:
            slot.y -= top


def _spread(layer: Sequence[_Slot], wanted: Sequence[float]) -> None:
    """The y closest to `wanted` in least squares that keep order and gaps (pool adjacent violators)."""
    offsets = [0.0]
    for upper, lower in itertools.pairwise(layer):
        offsets.append(offsets[-1] + (upper.height + lower.height) / 2 + SLOT_GAP)
    pools: list[tuple[float, int]] = []  # (sum, count) of the slots that touch
    for target, offset in zip(wanted, offsets, strict=False):
        total, count = target - offset, 1
        while pools and pools[-1][0] / pools[-1][1] >= total / count:
            pooled_total, pooled_count = pools.pop()
            total, count = total + pooled_total, count + pooled_count
        pools.append((total, count))
    means = [total / count for total, count in pools for _ in range(count)]
    for slot, offset, mean in zip(layer, offsets, means, strict=False):
        slot.y = offset + mean


def draw_genotype(genotype: Mapping[str, object]) -> str:
    """The SVG of `genotype` (its JSON form), dark or light as the viewer prefers. Raises RefusalError if malformed."""
    layouts = [layout_cell(cell) for cell in cells_of(genotype)]
    occurring = {kind_of(box.text) for layout in layouts for box in layout.label_boxes.values()}
    legend, legend_width = _legend([kind for kind in KINDS if kind in occurring])
    width = 2 * MARGIN + max(legend_width, *(layout.width for layout in layouts))
    parts, y = [], MARGIN
    for layout in layouts:
        parts.append(f'<g transform="translate({MARGIN:g} {y:g})">{_cell_svg(layout)}</g>')
        y += TITLE_HEIGHT + layout.height + MARGIN
    parts.append(f'<g transform="translate({MARGIN:g} {y:g})">{legend}</g>')
    height = y + LEGEND_HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="genotype-drawing" role="img" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}">'
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


def _edge_svg(layout: CellLayout, edge: _Edge) -> str:
    start, end = edge.path[0], edge.path[-1]
    x, y = layout.circle_x(start.layer) + NODE_RADIUS, start.y
    line = f"M{x:.1f} {y:.1f}"
    for lane in edge.path[1:-1]:
        line += _curve(x, y, layout.layer_left[lane.layer], lane.y)
        x, y = layout.circle_x(lane.layer) + NODE_RADIUS, lane.y
        line += f"H{x:.1f}"
    node_x = layout.circle_x(end.layer) - NODE_RADIUS
    kind = "concat"
    if edge.operation is not None:
        kind = kind_of(edge.operation)
        label_left, label_y = layout.layer_left[end.layer], _label_y(edge)
        line += _curve(x, y, label_left, label_y)
        x, y = label_left + layout.label_widths[end.layer], label_y
        line += f"H{x:.1f}"
    line += _curve(x, y, node_x - 6, end.y)
    head = f"{node_x:.1f},{end.y:.1f} {node_x - 9:.1f},{end.y - 4.5:.1f} {node_x - 9:.1f},{end.y + 4.5:.1f}"
    return f'<path class="edge {kind}" data-source="{source_name(start.source)}" d="{line}"/><polygon points="{head}"/>'


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    middle = (x + to_x) / 2
    return f"C{middle:.1f} {y:.1f} {middle:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}"


def _label_svg(box: Box) -> str:
    # Letters that XML cannot hold, such as control characters, are shown as the replacement character.
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in box.text)
    return (
        f'<rect class="{kind_of(box.text)}" x="{box.left:.1f}" y="{box.top:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="{box.height / 2:.1f}"/><text class="label" '
        f'x="{box.left + box.width / 2:.1f}" y="{box.top + box.height / 2 + 4:.1f}">{escape(text)}</text>'
    )


def _circle_svg(layout: CellLayout, slot: _Slot) -> str:
    x, output = layout.circle_x(slot.layer), NUM_INPUTS + len(layout.cell.nodes)
    if NUM_INPUTS <= slot.source < output:
        name = str(slot.source - NUM_INPUTS + 1)
    else:
        index = "k" if slot.source == output else ("k−2", "k−1")[slot.source]
        name = f'c<tspan dy="3" font-size="9">{index}</tspan>'
    return (
        f'<circle cx="{x:.1f}" cy="{slot.y:.1f}" r="{NODE_RADIUS:g}"/>'
        f'<text x="{x:.1f}" y="{slot.y + 4.5:.1f}">{name}</text>'
    )


def _legend(kinds: Sequence[str]) -> tuple[str, float]:
    """The legend of the kinds that occur, and its width in pixels."""
    parts, x = [], 0.0
    entries = [(kind, KINDS[kind][0]) for kind in kinds] + [("concat", "concatenated to the output")]
    for kind, words in entries:
        if kind == "concat":
            parts.append(f'<path class="concat" d="M{x:.1f} 0H{x + 26:.1f}"/>')
        else:
            parts.append(f'<rect class="{kind}" x="{x:.1f}" y="-7" width="26" height="14" rx="7"/>')
        parts.append(f'<text class="key" x="{x + 34:.1f}" y="4.5">{words}</text>')
        x += 34 + 7.4 * len(words) + 22
    return "".join(parts), x - 22
