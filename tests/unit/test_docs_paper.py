"""The page that maps the paper to the code names what is there."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from fedmetanas_core.config import PRESETS, defaults

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "paper.md").read_text()
ROOMS = {path.name for path in (ROOT / "fedmetanas_core").iterdir() if path.is_dir()} | {"server_app", "client_app"}
NAMES = sorted({name for name in re.findall(r"`(\w+(?:\.\w+)+)`", TEXT) if name.split(".")[0] in ROOMS})
CODE = set(re.findall(r"`([^`\n]+)`", TEXT))


def resolve(name: str) -> object:
    """What the longest part of the name that is a module has under the rest of it."""
    parts = name.split(".") if name.startswith(("server_app", "client_app")) else ["fedmetanas_core", *name.split(".")]
    for end in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            found = getattr(found, attribute)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there(name: str) -> None:
    assert resolve(name) is not None


def test_a_name_that_is_not_there_is_noticed() -> None:
    with pytest.raises(AttributeError):
        resolve("search.steps.Reptile")


def test_every_equation_and_line_has_its_place() -> None:
    assert len(NAMES) > 50
    assert {int(number) for number in re.findall(r"\((\d+)\)", TEXT)} >= set(range(1, 11))
    lines = re.search(r"## Algorithm 1\n(.*?)\n## ", TEXT, re.DOTALL)
    assert lines is not None
    numbers = {
        number for row in re.findall(r"^\| ([\d, to]+)", lines[1], re.MULTILINE) for number in re.findall(r"\d+", row)
    }
    assert {"1", "4", "5", "7", "8", "11", "12", "13", "16", "17", "18", "19", "21"} <= numbers
    for section in ("4.1", "4.2", "4.3", "4.4", "4.5", "5"):
        assert f"## Section {section}:" in TEXT


def test_every_key_is_one_and_every_setting_is_a_presets_or_a_choice() -> None:
    settings = {tuple(code.split("=")) for code in CODE if re.fullmatch(r"\w+=\w+", code)}
    assert {key for key, _ in settings} <= set(defaults())
    literal = PRESETS["paper_literal"]
    written = re.findall(r"`(\w+)=(\w+)`[^|\n]*\|$", TEXT, re.MULTILINE)
    for key, value in (pair for pair in written if pair[0] in literal):
        assert value in (literal[key], PRESETS["recommended"][key])
