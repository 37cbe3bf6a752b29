"""Figures and other people's words as one can read them."""

import math


def describe(seconds: float) -> str:
    """A duration for people, two units at most: "4.2 s", "3 min 20 s", "1 h 5 min", "2 d 3 h"."""
    if not math.isfinite(seconds) or seconds < 0:
        return "unknown"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole_seconds = round(seconds)
    if whole_seconds < 60:
        return f"{whole_seconds} s"
    if whole_seconds < 3600:
        return _two_units(whole_seconds, 60, "min", "s")
    whole_minutes = round(seconds / 60)
    if whole_minutes < 24 * 60:
        return _two_units(whole_minutes, 60, "h", "min")
    return _two_units(round(seconds / 3600), 24, "d", "h")


def _two_units(amount: int, per_large: int, large: str, small: str) -> str:
    whole, rest = divmod(amount, per_large)
    return f"{whole} {large} {rest} {small}" if rest else f"{whole} {large}"


def describe_bytes(count: float) -> str:
    """A size for people in decimal units: "512 B", "8.0 MB"."""
    if count < 1000:
        return f"{count:.0f} B"
    units = ["kB", "MB", "GB", "TB", "PB"]
    amount, unit = count / 1000, units.pop(0)
    while amount >= 999.95 and units:  # from there on one decimal would show 1000.0
        amount, unit = amount / 1000, units.pop(0)
    return f"{amount:.1f} {unit}"


def describe_macs(count: float) -> str:
    """Multiply-adds in thousands or millions."""
    return f"{count / 1e6:.1f} M multiply-adds" if count >= 1e6 else f"{count / 1e3:.0f} k multiply-adds"


def printable(text: str) -> str:
    """Somebody else's words, for one line of a terminal, a page or a drawing: what cannot be shown as its escape."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )
