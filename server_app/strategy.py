"""Which client gets what, and how the replies become the next state."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedmetanas_core.errors import FedMetaNASError, RunFailedError
from fedmetanas_core.federation import wire
from fedmetanas_core.federation.screening import screen
from fedmetanas_core.federation.update import ClientUpdate, ServerState
from fedmetanas_core.methods.method import Method
from fedmetanas_core.seeds import numpy_stream


def sample_clients(seed: int, round_number: int, num_clients: int, clients_per_round: int) -> list[int]:
    """Partition ids of one round, ascending: uniform without replacement, a function of seed and round alone."""
    stream = numpy_stream(seed, "client sampling", round_number)
    return sorted(int(client) for client in stream.choice(num_clients, clients_per_round, replace=False))


@dataclass
class Exchange:
    """What one round's messages did: who was asked, whose update counts, who was excluded and why."""

    clients: list[int]
    downlink_bytes: int = 0
    uplink_bytes: int = 0
    accepted: list[ClientUpdate] = field(default_factory=list)
    excluded: list[dict[str, Any]] = field(default_factory=list)


class SearchStrategy(FedAvg):
    """Flower's FedAvg with seeded sampling by partition id, a payload per round, and a method's own averaging.

    ``nodes`` maps partition ids to node ids; ``run`` identifies run and code to the clients.
    """

    def __init__(
        self,
        method: Method,
        state: ServerState,
        nodes: dict[int, int],
        run: ConfigRecord,
        clients_per_round: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.method, self.state, self.nodes, self.run = method, state, nodes, run
        self.clients_per_round, self.seed = clients_per_round, seed
        self.exchange = Exchange([])
        self._client_of = {node: client for client, node in nodes.items()}
        self._asked: dict[str, int] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each sampled client."""
        clients = sample_clients(self.seed, server_round, len(self.nodes), self.clients_per_round)
        return self._messages(MessageType.TRAIN, server_round, arrays, clients)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for every client."""
        return self._messages(MessageType.EVALUATE, server_round, arrays, sorted(self.nodes))

    def _messages(self, kind: str, server_round: int, arrays: ArrayRecord, clients: Sequence[int]) -> Iterable[Message]:
        plan = self.method.plan(server_round)
        content = wire.encode_payload(arrays, self.state.architecture, plan, self.run)
        self.exchange = Exchange(list(clients), downlink_bytes=wire.array_bytes(content) * len(clients))
        return [Message(content, self.nodes[client], kind) for client in clients]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Screen the replies and average those that fit into ``state``; pruning is the loop's next step.

        Raises RunFailedError when nothing can be averaged, or when a Ray worker died: Flower never replaces it.
        """
        plan = self.method.plan(server_round)
        for client, reply in self._by_client(replies):
            reason = self._failure(reply) if reply is not None else "no reply before the deadline"
            if reply is not None and reason is None:
                reason = self._take(reply)
            if reason is not None:
                self.exchange.excluded.append({"client": client, "reason": reason})
        if not self.exchange.accepted:
            reasons = "; ".join(f"client {row['client']}: {row['reason']}" for row in self.exchange.excluded)
            raise RunFailedError(f"round {server_round}: no client sent a usable update ({reasons})")
        self.state = self.method.aggregate(self.state, self.exchange.accepted, plan)
        total = sum(update.num_examples for update in self.exchange.accepted)
        loss = sum(update.num_examples * update.metrics["train_loss"] for update in self.exchange.accepted) / total
        return wire.encode_arrays(self.state), MetricRecord({wire.EXAMPLES: total, "train_loss": loss})

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Each answering client's figures as lists in the order of ``client``; RunFailedError if none answered."""
        rows = [
            dict(reply.content.metric_records[wire.METRICS])
            for _, reply in self._by_client(replies)
            if reply is not None and self._failure(reply) is None
        ]
        if not rows:
            raise RunFailedError("no client answered the evaluation")
        return MetricRecord({name: [row[name] for row in rows] for name in rows[0]})  # type: ignore[misc]

    def _by_client(self, replies: Iterable[Message]) -> list[tuple[int, Message | None]]:
        """The reply of every client that was asked, in client order; float sums then never depend on arrival."""
        found = {self._client_of.get(reply.metadata.src_node_id, -1): reply for reply in replies}
        return [(client, found.get(client)) for client in sorted(self.exchange.clients)]

    def _failure(self, reply: Message) -> str | None:
        if not reply.has_error():
            return None
        reason = str(reply.error.reason).strip().splitlines()[-1] if reply.error.reason else f"code {reply.error.code}"
        if "ActorDied" in str(reply.error.reason):
            raise RunFailedError(f"a Ray worker died (out of memory, perhaps): {reason}")
        return reason

    def _take(self, reply: Message) -> str | None:
        """Accept a reply, or say why not."""
        self.exchange.uplink_bytes += wire.array_bytes(reply.content)
        try:
            update = wire.decode_update(reply.content)
        except FedMetaNASError as error:
            return str(error)
        reason = screen(update, self.state, self.method.plan(update.round))
        if reason is None:
            self.exchange.accepted.append(update)
        return reason
