"""A fingerprint of the code that runs, so that a server and its clients can tell whether they run the same."""

import hashlib
import subprocess
from functools import cache
from pathlib import Path

PACKAGES = ("server_app", "client_app", "fedmetanas_core")


@cache
def code_fingerprint(root: Path | None = None) -> str:
    """SHA-256 over the paths and contents of the Python files of this app, 16 hex digits.

    Flower's workers import whatever lies in the directory in which its SuperLink was first started; with two projects
    of the same package names that may be the other one's code, without any error.
    """
    base = root or Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((base / package).rglob("*.py")):
            digest.update(path.relative_to(base).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def code_commit(project: Path) -> str | None:
    """The git commit of the working tree at ``project``, with ``+`` if files differ from it.

    None outside a repository, and where ``project`` holds other code than runs here.
    """
    if code_fingerprint(project) != code_fingerprint():
        return None
    try:
        command = ["git", "-C", str(project), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
