"""Flower's Grid without Flower's processes: messages go straight to the client app's functions, in this process."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client_app.app import evaluate, query, train

_HANDLERS: dict[str, Any] = {"train": train, "evaluate": evaluate, "query": query}
_FIRST_NODE = 1000


class LocalGrid:
    """``num_nodes`` virtual clients; ``sent`` records every message that went out and every reply that came back."""

    def __init__(self, num_nodes: int) -> None:
        # Flower sets these in the processes it starts; a message cannot be made without them.
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self.num_nodes = num_nodes
        self.states: dict[int, RecordDict] = {}  # what each client keeps between messages
        self.sent: list[tuple[Message, Message]] = []

    def get_node_ids(self) -> list[int]:
        """Node ids unlike partition ids, as in Flower."""
        return [_FIRST_NODE + client for client in range(self.num_nodes)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Every client's reply, the last asked first: nothing may depend on the order of arrival."""
        replies = []
        for message in messages:
            client = message.metadata.dst_node_id - _FIRST_NODE
            node = {"partition-id": client, "num-partitions": self.num_nodes}
            context = SimpleNamespace(node_config=node, state=self.states.setdefault(client, RecordDict()))
            reply = _HANDLERS[message.metadata.message_type](message, context)
            self.sent.append((message, reply))
            replies.append(reply)
        return replies[::-1]
