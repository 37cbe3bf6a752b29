"""Merging flwr.toml into a user's Flower configuration, and writing values as TOML."""

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedmetanas_core.errors import RefusalError
from fedmetanas_core.run.flower_config import flower_home, install_profiles
from fedmetanas_core.run.superlink import toml_table

PROFILES = Path(__file__).parents[2] / "flwr.toml"
GENERATED = (
    '[superlink]\ndefault = "local"\n\n[superlink.supergrid]\naddress = "api.flower.ai"\n\n'
    '[superlink.local]\naddress = ":local:"\n'
)


def connections(home: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((home / "config.toml").read_text())["superlink"]
    return table


def nodes(home: Path, name: str) -> int:
    count: int = connections(home)[name]["options"]["num-supernodes"]
    return count


def test_a_fresh_home_gets_everything(tmp_path: Path) -> None:
    home = tmp_path / "new" / "flwr"
    assert "added connection `local`" in install_profiles(home, PROFILES, None)
    assert connections(home) == tomllib.loads(PROFILES.read_text())["superlink"]
    assert list(home.iterdir()) == [home / "config.toml"]


def test_flowers_own_file_gets_the_options_and_keeps_the_rest(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(GENERATED)
    assert "`local` now has 100 virtual clients" in install_profiles(tmp_path, PROFILES, None)
    ours = tomllib.loads(PROFILES.read_text())["superlink"]
    assert connections(tmp_path) == ours | {"supergrid": {"address": "api.flower.ai"}}


@pytest.mark.parametrize("num_nodes", [None, 7])
@pytest.mark.parametrize("before", ["", GENERATED, GENERATED.replace("\n", "\r\n"), "# nothing but this"])
def test_a_second_call_changes_no_byte(tmp_path: Path, before: str, num_nodes: int | None) -> None:
    config = tmp_path / "config.toml"
    config.write_bytes(before.encode())
    install_profiles(tmp_path, PROFILES, num_nodes)
    once, stamp = config.read_bytes(), config.stat().st_mtime_ns
    assert install_profiles(tmp_path, PROFILES, num_nodes) == ""
    assert (config.read_bytes(), config.stat().st_mtime_ns) == (once, stamp)


def test_the_users_text_stays_as_it_is(tmp_path: Path) -> None:
    before = (
        "# mine\n[superlink]\ndefault = 'lab'   # do not touch\n\n[superlink.lab]\naddress = \"lab:8000\"\n"
        "\n[superlink.local] # home\naddress = ':local:' # here\n# after\n[other]\nlist = [\n  1,\n]"
    )
    (tmp_path / "config.toml").write_text(before)
    install_profiles(tmp_path, PROFILES, None)
    after = (tmp_path / "config.toml").read_text()
    kept = iter(after.splitlines())
    assert all(line in kept for line in before.splitlines()), "every line is still there, in order"
    assert connections(tmp_path)["default"] == "lab"
    assert nodes(tmp_path, "local") == 100


def test_nodes_changes_local_and_gpu_and_is_remembered(tmp_path: Path) -> None:
    install_profiles(tmp_path, PROFILES, 12)
    assert (nodes(tmp_path, "local"), nodes(tmp_path, "gpu")) == (12, 12)
    assert install_profiles(tmp_path, PROFILES, None) == ""
    assert nodes(tmp_path, "local") == 12
    assert install_profiles(tmp_path, PROFILES, 30).count("now has 30 virtual clients") == 2
    assert (nodes(tmp_path, "local"), nodes(tmp_path, "gpu")) == (30, 30)


def test_nodes_in_the_form_that_flower_writes_itself(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        GENERATED + "\n[superlink.local.options]\nnum-supernodes = 5\n"
        "\n[superlink.local.options.backend.client-resources]\nnum-cpus = 1\nnum-gpus = 0.0\n"
    )
    install_profiles(tmp_path, PROFILES, None)
    assert nodes(tmp_path, "local") == 5
    install_profiles(tmp_path, PROFILES, 9)
    assert nodes(tmp_path, "local") == 9


@pytest.mark.parametrize(
    "local",
    ['address = "10.0.0.1:8000"\n', 'address = ":local:"\noptions.num-supernodes = 100\noptions.verbose = true\n'],
)
def test_a_changed_local_is_kept_and_said(tmp_path: Path, local: str) -> None:
    (tmp_path / "config.toml").write_text(f'[superlink]\ndefault = "local"\n[superlink.local]\n{local}')
    assert "kept `local`" in install_profiles(tmp_path, PROFILES, 50)
    assert connections(tmp_path)["local"] == tomllib.loads(local)
    assert nodes(tmp_path, "gpu") == 50


def test_an_edited_edge_is_kept(tmp_path: Path) -> None:
    install_profiles(tmp_path, PROFILES, None)
    config = tmp_path / "config.toml"
    config.write_text(config.read_text().replace("superlink.example.org", "hospital.example"))
    before = config.read_bytes()
    assert "kept `edge`" in install_profiles(tmp_path, PROFILES, None)
    assert config.read_bytes() == before


@pytest.mark.parametrize("text", ["[superlink\n", "superlink = 3\n", 'superlink = {default = "x"}\n', b"\xff"])
def test_what_cannot_be_merged_is_refused_by_name(tmp_path: Path, text: str | bytes) -> None:
    config = tmp_path / "config.toml"
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = config.read_bytes()
    with pytest.raises(RefusalError, match=r"config\.toml"):
        install_profiles(tmp_path, PROFILES, None)
    assert config.read_bytes() == before


@pytest.mark.parametrize("number", [0, -3, True])
def test_a_senseless_node_count_is_refused(tmp_path: Path, number: int) -> None:
    with pytest.raises(RefusalError, match="--nodes"):
        install_profiles(tmp_path, PROFILES, number)
    assert list(tmp_path.iterdir()) == []


def test_a_linked_file_stays_a_link_and_permissions_stay(tmp_path: Path) -> None:
    real = tmp_path / "dotfiles.toml"
    real.write_text(GENERATED)
    real.chmod(0o600)
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").symlink_to(real)
    install_profiles(home, PROFILES, None)
    assert (home / "config.toml").is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600
    assert nodes(home, "gpu") == 100


def test_flower_home_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert flower_home() == tmp_path
    monkeypatch.delenv("FLWR_HOME")
    assert flower_home() == Path.home() / ".flwr"


def test_toml_values_come_back_the_same() -> None:
    values: dict[str, bool | int | float | str] = {
        "plain": "digits",
        "path": r"C:\new folder\x.npz",
        "quotes": "'single' \"double\" '''",
        "control": "\x00\x1f\x7f\t\r\n",
        "letters": "Zürich 北京 \U0001f338",
        "search.lr": 1e-05,
        "large": 1e16,
        "negative": -0.0,
        "yes": True,
        "int": -(2**63),
        "with = equals # and hash": "",
    }
    read = tomllib.loads(toml_table(values))
    assert read == values
    assert {key: type(value) for key, value in read.items()} == {key: type(value) for key, value in values.items()}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2**63, "\ud800", None, [1]])
def test_values_that_flower_cannot_carry_are_refused_by_key(value: Any) -> None:
    with pytest.raises(RefusalError, match="speed"):
        toml_table({"speed": value})
