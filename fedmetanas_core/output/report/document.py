"""What the pages are put together from: the document, its sections and tables, figures in words."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from fedmetanas_core.output.pictures import phases_of
from fedmetanas_core.output.report.charts import Span
from fedmetanas_core.output.report.facts import RunFacts
from fedmetanas_core.output.report.style import SCRIPT, STYLE

PLACES = ("run_name", "runs_dir", "resume", "ray_address", "workers", "data_root")  # say nothing of the method
Row = Mapping[str, Any]


def page(title: str, body: str) -> str:
    """A document with style and script inside."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>'
        f'{escape(title)}</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head>\n<body>{body}<script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A part of the page, left out where it has nothing."""
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n" if body else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), long: bool = False) -> str:
    """A table of texts; ``numbers`` are the columns that stand to the right. ``long`` texts may break anywhere."""

    def line(tag: str, cells: Sequence[str]) -> str:
        looks = (' class="number"' if place in numbers else "" for place in range(len(cells)))
        return "".join(f"<{tag}{look}>{escape(cell)}</{tag}>" for look, cell in zip(looks, cells, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    look = ' class="long"' if long else ""
    return (
        f'<div class="wide"><table{look}><thead><tr>{line("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def percent(value: float | None, digits: int = 1) -> str:
    """An accuracy as people say it."""
    return "not measured" if value is None else f"{100 * value:.{digits}f} %"


def travelled(facts: RunFacts) -> tuple[int, int]:
    """Bytes up and down: of the whole run once it has ended, until then of its rounds."""
    up, down = (
        facts.summary.get(key) or sum(row[key] for row in facts.rounds) for key in ("uplink_bytes", "downlink_bytes")
    )
    return up, down


def spans(facts: RunFacts) -> list[Span]:
    """The run's phases, for charts."""
    return [Span(*each) for each in phases_of(facts.rounds)]


def points(rounds: Sequence[Row], value: Callable[[Row], float | None]) -> list[tuple[float, float]]:
    """(round, value) wherever there is one."""
    return [(float(row["round"]), float(found)) for row in rounds if (found := value(row)) is not None]
