"""Several runs on one page: their figures in columns, their curves in one chart, their cells beside each other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import accumulate
from typing import Any

from fedmetanas_core.config import defaults
from fedmetanas_core.output.drawing import draw_genotype
from fedmetanas_core.output.report.charts import Points, Series, line_chart
from fedmetanas_core.output.report.document import PLACES, page, percent, points, section, table, travelled
from fedmetanas_core.output.report.facts import RunFacts
from fedmetanas_core.text import describe, describe_bytes, describe_macs

Row = Mapping[str, Any]


def compare_runs(runs: Sequence[RunFacts]) -> str:
    """The page of two or more runs."""
    folders = [facts.name for facts in runs]
    names = [facts.name if folders.count(facts.name) == 1 else str(facts.path) for facts in runs]
    runs = [replace(facts, name=name) for facts, name in zip(runs, names, strict=True)]
    body = [
        f'<header><p class="soft">FedMetaNAS report</p><h1>{len(runs)} runs side by side</h1></header>',
        section("What came out", table(("", *names), _figures(runs), range(1, len(runs) + 1))),
        section("Where they differ", _differences(runs)),
        section("How they learned", _curves(runs)),
        section("The networks", _cells(runs)),
    ]
    return page(f"{', '.join(names)}: FedMetaNAS", "".join(body))


def _figures(runs: Sequence[RunFacts]) -> list[tuple[str, ...]]:
    figures: dict[str, Callable[[RunFacts], str]] = {
        "state": lambda facts: str(facts.summary.get("status") or "running"),
        "test accuracy": lambda facts: percent(facts.summary.get("test_accuracy"), 2),
        "just before extraction": lambda facts: percent(facts.summary.get("test_accuracy_supernet"), 2),
        "clients' accuracy": lambda facts: percent(facts.summary.get("client_accuracy_mean"), 2),
        "after adaptation": lambda facts: percent(facts.summary.get("client_accuracy_adapted_mean"), 2),
        "weights": lambda facts: _count(_of_network(facts, "parameters")),
        "an image": lambda facts: "" if (macs := _of_network(facts, "macs")) is None else describe_macs(macs),
        "budget": _budget,
        "rounds": lambda facts: str(len(facts.rounds)),
        "clients computed": lambda facts: describe(sum(row["compute_seconds"] for row in facts.rounds)),
        "sent": lambda facts: describe_bytes(sum(travelled(facts))),
        "hardware": lambda facts: "; ".join(facts.summary.get("hardware") or ()),
    }
    return [(name, *(told(facts) for facts in runs)) for name, told in figures.items()]


def _of_network(facts: RunFacts, figure: str) -> float | None:
    """Of the network that is used; where every client has its own, the mean of theirs."""
    own = facts.summary.get(f"personal_{figure}")
    found: float | None = facts.summary.get(figure) if own is None else own
    return found


def _budget(facts: RunFacts) -> str:
    kept = (facts.summary.get("budget") or {}).items()
    return ", ".join(f"{key}={entry['limit']:,.6g}{'' if entry['met'] else ' NOT kept'}" for key, entry in kept)


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _differences(runs: Sequence[RunFacts]) -> str:
    """The keys in which the runs were not given the same."""
    keys = [key for key in defaults() if key not in PLACES]
    rows = [
        (key, *(str(facts.config.get(key)) for facts in runs))
        for key in keys
        if len({str(facts.config.get(key)) for facts in runs}) > 1
    ]
    return table(("key", *(facts.name for facts in runs)), rows) if rows else "<p>All were given the same keys.</p>"


def _curves(runs: Sequence[RunFacts]) -> str:
    def measured(value: Callable[[Row], float | None]) -> list[Series]:
        return [Series(facts.name, points(facts.rounds, value)) for facts in runs]

    charts = [
        ("Accuracy of the global model", "accuracy", measured(lambda row: row["test_accuracy"])),
        ("Clients' loss", "loss", measured(lambda row: row["train_loss"])),
        ("Alive operations", "operations", measured(lambda row: row["alive_operations"])),
        ("Sent so far (MB)", "MB", [Series(facts.name, _sent(facts)) for facts in runs]),
    ]
    drawn = "".join(
        f"<div><h3>{escape(title)}</h3>{line_chart(f'{title}, by round', unit, series)}</div>"
        for title, unit, series in charts
        if any(each.points for each in series)
    )
    return f'<div class="two">{drawn}</div>' if drawn else ""


def _sent(facts: RunFacts) -> Points:
    sums = accumulate((row["uplink_bytes"] + row["downlink_bytes"]) / 1e6 for row in facts.rounds)
    return [(float(row["round"]), total) for row, total in zip(facts.rounds, sums, strict=True)]


def _cells(runs: Sequence[RunFacts]) -> str:
    drawn = [
        f'<div class="wide"><h3>{escape(facts.name)}</h3>{draw_genotype(genotype)}</div>'
        for facts in runs
        if (genotype := facts.summary.get("genotype"))
    ]
    return f'<div class="two">{"".join(drawn)}</div>' if drawn else ""
