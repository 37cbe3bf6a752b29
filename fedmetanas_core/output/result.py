"""What a run came to, in words for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedmetanas_core.output.words import genotype_in_words
from fedmetanas_core.text import describe, describe_bytes, describe_macs, printable

CAUSES = {  # of pruning, as the summary names them
    "voluntary": "below threshold",
    "forced": "over cap",
    "none": "none",
    "stranded": "with their edge",
}
FEW, LONGEST = 3, 10  # classes that are named, and letters of their names: lines stay within 80
NOT_ONE_HOT = [
    "                 The search did not become one-hot, so extraction cut away what still",
    "                 counted. More rounds, or prune_cap=linear, end with one network.",
]


def describe_result(summary: Mapping[str, Any], seconds: float) -> str:
    """Network, accuracies, pruning, costs."""
    genotype, client = summary["genotype"], summary["client_accuracy_mean"]
    lines = [
        "",
        *([genotype_in_words(genotype), ""] if genotype is not None else []),
        *_describe_accuracy(summary),
        f"client accuracy  {client:.4f} ± {summary['client_accuracy_std']:.4f} over clients, "
        f"{summary['client_accuracy_adapted_mean']:.4f} adapted{_used(summary)}",
        *_describe_unseen(summary),
        *_describe_pruning(summary["pruning_events"]),
        _describe_network(summary),
        *_describe_budget(summary),
        f"travelled        {describe_bytes(summary['uplink_bytes'])} up, "
        f"{describe_bytes(summary['downlink_bytes'])} down",
        f"took             {_describe_time(summary, seconds)}",
    ]
    if summary["updates_excluded"]:
        lines.append(f"excluded         {summary['updates_excluded']} updates; rounds.jsonl says whose and why")
    return "\n".join(lines)


def _describe_time(summary: Mapping[str, Any], seconds: float) -> str:
    """Of the command, and of the rounds and measurements alone, which a resumed run adds up."""
    this_time, in_all = (" this time", " in all") if summary.get("resumed_after") else ("", "")
    return f"{describe(seconds)}{this_time}; the search itself {describe(summary['seconds'])}{in_all}"


def _used(summary: Mapping[str, Any]) -> str:
    """Which of the two accuracies is what the method is about, where that is not plain."""
    plain, adapted, used = (summary[f"client_accuracy{which}"] for which in ("", "_adapted", "_used"))
    return ", as this method uses it" if used == adapted != plain else ""


def _describe_accuracy(summary: Mapping[str, Any]) -> list[str]:
    accuracy, before = summary["test_accuracy"], summary["test_accuracy_supernet"]
    if before is None:
        what = "of the model" if summary["test_accuracy_last_evaluations"] is not None else "mean of the clients' own"
        return [f"test accuracy    {accuracy:.4f} {what}", *_describe_classes(summary)]
    lossless = "" if summary["one_hot"] or accuracy == before else ", which still mixed operations"
    return [
        f"test accuracy    {accuracy:.4f} of the extracted network",
        f"                 {before:.4f} just before extraction{lossless}",
        *_describe_classes(summary),
        *(NOT_ONE_HOT if summary["method"] == "fedmetanas" and not summary["one_hot"] else []),
    ]


def guessing(classes: Sequence[Mapping[str, Any]]) -> float:
    """The accuracy of saying the same of every image: the share of the largest of the summary's ``test_classes``."""
    images = [int(each["images"]) for each in classes]
    return max(images) / sum(images)


def weakest(classes: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """The few classes that are recognised least, and the share of their images that is."""
    shares = [(str(each["name"]), each["right"] / each["images"]) for each in classes if each["images"]]
    return sorted(shares, key=lambda each: each[1])[:FEW]


def _describe_classes(summary: Mapping[str, Any]) -> list[str]:
    classes = summary.get("test_classes") or []
    if not classes:
        return []
    least = ", ".join(f"{_short(name)} ({share:.2f})" for name, share in weakest(classes))
    return [
        f"                 {guessing(classes):.4f} by always saying the same",
        f"                 least: {least}",
    ]


def _short(name: str) -> str:
    """A class name, which may be any folder's, for a line of a terminal; no letter's escape is cut."""
    shown = printable(name)
    if len(shown) <= LONGEST:
        return shown
    kept = ""
    for letter in map(printable, name):
        if len(kept) + len(letter) >= LONGEST:
            break
        kept += letter
    return f"{kept}…"


def _describe_network(summary: Mapping[str, Any]) -> str:
    """What an image costs; where every client has a network of its own, the mean of theirs."""
    own = summary.get("personal_parameters") is not None
    parameters, macs = (summary[f"{'personal_' if own else ''}{figure}"] for figure in ("parameters", "macs"))
    whose = ", mean of the clients' own" if own else ""
    return f"network          {parameters:,.0f} parameters, {describe_macs(macs)} an image{whose}"


def _describe_budget(summary: Mapping[str, Any]) -> list[str]:
    """What was asked of the network and what it costs; for what its choices cost, see the last prune event."""
    lines = [
        f"budget           {key}={entry['limit']:,.6g}: {entry['spent']:,.6g}"
        f"{'' if entry['met'] else ', NOT met: nothing that is left is cheaper'}"
        for key, entry in (summary.get("budget") or {}).items()
    ]
    cuts = [event for event in summary["pruning_events"] if event.get("cut_freely") is not None]
    if lines and cuts:
        last = cuts[-1]
        lines.append(
            f"                 at round {last['round']}: {last['cut_freely']:.3f} cut out freely, "
            f"{last['cut_within_budget']:.3f} within the budget"
        )
    return lines


def _describe_unseen(summary: Mapping[str, Any]) -> list[str]:
    if "unseen_client_accuracy_mean" not in summary:
        return []
    plain, adapted = (summary[f"unseen_client_accuracy{suffix}_mean"] for suffix in ("", "_adapted"))
    return [f"                 {plain:.4f} of clients that never trained, {adapted:.4f} adapted"]


def _describe_pruning(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many choices went and why, and what the last event cost before anything could recover."""
    prunes = [event for event in events if event["kind"] == "pruning"]
    lines = []
    if prunes:
        causes = {cause: sum(event[cause] for event in prunes) for cause in CAUSES}
        last = prunes[-1]
        lines = [
            f"pruning          {sum(causes.values())} operations and pairs of inputs in {len(prunes)} events:",
            "                 " + ", ".join(f"{causes[cause]} {words}" for cause, words in CAUSES.items()),
        ]
        if last["before"] is not None:
            lines += [
                f"                 the last, round {last['round']}: {last['before']:.3f} before, "
                f"{last['after']:.3f} after,",
                f"                 {last['hard_darts_rule']:.3f} by DARTS' hard rule",
            ]
    for event in events:
        if event["kind"] == "derivation":
            lines.append(
                f"genotype         round {event['round']}: {event['before']:.3f} before cutting it out, "
                f"{event['after']:.3f} after"
            )
    return lines
