"""The report of one run: what was asked, what came out, why, what it cost, and how to do it again."""

import shlex
from collections import Counter
from collections.abc import Mapping
from html import escape
from typing import Any

from fedmetanas_core.config import defaults
from fedmetanas_core.output.drawing import draw_genotype
from fedmetanas_core.output.report import sections
from fedmetanas_core.output.report.document import PLACES, page, percent, section, table, travelled
from fedmetanas_core.output.report.facts import RunFacts
from fedmetanas_core.output.result import guessing
from fedmetanas_core.output.words import genotype_in_words
from fedmetanas_core.text import describe, describe_bytes, describe_macs

WORDS = {
    "adapted": "a copy of the network after a few training steps on one client's own images. Its accuracy is measured "
    "on images which that client kept out, mostly of the few classes that it has; the network in the run folder is not "
    "changed by it.",
    "alphas": "the numbers that the search learns: one for each operation on each edge of a cell, and one for each "
    "pair of inputs of a node. The larger, the more that choice counts.",
    "cell, node, edge": "the network is a chain of cells of two kinds; reduction cells halve the side of their images. "
    "A node adds up what comes to it along its edges, from the two cells before, c(k-2) and c(k-1), or from earlier "
    "nodes of its cell.",
    "Dirichlet distribution": "how classes are shared out among virtual clients. With a small number most clients have "
    "few classes, with a large one all have about the same.",
    "DARTS' rule": "what other searches do at their end: keep the strongest choices at once and drop the rest.",
    "extraction": "cutting the network that was found out of the supernet, with its weights.",
    "none, over cap, below threshold, with their edge": "why a choice was pruned: the operation that does nothing goes "
    "first; more were alive than the round allows; its share was too small; its inputs were pruned.",
    "one-hot": "one operation is left on each edge and one pair of inputs at each node, so that supernet and network "
    "compute the same. The rounds from then on train what was found.",
    "support and query loss": "on the images that a client adapts with, and on others of its own that show what the "
    "adaptation is good for.",
    "sep_conv, dil_conv, pool, skip_connect": "operations of an edge: convolutions, separable or dilated, of the given "
    "size; the largest or the mean of the neighbouring pixels; nothing but passing on.",
    "statistics": "means and variances by which the network brings what its layers put out to one scale.",
    "supernet": "the network that has all candidate operations at once, weighed by the alphas.",
}
MOST_EXCLUSIONS = 200  # rows of a table that anybody reads
Row = Mapping[str, Any]


def report(facts: RunFacts) -> str:
    """The page, whole."""
    parts = [
        _head(facts),
        _cells(facts),
        sections.classes(facts),
        sections.curves(facts),
        sections.alphas(facts),
        sections.pruning(facts),
        sections.clients(facts),
        sections.costs(facts),
        _exclusions(facts),
        _asked(facts),
        _again(facts),
        _words(),
    ]
    return page(f"{facts.name}: FedMetaNAS", "".join(parts))


def _head(facts: RunFacts) -> str:
    summary, config = facts.summary, facts.config
    state = str(summary.get("status") or "running")
    dataset = str(config["dataset"]).rstrip("/").rsplit("/", 1)[-1]
    asked = (
        f"{config['num_clients']} clients, {config['clients_per_round']} a round, {config['num_rounds']} rounds of "
        f"{config['local_epochs']} epochs; {_partition_in_words(config)}; seed {config['seed']}"
    )
    told = "".join(f"<p>{escape(line)}</p>" for line in (asked, _images_in_words(facts)) if line)
    error = f'<p class="state failed">{escape(str(summary["error"]))}</p>' if summary.get("error") else ""
    return (
        f'<header><p class="soft">FedMetaNAS report</p><h1>{escape(str(config["method"]))} on {escape(dataset)} '
        f'<span class="state {escape(state)}">{escape(state)}</span></h1>{told}{error}'
        f'<div class="cards">{"".join(_card(*each) for each in _figures(facts))}</div></header>'
    )


def _images_in_words(facts: RunFacts) -> str:
    """Size, classes and number of the images, as far as the run folder knows."""
    parts = ["×".join(map(str, facts.image_shape))] if facts.image_shape else []
    parts += [f"{len(facts.class_names)} classes"] if facts.class_names else []
    tested = sum(each["images"] for each in facts.summary.get("test_classes") or [])
    parts += [f"{tested:,} test images"] if tested else []
    return f"Images: {', '.join(parts)}" if parts else ""


def _partition_in_words(config: Row) -> str:
    kind = config["partition"]
    if kind == "dirichlet":
        return f"classes by a Dirichlet distribution of {config['dir_alpha']}"
    return f"{config['classes_per_client']} classes a client" if kind == "label_skew" else "classes evenly"


def _card(name: str, value: str, note: str = "") -> str:
    return f'<div class="card"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>'


def _figures(facts: RunFacts) -> list[tuple[str, str, str]]:
    summary, rounds = facts.summary, facts.rounds
    before, classes = summary.get("test_accuracy_supernet"), summary.get("test_classes")
    notes = [f"{percent(before)} before extraction"] if before is not None else []
    notes += [f"{percent(guessing(classes))} by always saying the same"] if classes else []
    spread = summary.get("client_accuracy_std")
    cards = [
        ("test accuracy", percent(summary.get("test_accuracy")), "; ".join(notes)),
        (
            "clients' accuracy",
            percent(summary.get("client_accuracy_mean")),
            "" if spread is None else f"± {100 * spread:.1f} between clients",
        ),
        (
            "after adaptation",
            percent(summary.get("client_accuracy_adapted_mean")),
            "of each client's own copy, on images of its own",
        ),
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
    up, down = travelled(facts)
    cards.append(("sent", describe_bytes(up + down), f"{describe_bytes(up)} up, {describe_bytes(down)} down"))
    seconds = summary.get("seconds") or sum(row["seconds"] for row in rounds)
    compute = sum(row["compute_seconds"] for row in rounds)
    beside = f"without Flower's start; clients, side by side, {describe(compute)} in all"
    cards.append(("took", describe(seconds), beside))
    return cards


def _cells(facts: RunFacts) -> str:
    genotype = facts.summary.get("genotype")
    if not genotype:
        return ""
    words = f"<details><summary>in words</summary><pre>{escape(genotype_in_words(genotype))}</pre></details>"
    return section("The network that was found", f'<div class="wide">{draw_genotype(genotype)}</div>', words)


def _exclusions(facts: RunFacts) -> str:
    excluded = [(row["round"], each) for row in facts.rounds for each in row["excluded"]]
    notes = [(row["round"], each) for row in facts.rounds for each in row["notes"]]
    missing = facts.summary.get("clients_not_evaluated") or []
    parts = []
    if excluded:
        reasons = Counter(str(each["reason"]) for _, each in excluded).most_common()
        parts.append(f"<p>Answers that were not averaged: {len(excluded)}.</p>")
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


def _words() -> str:
    told = "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in WORDS.items())
    return section("Words", f"<details><summary>what they mean here</summary><dl>{told}</dl></details>")
