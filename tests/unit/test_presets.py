"""Every file under conf/ is a configuration that can run."""

import tomllib
from pathlib import Path

import pytest

from fedmetanas_core.config import Config

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.mark.parametrize("path", sorted(CONF.glob("*.toml")), ids=lambda path: path.name)
def test_a_preset_has_only_known_keys_and_values_in_range(path: Path) -> None:
    config = Config.from_mapping(tomllib.loads(path.read_text()))
    assert config.dataset in ("mnist", "cifar10")


def test_there_are_presets() -> None:
    assert {path.name for path in CONF.glob("*-laptop.toml")} >= {"mnist-laptop.toml", "cifar10-laptop.toml"}
