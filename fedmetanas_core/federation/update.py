"""The values that move between server and clients, and the state between rounds."""

from dataclasses import dataclass, field

from torch import Tensor

from fedmetanas_core.federation.compression import Stream
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.spec import SpaceSpec
from fedmetanas_core.space.supernet import Supernet, layouts


@dataclass(frozen=True)
class RoundPlan:
    """What everybody does in one round; made by the server, sent to the clients.

    ``round`` counts from 1 to ``num_rounds``. ``operation_cap`` and ``pair_caps`` (one per node) bound what survives
    the prune event of this round, if ``prunes``.
    """

    round: int
    num_rounds: int
    phase: str  # "warm-up", "search" or "one-hot"
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

    ``evaluations`` are the (round, accuracy) pairs of the global model at the regular evaluations so far.
    """

    spec: SpaceSpec
    weights: Tensor
    statistics: Tensor
    architecture: Architecture
    round: int = 0
    evaluations: list[tuple[int, float]] = field(default_factory=list)

    def supernet(self, device: str = "cpu") -> Supernet:
        """The network of the alive operations with this state's weights, in evaluation mode."""
        network = Supernet(self.spec, self.architecture.operation_mask, device)
        network.load(self.weights, self.statistics)
        return network.eval()

    def prune_weights(self, before: Tensor) -> None:
        """Drop the weights of operations that left the mask since ``before`` (the mask of the present weights)."""
        old, new = (layouts(self.spec, mask) for mask in (before, self.architecture.operation_mask))
        self.weights = old[0].select(self.weights, new[0])
        self.statistics = old[1].select(self.statistics, new[1])


@dataclass(frozen=True)
class Payload:
    """What a client receives: the alive network, the architecture and the plan."""

    weights: Tensor
    statistics: Tensor
    architecture: Architecture
    plan: RoundPlan


@dataclass(frozen=True)
class ClientUpdate:
    """What a client returns: the same tensors after its search, and how it went.

    ``votes`` are the client's keep bits (operations, pairs) where clients vote on pruning, else None. ``changes`` are
    the compressed changes of weights and the compressed statistics that are to travel in their place, if any. ``note``
    is for the ledger.
    """

    client: int
    round: int
    mask_version: int
    num_examples: int
    weights: Tensor
    statistics: Tensor
    operation_logits: Tensor
    input_logits: Tensor
    votes: tuple[Tensor, Tensor] | None = None
    changes: tuple[Stream, Stream] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def named_tensors(self) -> dict[str, Tensor]:
        """The tensors that are averaged, by name."""
        return {
            "weights": self.weights,
            "statistics": self.statistics,
            "operation_logits": self.operation_logits,
            "input_logits": self.input_logits,
        }
