"""What stands under docker/: files that parse, scripts and images without known faults, one set of command lines."""

import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())


def program(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def test_the_image_and_the_scripts_have_no_known_faults() -> None:
    subprocess.run([program("hadolint"), DOCKER / "Dockerfile"], check=True)
    subprocess.run([program("shellcheck"), *sorted(DOCKER.glob("*.sh"))], check=True)


def test_every_service_is_checked_and_has_no_rights() -> None:
    assert list(COMPOSE["services"]) == [
        *("superlink", "serverapp", "supernode-1", "clientapp-1", "supernode-2", "clientapp-2")
    ]
    for service in COMPOSE["services"].values():
        assert service["healthcheck"]["test"][:2] == ["CMD", "healthy"]
        assert f"--health-server-address={service['healthcheck']['test'][2]}" in service["command"]
        assert service["restart"] == "unless-stopped"
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert set(service["secrets"]) <= set(COMPOSE["secrets"])
    assert "USER 49999:49999" in (DOCKER / "Dockerfile").read_text()
    extra = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
    assert set(extra["services"]) == {"clientapp-1", "clientapp-2"}


def test_nothing_is_insecure_but_what_a_client_says_to_its_own_supernode() -> None:
    for name, service in COMPOSE["services"].items():
        if "--insecure" in service["command"]:
            assert service["networks"] == [f"site-{name[-1]}"]
            assert COMPOSE["networks"][f"site-{name[-1]}"] == {"internal": True}
            assert f"--runtime-api-address=supernode-{name[-1]}:9100" in service["command"]
    assert sum("--insecure" in service["command"] for service in COMPOSE["services"].values()) == 2


def test_both_sites_differ_in_their_name_alone() -> None:
    for kind in ("supernode", "clientapp"):
        one, two = (yaml.safe_dump(COMPOSE["services"][f"{kind}-{number}"]) for number in (1, 2))
        assert one.replace("site-1", "site-2").replace("SITE_1", "SITE_2").replace("supernode-1", "supernode-2") == two


@pytest.mark.parametrize("kind", ["superlink", "serverapp", "supernode", "clientapp"])
def test_systemd_starts_what_the_containers_do(kind: str) -> None:
    unit = (DOCKER / "systemd" / f"fedmetanas-{kind}.service").read_text()
    (command,) = re.findall(r"^ExecStart=((?:.*\\\n)*.*)$", unit, re.MULTILINE)
    words = [word.strip('"') for word in command.replace("\\\n", " ").split()]
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    service = COMPOSE["services"][kind if kind in COMPOSE["services"] else f"{kind}-1"]
    assert Path(words[0]).name == service["command"][0]
    assert sorted(flags) == sorted(word.split("=")[0] for word in service["command"][1:])
    for name in service.get("environment", {}):
        assert re.search(rf"^Environment=(.* )?{name}=", unit, re.MULTILINE), name
    assert "Restart=always" in unit
    if words[0].endswith("superexec"):
        assert "Environment=PATH=/opt/fedmetanas/bin:" in unit, "it starts flwr-serverapp or flwr-clientapp by name"


def test_keys_and_certificates_are_made_for_their_owner_alone_and_kept(tmp_path: Path) -> None:
    def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([DOCKER / script, *words], capture_output=True, text=True, check=False)

    assert run("certificates.sh").returncode == run("node-key.sh", "x").returncode == 2
    assert run("certificates.sh", str(tmp_path), "superlink", "10.0.0.5", "::1").returncode == 0
    assert run("node-key.sh", str(tmp_path), "site-1").returncode == 0
    said = subprocess.run(
        ["openssl", "x509", "-in", tmp_path / "server.pem", "-noout", "-ext", "subjectAltName"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "DNS:superlink, IP Address:10.0.0.5, IP Address:0:0:0:0:0:0:0:1" in said
    for name in ("authority.key", "server.key", "superlink.secret", "site-1", "site-1.secret"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    kept = {name: (tmp_path / name).read_bytes() for name in ("ca.crt", "superlink.secret", "site-1")}
    assert run("certificates.sh", str(tmp_path), "other").returncode == 0
    assert run("node-key.sh", str(tmp_path), "site-1").returncode == 0
    assert kept == {name: (tmp_path / name).read_bytes() for name in kept}
    trusted = ["openssl", "verify", "-CAfile", tmp_path / "ca.crt", tmp_path / "server.pem"]
    subprocess.run(trusted, check=True, capture_output=True)
