"""Pages that are made: the site's home page of README.md when it is built, the reference of the code by

    python docs/hooks.py

which writes docs/reference/. They are kept beside the others, so that links to them work in a clone.
"""

import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the sources beside this file, whether they are installed or not

from fedmetanas_core.commands.usage import COMMANDS, form  # noqa: E402
from fedmetanas_core.config import AUTO, Config, describe_keys  # noqa: E402
from fedmetanas_core.methods.keys import READ_BY  # noqa: E402

# What `auto` is shown for: name, side of the images, training images.
EXAMPLES = (
    ("digits", 8, 1437),
    ("a small set", 36, 1200),
    ("MNIST", 28, 60_000),
    ("CIFAR-10", 32, 50_000),
    ("photographs", 224, 10_000),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page that no file below docs/ holds."""
    files.append(File.generated(config, "index.md", content=home()))
    return files


def reference() -> dict[str, str]:
    """Pages made of the code, by their place below docs/."""
    return {"reference/commands.md": commands(), "reference/keys.md": keys()}


def home() -> str:
    """README.md without its front matter, its links as seen from docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return text.replace("](docs/", "](").replace("`docs/", "`").replace('src="docs/', 'src="')


def commands() -> str:
    """Every command: how it is written, and what it does."""
    parts = [
        "# Commands",
        "What `fedmetanas --help` says. `fedmetanas --version` tells the version.",
        "Options may stand anywhere after the command, as `--name VALUE` or `--name=VALUE`; `--config` of `search` "
        "comes first.",
    ]
    for command, (_, what) in COMMANDS.items():
        parts += [f"## {command}", f"```\n{form(command)}\n```", f"{what[0].upper()}{what[1:]}."]
    parts += [
        "## Exit codes",
        "| code | meaning |\n| --- | --- |\n| 0 | completed |\n| 1 | failed |\n| 2 | refused, before anything was "
        "started; one line on stderr says what and how to mend it |\n| 130 | interrupted, and saved |",
        "What a command has made is the last line on stdout; everything else goes to stderr.",
    ]
    return "\n\n".join(parts) + "\n"


def keys() -> str:
    """Every key of a run: default, meaning, who reads it; and what `auto` becomes."""
    rows = [
        f"| `{key}` | {shown(value)} | {about} | {', '.join(f'`{name}`' for name in READ_BY.get(key, ()))} |"
        for key, value, about in describe_keys()
    ]
    head = ["| key | default | meaning | read by |", "| --- | --- | --- | --- |"]
    parts = [
        "# Keys",
        "`fedmetanas search KEY=VALUE ...` takes these, and so do a TOML file after `--config` and `flwr run "
        "--run-config`. Where *read by* is empty, all methods do; a key that a method does not read changes nothing "
        "there, and the search says so.",
        "\n".join([*head, *rows]),
        "## What auto becomes",
        "By preset, size of the images and number of training images; `config.yaml` of a run has its own. Up to 200 "
        "rounds; the meaning above says what longer runs have instead.",
        resolved(),
    ]
    return "\n\n".join(parts) + "\n"


def shown(value: Any) -> str:
    """A default as a table cell."""
    return f"`{value}`" if value != "" else "(empty)"


def resolved() -> str:
    """What each key that is `auto` becomes for some images; what these do not decide is left out."""
    found = {name: Config().resolve(side, side, images) for name, side, images in EXAMPLES}
    titles = [f"{name}, {side}×{side}, {images:,} images" for name, side, images in EXAMPLES]
    rows = ["| key | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    for field in fields(Config):
        values = [getattr(config, field.name) for config in found.values()]
        if field.default == AUTO and AUTO not in values:
            rows.append(f"| `{field.name}` | " + " | ".join(shown(value) for value in values) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    for path, content in reference().items():
        page = ROOT / "docs" / path
        page.parent.mkdir(exist_ok=True)
        page.write_text(content, encoding="utf-8")
