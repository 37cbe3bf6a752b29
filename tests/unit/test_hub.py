"""What Flower and its hub ask of an app: a bundle without a warning, files that can be sent, a README with tags."""

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent
NOT_TRACKED = {"venv", "env", "data", "runs", "build", "dist", "certificates", "keys"}  # at the top; see .gitignore
APP: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the repository, as somebody has them who has built and run nothing yet."""
    folder = tmp_path_factory.mktemp("hub") / "fedmetanas"

    def unwanted(parent: str, names: list[str]) -> set[str]:
        made = {name for name in names if (name.startswith(".") and name != ".gitignore") or name.endswith(".egg-info")}
        return {"__pycache__"} | ((made | NOT_TRACKED) if Path(parent) == ROOT else set())

    shutil.copytree(ROOT, folder, ignore=unwanted)
    return folder


def test_flwr_build_packs_the_app_without_a_word_of_warning(clone: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "FLWR_HOME": str(tmp_path), "FLWR_DISABLE_UPDATE_CHECK": "1"}
    command = [str(SCRIPTS / "flwr"), "build", "--app", str(clone)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.glob("*.fab")
    assert done.stdout.strip().endswith(f"Successfully built {built.name}")
    assert len((done.stdout + done.stderr).strip().splitlines()) == 1  # what is missing would be a line
    name = APP["project"]["version"].replace(".", "-")
    assert built.name.startswith(f"{APP['tool']['flwr']['app']['publisher']}.fedmetanas.{name}.")
    with zipfile.ZipFile(built) as bundle:
        packed = {path for path in bundle.namelist() if not path.endswith(".py")}
        assert packed == {"pyproject.toml", "LICENSE", ".info/CONTENT"}
        packages = ("server_app", "client_app", "fedmetanas_core")
        sources = {path.relative_to(clone).as_posix() for name in packages for path in (clone / name).rglob("*.py")}
        assert {path for path in bundle.namelist() if path.endswith(".py")} == sources


def test_the_bundle_says_which_flower_it_is_for() -> None:
    from flwr.supercore.fab_format_version import normalize_and_validate_fab_format

    said = normalize_and_validate_fab_format(APP)
    assert (said.fab_format_version, said.flwr_version_min, said.flwr_version_target) == (1, "1.41.0", "1.41.0")


def test_flwr_app_publish_would_take_these_files(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything that the command checks before it sends: it has no dry run."""
    publish = importlib.import_module("flwr.cli.app_cmd.publish")
    publish._validate_app_name(clone.name, "directory")
    publish._validate_description(APP["project"]["description"])
    files = publish._collect_file_paths(clone)
    publish._validate_files(files)
    assert "Validation passed" in capsys.readouterr().out
    sent = {path.relative_to(clone).as_posix() for path in files}
    assert {"README.md", "LICENSE", "pyproject.toml", "flwr.toml", "server_app/app.py", "docs/tutorial.md"} <= sent


def test_the_readme_says_what_the_hub_sorts_by() -> None:
    _, front, text = (ROOT / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert set(facts) == {"tags", "dataset", "framework"}
    assert all(isinstance(word, str) for words in facts.values() for word in words)
    assert text.lstrip().startswith("# FedMetaNAS")
    # What the hub's guide asks a README to say.
    assert "100" in text.split("SuperNodes")[1][:60]
    assert "`data-path`" in text
