"""The house keeps its own rules: who imports whom, and what the project file says."""

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk

from fedmetanas_core.config import defaults

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {
    "fedmetanas_core": 0,
    "fedmetanas_core.errors": 0,
    "fedmetanas_core.seeds": 0,
    "fedmetanas_core.text": 0,
    "fedmetanas_core.space": 1,
    "fedmetanas_core.federation": 2,
    "fedmetanas_core.config": 2,
    "fedmetanas_core.config_values": 1,
    "fedmetanas_core.search": 3,
    "fedmetanas_core.run": 3,
    "fedmetanas_core.methods": 4,
    "fedmetanas_core.output": 4,
    "fedmetanas_core.data": 4,
    "fedmetanas_core.preflight": 5,
    "fedmetanas_core.description": 6,
    "fedmetanas_core.runs": 6,
    "fedmetanas_core.launch": 7,
    "fedmetanas_core.comparison": 8,
    "fedmetanas_core.estimate": 8,
    "fedmetanas_core.commands": 9,
    "fedmetanas_core.cli": 10,
    "client_app": 7,
    "server_app": 7,
}
SOURCES = [
    path
    for package in ("fedmetanas_core", "client_app", "server_app")
    for path in sorted((ROOT / package).rglob("*.py"))
]


def room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] not in ("fedmetanas_core", "client_app", "server_app"):
        return None
    return ".".join(parts[:2]) if parts[0] == "fedmetanas_core" and len(parts) > 1 else parts[0]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            # What is named may be a module or something in one; a room that does not exist has no floor of its own.
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_of(path))
def test_a_room_imports_only_from_lower_floors(path: Path) -> None:
    here = room_of(module_of(path))
    assert here in FLOORS, f"{here} has no floor"
    for imported in imports_of(path):
        there = room_of(imported)
        if there in FLOORS and there != here:
            assert FLOORS[there] < FLOORS[here], f"{here} imports {imported}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_of(path))
def test_only_wire_in_the_core_knows_flower(path: Path) -> None:
    module = module_of(path)
    if module.startswith("fedmetanas_core") and module != "fedmetanas_core.federation.wire":
        assert not {name.split(".")[0] for name in imports_of(path)} & {"flwr", "ray"}


def test_the_bundle_holds_the_app_and_no_environment_or_data_beside_it(tmp_path: Path) -> None:
    """Flower walks the whole folder, to a depth of ten, before it looks at fab-include: a virtual environment there,
    or a data folder, must be among the ignored ones."""
    project = tmp_path / "project"
    tracked = [path for path in SOURCES if "__pycache__" not in path.parts]
    for path in [*tracked, *(ROOT / name for name in ("pyproject.toml", ".gitignore", "README.md", "LICENSE"))]:
        target = project / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name in (".venv", "venv", "env", "data", "runs"):
        deep = project / name / "lib/python3.11/site-packages/a/b/c/d/e/f/g"
        deep.mkdir(parents=True)
        (deep / "module.py").write_text("")
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(project))) as bundle:
        bundled = {name for name in bundle.namelist() if name.endswith(".py")}
    assert bundled == {path.relative_to(ROOT).as_posix() for path in tracked}


def test_ci_runs_what_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = re.findall(r"^pip install .*&& pytest", (ROOT / "README.md").read_text(), re.MULTILINE)
    (command,) = commands
    install, test = command.split(" && ")
    assert install.replace("install", "install --quiet", 1) in script
    assert script.index(test) > script.index(install.replace("install", "install --quiet", 1))
    assert {"ruff check .", "ruff format --check .", "mypy"} <= set(script)


def test_floor_rule_sees_a_breach(tmp_path: Path) -> None:
    offender = tmp_path / "offender.py"
    offender.write_text("from fedmetanas_core.methods.registry import METHODS\n")
    assert {room_of(name) for name in imports_of(offender)} == {"fedmetanas_core.methods"}
    offender.write_text("from fedmetanas_core import methods\n")
    assert "fedmetanas_core.methods" in {room_of(name) for name in imports_of(offender)}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_key_is_in_the_project_file_with_its_default() -> None:
    declared = project()["tool"]["flwr"]["app"]["config"]
    assert declared == defaults()
    assert {key: type(value) for key, value in declared.items()} == {k: type(v) for k, v in defaults().items()}


def test_uv_is_told_of_every_dependency() -> None:
    table = project()["project"]
    wanted = [*table["dependencies"], *(name for extra in table["optional-dependencies"].values() for name in extra)]
    names = {name.split("[")[0].split(">")[0].split("=")[0].lower() for name in wanted}
    assert set(project()["tool"]["uv"]["exclude-dependencies"]) == names


def test_files_stay_short() -> None:
    long = {module_of(path): count for path in SOURCES if (count := len(path.read_text().splitlines())) > 400}
    assert not long


@pytest.mark.parametrize("module", ["space.network", "output.export", "output.predict", "commands.export"])
def test_a_found_network_loads_and_travels_without_flower_or_ray(module: str) -> None:
    """load_network is in the first."""
    foreign = {"flwr", "ray", "fedmetanas_core.federation.wire"}
    code = f"import sys, fedmetanas_core.{module}; print(*sorted({foreign} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_a_round_imports_nothing_that_takes_long_and_is_not_needed(tmp_path: Path) -> None:
    """Under process isolation every message waits for its process's imports."""
    program = f"""
import sys
from pathlib import Path
from local_grid import LocalGrid, run_all
from fedmetanas_core.config import Config
from fedmetanas_core.preflight import prepare_experiment
from fedmetanas_core.runs import begin_run
place = Path({str(tmp_path)!r})
config = Config.from_mapping(dict(num_rounds=1, num_clients=4, clients_per_round=2, init_channels=2, num_nodes=2))
run_all(begin_run(place, "run", prepare_experiment(config, place), place), LocalGrid(4))
known = {{"torch", "torch._dynamo", "sympy", "scipy", "sklearn", "torchvision", "PIL", "matplotlib"}}
print(*sorted(known & sys.modules.keys()))
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "torch"
