"""Charts of a report as inline SVG: whole without JavaScript, which adds a reading line where the pointer is.

Colours are CSS variables of the page, so that light and dark need no second drawing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10
from typing import TypeVar

WIDTH, HEIGHT = 420.0, 210.0  # SVG units; the page scales them, little on a phone, so that their text stays legible
LEFT, RIGHT, TOP, BOTTOM = 50.0, 12.0, 20.0, 36.0
HEADROOM = 0.04  # above the highest value
COLOURS = 6  # of the style
LETTER = 6.2  # of a phase's name
TICKS = 4
MOST_POINTS = 600  # of a curve
Points = Sequence[tuple[float, float]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Series:
    """A named curve; rounds that were not measured have no point."""

    name: str
    points: Points


@dataclass(frozen=True)
class Span:
    """A phase: its name, first and last round."""

    name: str
    first: int
    last: int


def ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """Round numbers from ``low`` to ``high``: about ``count`` of them, steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * (1 - 1e-9))
    first = floor(low / step + 1 - 1e-9)
    return [round(number * step, 12) for number in range(first, floor(high / step + 1e-9) + 1)]


def shown(value: float) -> str:
    """A number for an axis or a tooltip: four significant digits, thousands apart."""
    if value and abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def tick(value: float) -> str:
    """The same for an axis, where there is little room: thousands and millions by their letter."""
    for unit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def thinned(items: Sequence[Item], most: int) -> Sequence[Item]:
    """At most about so many, evenly spaced, the first and the last among them: a page shows no more pixels."""
    if len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


class _Scale:
    """Values to places along an axis."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = (low, high) if high > low else (low - 0.5, low + 0.5)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(
    label: str, unit: str, series: Sequence[Series], spans: Sequence[Span] = (), from_zero: bool = False
) -> str:
    """Curves over rounds, the phases shaded and named. ``label`` says what is drawn, for those who do not see it.

    ``unit`` stands along the upright axis.
    """
    series = [Series(each.name, thinned(each.points, MOST_POINTS)) for each in series]
    points = [point for each in series for point in each.points]
    if not points:
        return '<p class="none">not measured</p>'
    rounds, values = [x for x, _ in points], [y for _, y in points]
    first, last = min([*rounds, *(span.first for span in spans)]), max([*rounds, *(span.last for span in spans)])
    x = _Scale(first, last, LEFT, WIDTH - RIGHT)
    low, high = min(0.0, *values) if from_zero else min(values), max(values)
    y = _Scale(low, high + HEADROOM * (high - low), HEIGHT - BOTTOM, TOP)
    parts = [_span(span, x) for span in spans]
    parts += [_horizontal(value, y) for value in ticks(y.low, y.high)]
    parts += [_vertical(value, x) for value in ticks(x.low, x.high, 6) if value == int(value)]
    parts += [_curve(each.points, _look(number), x, y) for number, each in enumerate(series)]
    read = [{"name": each.name, "points": [[px, py] for px, py in each.points]} for each in series]
    frame = {"low": x.low, "high": x.high, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM}
    data = escape(json.dumps({**frame, "series": read}))
    return (
        f'<figure class="chart"><svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(label)}" '
        f'data-chart="{data}"><title>{escape(label)}</title>{"".join(parts)}'
        f"{_axes('round', unit)}</svg>{_legend(series, [span for span in spans if not _fits(span, x)])}</figure>"
    )


def _axes(across: str, upright: str) -> str:
    middle = (HEIGHT - BOTTOM + TOP) / 2
    return (
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 3:g}">{escape(across)}</text>'
        f'<text class="axis" transform="translate(12 {middle:g}) rotate(-90)">{escape(upright)}</text>'
    )


def _fits(span: Span, x: _Scale) -> bool:
    """Whether the name has room above its ground."""
    left, right = _ends(span, x)
    return right - left > LETTER * len(span.name)


def _ends(span: Span, x: _Scale) -> tuple[float, float]:
    return x(max(x.low, span.first - 0.5)), x(min(x.high, span.last + 0.5))


def _kind(span: Span) -> str:
    """Its class in the style."""
    return "".join(letter if letter.isalnum() else "-" for letter in span.name)


def _span(span: Span, x: _Scale) -> str:
    left, right = _ends(span, x)
    name = f'<text class="phase" x="{left:.1f}" y="{TOP - 6:g}">{escape(span.name)}</text>'
    return (
        f'<rect class="span {_kind(span)}" x="{left:.1f}" y="{TOP:g}" width="{max(0.0, right - left):.1f}" '
        f'height="{HEIGHT - TOP - BOTTOM:g}"><title>{escape(span.name)}: rounds {span.first} to {span.last}</title>'
        f"</rect>{name if _fits(span, x) else ''}"
    )


def _horizontal(value: float, y: _Scale) -> str:
    at = y(value)
    return (
        f'<path class="grid" d="M{LEFT:g} {at:.1f}H{WIDTH - RIGHT:g}"/>'
        f'<text class="tick left" x="{LEFT - 6:g}" y="{at + 3.5:.1f}">{tick(value)}</text>'
    )


def _vertical(value: float, x: _Scale) -> str:
    return f'<text class="tick" x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 14:g}">{value:g}</text>'


def _look(number: int) -> str:
    """The classes of the curve with this number: a colour, and how it is broken once colours come again."""
    return f"s{number % COLOURS} d{number // COLOURS % COLOURS}"


def _curve(points: Points, look: str, x: _Scale, y: _Scale) -> str:
    places = [f"{x(px):.1f},{y(py):.1f}" for px, py in points]
    if len(places) == 1:
        cx, cy = places[0].split(",")
        return f'<circle class="dot {look}" cx="{cx}" cy="{cy}" r="3.5"/>'
    return f'<polyline class="line {look}" points="{" ".join(places)}"/>'


def _legend(series: Sequence[Series], grounds: Sequence[Span]) -> str:
    """Which curve is which, where there are several, and the phases whose names have no room in the chart."""
    keys = [
        f'<li><svg class="key" viewBox="0 0 26 6" aria-hidden="true"><path class="line {_look(number)}" d="M0 3H26"/>'
        f"</svg>{escape(each.name)}</li>"
        for number, each in enumerate(series)
    ]
    keys = keys if len(series) > 1 else []
    keys += [
        f'<li><svg class="key ground" viewBox="0 0 26 12" aria-hidden="true"><rect class="span {_kind(span)}" '
        f'width="26" height="12"/></svg>{escape(span.name)}</li>'
        for span in {span.name: span for span in grounds}.values()
    ]
    return f'<ul class="legend">{"".join(keys)}</ul>' if keys else ""


def heat_map(
    label: str,
    rows: Sequence[str],
    values: Sequence[Sequence[float | None]],
    columns: str,
    highest: float,
    numbers: Sequence[int],
    width: float = 360.0,
) -> str:
    """Cells shaded by value; ``columns`` says what the columns count, ``numbers`` of each. None is what is not there.

    Neighbours in a row that look alike are one rectangle, so that a thousand rounds stay a small picture.
    """
    count = max(len(line) for line in values)
    left, cell = 12.0 + 6.2 * max(len(name) for name in rows), 13.0
    height = cell * len(rows) + 23.0
    step = (width - left - 2.0) / count
    parts = []
    for number, (name, line) in enumerate(zip(rows, values, strict=True)):
        top = number * cell + 3.0  # letters reach above their row
        parts.append(f'<text class="tick left" x="{left - 5:.1f}" y="{top + cell - 3.5:.1f}">{escape(name)}</text>')
        start = 0
        for place in range(1, len(line) + 1):
            if place < len(line) and _shade(line[place], highest) == _shade(line[start], highest):
                continue
            share = _shade(line[start], highest)
            look = 'class="gone"' if share is None else f'class="heat" fill-opacity="{share:g}"'
            said = "pruned" if line[start] is None else shown(float(line[start] or 0.0))
            where = f"{numbers[start]}" if place - start == 1 else f"{numbers[start]} to {numbers[place - 1]}"
            parts.append(
                f'<rect {look} x="{left + start * step:.2f}" y="{top:.1f}" width="{(place - start) * step:.2f}" '
                f'height="{cell - 1:g}"><title>{escape(name)}, {escape(columns)} {where}: {said}</title></rect>'
            )
            start = place
    ends = [
        f'<text class="tick" style="text-anchor:{anchor}" x="{at:.1f}" y="{height - 6:.1f}">{text}</text>'
        for at, anchor, text in ((left, "start", f"{columns} {numbers[0]}"), (width - 2.0, "end", numbers[-1]))
    ]
    return (
        f'<svg class="map" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{''.join(parts)}{''.join(ends)}</svg>"
    )


def _shade(value: float | None, highest: float) -> float | None:
    """A share of full colour, in steps of a fiftieth."""
    return None if value is None else round(50 * value / max(highest, 1e-12)) / 50


def histogram(label: str, values: Sequence[float], bins: int = 20) -> str:
    """How many of the values, accuracies from 0 to 1, lie where; the mean is marked."""
    if not values:
        return '<p class="none">not measured</p>'
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, int(value * bins)))] += 1
    x, y = _Scale(0.0, 1.0, LEFT, WIDTH - RIGHT), _Scale(0.0, max(counts), HEIGHT - BOTTOM, TOP)
    parts = [_horizontal(value, y) for value in ticks(0.0, max(counts)) if value == int(value)]
    for number, count in enumerate(counts):
        low, high = number / bins, (number + 1) / bins
        if count:
            said = f"{count} of {len(values)}: {low:.2f} to {high:.2f}"
            parts.append(
                f'<rect class="bar" x="{x(low) + 1:.1f}" y="{y(count):.1f}" width="{x(high) - x(low) - 2:.1f}" '
                f'height="{y(0) - y(count):.1f}"><title>{said}</title></rect>'
            )
    mean = sum(values) / len(values)
    parts.append(
        f'<path class="mean" d="M{x(mean):.1f} {TOP:g}V{HEIGHT - BOTTOM:g}"/>'
        f'<text class="tick left" x="{min(x(mean) + 28, WIDTH - RIGHT):.1f}" y="{TOP - 6:g}">mean {mean:.3f}</text>'
    )
    parts += [_vertical(value, x) for value in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return (
        f'<figure class="chart"><svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{''.join(parts)}{_axes('accuracy', 'clients')}</svg></figure>"
    )
