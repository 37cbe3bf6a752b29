"""The values that move between server and clients, and the state between rounds."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from fedmetanas_core.federation.compression import Stream
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.fixed import Space
from fedmetanas_core.space.models import build, layouts

RENEWAL = "statistics"  # clients only renew the running statistics of the network they get


@dataclass(frozen=True)
class RoundPlan:
    """What everybody does in one round; made by the server, sent to the clients.

    ``round`` counts from 1 to ``num_rounds``; a method may have several stages, each with rounds of its own, in which
    rates start anew. ``operation_cap`` and ``pair_caps`` (one per node) bound what survives
    the prune event of this round, if ``prunes``, or the one before it.
    """

    round: int
    num_rounds: int
    stage: int
    stage_round: int
    stage_rounds: int
    phase: str  # "warm-up", "search", "one-hot", "training", "retraining" or RENEWAL
    temperature: float
    noise_scale: float
    adapts_architecture: bool
    prunes: bool
    operation_cap: int
    pair_caps: tuple[int, ...]
    alpha_weight_decay: float
    seed: int


@dataclass
class ServerState:
    """Everything a run is, between two rounds: flat weights and statistics of the alive network, the architecture.

    ``stage`` is the stage of the method that it belongs to. ``memory`` holds what the server alone knows beside them
    (policies, moments of an optimiser), by name. ``evaluations`` are the (round, accuracy) pairs of the global model at
    the regular evaluations so far.
    """

    spec: Space
    weights: Tensor
    statistics: Tensor
    architecture: Architecture
    round: int = 0
    stage: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    evaluations: list[tuple[int, float]] = field(default_factory=list)

    def network(self, device: str = "cpu") -> TrainableNetwork:
        """The network of the alive operations with this state's weights, in evaluation mode."""
        network = build(self.spec, self.architecture.operation_mask, device)
        network.load(self.weights, self.statistics)
        return network.eval()

    def selected(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and statistics of the operations of a smaller mask."""
        old, new = (layouts(self.spec, each) for each in (self.architecture.operation_mask, mask))
        return old[0].select(self.weights, new[0]), old[1].select(self.statistics, new[1])

    def restrict(self, operation_mask: Tensor, input_mask: Tensor) -> bool:
        """Prune the architecture to these masks, and drop the weights of what went; True if anything did."""
        before = self.architecture.clone()
        if not self.architecture.restrict(operation_mask, input_mask):
            return False
        old, new = (layouts(self.spec, each.operation_mask) for each in (before, self.architecture))
        self.weights, self.statistics = old[0].select(self.weights, new[0]), old[1].select(self.statistics, new[1])
        return True

    def copy(self) -> "ServerState":
        """One that can be pruned without changing this one."""
        return replace(
            self,
            architecture=self.architecture.clone(),
            memory=dict(self.memory),
            evaluations=list(self.evaluations),
        )


@dataclass(frozen=True)
class Payload:
    """What a client receives: a network, its architecture and the plan.

    Over the wire weights and statistics are those of the part that is shared; whoever trains has the whole.
    """

    weights: Tensor
    statistics: Tensor
    architecture: Architecture
    plan: RoundPlan
    alphas: bool = True  # whether the logits travel


@dataclass(frozen=True)
class ClientUpdate:
    """What a client returns: the same tensors after its training, and how it went.

    ``operation_logits`` and ``input_logits`` are missing where alphas do not travel; where the server steps, what
    travels in their place is ``alpha_gradient``. ``votes`` are the client's keep bits (operations, pairs) where clients
    vote on pruning; ``scores`` what it loses without each operation, where that ranks them. ``touched`` is the mask of
    the operations whose weights are here, if not of all that came. ``changes`` are the compressed changes of weights
    and the compressed statistics that are to travel in their place, if any. ``note`` is for the ledger, ``run_id``
    that of the run which asked.
    """

    client: int
    round: int
    mask_version: int
    num_examples: int
    weights: Tensor
    statistics: Tensor
    operation_logits: Tensor | None = None
    input_logits: Tensor | None = None
    alpha_gradient: tuple[Tensor, Tensor] | None = None
    votes: tuple[Tensor, Tensor] | None = None
    scores: Tensor | None = None
    touched: Tensor | None = None
    changes: tuple[Stream, Stream] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""
    run_id: str = ""

    def named_tensors(self) -> dict[str, Tensor]:
        """The tensors that are averaged, by name."""
        tensors = {
            "weights": self.weights,
            "statistics": self.statistics,
            "operation_logits": self.operation_logits,
            "input_logits": self.input_logits,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@dataclass(frozen=True)
class Evaluation:
    """What a client measured on its own held-out images, and the network it would use, if that is its own.

    ``genotype`` is JSON; ``weights`` and ``statistics`` are flat, for that genotype's network.
    """

    client: int
    num_examples: int
    metrics: dict[str, float]
    genotype: str | None = None
    weights: Tensor | None = None
    statistics: Tensor | None = None
