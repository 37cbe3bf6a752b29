"""The rounds' time, counted with a clock that is set by hand."""

import pytest

from fedmetanas_core.run.stopwatch import Stopwatch


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def one_round(watch: Stopwatch, clock: Clock) -> None:
    with watch.round():
        clock.now += 1.0
        with watch.part("exchange"):
            clock.now += 4.0
        with watch.part("saving"):
            clock.now += 2.0


def test_the_first_round_is_left_out_and_the_rest_is_named() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    one_round(watch, clock)
    assert not any(watch.seconds().values())
    one_round(watch, clock)
    one_round(watch, clock)
    assert watch.seconds() == {"exchange": 8.0, "averaging": 0.0, "evaluation": 0.0, "saving": 4.0, "other": 2.0}


def test_what_breaks_off_is_counted_as_well() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    one_round(watch, clock)

    def broken_off() -> None:
        with watch.round(), watch.part("exchange"):
            clock.now += 3.0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert watch.seconds()["exchange"] == 3.0
    assert watch.seconds()["other"] == 0.0


def test_a_part_must_have_a_name_that_is_known() -> None:
    with pytest.raises(KeyError), Stopwatch().part("lunch"):
        pass
