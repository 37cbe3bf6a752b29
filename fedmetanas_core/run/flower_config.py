"""Merge this project's Flower connections into the user's Flower configuration, without disturbing the rest."""

from __future__ import annotations

import copy
import os
import re
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmetanas_core.errors import RefusalError

# What Flower itself writes for `local`: two virtual clients, so nobody's choice.
BARE_LOCAL = {"address": ":local:"}
# The node count is the user's to set on these two; a SuperLink elsewhere counts its own nodes.
SIMULATED = ("local", "gpu")

_HEADER = re.compile(r"^\s*\[")
_ADDRESS = re.compile(r"^\s*address\s*=")
_NODES = re.compile(r"^(\s*(?:options\s*\.\s*)?num-supernodes\s*=\s*)\d[\d_]*", re.MULTILINE)


def flower_home() -> Path:
    """Where Flower keeps its configuration: $FLWR_HOME, else `.flwr` in the home directory."""
    given = os.environ.get("FLWR_HOME")
    return Path(given).expanduser().resolve() if given else Path.home() / ".flwr"


def install_profiles(flower_home: Path, profiles: Path, num_nodes: int | None = None) -> str:
    """Merge the `[superlink.*]` tables of `profiles` into `<flower_home>/config.toml`; a line on what was done, if any.

    A second call with the same arguments changes no byte. The user's text is kept: connections are appended, the
    options of a bare `local` are inserted, and `num_nodes` (virtual clients of `local` and `gpu`) replaces only a
    number. A connection the user has changed otherwise stays as it is, and a line says so.

    Raises RefusalError if a file cannot be read or parsed, `num_nodes` is not a positive integer, or the user's file
    is written in a way that text can not be added to.
    """
    if num_nodes is not None and (isinstance(num_nodes, bool) or num_nodes < 1):
        raise RefusalError(f"--nodes {num_nodes} is not a number of clients", "give 1 or more")
    config = (flower_home / "config.toml").resolve()
    before = _read(config) if config.exists() else ""
    user, ours_text = _parse(before, config), _read(profiles)
    ours = _connections(_parse(ours_text, profiles), profiles)
    text, lines = before, []
    if "superlink" not in user:
        text = _append(text, '[superlink]\ndefault = "local"\n')
        lines.append("the default connection is `local`")
    current = _connections(user, config) if "superlink" in user else {}
    expected = {name: copy.deepcopy(current.get(name, value)) for name, value in ours.items()}
    for name, profile in ours.items():
        wanted = _with_nodes(profile, num_nodes) if name in SIMULATED else profile
        text, line, expected[name] = _merge(text, name, current.get(name), wanted, ours_text, num_nodes)
        lines += [line] if line else []
    if text != before:
        _verify(text, config, user, expected)
        _write_atomically(config, text)
    return f"{config}, for flwr run: {'; '.join(lines)}" if lines else ""


def _merge(
    text: str, name: str, present: Any, wanted: dict[str, Any], ours_text: str, num_nodes: int | None
) -> tuple[str, str, Any]:
    """One connection: (new text, what was done or "", the table that the new text must hold)."""
    nodes = _nodes(wanted)
    if present is None:
        return _append(text, _set_nodes(_block(ours_text, name), nodes)), f"added connection `{name}`", wanted
    if present == wanted:
        return text, "", present
    if name == "local" and present == BARE_LOCAL:
        start, end = _span(ours_text, name)
        options = [row for row in ours_text[start:end].splitlines()[1:] if not _ADDRESS.match(row)]
        start, end = _span(text, name)
        rows = text[start:end].rstrip("\r\n").splitlines()
        at = next((i for i, row in enumerate(rows) if _ADDRESS.match(row)), 0) + 1
        rows[at:at] = _set_nodes("\n".join(options), nodes).splitlines()
        return text[:start] + "\n".join(rows) + "\n" + text[end:], f"`local` now has {nodes} virtual clients", wanted
    if nodes is not None and _with_nodes(present, nodes) == wanted:
        if num_nodes is None:  # the count is from an earlier --nodes, or typed in: a choice either way
            return text, "", present
        start, end = _span(text, name)
        changed = text[:start] + _set_nodes(text[start:end], nodes) + text[end:]
        return changed, f"`{name}` now has {nodes} virtual clients instead of {_nodes(present)}", wanted
    return text, f"kept `{name}` as it is, because it was changed by hand", present


def _nodes(connection: Any) -> int | None:
    """The number of virtual clients of a connection, None where it does not say."""
    options = connection.get("options") if isinstance(connection, dict) else None
    nodes = options.get("num-supernodes") if isinstance(options, dict) else None
    return nodes if isinstance(nodes, int) else None


def _with_nodes(connection: Any, num_nodes: int | None) -> dict[str, Any]:
    """A copy with another node count; a connection without one is copied as it is."""
    changed: dict[str, Any] = copy.deepcopy(connection) if isinstance(connection, dict) else {}
    if num_nodes is not None and _nodes(changed) is not None:
        changed["options"]["num-supernodes"] = num_nodes
    return changed


def _set_nodes(text: str, num_nodes: int | None) -> str:
    return text if num_nodes is None else _NODES.sub(rf"\g<1>{num_nodes}", text)


def _span(text: str, name: str) -> tuple[int, int]:
    """Where connection `name` stands in the text, sub-tables included; (0, 0) where it has no header of its own."""
    header = re.compile(rf"^\s*\[\s*superlink\s*\.\s*[\"']?{re.escape(name)}[\"']?\s*[.\]]")
    start = end = position = 0
    inside = False
    for row in text.splitlines(keepends=True):
        if _HEADER.match(row):
            belongs = bool(header.match(row))
            start = position if belongs and not inside and end == 0 else start
            inside = belongs
        position += len(row)
        if inside and row.strip() and not row.lstrip().startswith("#"):
            end = position
    return start, end


def _block(text: str, name: str) -> str:
    """The text of one connection with the comment lines above its header."""
    start, end = _span(text, name)
    above = text[:start].splitlines(keepends=True)
    while above and above[-1].startswith("#"):
        start -= len(above.pop())
    return text[start:end]


def _append(text: str, block: str) -> str:
    separator = "" if not text else "\n" if text.endswith("\n") else "\n\n"
    return text + separator + block


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RefusalError(f"cannot read {path}: {error}", "repair the file or move it away") from error


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RefusalError(f"{path} is not valid TOML: {error}", "repair the file or move it away") from error


def _connections(parsed: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The connections by name: the tables inside `superlink`."""
    table = parsed.get("superlink")
    if not isinstance(table, dict):
        raise RefusalError(f"{path} has no table [superlink]", "repair the file or move it away")
    return {name: value for name, value in table.items() if isinstance(value, dict)}


def _verify(text: str, path: Path, user: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a text edit that went astray (inline tables, for one), before it reaches the user's file."""
    hint = "add the [superlink.*] tables of flwr.toml to it by hand, or move it away"
    try:
        after = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RefusalError(f"cannot add connections to {path} as it is written", hint) from error
    merged = {"superlink": {"default": "local"}} | copy.deepcopy(dict(user))
    merged["superlink"] |= expected
    if after != merged:
        raise RefusalError(f"cannot add connections to {path} as it is written", hint)


def _write_atomically(path: Path, text: str) -> None:
    """Write aside, sync, rename: Flower never sees half a file. Keeps the permissions of a file that is there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=".config-", suffix=".toml", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, path.stat().st_mode & 0o777 if path.exists() else 0o644)
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RefusalError(f"cannot write {path}: {error}", "check the permissions, or set FLWR_HOME") from error
