"""Durations, sizes and other people's words as they are shown."""

import pytest

from fedmetanas_core.text import describe, describe_bytes, describe_macs, printable


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (4.24, "4.2 s"),
        (9.97, "10 s"),
        (59.4, "59 s"),
        (59.7, "1 min"),
        (200, "3 min 20 s"),
        (3599.7, "1 h"),
        (3900, "1 h 5 min"),
        (86399, "1 d"),
        (183600, "2 d 3 h"),
        (-1, "unknown"),
        (float("nan"), "unknown"),
        (float("inf"), "unknown"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert describe(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (8_000_000, "8.0 MB"),
        (999_960, "1.0 MB"),
        (1_250_000_000, "1.2 GB"),
        (3 * 10**18, "3000.0 PB"),
    ],
)
def test_sizes_in_words(count: int, words: str) -> None:
    assert describe_bytes(count) == words


def test_multiply_adds_in_words() -> None:
    assert [describe_macs(count) for count in (42_464, 1_000_000, 57_720_000)] == [
        "42 k multiply-adds", "1.0 M multiply-adds", "57.7 M multiply-adds"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Käse, 猫", "Käse, 猫"),
        ("two\nlines", "two\\nlines"),
        ("bell\x07, \x1b[31mred", "bell\\x07, \\x1b[31mred"),
        ("a byte that is no letter: \udcff", "a byte that is no letter: \\udcff"),
    ],
)
def test_what_cannot_be_shown_is_its_escape(text: str, shown: str) -> None:
    assert printable(text) == shown
