"""Every command in README.md and the documentation is known to be run by something, and names are those of the code."""

import re
from pathlib import Path

import pytest
from docs_commands import PAGES, PROVEN, ROOT, Command, Covered, Impossible, blocks, commands, lines_of, proof_of

from fedmetanas_core.commands.usage import COMMANDS
from fedmetanas_core.config import defaults, describe_keys

TOLD = [command for page in PAGES for command in commands(page)]
TEXT = {page: page.read_text() for page in PAGES}
BETWEEN = [re.sub(r"```.*?```", "", text, flags=re.DOTALL) for text in TEXT.values()]  # the blocks
INLINE = {span for text in BETWEEN for span in re.findall(r"`([^`\n]+)`", text)}
NAMED = re.compile(r"\b(?:benchmarks|conf|docker|examples|tests)/[\w/.-]*\w\.\w+")


@pytest.mark.parametrize("command", TOLD, ids=lambda command: f"{command.page}: {command.text}"[:100])
def test_every_command_is_proven(command: Command) -> None:
    assert proof_of(command) is not None, f"{command.page}: add a line for {command.text!r} to tests/docs_commands.py"


def test_commands_are_found_in_blocks_and_indented() -> None:
    assert len(TOLD) > 40
    texts = {command.text for command in TOLD}
    assert {"pip install -e . && fedmetanas search", "flwr run . --run-config dir_alpha=0.1"} <= texts
    assert "ray start --head --port=6379" in texts  # indented in a list
    assert not any("#" in text for text in texts)


def test_a_command_that_nobody_knows_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    indented = "    fedmetanas search \\\n        colour=blue   # so\n\n- one\n\n        fedmetanas fly\n"
    page.write_text(f"Text\n\n{indented}\n```bash\nflwr walk\n```\n")
    found = [line for kind, text in blocks(page) if kind == "bash" for line in lines_of(text)]
    assert found == ["fedmetanas search colour=blue", "fedmetanas fly", "flwr walk"]
    assert all(proof_of(Command("page", line)) is None for line in found)


def test_every_proof_is_there_and_needed() -> None:
    used = {id(proof_of(command)) for command in TOLD}
    for pattern, proof in PROVEN:
        assert id(proof) in used, f"no page has {pattern!r} any more"
        if isinstance(proof, Covered):
            path, _, name = proof.by.partition("::")
            source = (ROOT / path).read_text()
            assert not name or f"def {name}(" in source, proof.by
    assert len({proof.because for _, proof in PROVEN if isinstance(proof, Impossible)}) < 8


def test_files_that_are_named_are_there() -> None:
    named = {name for text in TEXT.values() for name in NAMED.findall(text)}
    assert len(named) > 30
    made = {"docker/keys/site-1.secret", "docker/keys/site-2.secret", "docker/certificates/server.key"}
    made |= {"docker/certificates/superlink.secret", "conf/NAME.toml"}
    assert [name for name in sorted(named - made) if not (ROOT / name).exists()] == []


def test_commands_and_keys_that_are_named_in_passing_are_those_of_the_code() -> None:
    typed = [span.split() for span in INLINE if span.startswith("fedmetanas ")]
    assert {words[1] for words in typed} <= {*COMMANDS, "--help", "--version"}
    pairs = {span for span in INLINE if re.fullmatch(r"[a-z]\w+=\S+(?: [a-z]\w+=\S+)*", span)}
    keys = {pair.split("=")[0] for span in pairs for pair in span.split()}
    assert len(keys) > 20
    assert keys <= set(defaults())


def test_the_readmes_keys_have_their_default_and_meaning() -> None:
    table = TEXT[ROOT / "README.md"].split("## Twelve keys")[1]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", table, re.MULTILINE)
    known = {key: (f"`{value}`" if value != "" else "(empty)", about) for key, value, about in describe_keys()}
    assert len(rows) == 12
    assert {key: (value, about) for key, value, about in rows}.items() <= known.items()
