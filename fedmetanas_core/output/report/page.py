"""The report of one run: what was asked, what came out, why, what it cost, and how to do it again."""

import shlex
from collections import Counter
from collections.abc import Mapping
from html import escape
from typing import Any

from fedmetanas_core.config import defaults
from fedmetanas_core.output.drawing import draw_genotype
from fedmetanas_core.output.pictures import edge_names, over_rounds
from fedmetanas_core.output.report.charts import Series, heat_map, histogram, line_chart, thinned
from fedmetanas_core.output.report.document import PLACES, page, percent, points, section, spans, table
from fedmetanas_core.output.report.facts import RunFacts
from fedmetanas_core.output.result import CAUSES
from fedmetanas_core.output.words import genotype_in_words
from fedmetanas_core.run.progress import describe, describe_bytes, describe_macs
from fedmetanas_core.space.spec import PRIMITIVES

MOST_EXCLUSIONS = 200  # rows of a table that anybody reads
MOST_ROUNDS = 400  # of a heat map
MOST_CLIENTS, MOST_CLASSES = 300, 60  # of a map that anybody looks at; more would make the page tens of megabytes
Row = Mapping[str, Any]


def report(facts: RunFacts) -> str:
    """The page, whole."""
    sections = [
        _head(facts),
        _cells(facts),
        _curves(facts),
        _alphas(facts),
        _pruning(facts),
        _clients(facts),
        _costs(facts),
        _exclusions(facts),
        _asked(facts),
        _again(facts),
    ]
    return page(f"{facts.name}: FedMetaNAS", "".join(sections))


def _head(facts: RunFacts) -> str:
    summary, config = facts.summary, facts.config
    state = str(summary.get("status") or "running")
    dataset = str(config["dataset"]).rstrip("/").rsplit("/", 1)[-1]
    asked = (
        f"{config['num_clients']} clients, {config['clients_per_round']} a round, {config['num_rounds']} rounds of "
        f"{config['local_epochs']} epochs; {_partition_in_words(config)}; seed {config['seed']}"
    )
    error = f'<p class="state failed">{escape(str(summary["error"]))}</p>' if summary.get("error") else ""
    return (
        f'<header><p class="soft">FedMetaNAS report</p><h1>{escape(str(config["method"]))} on {escape(dataset)} '
        f'<span class="state {escape(state)}">{escape(state)}</span></h1><p>{escape(asked)}</p>{error}'
        f'<div class="cards">{"".join(_card(*each) for each in _figures(facts))}</div></header>'
    )


def _partition_in_words(config: Row) -> str:
    kind = config["partition"]
    if kind == "dirichlet":
        return f"classes by a Dirichlet distribution of {config['dir_alpha']}"
    return f"{config['classes_per_client']} classes a client" if kind == "label_skew" else "classes evenly"


def _card(name: str, value: str, note: str = "") -> str:
    return f'<div class="card"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>'


def _figures(facts: RunFacts) -> list[tuple[str, str, str]]:
    summary, rounds = facts.summary, facts.rounds
    before = summary.get("test_accuracy_supernet")
    spread = summary.get("client_accuracy_std")
    cards = [
        (
            "test accuracy",
            percent(summary.get("test_accuracy")),
            "" if before is None else f"{percent(before)} before extraction",
        ),
        (
            "clients' accuracy",
            percent(summary.get("client_accuracy_mean")),
            "" if spread is None else f"± {100 * spread:.1f} between clients",
        ),
        ("after adaptation", percent(summary.get("client_accuracy_adapted_mean")), "a client on its own images"),
    ]
    own = "personal_" if summary.get("personal_parameters") is not None else ""
    parameters, macs = summary.get(f"{own}parameters"), summary.get(f"{own}macs")
    if parameters is not None and macs is not None:
        cards.append(
            (
                "network",
                f"{parameters:,.0f} weights",
                f"{describe_macs(macs)} an image{', mean of the clients' if own else ''}",
            )
        )
    for key, entry in (summary.get("budget") or {}).items():
        kept = "kept to" if entry["met"] else "NOT kept to"
        cards.append((key, f"{entry['spent']:,.6g}", f"of {entry['limit']:,.6g}: {kept}"))
    up, down = (sum(row[key] for row in rounds) for key in ("uplink_bytes", "downlink_bytes"))
    cards.append(("sent", describe_bytes(up + down), f"{describe_bytes(up)} up, {describe_bytes(down)} down"))
    seconds = summary.get("seconds") or sum(row["seconds"] for row in rounds)
    compute = sum(row["compute_seconds"] for row in rounds)
    cards.append(("took", describe(seconds), f"without Flower's start; clients computed {describe(compute)}"))
    return cards


def _cells(facts: RunFacts) -> str:
    genotype = facts.summary.get("genotype")
    if not genotype:
        return ""
    words = f"<details><summary>in words</summary><pre>{escape(genotype_in_words(genotype))}</pre></details>"
    return section("The network that was found", f'<div class="wide">{draw_genotype(genotype)}</div>', words)


def _curves(facts: RunFacts) -> str:
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
        + line_chart("Accuracy of the global model over rounds", accuracy, shades)
        + "</div><div><h3>Clients' loss</h3>"
        + line_chart("Clients' mean loss over rounds", told, shades)
        + "</div>"
    )
    return section("How it learned", f'<div class="two">{charts}</div>')


def _alphas(facts: RunFacts) -> str:
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
    )
    return section(
        "Why: alphas over the rounds", told, f'<div class="toggle" data-toggle="alphas" hidden>{choices}</div>', *blocks
    )


def _pruning(facts: RunFacts) -> str:
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
    head = ("round", "before", "after", "by DARTS' rule", "choices left", "removed")
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


def _clients(facts: RunFacts) -> str:
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
        clients, classes = facts.counts.shape
        part = "" if shown.shape == facts.counts.shape else f" The first of {clients} clients and {classes} classes."
        held += f'<p class="soft">Strongest colour: {highest:.0f} images.{part}</p>'
    return section("Clients", charts, held)


def _costs(facts: RunFacts) -> str:
    rounds, shades = facts.rounds, spans(facts)
    if not rounds:
        return ""
    charts = [
        ("Alive operations", [Series("operations", points(rounds, lambda row: row["alive_operations"]))]),
        ("Weights of the network as it stands", [Series("weights", points(rounds, lambda row: row["parameters"]))]),
        (
            "Multiply-adds of an image (million)",
            [Series("multiply-adds", points(rounds, lambda row: row["macs"] / 1e6))],
        ),
        (
            "Sent in a round (MB)",
            [
                Series("up", points(rounds, lambda row: row["uplink_bytes"] / 1e6)),
                Series("down", points(rounds, lambda row: row["downlink_bytes"] / 1e6)),
            ],
        ),
        (
            "Seconds of a round",
            [
                Series("by the clock", points(rounds, lambda row: row["seconds"])),
                Series("the slowest client's computing", points(rounds, lambda row: row["longest_compute_seconds"])),
            ],
        ),
    ]
    drawn = "".join(
        f"<div><h3>{escape(title)}</h3>{line_chart(f'{title}, over rounds', series, shades, from_zero=True)}</div>"
        for title, series in charts
        if any(each.points for each in series)
    )
    return section("What it cost", f'<div class="two">{drawn}</div>')


def _exclusions(facts: RunFacts) -> str:
    excluded = [(row["round"], each) for row in facts.rounds for each in row["excluded"]]
    notes = [(row["round"], each) for row in facts.rounds for each in row["notes"]]
    missing = facts.summary.get("clients_not_evaluated") or []
    parts = []
    if excluded:
        reasons = Counter(str(each["reason"]) for _, each in excluded).most_common()
        parts.append(f"<p>{len(excluded)} answers were not averaged.</p>")
        parts.append(
            table(("reason", "times"), [(reason, str(times)) for reason, times in reasons[:MOST_EXCLUSIONS]], (1,))
        )
        rows = [(str(number), str(each["client"]), str(each["reason"])) for number, each in excluded[:MOST_EXCLUSIONS]]
        more = f"<p>and {len(excluded) - len(rows)} more, in rounds.jsonl</p>" if len(excluded) > len(rows) else ""
        each_of_them = table(("round", "client", "reason"), rows, (0, 1)) + more
        parts.append(f"<details><summary>each of them</summary>{each_of_them}</details>")
    if missing:
        rows = [("", str(each["client"]), str(each["reason"])) for each in missing[:MOST_EXCLUSIONS]]
        parts.append(
            f"<p>{len(missing)} clients did not measure the result.</p>" + table(("", "client", "reason"), rows, (1,))
        )
    if notes:
        rows = [
            (str(number), "" if each["client"] is None else str(each["client"]), str(each["note"]))
            for number, each in notes[:MOST_EXCLUSIONS]
        ]
        parts.append(f"<h3>Events</h3>{table(('round', 'client', 'event'), rows, (0, 1))}")
    return section("Answers left out, and events", *(parts or ["<p>Every answer counted.</p>"]))


def _asked(facts: RunFacts) -> str:
    usual = defaults()
    keys = [key for key in usual if key in facts.config]
    changed = [key for key in keys if facts.config[key] != usual[key] and usual[key] != "auto" and key not in PLACES]
    rows = [(key, str(facts.config[key]), str(usual[key])) for key in changed]
    told = table(("key", "value", "default"), rows, long=True) if rows else "<p>All keys at their defaults.</p>"
    every = table(("key", "value"), [(key, str(facts.config[key])) for key in keys], long=True)
    return section(
        "What was asked", told, f"<details><summary>every key, as it was resolved</summary>{every}</details>"
    )


def _again(facts: RunFacts) -> str:
    config, usual = facts.config, defaults()
    given = [key for key in usual if key in config and config[key] != usual[key] and key not in PLACES]
    command = " ".join(["fedmetanas search", *(shlex.quote(f"{key}={config[key]}") for key in given)])
    versions = ", ".join(f"{name} {number}" for name, number in (config.get("versions") or {}).items())
    rows = [
        ("commit", str(config.get("commit") or "unknown")),
        ("code", str(config.get("code_fingerprint"))),
        ("versions", versions),
        ("hardware", "; ".join(facts.summary.get("hardware") or ()) or "unknown"),
        ("partition", str(config.get("partition_hash"))),
        ("run folder", str(facts.path)),
    ]
    told = "<p>On processors of one kind, the same command gives the same weights, byte for byte.</p>"
    if config["dataset"] == "nodes":
        pairs = (f"{key}={config[key]!r}" for key in given)  # as plain `flwr run` takes them: text in quotes
        command = f"flwr run . CONNECTION --run-config {shlex.quote(' '.join(pairs))}"
        told = "<p>With the same nodes and their images.</p>"
    return section(
        "How to do it again", f"<pre>{escape(command)}</pre>", told, table(("what", "which"), rows, long=True)
    )
