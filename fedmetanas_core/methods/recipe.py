"""What a method is made of. Each part is a value; a method is a named combination of them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fedmetanas_core.federation.policy import Architect, NoAlphas, Shared
from fedmetanas_core.search.local_search import LocalOptions
from fedmetanas_core.search.prune_events import Pruning
from fedmetanas_core.search.pruning import PruneRule
from fedmetanas_core.search.schedule import Planner
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.budget import Budget
from fedmetanas_core.space.fixed import Space
from fedmetanas_core.space.genotype import Genotype
from fedmetanas_core.space.spec import SpaceSpec


@dataclass(frozen=True)
class Stage:
    """Rounds of one kind.

    ``space``: what network there is. ``planner``: phase, temperature, noise and prune events of each round. ``local``:
    how a client trains. ``architect``: who updates the alphas. ``pruning``: what the server prunes after a round.
    ``derive``: the genotype that the alphas stand for, at the end of the stage; fixed models have none. ``draw``: begin
    with a random genotype in place of the whole space. ``without_none``: begin without that operation.
    ``continues``: begin with what the stage before has left. ``name``: for the ledger.
    """

    name: str
    rounds: int
    space: Space
    planner: Planner
    local: LocalOptions
    architect: Architect = field(default_factory=NoAlphas)
    pruning: Pruning | None = None
    derive: Callable[[Architecture], Genotype] | None = None
    draw: Callable[[SpaceSpec, torch.Generator], Genotype] | None = None
    without_none: bool = False
    continues: bool = False


@dataclass(frozen=True)
class Share:
    """Which part of weights and statistics travels, and what a client keeps for itself.

    ``down`` and ``up`` are parts (space.parts). ``kept`` is the part that a client stores after its training, with
    alphas and masks where it is all of it; ``resumes`` whether its next training begins with that.
    """

    down: str = "all"
    up: str = "all"
    kept: str = "none"
    resumes: bool = False


@dataclass(frozen=True)
class Personal:
    """How a client makes the model that it would use, after the last round.

    First ``search`` trains weights and alphas, then ``derive`` cuts the client's own genotype out of its own alphas,
    then ``tune`` trains its weights; what is None is left out. ``masks``: the rule by which every client prunes its
    personal cells for itself, if it does, whenever it trains from round ``masks_from`` on. ``is_the_point``: the method
    is about this model; of others, a client uses the one that all share. ``own_limits``: what it cuts out can keep to
    limits that its node alone has.
    """

    tune: LocalOptions | None = None
    search: LocalOptions | None = None
    derive: Callable[[Architecture, int], Genotype] | None = None
    masks: PruneRule | None = None
    masks_from: int = 1
    is_the_point: bool = False
    own_limits: bool = False

    @property
    def own_architecture(self) -> bool:
        """Whether clients end with networks of their own."""
        return self.derive is not None or self.masks is not None


@dataclass(frozen=True)
class Recipe:
    """A method: stages that follow each other, what is shared, and what becomes of the result at each client.

    ``budget``: what every network that it ends with keeps to.
    """

    stages: tuple[Stage, ...]
    personal: Personal
    share: Share = field(default_factory=Share)
    budget: Budget | None = None

    @property
    def is_local(self) -> bool:
        """Whether nothing ever travels, so that there is no global model."""
        return self.share.down == self.share.up == "none"

    @property
    def keeps_private(self) -> bool:
        """Whether clients keep anything to themselves between rounds."""
        return self.share.kept != "none" or self.personal.masks is not None

    @property
    def same_for_all(self) -> bool:
        """Whether all clients of a round get and send back the same network."""
        return self.compressible and all(isinstance(stage.architect, Shared) for stage in self.stages)

    @property
    def compressible(self) -> bool:
        """Whether an update has all the weights that its client got."""
        whole = self.share.down == self.share.up == "all" and self.personal.masks is None
        return whole and not any(stage.local.returns_touched for stage in self.stages)
