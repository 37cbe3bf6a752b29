"""``fedmetanas search``: one search on virtual clients, with a SuperLink of its own."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from fedmetanas_core.commands.pairs import parse_pairs
from fedmetanas_core.commands.terminal import COMPLETED, FAILED, INTERRUPTED, say
from fedmetanas_core.config import Config
from fedmetanas_core.description import describe_experiment
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.launch import Outcome, prepare_launch, start
from fedmetanas_core.methods.keys import unread
from fedmetanas_core.output.result import describe_result
from fedmetanas_core.run.flower_config import flower_home, install_profiles
from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.run.progress import Progress
from fedmetanas_core.runs import is_complete

BEFORE = "starting Ray and the clients"
AFTER = "measuring the found network on the test images and on every client"


def run(arguments: Sequence[str]) -> int:
    """[--config FILE.toml] [KEY=VALUE ...]"""
    given = parse_pairs(arguments)
    if (path := Config.from_mapping(given).resume) and is_complete(Path(path).expanduser()):
        say("fedmetanas: this run is complete")
        print(Path(path).expanduser().resolve(), flush=True)
        return COMPLETED
    launch = prepare_launch(given, Path.cwd())
    _set_up(launch.app)
    if ignored := unread(launch.config.method, given):
        say(f"note: {', '.join(ignored)}: without effect in {launch.config.method}")
    say(describe_experiment(launch.experiment))
    say(f"run       {launch.folder.path}")
    rounds = int(launch.experiment.config.num_rounds)
    outcome = start(launch, lambda: Progress(rounds, before=BEFORE, after=AFTER), say)
    if outcome.status == "completed":
        say(describe_result(outcome.summary, outcome.seconds))
        print(launch.folder.path, flush=True)
        return COMPLETED
    _explain(outcome, launch.folder)
    return INTERRUPTED if outcome.status == "interrupted" else FAILED


def _set_up(app: Path) -> None:
    """Add the connections for plain `flwr run`; the search does not need them, so a refusal is only a note."""
    try:
        told = install_profiles(flower_home(), app / "flwr.toml", None)
    except RefusalError as refusal:
        told = f"note, for flwr run: {refusal}"
    if told:
        say(told)


def _explain(outcome: Outcome, folder: RunFolder) -> None:
    failed = outcome.status == "failed"
    say(f"fedmetanas: the run failed: {outcome.reason}" if failed else "fedmetanas: interrupted")
    if "heartbeat" in outcome.reason.lower():
        say("Its process was killed, most likely for want of memory; fewer workers or a smaller network need less.")
    if outcome.log:
        say("\n".join(["the end of its log:", *outcome.log]))
    say(f"It goes on with: fedmetanas search resume={shlex.quote(str(folder.path))}")
