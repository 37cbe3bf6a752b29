"""The kinds of values that keys of the configuration take: declared with their limits, checked against them."""

from collections.abc import Mapping
from dataclasses import field
from difflib import get_close_matches
from math import isfinite
from typing import Any

from fedmetanas_core.errors import RefusalError

AUTO = "auto"


def _key(default: Any, about: str, **limits: Any) -> Any:
    return field(default=default, metadata={"about": about, **limits})


def count(default: int | str, about: str, least: int = 1, most: int = 10**9) -> Any:
    """A key that takes a whole number."""
    return _key(default, about, kind=int, least=least, most=most)


def number(default: float | str, about: str, least: float = 0.0, above: bool = False, most: float = 1e9) -> Any:
    """A key that takes a number; ``above``: the least itself is out of range."""
    return _key(default, about, kind=float, least=least, above=above, most=most)


def choice(default: str, about: str, *choices: str) -> Any:
    """A key that takes one of these words."""
    return _key(default, about, kind=str, choices=choices)


def text(default: str, about: str) -> Any:
    """A key that takes text."""
    return _key(default, about, kind=str)


def checked(spec: Any, value: Any) -> Any:
    """The value of a dataclass field declared above; RefusalError if it is not of its kind or out of range."""
    limits = spec.metadata
    if isinstance(value, str) and value == AUTO and spec.default == AUTO:
        return value
    if limits["kind"] is str:
        return _checked_text(spec.name, value, limits.get("choices"))
    wanted = "a whole number" if limits["kind"] is int else "a number"
    fix = f"give {wanted} {_range(limits)}" + (" or auto" if spec.default == AUTO else "")
    if value == "":
        raise RefusalError(f"{spec.name}: no value was given", fix)
    if isinstance(value, str) and value.replace(",", "", 1).isdigit() and "," in value:
        raise RefusalError(f"{spec.name}: {value!r} is not a number", f"write {value.replace(',', '.')}")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, int) and abs(value) > 10**18:  # Python itself neither prints nor converts integers much larger
        raise RefusalError(f"{spec.name}: a number of more than 18 digits is out of range", fix)
    if not is_number or not isfinite(value) or (limits["kind"] is int and int(value) != value):
        raise RefusalError(f"{spec.name}: {repr(value)[:80]} is not {wanted}", fix)
    low, high = limits["least"], limits["most"]
    if value < low or value > high or (limits.get("above") and value <= low):
        raise RefusalError(f"{spec.name}: {value!r} is out of range", fix)
    return limits["kind"](value)


def _range(limits: Mapping[str, Any]) -> str:
    return f"{'above' if limits.get('above') else 'of at least'} {limits['least']} and at most {limits['most']}"


def _checked_text(name: str, value: Any, choices: tuple[str, ...] | None) -> str:
    if not isinstance(value, str):
        raise RefusalError(f"{name}: {value!r} is not text", f"write {name}='...'")
    if choices and value not in choices:
        near = get_close_matches(value, choices, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RefusalError(f"{name}: {value!r} is unknown", f"{hint}choose one of {', '.join(choices)}")
    return value
