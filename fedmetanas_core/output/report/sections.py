"""What a run has measured, as sections of its report: classes, curves, alphas, pruning, clients, costs."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fedmetanas_core.output.pictures import edge_names, over_rounds
from fedmetanas_core.output.report.charts import Series, heat_map, histogram, line_chart, thinned
from fedmetanas_core.output.report.document import percent, points, section, spans, table
from fedmetanas_core.output.report.facts import RunFacts
from fedmetanas_core.output.result import CAUSES
from fedmetanas_core.space.spec import PRIMITIVES

MOST_ROUNDS = 400  # of a heat map
MOST_CLIENTS, MOST_CLASSES = 300, 60  # of a map that anybody looks at; more would make the page tens of megabytes
TAKEN_FOR, MOST_MISSING, LONGEST_NAME = 3, 10, 40  # classes that are named, and letters of their names
Row = Mapping[str, Any]


def classes(facts: RunFacts) -> str:
    """How well each class is recognised, and what it is taken for."""
    every = facts.summary.get("test_classes") or []
    tested = sorted((each for each in every if each["images"]), key=lambda each: each["right"] / each["images"])
    told = bool(tested) and "answers" in tested[0]
    rows = [
        (
            str(each["name"])[:LONGEST_NAME],
            f"{each['images']:,}",
            percent(each["right"] / each["images"]),
            *([_taken_for(each, every)] if told else []),
        )
        for each in tested[:MOST_CLASSES]
    ]
    notes = [f"The {MOST_CLASSES} weakest of {len(tested)} classes."] if tested[MOST_CLASSES:] else []
    missing = [str(each["name"])[:LONGEST_NAME] for each in every if not each["images"]]
    more = f" and {len(missing) - MOST_MISSING} more" if missing[MOST_MISSING:] else ""
    notes += [f"Without a test image: {', '.join(missing[:MOST_MISSING])}{more}."] if missing else []
    head = ("class", "test images", "recognised", *(["else taken for (images)"] if told else []))
    below = "".join(f'<p class="soft">{escape(note)}</p>' for note in notes)
    return section("Classes", table(head, rows, (1, 2)) + below) if rows else ""


def _taken_for(own: Row, every: Sequence[Row]) -> str:
    """The few other classes that its images were most often taken for."""
    others = ((count, other["name"]) for count, other in zip(own["answers"], every, strict=True) if other is not own)
    taken = sorted((pair for pair in others if pair[0]), reverse=True)[:TAKEN_FOR]
    return ", ".join(f"{name[:LONGEST_NAME]} ({count})" for count, name in taken)


def curves(facts: RunFacts) -> str:
    rounds, shades = facts.rounds, spans(facts)
    if not rounds:
        return section("Curves", "<p>No round has been completed yet.</p>")
    accuracy = [Series("accuracy", points(rounds, lambda row: row["test_accuracy"]))]
    losses = [
        Series("query or training loss", points(rounds, lambda row: row["train_loss"])),
        Series("support loss", points(rounds, lambda row: row["support_loss"])),
    ]
    told = [each for each in losses if each.points]
    charts = (
        "<div><h3>Accuracy of the global model</h3>"
        + line_chart("Accuracy of the global model over rounds", "accuracy", accuracy, shades, from_zero=True)
        + "</div><div><h3>Clients' loss</h3>"
        + line_chart("Clients' mean loss over rounds", "loss", told, shades)
        + "</div>"
    )
    return section("How it learned", f'<div class="two">{charts}</div>')


def alphas(facts: RunFacts) -> str:
    if not facts.history:
        return ""
    groups, last = list(facts.history[0]["operations"]), facts.rounds[-1]["round"] if facts.rounds else 1
    blocks = []
    for group in groups:
        shown = thinned(range(1, last + 1), MOST_ROUNDS)
        shares = over_rounds(facts.history, group, last)[..., [number - 1 for number in shown]]
        edges = len(shares)
        maps = "".join(
            f"<figure><h3>{escape(name)}</h3>"
            + heat_map(
                f"{group} cell, edge {name}: share of each operation over the rounds",
                PRIMITIVES,
                [[None if value != value else float(value) for value in line] for line in shares[edge]],
                "round",
                1.0,
                shown,
            )
            + "</figure>"
            for edge, name in enumerate(edge_names(edges))
        )
        words = {"normal": "normal cell", "reduce": "reduction cell"}.get(group, group)
        block = f'<h3>{escape(words)}</h3><div class="maps">{maps}</div>'
        blocks.append(f'<div data-part="alphas" data-name="{escape(group)}">{block}</div>')
    choices = "".join(
        f'<label><input type="radio" name="alphas" value="{name}"{" checked" if name == "all" else ""}> {name}</label>'
        for name in ("all", *map(escape, groups))
    )
    told = (
        "<p>For every edge of a cell, how likely the search held each operation to be after each round (the softmax of "
        "its alphas): the stronger the colour, the likelier. Grey: pruned. c(k-2) and c(k-1) are a cell's inputs.</p>"
        '<p class="soft">0<span class="ramp"></span>1<span class="ramp gone"></span>pruned</p>'
    )
    return section(
        "Why: alphas over the rounds", told, f'<div class="toggle" data-toggle="alphas" hidden>{choices}</div>', *blocks
    )


def pruning(facts: RunFacts) -> str:
    events = facts.summary.get("pruning_events") or []
    prunes = [event for event in events if event["kind"] == "pruning"]
    rows = [
        (
            str(event["round"]),
            percent(event["before"]),
            percent(event["after"]),
            percent(event["hard_darts_rule"]),
            str(event["alive_operations"]),
            ", ".join(f"{event[cause]} {words}" for cause, words in CAUSES.items() if event[cause]) or "none",
        )
        for event in prunes
    ]
    head = ("round", "before", "after", "by DARTS' rule", "operations left", "removed: operations and pairs of inputs")
    parts = [table(head, rows, (0, 1, 2, 3, 4))] if rows else []
    derived = [
        (str(event["round"]), percent(event["before"]), percent(event["after"]), percent(event["recalibrated"]))
        for event in events
        if event["kind"] == "derivation"
    ]
    if derived:
        parts.append(
            table(("genotype, round", "before", "with inherited weights", "statistics renewed"), derived, (0, 1, 2, 3))
        )
    if parts:
        parts.insert(0, "<p>Accuracy just before and after each cut, before anything could recover.</p>")
    return section("What pruning cost", *parts)


def clients(facts: RunFacts) -> str:
    summary, parts = facts.summary, []
    for key, title in (("client_accuracy", "as the network comes"), ("client_accuracy_adapted", "after adaptation")):
        values = summary.get(key) or []
        if values:
            label = f"Clients by their accuracy, {title}"
            parts.append(f"<div><h3>{len(values)} clients, {title}</h3>{histogram(label, values)}</div>")
    charts = f'<div class="two">{"".join(parts)}</div>' if parts else ""
    held = ""
    if facts.counts.size:
        shown = facts.counts[:MOST_CLIENTS, :MOST_CLASSES]
        rows = [name[:20] for name in facts.class_names[:MOST_CLASSES]]
        values = [[float(count) for count in line] for line in shown.T]
        highest = float(facts.counts.max())
        drawn = heat_map(
            "Training images by class and client", rows, values, "client", highest, range(len(shown)), 900.0
        )
        held = f'<h3>Training images of each class, by client</h3><div class="wide">{drawn}</div>'
        holders, kinds = facts.counts.shape
        part = "" if shown.shape == facts.counts.shape else f" The first of {holders} clients and {kinds} classes."
        held += f'<p class="soft">Strongest colour: {highest:.0f} images.{part}</p>'
    return section("Clients", charts, held)


def costs(facts: RunFacts) -> str:
    rounds, shades = facts.rounds, spans(facts)
    if not rounds:
        return ""
    charts = [
        ("Alive operations", "operations", [Series("operations", points(rounds, lambda row: row["alive_operations"]))]),
        (
            "Weights of the network as it stands",
            "weights",
            [Series("weights", points(rounds, lambda row: row["parameters"]))],
        ),
        (
            "Multiply-adds of an image (million)",
            "million",
            [Series("multiply-adds", points(rounds, lambda row: row["macs"] / 1e6))],
        ),
        (
            "Sent in a round (MB)",
            "MB",
            [
                Series("up", points(rounds, lambda row: row["uplink_bytes"] / 1e6)),
                Series("down", points(rounds, lambda row: row["downlink_bytes"] / 1e6)),
            ],
        ),
        (
            "Seconds of a round",
            "seconds",
            [
                Series("by the clock", points(rounds, lambda row: row["seconds"])),
                Series("the slowest client's computing", points(rounds, lambda row: row["longest_compute_seconds"])),
            ],
        ),
    ]
    drawn = "".join(
        f"<div><h3>{escape(title)}</h3>{line_chart(f'{title}, by round', unit, series, shades, from_zero=True)}</div>"
        for title, unit, series in charts
        if any(each.points for each in series)
    )
    return section("What it cost", f'<div class="two">{drawn}</div>')
