"""Kills at random moments, of real processes: the short form of benchmarks/kill_and_resume.py."""

import importlib
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
kill_and_resume = importlib.import_module("benchmarks.kill_and_resume")
pytestmark = pytest.mark.e2e


def test_killed_and_resumed_searches_end_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "FLWR_HOME", str(tmp_path / "flower"))
    assert kill_and_resume.run(tmp_path, kills=3, seed=2)
