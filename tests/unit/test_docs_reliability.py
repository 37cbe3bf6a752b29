"""The table of faults names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_that_is_named_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`tests/" in line]
    assert len(rows) > 15
    for row in rows:
        path = ""
        for file, name in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", row):
            path = file or path
            if not path:
                continue
            source = (ROOT / path).read_text()
            assert not name or f"def {name}(" in source, f"{path}::{name}"
    assert all((ROOT / script).is_file() for script in re.findall(r"`(benchmarks/\w+\.py)`", text))
