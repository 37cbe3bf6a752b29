"""The command line: reading of arguments, and setup."""

import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from fedmetanas_core import cli, commands, launch
from fedmetanas_core.commands.options import read_options
from fedmetanas_core.commands.pairs import parse_pairs
from fedmetanas_core.commands.usage import COMMANDS
from fedmetanas_core.config import Config, describe_keys
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.output.result import describe_result

ROOT = Path(__file__).resolve().parents[2]


def test_values_are_toml_where_they_parse_and_text_otherwise() -> None:
    pairs = parse_pairs(["a=0.1", "b=3", "c=true", "d='x y'", "e=/a/b.npz", "f='/a/b.npz'", "g=x=y", "h="])
    assert pairs == {
        "a": 0.1,
        "b": 3,
        "c": True,
        "d": "x y",
        "e": "/a/b.npz",
        "f": "/a/b.npz",
        "g": "x=y",
        "h": "",
    }


def test_a_value_cannot_smuggle_in_a_second_key() -> None:
    assert parse_pairs(["a=1\nb = 2"]) == {"a": "1\nb = 2"}


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("digits", "did you mean dataset=digits?"),
        ("num_rounds", "write num_rounds=VALUE"),
        ("num_rounds = 4", "write num_rounds=VALUE, without dashes and spaces"),
        ("--num_rounds=4", "write num_rounds=VALUE, without dashes and spaces"),
        ("images.npz", "did you mean dataset=images.npz?"),
    ],
)
def test_what_is_no_pair_gets_a_hint(word: str, hint: str) -> None:
    with pytest.raises(RefusalError) as caught:
        parse_pairs([word])
    assert hint in str(caught.value)


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(RefusalError, match="seed: given twice"):
        parse_pairs(["seed=1", "seed=2"])


def test_a_configuration_file_comes_first_and_pairs_win(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("seed = 4\nnum_rounds = 9\n")
    assert parse_pairs(["--config", str(file), "seed=5"]) == {"seed": 5, "num_rounds": 9}
    with pytest.raises(RefusalError, match="before the pairs"):
        parse_pairs(["seed=5", "--config", str(file)])


@pytest.mark.parametrize(
    ("cores", "clients", "workers"), [(2, 5, 3), (2, 4, 2), (2, 1, 1), (4, 5, 5), (16, 5, 5), (1, 5, 1), (4, 10, 5)]
)
def test_workers_fit_cores_and_clients(cores: int, clients: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "available_cores", lambda: cores)
    config = Config.from_mapping({"clients_per_round": clients})
    assert launch.worker_count(config, on_gpu=False) == workers


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serach"]) == cli.REFUSED
    assert "did you mean search?" in capsys.readouterr().err


def test_help_names_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, default, about in describe_keys():
        assert any(line.split() == [name, *(str(default) or "(empty)").split(), *about.split()] for line in lines), name


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedmetanas {version('fedmetanas')}\n"


def test_setup_merges_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert cli.main(["setup", "--nodes", "12"]) == cli.COMPLETED
    written = (tmp_path / "config.toml").read_bytes()
    assert tomllib.loads(written.decode())["superlink"]["local"]["options"]["num-supernodes"] == 12
    assert cli.main(["setup"]) == cli.COMPLETED
    assert (tmp_path / "config.toml").read_bytes() == written
    assert "up to date" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--nodes", "0"], ["--nodes"], ["--nodes", "many"], ["now"]], ids=str)
def test_setup_refuses_nonsense(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["setup", *words]) == cli.REFUSED
    assert capsys.readouterr().err.count("\n") == 1


def test_the_result_names_what_pruning_cost_and_who_was_left_out() -> None:
    edges = [[["sep_conv_3x3", 0], ["skip_connect", 1]]]
    counts = {"kind": "pruning", "voluntary": 1, "forced": 20, "stranded": 3, "none": 4}
    summary = {
        "method": "fedmetanas",
        "genotype": {"normal": edges, "reduce": edges, "concat": [2]},
        "one_hot": True,
        "test_accuracy": 0.9,
        "test_accuracy_supernet": 0.9,
        "client_accuracy_mean": 0.8,
        "client_accuracy_std": 0.1,
        "client_accuracy_adapted_mean": 0.95,
        "client_accuracy": [0.7, 0.9],
        "client_accuracy_adapted": [0.95, 0.95],
        "client_accuracy_used": [0.7, 0.9],
        "pruning_events": [
            {"round": 3, "before": 0.5, "after": 0.4, "hard_darts_rule": 0.1, **counts},
            {"round": 9, "before": 0.75, "after": 0.7, "hard_darts_rule": 0.25, **counts},
        ],
        "parameters": 1234,
        "macs": 2_000_000,
        "uplink_bytes": 1000,
        "downlink_bytes": 2000,
        "updates_excluded": 0,
        "seconds": 40.0,
        "test_classes": [
            {"name": "dog", "images": 1, "right": 1},
            {"name": "a tabby\ncat of ours", "images": 6, "right": 3},
            {"name": "none", "images": 0, "right": 0},
            {"name": "goat", "images": 1, "right": 1},
        ],
    }
    text = describe_result(summary, 61.0)
    assert "56 operations and pairs of inputs in 2 events:" in text
    assert "took             1 min 1 s; the search itself 40 s" in text
    assert "0.7500 by always saying the same\n" in text
    assert "                 least: a tabby\\n… (0.50), dog (1.00), goat (1.00)\n" in text
    assert "2 below threshold, 40 over cap, 8 none, 6 with their edge" in text
    assert "round 9: 0.750 before, 0.700 after," in text
    assert "0.250 by DARTS' hard rule" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "one-hot" not in text
    assert "did not become one-hot" in describe_result({**summary, "one_hot": False}, 61.0)
    assert "as this method uses it" not in text
    own = describe_result({**summary, "client_accuracy_used": [0.95, 0.95]}, 61.0)
    assert "0.9500 adapted, as this method uses it" in own
    resumed = describe_result({**summary, "resumed_after": [4]}, 10.0)
    assert "took             10 s this time; the search itself 40 s in all" in resumed
    assert "excluded" not in text
    assert "excluded         7 updates" in describe_result({**summary, "updates_excluded": 7}, 61.0)
    assert "events" not in describe_result({**summary, "pruning_events": []}, 61.0)


def test_every_command_has_a_module_and_every_module_of_a_command_is_listed() -> None:
    shared = {"__init__", "networks", "options", "pairs", "terminal", "usage"}
    files = {path.stem for path in Path(commands.__file__).parent.glob("*.py")}
    assert files - shared == set(COMMANDS)
    for name in COMMANDS:
        assert callable(import_module(f"fedmetanas_core.commands.{name}").run)


def test_options_are_read_wherever_they_stand() -> None:
    words = ["a", "--nodes=3", "--quiet", "--results", "b", "c", "--", "--d"]
    plain, given = read_options("compare", words, with_value=["--nodes", "--results"], switches=["--quiet"])
    assert plain == ["a", "c", "--d"]
    assert given == {"--nodes": "3", "--quiet": "", "--results": "b"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--what"], "unknown option: '--what'"),
        (["--quiet=1"], "unknown option: '--quiet=1'"),
        (["--nodes", "1", "--nodes=2"], "--nodes was given twice"),
        (["--nodes="], "--nodes without a value"),
        (["--nodes"], "--nodes without a value"),
    ],
    ids=str,
)
def test_options_that_cannot_be_read_are_refused(words: list[str], named: str) -> None:
    with pytest.raises(RefusalError) as caught:
        read_options("setup", words, with_value=["--nodes"], switches=["--quiet"])
    assert named in str(caught.value)


@pytest.mark.parametrize("words", [[], ["a.toml", "b.toml"], ["--results"], ["a.toml", "--result", "x"]], ids=str)
def test_compare_refuses_nonsense(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *words]) == cli.REFUSED
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_the_command_starts_without_what_only_some_commands_need() -> None:
    """torch alone takes over a second."""
    program = (
        "import sys, fedmetanas_core.cli; print(*sorted({'torch', 'flwr', 'ray', 'numpy', 'rich'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
