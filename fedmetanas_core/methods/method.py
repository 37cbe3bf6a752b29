"""What the round loop asks of a method."""

from collections.abc import Sequence
from typing import Protocol

from fedmetanas_core.config import Config
from fedmetanas_core.federation.update import ClientUpdate, Payload, RoundPlan, ServerState
from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.search.pruning import PruneReport
from fedmetanas_core.space.network import Network
from fedmetanas_core.space.spec import SpaceSpec


class Method(Protocol):
    """An algorithm as a value: state in, state out. ``config`` is resolved (no ``auto`` left that it reads)."""

    def __init__(self, config: Config, spec: SpaceSpec) -> None: ...

    def initial_state(self) -> ServerState:
        """The state before round 1."""
        ...

    def plan(self, round_number: int) -> RoundPlan:
        """What happens in this round, counted from 1."""
        ...

    def local_update(self, payload: Payload, client: int, data: LocalData) -> ClientUpdate:
        """A client's share of the round."""
        ...

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate], plan: RoundPlan) -> ServerState:
        """The state after averaging the updates, given in client order."""
        ...

    def prune(self, state: ServerState, updates: Sequence[ClientUpdate], plan: RoundPlan) -> PruneReport | None:
        """Prune ``state`` in place if the plan says so; what was removed, or None if there was no event."""
        ...

    def extract(self, state: ServerState) -> Network:
        """The discrete network that this state stands for, with inherited weights."""
        ...
