"""Which commit a run is said to have used: that of the code that runs, or none."""

import shutil
import subprocess
from pathlib import Path

import pytest

from fedmetanas_core.run.fingerprint import PACKAGES, code_commit, code_fingerprint

ROOT = Path(__file__).resolve().parents[2]


def git(directory: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", "-C", str(directory), *who, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with this very code in one commit."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "all")
    return tmp_path


def test_the_commit_of_the_same_code_is_named(project: Path) -> None:
    assert code_commit(project) == git(project, "rev-parse", "HEAD")
    (project / "server_app" / "__init__.py").chmod(0o755)
    assert code_commit(project) == git(project, "rev-parse", "HEAD") + "+"


def test_another_projects_commit_is_not_ours(project: Path) -> None:
    (project / "server_app" / "other.py").write_text("")
    code_fingerprint.cache_clear()
    assert code_commit(project) is None


def test_no_repository_no_commit(project: Path) -> None:
    shutil.rmtree(project / ".git")
    assert code_commit(project) is None
