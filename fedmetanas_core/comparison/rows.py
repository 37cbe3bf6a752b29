"""One finished run as a small JSON file: its figures and its curve, with where and by what it was made."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from fedmetanas_core.comparison.plan import PlannedRun
from fedmetanas_core.config import defaults
from fedmetanas_core.errors import RunFailedError
from fedmetanas_core.run.files import spread_json, write_atomically
from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.search.pruning import PruneReport

LAST_SHARE = 0.2  # of the rounds, at most LAST_ROUNDS: the end of a run, over which its fluctuation is taken
LAST_ROUNDS = 100
BANDWIDTH_MBIT = 100  # of each client, for the simulated parallel time
FIGURES = (
    *("test_accuracy", "test_accuracy_supernet", "test_accuracy_recalibrated", "max_logit_difference"),
    *("client_accuracy_mean", "client_accuracy_std", "client_accuracy_adapted_mean", "client_accuracy_adapted_std"),
    *("client_accuracy_used_mean", "client_accuracy_used_std"),
    *("unseen_client_accuracy_mean", "unseen_client_accuracy_adapted_mean", "unseen_client_accuracy_used_mean"),
    *("parameters", "macs", "personal_parameters", "personal_macs", "adaptation_seconds"),
    *("seconds", "peak_memory_bytes", "updates_excluded"),
)

EVENT = ("round", "kind", "before", "after", "recalibrated", "hard_darts_rule")
# Settings that change no figure.
WHERE_IT_RUNS = ("run_name", "runs_dir", "resume", "workers", "data_root", "ray_address", "track")

Row = dict[str, Any]


def row_of(run: PlannedRun, folder: RunFolder) -> Row:
    """What a completed run has to say: its ``keys`` as the table gives them, the ``settings`` that came of them.

    Bytes are those of the rounds; what the measurements at the end send is no part of a method.
    """
    summary, config, rounds = folder.read_summary() or {}, folder.read_config(), folder.rounds.read()
    curve, every = _curve(rounds), int(config["evaluate_every"])
    # Prune events are evaluated as well; only the regular evaluations make a curve that compares with another.
    regular = [at for at in curve if at["accuracy"] is not None and (at["round"] % every == 0 or at is curve[-1])]
    end = len(rounds) - min(LAST_ROUNDS, LAST_SHARE * len(rounds))
    last = [at["accuracy"] for at in regular if at["round"] > end and at["stage"] == curve[-1]["stage"]]
    return {
        "method": run.method,
        "dataset": run.dataset.name,
        "partition": run.partition.name,
        "seed": run.seed,
        "fingerprint": run.fingerprint,
        "keys": run.keys,
        "settings": {key: config.get(key) for key in defaults() if key not in WHERE_IT_RUNS},
        "rounds": len(rounds),
        **{name: summary.get(name) for name in FIGURES},
        "uplink_bytes": sum(row["uplink_bytes"] for row in rounds),
        "downlink_bytes": sum(row["downlink_bytes"] for row in rounds),
        "test_accuracy_last": fmean(last) if last else None,
        "round_std": pstdev(last) if len(last) > 1 else None,
        "compute_seconds": curve[-1]["compute_seconds"],
        "parallel_seconds": curve[-1]["parallel_seconds"],
        "events": [
            {key: event.get(key) for key in (*EVENT, *(asdict(PruneReport()) if event["kind"] == "pruning" else ()))}
            for event in summary.get("pruning_events", [])
        ],
        "curve": regular,
        "commit": config.get("commit"),
        "versions": config.get("versions"),
        "device": config.get("device"),
        "hardware": "; ".join(summary.get("hardware") or ()) or None,
        "partition_hash": config.get("partition_hash"),
    }


def _curve(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """After each round: accuracy, where it was measured, and what had been spent so far."""
    compute = parallel = travelled = 0.0
    curve = []
    for row in rounds:
        exchanged = row["uplink_bytes"] + row["downlink_bytes"]
        compute += row["compute_seconds"]
        parallel += row["longest_compute_seconds"]
        parallel += 8e-6 * exchanged / max(1, len(row["clients"])) / BANDWIDTH_MBIT
        travelled += exchanged
        curve.append(
            {
                "round": row["round"],
                "stage": row["stage"],
                "accuracy": row["test_accuracy"],
                "compute_seconds": round(compute, 3),
                "parallel_seconds": round(parallel, 3),
                "bytes": int(travelled),
            }
        )
    return curve


def save_row(directory: Path, run: PlannedRun, row: Mapping[str, Any]) -> None:
    """Write a row, in one piece."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / f"{run.name}.json", (spread_json(row) + "\n").encode())


def load_row(directory: Path, run: PlannedRun) -> Row | None:
    """The row of this very run; None if there is none, or it was given other settings. RunFailedError if damaged."""
    path = directory / f"{run.name}.json"
    if not path.is_file():
        return None
    try:
        row: Row = json.loads(path.read_bytes())
        return row if row["fingerprint"] == run.fingerprint else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFailedError(f"{path} is damaged ({error}); remove it, and its run is made again") from error
