"""What happens in which round: phases, temperature, noise, prune events and caps, as functions of the round."""

from dataclasses import dataclass
from math import ceil, comb, cos, floor, pi
from typing import Any, Protocol, Self

from fedmetanas_core.federation.update import RoundPlan
from fedmetanas_core.seeds import derive_seed
from fedmetanas_core.space.spec import PRIMITIVES

WARMUP, PRUNE_START, CAP_START, ONE_HOT, PRUNE_INTERVAL = 0.15, 0.30, 0.50, 0.80, 0.05  # of all rounds


class Planner(Protocol):
    """Says what happens in which round of a stage."""

    def plan(self, round_number: int) -> RoundPlan:
        """The plan of one round of the stage, counted from 1."""
        ...


@dataclass(frozen=True)
class Steady:
    """The same in all rounds: alphas learn or not, at one temperature, with Gumbel noise or without."""

    num_rounds: int
    phase: str = "training"
    adapts: bool = False
    temperature: float = 1.0
    noise_scale: float = 0.0
    alpha_weight_decay: float = 0.0

    def plan(self, round_number: int) -> RoundPlan:
        """See Planner."""
        return RoundPlan(
            round=round_number,
            num_rounds=self.num_rounds,
            stage=0,
            stage_round=round_number,
            stage_rounds=self.num_rounds,
            phase=self.phase,
            temperature=self.temperature,
            noise_scale=self.noise_scale,
            adapts_architecture=self.adapts,
            prunes=False,
            operation_cap=len(PRIMITIVES),
            pair_caps=(),
            alpha_weight_decay=self.alpha_weight_decay,
            seed=0,
        )


@dataclass(frozen=True)
class Schedule:
    """A search of ``num_rounds`` rounds; all other times are fractions of it.

    Warm-up (alphas frozen) lasts to ``warmup``, the search to ``one_hot``; from ``prune_start`` there is a prune
    event every ``prune_interval`` until ``one_hot``. Caps stay at full width to ``cap_start`` and fall linearly to one
    choice per row at ``one_hot``. Noise is full until the middle of the search and fades linearly to 0 at ``one_hot``.
    """

    num_rounds: int
    num_nodes: int
    seed: int
    warmup: float = WARMUP
    one_hot: float = ONE_HOT
    prune_start: float = PRUNE_START
    prune_interval: float = PRUNE_INTERVAL
    cap_start: float = CAP_START
    temperature_start: float = 1.0
    temperature_end: float = 0.1
    noise_fades: bool = True
    caps: bool = True
    alpha_weight_decay: float = 1e-3

    @classmethod
    def with_search_fraction(cls, search_fraction: float, **facts: Any) -> Self:
        """A schedule that is one-hot at this fraction of the run, the phases before it in their usual proportions."""
        share = search_fraction / ONE_HOT
        return cls(
            warmup=WARMUP * share,
            one_hot=search_fraction,
            prune_start=PRUNE_START * share,
            prune_interval=PRUNE_INTERVAL * share,
            cap_start=CAP_START * share,
            **facts,
        )

    def events(self) -> dict[int, float]:
        """Prune events: the round after which each happens, and its fraction of the run.

        An event at fraction f follows round ceil(f * num_rounds). In a run too short for all of them several fall on
        one round, and the latest counts; the last one makes the masks one-hot.
        """
        count = round((self.one_hot - self.prune_start) / self.prune_interval)
        fractions = [self.one_hot - self.prune_interval * step for step in range(count, -1, -1)]
        return {max(1, ceil(fraction * self.num_rounds - 1e-9)): fraction for fraction in fractions}

    @property
    def one_hot_round(self) -> int:
        """The round of the last event, after which the masks are one-hot if caps are on."""
        return max(self.events())

    def progress(self, round_number: int) -> float:
        """The fraction of the run that lies before this round."""
        return (round_number - 1) / self.num_rounds

    def temperature(self, round_number: int) -> float:
        """Constant in the warm-up, then geometric, reaching its end at ``one_hot``."""
        share = self._share(self.progress(round_number), self.warmup, self.one_hot)
        return float(self.temperature_start * (self.temperature_end / self.temperature_start) ** share)

    def noise_scale(self, round_number: int) -> float:
        """1 until the middle of the search, then linear to 0 at ``one_hot``; 1 throughout if it does not fade."""
        if not self.noise_fades:
            return 1.0
        middle = (self.warmup + self.one_hot) / 2
        return 1.0 - self._share(self.progress(round_number), middle, self.one_hot)

    def cap(self, width: int, fraction: float) -> int:
        """How many of ``width`` choices an event at this fraction of the run may leave."""
        if not self.caps:
            return width
        share = self._share(fraction, self.cap_start, self.one_hot)
        return 1 + floor((width - 1) * (1.0 - share) + 0.5 + 1e-9)

    def plan(self, round_number: int) -> RoundPlan:
        """The plan of one round, counted from 1."""
        events = self.events()
        fraction = max((event for at, event in events.items() if at <= round_number), default=0.0)
        if self.progress(round_number) < self.warmup - 1e-9 and round_number <= self.one_hot_round:
            phase = "warm-up"
        else:  # without caps nothing makes the masks one-hot, so the search goes on
            phase = "one-hot" if self.caps and round_number > self.one_hot_round else "search"
        return RoundPlan(
            round=round_number,
            num_rounds=self.num_rounds,
            stage=0,
            stage_round=round_number,
            stage_rounds=self.num_rounds,
            phase=phase,
            temperature=self.temperature(round_number),
            noise_scale=self.noise_scale(round_number),
            adapts_architecture=phase == "search",
            prunes=round_number in events,
            operation_cap=self.cap(len(PRIMITIVES), fraction),
            pair_caps=tuple(self.cap(comb(2 + node, 2), fraction) for node in range(self.num_nodes)),
            # Once pruning has begun, decay would pull the logits back to the tie that pruning is to resolve.
            alpha_weight_decay=self.alpha_weight_decay if round_number <= min(events) else 0.0,
            seed=derive_seed(self.seed, "round", round_number),
        )

    @staticmethod
    def _share(value: float, start: float, end: float) -> float:
        """How far ``value`` is from ``start`` to ``end``, within [0, 1]."""
        return min(1.0, max(0.0, (value - start) / (end - start)))


@dataclass(frozen=True)
class Later:
    """Another planner from a later round on: for a stage that continues the one before."""

    planner: Planner
    rounds_before: int

    def plan(self, round_number: int) -> RoundPlan:
        """See Planner."""
        return self.planner.plan(self.rounds_before + round_number)


def cosine_learning_rate(step: int, steps: int, start: float, end: float) -> float:
    """Cosine from ``start`` at step 0 towards ``end`` at step ``steps``, on the global count of local epochs."""
    return end + (start - end) * (1.0 + cos(pi * step / steps)) / 2.0
