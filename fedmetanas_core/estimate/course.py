"""The course of a run before it is run: its rounds in segments of equal work, with the network of each.

Phases and caps are functions of the round. Which choices a prune leaves depends on what is learned, how many mostly on
the caps; so a course is taken with the initial alphas in place of learned ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from fedmetanas_core.config import Config
from fedmetanas_core.federation.sampling import sample_clients, take_turns
from fedmetanas_core.federation.update import Payload, RoundPlan, ServerState
from fedmetanas_core.methods.client import Memory, own_masks
from fedmetanas_core.methods.method import Method
from fedmetanas_core.seeds import torch_stream
from fedmetanas_core.space.cost import Cost, edge_costs, measure_cost
from fedmetanas_core.space.spec import SpaceSpec

HEAVIEST, LIGHTEST = 1000, 1001  # draws of alphas that are none
RANKED = 0.1  # far more than random alphas differ, and far too little for a threshold to prune by

Kind = tuple[int, str, bool, bool]  # stage, phase, whether alphas learn, whether operations are mixed
Who = dict[int, tuple[int, ...]]  # round to the clients that train in it


@dataclass(frozen=True)
class Segment:
    """Consecutive rounds with the same network and the same kind of work.

    ``state`` is that with which its first round begins, without weights (see ``filled``).
    """

    first: int
    rounds: int
    kind: Kind
    state: ServerState

    @property
    def middle(self) -> int:
        """The round that stands for all."""
        return self.first + (self.rounds - 1) // 2

    @property
    def stage(self) -> int:
        """The stage of the method."""
        return self.kind[0]

    @property
    def phase(self) -> str:
        """Of the plan."""
        return self.kind[1]


@dataclass(frozen=True)
class Course:
    """All segments, the rounds after which something is pruned or a stage ends, and the state at the end.

    ``trainings`` says who trains in which round.
    """

    segments: tuple[Segment, ...]
    prunes: tuple[int, ...]
    stage_ends: tuple[int, ...]
    last: ServerState
    trainings: Who = field(repr=False)

    def segment_of(self, round_number: int) -> Segment:
        """The one that a round belongs to."""
        return next(each for each in reversed(self.segments) if each.first <= round_number)

    def is_settled(self, method: Method) -> bool:
        """Whether schedule and caps alone decide how much is pruned, and not what is learned."""
        return self.last.architecture.is_one_hot() or all(stage.pruning is None for stage in method.recipe.stages)


def trainings(config: Config, method: Method) -> Who:
    """Who trains in which round, if everybody answers."""
    seen, count = config.num_clients - config.unseen_clients, config.clients_per_round
    rounds = range(1, method.num_rounds + 1)
    if method.recipe.is_local:
        return {number: tuple(take_turns(config.seed, number, seen, range(seen), count)) for number in rounds}
    return {number: tuple(sample_clients(config.seed, number, range(seen), count)) for number in rounds}


def _drawn(method: Method, draw: int) -> ServerState:
    """The state before round 1 with alphas of its own, unless the draw is 0, which is the run's.

    In HEAVIEST the alphas rank operations by their multiply-adds, in LIGHTEST against them.
    """
    state, stage = method.initial_state(), method.recipe.stages[0]
    if draw and stage.draw is None:
        state.architecture.initialise(torch_stream(method.seed, "estimate", draw))
        if draw in (HEAVIEST, LIGHTEST) and isinstance(state.spec, SpaceSpec):
            costs = torch.zeros(state.architecture.operation_logits.shape, dtype=torch.float64)
            for cell, each in zip(state.spec.cells, edge_costs(state.spec), strict=True):
                costs[cell.group] += each
            with torch.no_grad():
                state.architecture.operation_logits.add_(
                    costs / costs.max(), alpha=RANKED if draw == HEAVIEST else -RANKED
                )
        stage.architect.begin(state)
    return state


def _walk(method: Method, draw: int) -> Iterator[tuple[RoundPlan, ServerState, ServerState, bool]]:
    """(plan, state before and after, whether something was pruned), round by round, with nothing learned."""
    state = _drawn(method, draw)
    for number in range(1, method.num_rounds + 1):
        plan = method.plan(number)
        state = method.enter(state, plan)
        before = state.copy()
        pruned = method.prune(state, [], plan) is not None
        state.round = number
        yield plan, before, state, pruned


def _lean(state: ServerState) -> ServerState:
    """Without weights, so that many can be kept."""
    return replace(state.copy(), weights=torch.empty(0), statistics=torch.empty(0))


def filled(method: Method, state: ServerState) -> ServerState:
    """The same with the weights that its network would have at the beginning of its stage."""
    weights, statistics = method.beginning(state.stage).selected(state.architecture.operation_mask)
    return replace(state.copy(), weights=weights, statistics=statistics)


def _kind(method: Method, plan: RoundPlan, state: ServerState) -> Kind:
    scores = " with scores" if method.stage(plan).local.scores and plan.prunes else ""
    return plan.stage, plan.phase + scores, plan.adapts_architecture, not state.architecture.is_one_hot()


def take_course(config: Config, method: Method, draw: int = 0) -> Course:
    """The whole run. Segments of all draws begin in the same rounds unless a prune removes nothing in one of them."""
    segments, prunes, stage_ends, version = list[Segment](), list[int](), list[int](), -1
    last = _lean(method.initial_state())
    for plan, before, after, pruned in _walk(method, draw):
        kind = _kind(method, plan, before)
        if not segments or kind != segments[-1].kind or before.architecture.version != version:
            segments.append(Segment(plan.round, 0, kind, _lean(before)))
            version = before.architecture.version
        segments[-1] = replace(segments[-1], rounds=segments[-1].rounds + 1)
        prunes += [plan.round] if pruned else []
        stage_ends += [plan.round] if method.ends_stage(plan) else []
        if plan.round == method.num_rounds:
            last = _lean(after)
    return Course(tuple(segments), tuple(prunes), tuple(stage_ends), last, trainings(config, method))


def client_memory(method: Method, course: Course, client: int, number: int) -> Memory:
    """What a client keeps for itself when it comes to a round, as far as the size of its network depends on it.

    These are the masks of its personal cells, from its last training before.
    """
    if method.recipe.personal.masks is None:
        return {}
    earlier = [each for each in range(1, number) if client in course.trainings[each]]
    if not earlier:
        return {}
    return own_masks(method, course.segment_of(earlier[-1]).state.architecture, method.plan(earlier[-1]))


def end_cost(method: Method, course: Course) -> Cost:
    """Of the network that the last state stands for."""
    state, genotype = course.last, method.derive(course.last)
    if genotype is None or not isinstance(state.spec, SpaceSpec):
        return measure_cost(state.spec, state.architecture.operation_mask)
    return measure_cost(replace(state.spec, auxiliary=False), genotype.masks(state.spec)[0])


def last_state(method: Method, course: Course) -> ServerState:
    """That from which clients get their networks at the end: what has not become one-hot is cut down to one."""
    state, genotype = filled(method, course.last), method.derive(course.last)
    if genotype is not None and isinstance(state.spec, SpaceSpec) and not method.recipe.personal.own_architecture:
        state.restrict(*genotype.masks(state.spec))
    return state


def payload_of(method: Method, course: Course, client: int, number: int) -> Payload:
    """What a client gets in a round."""
    return method.payload(filled(method, course.segment_of(number).state), client, method.plan(number))
