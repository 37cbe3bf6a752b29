"""What happens when, worked by hand."""

from math import ceil

import pytest

from fedmetanas_core.search.schedule import Schedule, cosine_learning_rate

HUNDRED = Schedule(num_rounds=100, num_nodes=4, seed=0)


def test_phases_of_a_run_of_a_hundred_rounds() -> None:
    phases = [HUNDRED.plan(number).phase for number in range(1, 101)]
    assert phases == ["warm-up"] * 15 + ["search"] * 65 + ["one-hot"] * 20
    adapts = [HUNDRED.plan(number).adapts_architecture for number in range(1, 101)]
    assert adapts == [phase == "search" for phase in phases]


def test_events_of_a_run_of_a_hundred_rounds() -> None:
    expected = [30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 80]
    assert [number for number in range(1, 101) if HUNDRED.plan(number).prunes] == expected
    assert HUNDRED.one_hot_round == 80


@pytest.mark.parametrize("num_rounds", range(1, 201))
def test_events_are_distinct_where_possible_and_the_last_one_leaves_one_choice(num_rounds: int) -> None:
    schedule = Schedule(num_rounds, num_nodes=4, seed=0)
    events = [number for number in range(1, num_rounds + 1) if schedule.plan(number).prunes]
    rounds_between = -(-8 * num_rounds // 10) - -(-3 * num_rounds // 10) + 1  # from 0.3 R to 0.8 R, rounded up
    assert len(events) == min(11, rounds_between)
    assert events[-1] == ceil(0.8 * num_rounds - 1e-9) <= num_rounds
    last = schedule.plan(events[-1])
    assert last.operation_cap == 1
    assert last.pair_caps == (1, 1, 1, 1)


def test_temperature_is_one_in_the_warm_up_then_geometric_and_ends_at_a_tenth() -> None:
    assert [HUNDRED.temperature(number) for number in (1, 15, 16)] == pytest.approx([1.0, 1.0, 1.0], abs=1e-12)
    # Half way between 0.15 and 0.80 lies 0.475 = 19 / 40.
    assert Schedule(40, 4, 0).temperature(20) == pytest.approx(10**-0.5, rel=1e-12)
    assert HUNDRED.temperature(30) == pytest.approx(10 ** (-14 / 65), rel=1e-12)
    assert [HUNDRED.temperature(number) for number in (81, 100)] == pytest.approx([0.1, 0.1], rel=1e-12)
    ratios = [HUNDRED.temperature(number + 1) / HUNDRED.temperature(number) for number in range(16, 80)]
    assert ratios == pytest.approx([10 ** (-1 / 65)] * 64, rel=1e-9)


def test_noise_is_full_to_the_middle_of_the_search_then_linear_to_zero() -> None:
    assert [HUNDRED.noise_scale(number) for number in (1, 16, 48)] == [1.0, 1.0, 1.0]
    assert Schedule(80, 4, 0).noise_scale(52) == pytest.approx(0.5, abs=1e-12)  # 51 / 80 = (0.475 + 0.8) / 2
    assert HUNDRED.noise_scale(80) == pytest.approx(0.01 / 0.325, abs=1e-12)
    assert [HUNDRED.noise_scale(number) for number in (81, 100)] == [0.0, 0.0]


def test_noise_may_stay_full() -> None:
    schedule = Schedule(100, 4, 0, noise_fades=False)
    assert {schedule.plan(number).noise_scale for number in range(1, 101)} == {1.0}


def test_caps_of_a_run_of_a_hundred_rounds() -> None:
    # Operations: 1 + 7 (1 - share), share = (f - 0.5) / 0.3. Ties of rounding (0.65: 4.5) are left out.
    caps = {30: 8, 35: 8, 40: 8, 45: 8, 50: 8, 55: 7, 60: 6, 70: 3, 75: 2, 80: 1}
    assert {number: HUNDRED.plan(number).operation_cap for number in caps} == caps
    # Between two events the caps of the first hold: whoever prunes at other times keeps to them.
    between = {1: 8, 29: 8, 31: 8, 54: 8, 56: 7, 59: 7, 61: 6, 79: 2, 81: 1, 100: 1}
    assert {number: HUNDRED.plan(number).operation_cap for number in between} == between
    assert not any(HUNDRED.plan(number).prunes for number in between)
    assert HUNDRED.plan(64).pair_caps == HUNDRED.plan(60).pair_caps
    assert HUNDRED.plan(50).pair_caps == (1, 3, 6, 10)
    assert HUNDRED.plan(60).pair_caps == (1, 2, 4, 7)  # 1 + (0, 2, 5, 9) * 2/3 = 1, 2.33, 4.33, 7
    assert HUNDRED.plan(70).pair_caps == (1, 2, 3, 4)  # 1 + (0, 2, 5, 9) / 3 = 1, 1.67, 2.67, 4
    assert HUNDRED.plan(80).pair_caps == (1, 1, 1, 1)


def test_caps_fall_along_a_line_and_never_rise() -> None:
    for width in (1, 3, 6, 8, 10):
        caps = [HUNDRED.cap(width, percent / 100) for percent in range(101)]
        assert caps == sorted(caps, reverse=True)
        assert caps[:51] == [width] * 51
        assert caps[80:] == [1] * 21
        for percent in range(50, 81):
            line = 1 + (width - 1) * (80 - percent) / 30
            assert abs(caps[percent] - line) <= 0.5 + 1e-9


def test_caps_can_be_switched_off() -> None:
    schedule = Schedule(100, 3, 0, caps=False)
    plan = schedule.plan(80)
    assert plan.prunes
    assert plan.operation_cap == 8
    assert plan.pair_caps == (1, 3, 6)
    # The masks need not be one-hot then, so alphas go on learning.
    assert [
        (schedule.plan(number).phase, schedule.plan(number).adapts_architecture) for number in (15, 16, 81, 100)
    ] == [
        ("warm-up", False),
        ("search", True),
        ("search", True),
        ("search", True),
    ]


def test_alphas_decay_until_the_first_event_only() -> None:
    decays = [HUNDRED.plan(number).alpha_weight_decay for number in range(1, 101)]
    assert decays == [1e-3] * 30 + [0.0] * 70


def test_a_plan_states_its_round_and_each_round_has_a_seed_of_its_own() -> None:
    plans = [HUNDRED.plan(number) for number in range(1, 101)]
    assert [(plan.round, plan.num_rounds) for plan in plans] == [(number, 100) for number in range(1, 101)]
    assert [(plan.stage, plan.stage_round, plan.stage_rounds) for plan in plans] == [(0, n, 100) for n in range(1, 101)]
    assert len({plan.seed for plan in plans}) == 100
    assert HUNDRED.plan(7) == Schedule(100, 4, 0).plan(7)
    assert HUNDRED.plan(7).seed != Schedule(100, 4, 1).plan(7).seed


def test_one_round_still_prunes() -> None:
    plan = Schedule(1, 4, 0).plan(1)
    assert plan.prunes
    assert (plan.operation_cap, plan.pair_caps) == (1, (1, 1, 1, 1))


def test_cosine_by_hand() -> None:
    rate = [cosine_learning_rate(step, 60, 0.025, 0.001) for step in (0, 20, 30, 40, 60)]
    assert rate == pytest.approx([0.025, 0.019, 0.013, 0.007, 0.001], abs=1e-15)  # cos 60 degrees is a half


def test_the_search_may_end_earlier_with_its_phases_in_proportion() -> None:
    usual = Schedule(num_rounds=80, num_nodes=3, seed=1)
    shorter = Schedule.with_search_fraction(0.4, num_rounds=160, num_nodes=3, seed=1)
    assert shorter.one_hot_round == usual.one_hot_round == 64
    assert set(shorter.events()) == set(usual.events())
    for number in range(1, 81):
        one, other = usual.plan(number), shorter.plan(number)
        assert (one.phase, one.prunes, one.operation_cap, one.pair_caps) == (
            other.phase, other.prunes, other.operation_cap, other.pair_caps,
        )  # fmt: skip
        assert one.temperature == pytest.approx(other.temperature)
        assert one.noise_scale == pytest.approx(other.noise_scale)
    assert shorter.plan(160).phase == "one-hot"
    assert Schedule.with_search_fraction(0.8, num_rounds=80, num_nodes=3, seed=1) == usual
