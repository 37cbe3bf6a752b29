"""Which keys have a say in which method: the table in the documentation, and the recipes themselves."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from helpers import small_spec

from fedmetanas_core.config import Config
from fedmetanas_core.methods.keys import READ_BY, unread
from fedmetanas_core.methods.registry import METHODS, make_method

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text()
RESOLVED = replace(Config().resolve(8, 8, 1437), max_macs=10**9)  # some keys say how budgets are kept
LIMITS = {field.name: field.metadata for field in fields(Config)}


def recipe(method: str, config: Config) -> str:
    """The method's recipe in words, without addresses."""
    found = make_method(replace(config, method=method), small_spec(num_cells=4)).recipe
    return re.sub(r" at 0x[0-9a-f]+", "", repr(found))


def others(key: str) -> list[object]:
    """Valid values of this key that are not the resolved one."""
    value = getattr(RESOLVED, key)
    if choices := LIMITS[key].get("choices"):
        return [choice for choice in choices if choice not in (value, "auto")]
    return [value + 1] if LIMITS[key]["kind"] is int else [value / 2 or 0.1]


@pytest.mark.parametrize("key", READ_BY)
def test_a_key_changes_the_methods_that_read_it(key: str) -> None:
    changed = [replace(RESOLVED, **{key: value}) for value in others(key)]  # type: ignore[arg-type]
    for method in READ_BY[key]:
        assert any(recipe(method, config) != recipe(method, RESOLVED) for config in changed), method


def test_the_documentation_has_the_same_table() -> None:
    (table,) = re.findall(r"\| keys \| methods \|\n.*\n((?:\|.*\n)+)", DOCS)
    found = {}
    for line in table.splitlines():
        keys, methods = (re.findall(r"`(\w+)`", cell) for cell in line.strip("|").split("|"))
        found.update({key: set(methods) for key in keys})
    assert found == {key: set(methods) for key, methods in READ_BY.items()}
    assert all(set(methods) <= set(METHODS) for methods in READ_BY.values())


def test_only_what_has_no_effect_is_named() -> None:
    assert unread("fedrep", ["relaxation", "seed", "model", "skip_cap"]) == ["relaxation", "skip_cap"]
    assert unread("fedmetanas", ["relaxation", "prune_score", "dir_alpha"]) == []
