"""Which client gets what, and how the replies become the next state."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedmetanas_core.config import Config
from fedmetanas_core.errors import FedMetaNASError, ProcessDiedError, RunFailedError
from fedmetanas_core.federation import wire
from fedmetanas_core.federation.averaging import pooled_statistics
from fedmetanas_core.federation.direction import opposed
from fedmetanas_core.federation.sampling import sample_clients, take_turns
from fedmetanas_core.federation.screening import Screening
from fedmetanas_core.federation.update import RENEWAL, ClientUpdate, Evaluation, Payload, RoundPlan, ServerState
from fedmetanas_core.federation.wire import RunIdentity
from fedmetanas_core.methods.method import Method
from fedmetanas_core.run.tally import Tally
from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.network import Network
from fedmetanas_core.space.spec import SpaceSpec
from server_app.measuring import personal_network
from server_app.replies import error_line

# Flower's own words for these hold a number of the node at most.
_GONE = {
    ErrorCode.NODE_UNAVAILABLE: "its node went away",
    ErrorCode.CLIENT_APP_CRASHED: "its client process died",
    ErrorCode.MESSAGE_UNAVAILABLE: "its message expired before the node took it",
}
_WORKER_GONE = ("ActorDied", "ActorUnavailable")  # Ray's words; Flower neither replaces such a worker nor lets go of it
SHORTEST_LIFE_S = 60.0  # of a message
MOST_VOID_ROUNDS = 3  # in a row; a passing fault is over by then, a lasting one shall not use up the run


@dataclass
class Exchange:
    """What one round's messages did: who was asked, whose update counts, who was excluded and why.

    Seconds, peaks of memory (``gpu_bytes`` by client) and notes are what all updates that could be read say of
    themselves; compute is the training alone (run.stopwatch.Compute).
    """

    clients: list[int]
    downlink_bytes: int = 0
    uplink_bytes: int = 0
    client_seconds: float = 0.0
    compute_seconds: float = 0.0
    longest_compute_seconds: float = 0.0
    peak_client_bytes: int = 0
    peak_client_gpu_bytes: int = 0
    gpu_bytes: dict[int, int] = field(default_factory=dict)
    accepted: list[ClientUpdate] = field(default_factory=list)
    excluded: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)

    def mean(self, metric: str) -> float | None:
        """The accepted clients' mean of what they report, weighted by their examples; None if there are none."""
        total = sum(update.num_examples for update in self.accepted)
        if not total:
            return None
        return sum(update.num_examples * update.metrics[metric] for update in self.accepted) / total

    def exclude(self, client: int, reason: str) -> None:
        """Leave this client out, also if it was accepted before."""
        self.excluded.append({"client": client, "reason": reason})
        self.excluded.sort(key=lambda row: int(row["client"]))
        self.accepted = [update for update in self.accepted if update.client != client]


class SearchStrategy(FedAvg):
    """Flower's FedAvg with seeded sampling by partition id, a payload per round, and a method's own averaging.

    ``nodes`` maps clients to node ids, and may change from round to round, as may ``declared`` and ``held_out``, how
    many training and test images each has said to have. ``connected`` are the clients that can be asked now, all by
    default, ``known`` those that have ever taken part; ``virtual``: Ray runs them. ``run`` identifies run and code to
    the clients; ``tally`` is that of the run so far.
    """

    def __init__(
        self,
        method: Method,
        state: ServerState,
        nodes: dict[int, int],
        run: RunIdentity,
        config: Config,
        tally: Tally | None = None,
        declared: Mapping[int, int] | None = None,
        held_out: Mapping[int, int] | None = None,
        connected: Callable[[], Sequence[int]] | None = None,
        known: Callable[[], Iterable[int]] = tuple,
        virtual: bool = True,
    ) -> None:
        super().__init__()
        self.known, self.virtual = known, virtual
        self.connected = connected or (lambda: sorted(nodes))
        self.method, self.state, self.nodes, self.config = method, state, nodes, config
        self.run = wire.encode_run(run)
        self.screening = Screening(
            run.run_id, {} if declared is None else declared, config.norm_ratio, {} if held_out is None else held_out
        )
        self.exchange = Exchange([])
        self.payloads: dict[int, Payload] = {}
        self.tally = Tally() if tally is None else tally
        self.evaluations: list[Evaluation] = []
        self.networks: dict[int, Network] = {}  # by client, where they have their own
        self.candidates = 0  # of whom the last round's clients were drawn
        self._sent: list[Message] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each sampled client, with what the method sends it; ``arrays`` are not looked at."""
        plan = self.method.plan(server_round)
        self.state = self.method.enter(self.state, plan)
        clients = self._sample(server_round)
        payloads = {client: self.method.payload(self.state, client, plan) for client in clients}
        return self._messages(MessageType.TRAIN, payloads)

    def _sample(self, server_round: int) -> list[int]:
        """The clients of a round; where they share nothing they take turns, so that all get equally far."""
        config = self.config
        seen = config.num_clients - config.unseen_clients
        candidates = [client for client in self.connected() if client < seen]
        self.candidates = len(candidates)
        if self.method.recipe.is_local:
            return take_turns(config.seed, server_round, seen, candidates, config.clients_per_round)
        return sample_clients(config.seed, server_round, candidates, config.clients_per_round)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for every client that can be reached, also those that never train."""
        plan, connected = self.method.plan(server_round), self.connected()
        payloads = {client: self.method.final_payload(self.state, client, plan) for client in connected}
        messages = self._messages(MessageType.EVALUATE, payloads)
        for client in sorted((self.nodes.keys() | self.known()) - set(connected)):
            self.exchange.exclude(client, "not connected, or still at work for an earlier round")
        return messages

    def configure_renewal(self, server_round: int) -> Iterable[Message]:
        """One message for each client of a round: which statistics does the network have that would be cut out now?"""
        plan = self.method.plan(server_round)
        clients = self._sample(server_round)
        return self._messages(MessageType.TRAIN, dict.fromkeys(clients, self.method.renewal(self.state, plan)))

    def aggregate_renewal(self, replies: Iterable[Message]) -> TrainableNetwork | None:
        """The network that would be cut out, with its statistics renewed; None if nobody answered."""
        self._hear(replies, self._take)
        updates, network = self.exchange.accepted, self.method.extract(self.state)
        if not updates:
            return None
        sizes = [float(update.num_examples) for update in updates]
        statistics = [update.statistics for update in updates]
        network.load(network.weights.detach(), pooled_statistics(statistics, sizes, network.statistic_layout))
        return network

    def _messages(self, kind: str, payloads: dict[int, Payload]) -> Iterable[Message]:
        self.exchange, self.payloads = Exchange(list(payloads)), payloads
        self._sent, encoded = [], dict[Any, RecordDict]()
        for client, payload in payloads.items():
            key = id(payload.architecture)  # all that shares an architecture is the same
            if key not in encoded:
                encoded[key] = wire.encode_payload(payload, self.run)
            self.exchange.downlink_bytes += wire.array_bytes(encoded[key])
            # Twice the deadline: a node that comes back later shall not start on it, and a late reply shall be seen.
            lasts_s = max(SHORTEST_LIFE_S, 2 * self.config.round_timeout_s)
            self._sent.append(Message(wire.addressed(encoded[key], client), self.nodes[client], kind, ttl=lasts_s))
        return self._sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Screen the replies and average those that fit into ``state``; pruning is the loop's next step.

        A round with usable updates from fewer than half of its clients is void: the state stays. RunFailedError after
        several in a row, or when a Ray worker died, which Flower never replaces. Returns nothing, because ``state``
        holds everything.
        """
        plan = self.method.plan(server_round)
        self._hear(replies, self._take)
        self._leave_out_what_stands_out()
        if 2 * len(self.exchange.accepted) >= max(1, len(self.exchange.clients)):
            self.tally.void_rounds = 0
            self.state = self.method.aggregate(self.state, self.payloads, self.exchange.accepted, plan)
        else:
            self.tally.void_rounds += 1
            for update in list(self.exchange.accepted):
                self.exchange.exclude(update.client, "usable, but more than half of the others were not")
            self.state = replace(self.state, round=plan.round)
            self._refuse_to_go_on_without_clients(plan)
        return None, None

    def _leave_out_what_stands_out(self) -> None:
        accepted = self.exchange.accepted
        changes = {update.client: self.method.changes(self.payloads[update.client], update) for update in accepted}
        for client, reason in self.screening.together(changes).items():
            self.exchange.exclude(client, reason)
        if self.config.opposed == "exclude":
            accepted = self.exchange.accepted
            flat = {update.client: self.method.flat_change(self.payloads[update.client], update) for update in accepted}
            for client, reason in opposed(flat, self.tally.agreement).items():
                self.exchange.exclude(client, reason)

    def _refuse_to_go_on_without_clients(self, plan: RoundPlan) -> None:
        if self.tally.void_rounds < min(MOST_VOID_ROUNDS, plan.num_rounds):
            return
        reasons = "; ".join(f"client {row['client']}: {row['reason']}" for row in self.exchange.excluded)
        times = f", for {self.tally.void_rounds} rounds in a row" if self.tally.void_rounds > 1 else ""
        few = f"fewer than half of the clients sent a usable update{times}"
        raise RunFailedError(f"round {plan.round}: {few} ({reasons})")

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Keep the answers, in client order, as ``evaluations``, and clients' own networks as ``networks``.

        RunFailedError if there is no answer. Returns nothing.
        """
        self.evaluations, self.networks = [], {}
        self._hear(replies, self._take_answer)
        if not self.evaluations:
            raise RunFailedError(f"no client answered the evaluation: {self.exchange.excluded[0]['reason']}")
        return None

    def _take_answer(self, client: int, reply: Message) -> str | None:
        """Keep an answer to the evaluation, or say why not."""
        self.exchange.uplink_bytes += wire.array_bytes(reply.content)
        evaluation = wire.decode_evaluation(reply.content)
        reason = self.screening.answer(evaluation, client)
        space = self.state.spec
        if reason is None and self.method.recipe.personal.own_architecture and isinstance(space, SpaceSpec):
            self.networks[client] = personal_network(evaluation, space)
        if reason is None:
            self.evaluations.append(evaluation)
        return reason

    def _hear(self, replies: Iterable[Message], take: Callable[[int, Message], str | None]) -> None:
        """Let ``take`` have every reply, and exclude whom it gives a reason for.

        Whatever a reply's bytes lead to costs its client the round, and nobody else.
        """
        for client, reply in self._by_client(replies):
            reason = self._failure(reply)
            if reply is not None and reason is None:
                try:
                    reason = take(client, reply)
                except FedMetaNASError as error:
                    reason = str(error)
                except Exception as error:
                    reason = f"its reply cannot be read: {type(error).__name__}: {error}"[: wire.LONGEST_NOTE]
            if reason is not None:
                self.exchange.exclude(client, reason)

    def _by_client(self, replies: Iterable[Message]) -> list[tuple[int, Message | None]]:
        """The reply of every client that was asked, in client order; float sums then never depend on arrival."""
        # A node that went away is answered for by the SuperLink, under another node's number.
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in self._sent}
        client_of = {node: client for client, node in self.nodes.items()}
        found = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            node = node if node in client_of else asked.get(reply.metadata.reply_to_message_id, node)
            client = client_of.get(node)
            if client in found or client not in self.payloads:
                who = f"node {node}" if client is None else f"client {client}"
                self.exchange.notes.append(
                    {"client": client, "note": f"a reply of {who} that nobody asked for, dropped"}
                )
            else:
                found[client] = reply
        return [(client, found.get(client)) for client in sorted(self.exchange.clients)]

    def _failure(self, reply: Message | None) -> str | None:
        if reply is None:
            return "no reply before the deadline"
        if not reply.has_error():
            return None
        if reply.error.code in _GONE:
            return _GONE[reply.error.code]
        if self.virtual and any(each in str(reply.error.reason) for each in _WORKER_GONE):
            raise ProcessDiedError(f"a Ray worker died (out of memory, perhaps): {error_line(reply)}")
        return error_line(reply)

    def _take(self, client: int, reply: Message) -> str | None:
        """Accept a reply, or say why not."""
        self.exchange.uplink_bytes += wire.array_bytes(reply.content)
        sent = self.payloads[client]
        compression = "none" if sent.plan.phase == RENEWAL else self.config.compression
        update = wire.decode_update(reply.content, (sent.weights, sent.statistics), compression)
        exchange, said = self.exchange, update.metrics
        if update.note and [client, update.note] not in self.tally.heard:  # a note is told once
            self.tally.heard.append([client, update.note])
            exchange.notes.append({"client": client, "note": update.note})
        exchange.client_seconds += said["seconds"]
        exchange.compute_seconds += said["compute_seconds"]
        exchange.longest_compute_seconds = max(exchange.longest_compute_seconds, said["compute_seconds"])
        exchange.peak_client_bytes = max(exchange.peak_client_bytes, int(said["peak_memory_bytes"]))
        exchange.gpu_bytes[client] = int(said["peak_gpu_memory_bytes"])
        exchange.peak_client_gpu_bytes = max(exchange.peak_client_gpu_bytes, int(said["peak_gpu_memory_bytes"]))
        if update.client != client:
            return f"answers as client {update.client}"
        expected, variances = self.method.expected(sent, update), self.method.variances(sent, update)
        reason = self.screening.alone(update, sent, expected, variances)
        if reason is None:
            self.exchange.accepted.append(update)
        return reason
