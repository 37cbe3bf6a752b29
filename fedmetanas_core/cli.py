"""The ``fedmetanas`` command: ``setup`` and ``search``."""

import os
import re
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

from fedmetanas_core.config import AUTO, Config, defaults, describe_keys, text_keys
from fedmetanas_core.data.datasets import DATASETS
from fedmetanas_core.errors import FedMetaNASError, RefusalError
from fedmetanas_core.output.words import genotype_in_words
from fedmetanas_core.preflight import Experiment, describe_experiment, pick_device, prepare_experiment
from fedmetanas_core.run.fingerprint import code_commit
from fedmetanas_core.run.flower_config import flower_home, install_profiles
from fedmetanas_core.run.folder import RunFolder, blank_summary, check_can_create, default_run_name, resolve_runs_dir
from fedmetanas_core.run.processes import available_cores
from fedmetanas_core.run.progress import Progress, describe, describe_bytes, describe_macs
from fedmetanas_core.run.superlink import Simulation
from fedmetanas_core.space.native import build

COMPLETED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
GPU_CLIENTS = 5  # virtual clients that share a GPU at a time
POLL_S = 0.5
LOG_LINES = 12
BEFORE = "starting Ray and the clients"
AFTER = "measuring the found network on the test images and on every client"
USAGE = """usage:
  fedmetanas setup [--nodes N]                            add this project's connections to Flower's configuration
  fedmetanas search [--config FILE.toml] [KEY=VALUE ...]  search, and print the run folder
  fedmetanas search --help                                every key, its default and its meaning
  fedmetanas --version

A first search needs no key: fedmetanas search"""

CAUSES = {  # of pruning, as the summary names them
    "voluntary": "below threshold",
    "forced": "over cap",
    "none": "none",
    "stranded": "with their edge",
}
NOT_ONE_HOT = [
    "                 The search did not become one-hot, so extraction cut away what still",
    "                 counted. More rounds, or prune_cap=linear, end with one network.",
]


def entry_point() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code. Refusals are one line on stderr."""
    commands: dict[str, Callable[[Sequence[str]], int]] = {"setup": setup, "search": search}
    name, *rest = arguments or [""]
    if name in ("-h", "--help", "help"):
        print(USAGE)
        return COMPLETED
    if name == "--version":
        print(f"fedmetanas {version('fedmetanas')}")
        return COMPLETED
    try:
        if not name:
            raise RefusalError("no command was given", "write fedmetanas search, or fedmetanas --help")
        if name not in commands:
            near = get_close_matches(name, commands, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(commands)}"
            raise RefusalError(f"{name}: unknown command", fix)
        if any(word in ("-h", "--help") for word in rest):
            print(f"{USAGE}\n\n{_keys()}" if name == "search" else USAGE)
            return COMPLETED
        return commands[name](rest)
    except RefusalError as refusal:
        _say(f"fedmetanas: {refusal}")
        return REFUSED
    except FedMetaNASError as error:
        _say(f"fedmetanas: {error}")
        return FAILED
    except KeyboardInterrupt:
        _say("fedmetanas: interrupted")
        return INTERRUPTED


def _keys() -> str:
    """A line for every key: name, default and meaning."""
    lines = [f"  {name:22} {str(default) or '(empty)':12} {about}" for name, default, about in describe_keys()]
    return "\n".join(["keys (default, meaning):", *lines])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _app_directory() -> Path:
    """The folder with pyproject.toml that Flower runs."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file() or not (root / "flwr.toml").is_file():
        raise RefusalError(
            f"{root} does not hold the Flower app", "install it from its source folder: pip install -e ."
        )
    return root


def setup(arguments: Sequence[str]) -> int:
    """Merge flwr.toml into the user's Flower configuration."""
    nodes: int | None = None
    words = list(arguments)
    while words:
        word = words.pop(0)
        flag, has_value, value = word.partition("=")
        if flag != "--nodes" or nodes is not None:
            what = "given twice" if flag == "--nodes" else "unknown argument"
            raise RefusalError(f"setup: {what}: {word!r}", "write fedmetanas setup [--nodes 100]")
        value = value if has_value else (words.pop(0) if words else "")
        if not re.fullmatch("[0-9]{1,9}", value) or int(value) < 1:
            raise RefusalError(f"setup: --nodes {value[:80]!r} is not a whole number above 0", "write --nodes 100")
        nodes = int(value)
    changes = install_profiles(flower_home(), _app_directory() / "flwr.toml", nodes)
    _say("\n".join(changes) if changes else f"{flower_home() / 'config.toml'} is up to date")
    _say(f"now: flwr run {_app_directory()}")
    return COMPLETED


def parse_pairs(arguments: Sequence[str]) -> dict[str, Any]:
    """[--config FILE.toml] KEY=VALUE ...: a value is TOML where it parses, otherwise the bare text."""
    words, values = list(arguments), {}
    if words and words[0].partition("=")[0] == "--config":
        flag = words.pop(0)
        name = flag.partition("=")[2] if "=" in flag else (words.pop(0) if words else "")
        values = _read_config_file(name)
    given: set[str] = set()
    text_only = text_keys()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip() or key != key.strip() or key.startswith("-"):
            raise RefusalError(f"{word!r} is not KEY=VALUE", _pair_hint(key))
        if key in given:
            raise RefusalError(f"{key}: given twice", "give it once")
        given.add(key)
        values[key] = text if key in text_only and not _toml_text(text) else _toml_or_text(text)
    return values


def _pair_hint(key: str) -> str:
    """What whoever wrote this instead of KEY=VALUE may have meant."""
    if key.startswith("--config"):
        return "put --config FILE.toml before the pairs"
    name = key.strip().lstrip("-")
    if name in defaults():
        return f"write {name}=VALUE, without dashes and spaces"
    if name in DATASETS or name.endswith(".npz") or Path(name).is_dir():
        return f"did you mean dataset={name}?"
    return "write KEY=VALUE, without spaces"


def _toml_text(text: str) -> bool:
    """Whether this is a TOML string in its quotes; run_name=12 and run_name=2026-01-01 are text all the same."""
    return isinstance(_toml_or_text(text), str)


def _read_config_file(name: str) -> dict[str, Any]:
    if not name:
        raise RefusalError("--config: no file was given", "write --config FILE.toml")
    try:
        return tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise RefusalError(f"--config {name!r}: {error.strerror}", "give a TOML file that exists") from error
    except ValueError as error:
        raise RefusalError(f"--config {name}: not TOML: {error}", "mend it") from error


def _toml_or_text(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError:  # no TOML, or an integer of more digits than Python converts
        return text
    return parsed["value"] if len(parsed) == 1 else text


def search(arguments: Sequence[str]) -> int:
    """One search on virtual clients, with a SuperLink of its own."""
    app, launch_directory = _app_directory(), Path.cwd()
    given = parse_pairs(arguments)
    config = Config.from_mapping(given)
    runs_dir = resolve_runs_dir(config.runs_dir, os.environ, launch_directory)
    run_name = config.run_name or default_run_name(config.method, config.dataset)
    check_can_create(runs_dir, run_name)  # before the data, which may have to be downloaded
    experiment = prepare_experiment(config, launch_directory)
    _set_up(app)
    _say(describe_experiment(experiment))
    _say(f"run       {runs_dir / run_name}")
    device = pick_device(config)
    build.prepare(_say, device)  # before anything is started
    resolved = experiment.config
    located = {"dataset": resolved.dataset, "data_root": resolved.data_root}
    on_gpu = device == "cuda"
    simulation = Simulation(
        app,
        {**given, **located, "run_name": run_name, "runs_dir": str(runs_dir)},
        num_nodes=config.num_clients,
        num_workers=_workers(config, on_gpu),
        launch_dir=launch_directory,
        gpus_per_client=1 / GPU_CLIENTS if on_gpu else 0.0,
        environment={"FEDMETANAS_COMMIT": code_commit(app) or ""},
    )
    return _run(simulation, RunFolder(runs_dir / run_name), experiment)


def _set_up(app: Path) -> None:
    """Add the connections for plain `flwr run`; the search does not need them, so a refusal is only a note."""
    try:
        lines = install_profiles(flower_home(), app / "flwr.toml", None)
    except RefusalError as refusal:
        lines = [f"note, for flwr run: {refusal}"]
    for line in lines:
        _say(line)


def _workers(config: Config, on_gpu: bool) -> int:
    if config.workers != AUTO:
        return int(config.workers)
    if on_gpu:
        return GPU_CLIENTS
    cores, clients = available_cores(), config.clients_per_round
    # One more than there are cores where the clients do not come out even: five clients on two cores then keep both
    # busy to the end, instead of leaving one idle while the fifth works alone.
    return min(clients, cores + (clients % cores > 0))


def _run(simulation: Simulation, folder: RunFolder, experiment: Experiment) -> int:
    """Start, follow, end; SIGTERM is taken as Ctrl-C."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    started = time.monotonic()
    status, reason = "failed", ""
    try:
        _say("starting Flower ...")
        with simulation:
            try:
                flower_status, details = _follow(simulation, folder, int(experiment.config.num_rounds))
                summary = (folder.read_summary() or {}) if _is_ours(simulation, folder) else {}
                if flower_status == "finished:completed" and summary.get("status") == "completed":
                    status = "completed"
                reason = str(summary.get("error") or details or flower_status)
            except FedMetaNASError as error:
                reason = str(error)
            if status != "completed" and _is_ours(simulation, folder):
                simulation.keep_log = folder.path / "run.log"
    except KeyboardInterrupt:
        status, reason = "interrupted", "interrupted by the user"
    finally:
        signal.signal(signal.SIGTERM, previous)
    if status == "completed":
        _say(describe_result(summary, time.monotonic() - started))
        print(folder.path, flush=True)
        return COMPLETED
    _mark(simulation, folder, experiment, status, reason)
    _explain(simulation, folder, status, reason)
    return INTERRUPTED if status == "interrupted" else FAILED


def _is_ours(simulation: Simulation, folder: RunFolder) -> bool:
    """Whether this launch made the folder; another one may have taken its name in the meantime."""
    return folder.config_file.is_file() and folder.read_config().get("launch") == simulation.marker


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _follow(simulation: Simulation, folder: RunFolder, rounds: int) -> tuple[str, str]:
    """Show the ledger as it grows until Flower says that the run is over; its final status."""
    shown = 0
    with Progress(rounds, before=BEFORE, after=AFTER) as progress:
        while True:
            status, details = simulation.status()
            rows = folder.read_rounds() if shown or _is_ours(simulation, folder) else []
            for row in rows[shown:]:
                progress.update(row)
            shown = len(rows)
            if status.startswith("finished"):
                return status, details
            time.sleep(POLL_S)


def _mark(simulation: Simulation, folder: RunFolder, experiment: Experiment, status: str, reason: str) -> None:
    """Say in the run folder how the run ended, where the server could not any more."""
    if not _is_ours(simulation, folder):
        return
    known = folder.read_summary() or {}
    if known.get("status") in ("completed", "failed"):
        return
    rows = folder.read_rounds()
    totals = {key: sum(row[key] for row in rows) for key in ("uplink_bytes", "downlink_bytes", "seconds")}
    totals.update({key: rows[-1][key] for key in ("parameters", "macs")} if rows else {})
    end = {"rounds": len(rows), "status": status, "error": reason}
    folder.write_summary({**blank_summary(experiment.config), **totals, **known, **end})


def _explain(simulation: Simulation, folder: RunFolder, status: str, reason: str) -> None:
    _say("fedmetanas: interrupted" if status == "interrupted" else f"fedmetanas: the run failed: {reason}")
    if "heartbeat" in reason.lower():
        _say("Its process was killed, most likely for want of memory; fewer workers or a smaller network need less.")
    if _is_ours(simulation, folder):
        _say(f"The last complete state is in {folder.path / 'checkpoint'}; this version cannot go on from it.")
    elif status == "failed":
        _say("\n".join(["the end of its log:", *simulation.log_tail(LOG_LINES)]))


def describe_result(summary: Mapping[str, Any], seconds: float) -> str:
    """What came out, in words."""
    lines = [
        "",
        genotype_in_words(summary["genotype"]),
        "",
        f"test accuracy    {summary['test_accuracy']:.4f} of the extracted network, without retraining",
        f"                 {summary['test_accuracy_supernet']:.4f} just before extraction",
        *([] if summary["one_hot"] else NOT_ONE_HOT),
        f"client accuracy  {summary['client_accuracy_mean']:.4f} ± {summary['client_accuracy_std']:.4f} over clients, "
        f"{summary['client_accuracy_adapted_mean']:.4f} adapted",
        *_describe_pruning(summary["pruning_events"]),
        f"network          {summary['parameters']:,} parameters, {describe_macs(summary['macs'])} an image",
        f"travelled        {describe_bytes(summary['uplink_bytes'])} up, "
        f"{describe_bytes(summary['downlink_bytes'])} down; took {describe(seconds)}",
    ]
    if summary["updates_excluded"]:
        lines.append(f"excluded         {summary['updates_excluded']} updates; rounds.jsonl says whose and why")
    return "\n".join(lines)


def _describe_pruning(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many choices went and why, and what the last event cost before anything could recover."""
    if not events:
        return []
    causes = {cause: sum(event[cause] for event in events) for cause in CAUSES}
    last = events[-1]
    return [
        f"pruning          {sum(causes.values())} choices in {len(events)} events:",
        "                 " + ", ".join(f"{causes[cause]} {words}" for cause, words in CAUSES.items()),
        f"                 the last, round {last['round']}: {last['before']:.3f} before, {last['after']:.3f} after,",
        f"                 {last['hard_darts_rule']:.3f} by DARTS' hard rule",
    ]
