"""Every file under conf/ is a configuration that can run, or a table of such."""

import tomllib
from pathlib import Path

import pytest

from fedmetanas_core.comparison.plan import read_table
from fedmetanas_core.config import Config

CONF = Path(__file__).resolve().parents[2] / "conf"
TABLES = [path for path in sorted(CONF.glob("*.toml")) if "methods" in tomllib.loads(path.read_text())]
PRESETS = [path for path in sorted(CONF.glob("*.toml")) if path not in TABLES]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_a_preset_has_only_known_keys_and_values_in_range(path: Path) -> None:
    config = Config.from_mapping(tomllib.loads(path.read_text()))
    assert config.dataset in ("mnist", "cifar10")


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_a_table_has_only_known_keys_and_values_in_range(path: Path) -> None:
    table = read_table(path)  # refuses what a run would refuse
    assert len(table.runs) == len(table.methods) * len(table.seeds) * len(table.datasets) * len(table.partitions)


def test_there_are_presets() -> None:
    assert {path.name for path in PRESETS if path.match("*-laptop.toml")} >= {
        "mnist-laptop.toml",
        "cifar10-laptop.toml",
    }
