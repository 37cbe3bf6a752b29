"""The ``fedmetanas`` command: ``setup``, ``search`` and ``compare``."""

import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedmetanas_core.comparison.engine import DEFAULT_RESULTS, compare_table
from fedmetanas_core.config import Config, defaults, describe_keys, text_keys
from fedmetanas_core.data.datasets import DATASETS
from fedmetanas_core.description import describe_experiment
from fedmetanas_core.errors import FedMetaNASError, RefusalError
from fedmetanas_core.launch import Outcome, app_directory, prepare_launch, start
from fedmetanas_core.methods.keys import unread
from fedmetanas_core.output.result import describe_result
from fedmetanas_core.run.flower_config import flower_home, install_profiles
from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.run.progress import Progress
from fedmetanas_core.runs import is_complete

COMPLETED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
BEFORE = "starting Ray and the clients"
AFTER = "measuring the found network on the test images and on every client"
USAGE = """usage:
  fedmetanas setup [--nodes N]                            add this project's connections to Flower's configuration
  fedmetanas search [--config FILE.toml] [KEY=VALUE ...]  search, and print the run folder
  fedmetanas search --help                                every key, its default and its meaning
  fedmetanas compare TABLE.toml [--results DIR]           run what a table lacks, and print its page's path
  fedmetanas --version

A first search needs no key: fedmetanas search"""


def entry_point() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code. Refusals are one line on stderr."""
    commands: dict[str, Callable[[Sequence[str]], int]] = {"setup": setup, "search": search, "compare": compare}
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
    changes = install_profiles(flower_home(), app_directory() / "flwr.toml", nodes)
    _say("\n".join(changes) if changes else f"{flower_home() / 'config.toml'} is up to date")
    _say(f"now: flwr run {app_directory()}")
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
        content = tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise RefusalError(f"--config {name!r}: {error.strerror}", "give a TOML file that exists") from error
    except ValueError as error:
        raise RefusalError(f"--config {name}: not TOML: {error}", "mend it") from error
    if "methods" in content:
        raise RefusalError(f"--config {name}: it is a table", f"write fedmetanas compare {name}")
    return content


def _toml_or_text(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError:  # no TOML, or an integer of more digits than Python converts
        return text
    return parsed["value"] if len(parsed) == 1 else text


def search(arguments: Sequence[str]) -> int:
    """One search on virtual clients, with a SuperLink of its own."""
    given = parse_pairs(arguments)
    if (path := Config.from_mapping(given).resume) and is_complete(Path(path).expanduser()):
        _say("fedmetanas: this run is complete")
        print(Path(path).expanduser().resolve(), flush=True)
        return COMPLETED
    launch = prepare_launch(given, Path.cwd())
    _set_up(launch.app)
    if ignored := unread(launch.config.method, given):
        _say(f"note: {', '.join(ignored)}: without effect in {launch.config.method}")
    _say(describe_experiment(launch.experiment))
    _say(f"run       {launch.folder.path}")
    rounds = int(launch.experiment.config.num_rounds)
    outcome = start(launch, lambda: Progress(rounds, before=BEFORE, after=AFTER), _say)
    if outcome.status == "completed":
        _say(describe_result(outcome.summary, outcome.seconds))
        print(launch.folder.path, flush=True)
        return COMPLETED
    _explain(outcome, launch.folder)
    return INTERRUPTED if outcome.status == "interrupted" else FAILED


def compare(arguments: Sequence[str]) -> int:
    """A whole table: methods x datasets x partitions x seeds."""
    words, results = list(arguments), str(DEFAULT_RESULTS)
    table = ""
    while words:
        word = words.pop(0)
        flag, has_value, value = word.partition("=")
        if flag == "--results":
            results = value if has_value else (words.pop(0) if words else "")
            if not results:
                raise RefusalError("compare: --results without a folder", "write --results DIR")
        elif word.startswith("-") or table:
            fix = "write fedmetanas compare TABLE.toml [--results DIR]"
            raise RefusalError(f"compare: unknown argument: {word!r}", fix)
        else:
            table = word
    if not table:
        raise RefusalError("compare: no table was given", "write fedmetanas compare conf/table-2-small.toml")
    outcome = compare_table(Path(table), Path.cwd() / results, Path.cwd(), _say)
    if outcome.written is not None:
        print(outcome.written, flush=True)
    return {"completed": COMPLETED, "failed": FAILED, "interrupted": INTERRUPTED}[outcome.status]


def _set_up(app: Path) -> None:
    """Add the connections for plain `flwr run`; the search does not need them, so a refusal is only a note."""
    try:
        lines = install_profiles(flower_home(), app / "flwr.toml", None)
    except RefusalError as refusal:
        lines = [f"note, for flwr run: {refusal}"]
    for line in lines:
        _say(line)


def _explain(outcome: Outcome, folder: RunFolder) -> None:
    failed = outcome.status == "failed"
    _say(f"fedmetanas: the run failed: {outcome.reason}" if failed else "fedmetanas: interrupted")
    if "heartbeat" in outcome.reason.lower():
        _say("Its process was killed, most likely for want of memory; fewer workers or a smaller network need less.")
    if outcome.log:
        _say("\n".join(["the end of its log:", *outcome.log]))
    _say(f"It goes on with: fedmetanas search resume={shlex.quote(str(folder.path))}")
